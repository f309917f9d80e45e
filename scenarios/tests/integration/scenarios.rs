//! The scenarios of `ublk-torture` as its users run them: what they say of a sound server, and of one that is not.

use std::process::{Command, Output};

use super::runner::cases;

cases!("scenarios":
    torture_passes_copied_by_the_driver_inline in 60 s,
    torture_names_a_lost_write in 60 s,
);

fn run(arguments: &str) -> Output {
    let reports = tempfile::tempdir().expect("a directory");
    Command::new(env!("CARGO_BIN_EXE_ublk-torture"))
        .args(arguments.split(' '))
        .args(["--json", "--report"])
        .arg(reports.path())
        .output()
        .expect("run ublk-torture")
}

/// The last line of its output: the verdict.
fn verdict(arguments: &str, code: i32) -> serde_json::Value {
    let output = run(arguments);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "ublk-torture {arguments}:\n{out}\n{err}");
    let last = out.lines().last().expect("a last line");
    let verdict: serde_json::Value = serde_json::from_str(last).unwrap_or_else(|error| panic!("{last}: {error}"));
    assert_eq!(verdict["event"], "verdict", "{last}");
    verdict
}

fn passes(arguments: &str) {
    let verdict = verdict(arguments, 0);
    assert_eq!(verdict["verdict"], "pass", "{verdict}");
    assert!(verdict["evidence"].as_object().is_some_and(|evidence| !evidence.is_empty()), "{verdict}");
}

fn torture_passes_copied_by_the_driver_inline() {
    passes("torture --seed 1 --duration 3s --size 64M");
}

/// Torture fails, names the kind of corruption, and says how to see it again.
fn names(mutant: &str, class: &str) {
    let output = run(&format!("torture --seed 3 --duration 20s --size 16M --mutant {mutant}"));
    let out = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(2), "{mutant}:\n{out}\n{}", String::from_utf8_lossy(&output.stderr));
    let events: Vec<serde_json::Value> = out
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}")))
        .collect();
    let mismatch = events.iter().find(|event| event["event"] == "mismatch").unwrap_or_else(|| panic!("{out}"));
    assert!(mismatch.to_string().contains(class), "{mutant} is called {class}: {mismatch}");
    let verdict = events.last().expect("a verdict");
    assert_eq!(verdict["verdict"], "fail", "{verdict}");
    let repro = verdict["repro"].as_str().expect("a command");
    assert!(repro.contains("--seed 3") && repro.contains(mutant), "{repro}");
}

fn torture_names_a_lost_write() {
    names("lost-write", "lost");
}
