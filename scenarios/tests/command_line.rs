//! The program as its users call it, on a machine where it cannot or must not touch a device.

use std::fs;
use std::process::{Command, Output};

use serde_json::Value;

fn torture(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ublk-torture"))
        .args(args)
        .env_remove("UBLK_TORTURE_DURATION")
        .output()
        .expect("the program starts")
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("an exit status")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("text")
}

fn has_ublk() -> bool {
    fs::exists("/dev/ublk-control").unwrap_or(false)
}

#[test]
fn the_list_names_every_scenario() {
    let output = torture(&["list"]);
    assert_eq!(code(&output), 0);
    assert!(text(&output.stdout).lines().any(|line| line.starts_with("probe ")));
    for line in text(&torture(&["list", "--json"]).stdout).lines() {
        let entry: Value = serde_json::from_str(line).expect("JSON");
        assert!(entry["name"].is_string() && entry["about"].is_string(), "{line}");
    }
}

#[test]
fn help_is_no_error_and_tells_the_exit_statuses() {
    let output = torture(&["--help"]);
    assert_eq!(code(&output), 0);
    let help = text(&output.stdout);
    for word in ["Exit status", "70", "probe", "list"] {
        assert!(help.contains(word), "{word}: {help}");
    }
    assert_eq!(code(&torture(&["probe", "--help"])), 0);
    assert_eq!(code(&torture(&["--version"])), 0);
}

#[test]
fn what_cannot_be_understood_is_a_usage_error() {
    for (args, hint) in [
        (&["probe", "--no-such-flag"][..], "--no-such-flag"),
        (&["no-such-scenario"], "no-such-scenario"),
        (&[], "Usage"),
        (&["probe", "--size", "lots"], "256M"),
        (&["probe", "--size", "1M"], "from 64 MiB"),
        (&["probe", "--size", "2T"], "to 64 GiB"),
        (&["probe", "--duration", "soon"], "30s"),
        (&["probe", "--seed", "x"], "seed"),
        (&["probe", "--mode", "telepathy"], "user-copy"),
        (&["probe", "--capabilities", "flight"], "discard"),
        (&["probe", "--mutant", "no-such-bug"], "lost-write"),
        (&["probe", "--mutant", "lost-write:0"], "from 1"),
        (&["crash", "--backend", "medium", "--read-only"], "--read-only"),
        (&["crash", "--backend", "medium", "--ops", "9"], "--cuts"),
        (&["flush-trace", "--read-only"], "--read-only"),
        (&["flush-trace", "--ops", "9"], "--rounds"),
        (&["flush-trace", "--duration", "9s"], "--rounds"),
        (&["fault", "--ops", "9"], "--cells"),
        (&["fault", "--mutant", "error-swallowed", "--only", "pieces,closing"], "grid or plain"),
        (&["chain", "--ops", "9"], "--duration"),
        (&["chain", "--capabilities", "flush"], "flush and fua"),
        // What would be planted in a device of our own, or make one, is not passed over.
        (&["torture", "--device", "/dev/x", "--yes-destroy-data", "--mutant", "lost-write"], "--mutant"),
        (&["torture", "--server", "x", "--yes-destroy-data", "--read-only"], "--read-only"),
        (&["torture", "--device", "/dev/x", "--yes-destroy-data", "--faults", "draw"], "--faults"),
        (&["probe", "--server", "x", "--yes-destroy-data", "--size", "128M"], "--size"),
        (&["probe", "--device", "/dev/x", "--yes-destroy-data", "--plant", "size-lie"], "--plant"),
    ] {
        let output = torture(args);
        assert_eq!(code(&output), 1, "{args:?}");
        let message = text(&output.stderr);
        assert!(message.contains(hint), "{args:?}: {message}");
        assert!(output.stdout.is_empty(), "{args:?}");
    }
}

#[test]
fn a_duration_in_the_environment_that_is_none_is_a_usage_error() {
    let output = Command::new(env!("CARGO_BIN_EXE_ublk-torture"))
        .arg("probe")
        .env("UBLK_TORTURE_DURATION", "soon")
        .output()
        .expect("the program starts");
    assert_eq!(code(&output), 1);
    assert!(text(&output.stderr).contains("UBLK_TORTURE_DURATION"));
}

#[test]
fn a_report_that_cannot_be_written_is_told_before_anything_begins() {
    let dir = tempfile::tempdir().expect("temp dir");
    let file = dir.path().join("file");
    fs::write(&file, "in the way").expect("write");
    let output = torture(&["probe", "--report", file.to_str().expect("text")]);
    assert_eq!(code(&output), 1);
    assert!(text(&output.stderr).contains("cannot write a report to"));
    assert!(output.stdout.is_empty(), "no run began");
}

/// Where there is no ublk. Where there is, the integration tests run the scenario itself.
#[test]
fn without_ublk_the_verdict_is_the_environment_and_says_what_to_do() {
    if has_ublk() {
        return;
    }
    let dir = tempfile::tempdir().expect("temp dir");
    let report = dir.path().join("report");
    let output = torture(&["probe", "--json", "--seed", "42", "--report", report.to_str().expect("text")]);
    assert_eq!(code(&output), 4);
    let lines: Vec<Value> =
        text(&output.stdout).lines().map(|line| serde_json::from_str(line).expect("only JSON lines")).collect();
    let first = lines.first().expect("an event");
    assert_eq!((&first["event"], &first["seed"]), (&"run".into(), &42.into()));
    let last = lines.last().expect("an event");
    assert_eq!(last["event"], "verdict");
    assert_eq!(last["verdict"], "environment");
    assert_eq!(last["repro"], "ublk-torture probe --seed 42");
    assert!(text(&output.stdout).contains("modprobe ublk_drv"));
    assert_eq!(fs::read_to_string(report.join("events.jsonl")).expect("the events"), text(&output.stdout));
    let page = fs::read_to_string(report.join("report.txt")).expect("the page");
    assert!(page.contains("modprobe ublk_drv") && page.contains("repro: ublk-torture probe --seed 42"), "{page}");
}

#[test]
fn the_seed_is_told_first_in_plain_lines_too() {
    if has_ublk() {
        return;
    }
    let output = torture(&["probe", "--seed", "0x2a"]);
    assert_eq!(code(&output), 4);
    assert!(text(&output.stdout).starts_with("probe: seed 42\n"));
}
