//! Runs that are made of runs: the suite and the soak, as their users start them.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use super::runner::cases;
use super::scenarios::Underway;

cases!("suite":
    a_suite_passes_and_reports_each_part in 170 s,
    a_soak_of_one_round_catches_its_canary in 170 s,
    an_interrupted_soak_leaves_nothing in 60 s,
);

fn command(arguments: &[&str], reports: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ublk-torture"));
    command.args(arguments).arg("--report").arg(reports).arg("--junit").arg(reports.join("junit.xml")).arg("--json");
    command.env_remove("UBLK_TORTURE_DURATION");
    command
}

fn verdict(output: &Output, code: i32) -> Value {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{out}\n{err}");
    serde_json::from_str(out.lines().last().expect("a last line")).expect("a verdict")
}

fn json(path: &Path) -> Value {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).expect("JSON")
}

fn a_suite_passes_and_reports_each_part() {
    let reports = tempfile::tempdir().expect("a directory");
    let output = command(&["suite", "--seed", "1", "--only", "probe"], reports.path()).output().expect("run");
    let verdict = verdict(&output, 0);
    assert_eq!(verdict["evidence"]["passed"], 1, "{verdict}");
    let suite = json(&reports.path().join("suite.json"));
    assert_eq!((&suite["whole"], &suite["planned"]), (&true.into(), &1.into()), "{suite}");
    assert!(suite["left_out"].as_array().is_some_and(|names| names.contains(&"torture".into())), "{suite}");
    let part = &suite["parts"][0];
    assert_eq!((&part["name"], &part["verdict"]), (&"probe".into(), &"pass".into()), "{part}");
    assert!(part["evidence"]["storage_verified_bytes"].as_u64() > Some(0), "{part}");
    assert!(
        part["repro"].as_str().is_some_and(|repro| repro.contains("probe") && repro.contains("--seed")),
        "{part}"
    );
    let events = fs::read_to_string(reports.path().join("probe/events.jsonl")).expect("its own report");
    assert!(events.lines().last().is_some_and(|line| line.contains("\"verdict\":\"pass\"")));
    let junit = fs::read_to_string(reports.path().join("junit.xml")).expect("a JUnit report");
    assert!(junit.contains("<testsuite name=\"probe\"") && junit.contains("name=\"offset-map\""), "{junit}");
}

fn a_soak_of_one_round_catches_its_canary() {
    let reports = tempfile::tempdir().expect("a directory");
    let output = command(&["soak", "--seed", "1", "--only", "flush-trace"], reports.path()).output().expect("run");
    let verdict = verdict(&output, 0);
    let count = |name: &str| verdict["evidence"][name].as_u64();
    assert_eq!((count("rounds"), count("runs"), count("canaries_caught")), (Some(1), Some(1), Some(1)), "{verdict}");
}

fn an_interrupted_soak_leaves_nothing() {
    let reports = tempfile::tempdir().expect("a directory");
    let arguments = ["soak", "--seed", "2", "--duration", "1h", "--only", "torture"];
    let mut run = Underway::of(&mut command(&arguments, reports.path()));
    run.device();
    std::thread::sleep(Duration::from_secs(1));
    run.signal(Signal::SIGINT);
    // No whole round: it says nothing.
    assert_eq!(run.wait().code(), Some(5));
    assert_eq!((run.devices(), run.left()), (vec![], vec![]));
    let events = fs::read_to_string(reports.path().join("events.jsonl")).expect("a report");
    assert!(events.lines().last().is_some_and(|line| line.contains("\"vacuous\"")), "{events}");
}
