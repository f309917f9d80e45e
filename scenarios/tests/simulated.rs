//! What needs no device: the kill matrix, torture on the simulator, and replays of what it leaves behind.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use ublkit_harness::{Mutant, Oracle};

fn run(line: &str) -> Output {
    run_words(&line.split_ascii_whitespace().collect::<Vec<_>>())
}

fn run_words(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ublk-torture"))
        .args(words)
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

/// The events of a run with `--json`; the last is the verdict.
fn events(output: &Output) -> Vec<Value> {
    let events: Vec<Value> =
        text(&output.stdout).lines().map(|line| serde_json::from_str(line).expect("only JSON lines")).collect();
    assert_eq!(events.last().expect("an event")["event"], "verdict");
    events
}

fn of_kind<'a>(events: &'a [Value], kind: &str) -> Vec<&'a Value> {
    events.iter().filter(|event| event["event"] == kind).collect()
}

fn path(path: &Path) -> &str {
    path.to_str().expect("text")
}

#[test]
fn what_cannot_be_is_a_usage_error_and_says_what_can() {
    for (line, hint) in [
        ("mutants --only no-such-bug", "lost-write"),
        ("mutants --without delphi", "cross_device"),
        ("mutants --sim --device-mode", "--device-mode"),
        ("mutants --device-mode --without zero", "--without"),
        ("mutants --duration 5s", "--ops"),
        ("mutants --ops 0", "from 1"),
        ("mutants --threads 0", "from 1"),
        ("torture --sim --queues 3", "--queues"),
        ("torture --sim --backend file", "--backend"),
        ("torture --sim --mutant no-such-bug", "lost-write"),
        ("torture --sim --ops 0", "from 1"),
        ("torture --threads 2", "--sim"),
        ("torture --mutant autobuf-fallback", "--sim"),
        ("replay", "BUNDLE"),
        ("replay /nonexistent", "/nonexistent"),
        ("replay /", "bundle.json"),
        ("replay / --times 0", "--times"),
        ("replay / --ops 5", "--ops"),
    ] {
        let output = run(line);
        let message = text(&output.stderr);
        assert_eq!(code(&output), 1, "{line}: {message}");
        assert!(message.contains(hint), "{line}: {message}");
        assert!(output.stdout.is_empty(), "{line}");
    }
}

#[test]
fn a_matrix_where_all_is_as_it_should_be_passes_row_by_row() {
    let dir = tempfile::tempdir().expect("temp dir");
    let line = "mutants --only lost-write,bitflip-read,errored-write --control-seeds 5 --json --report";
    let output = run(&format!("{line} {}", path(dir.path())));
    assert_eq!(code(&output), 0, "{}", text(&output.stdout));
    let events = events(&output);
    let rows = of_kind(&events, "matrix_row");
    assert_eq!(rows.len(), 3);
    for row in rows {
        let control = row["mutant"] == "errored-write";
        assert_eq!((row["control"].as_bool(), row["found"].is_null()), (Some(control), control), "{row}");
        assert!(row["ops"].as_u64().is_some_and(|ops| ops > 0) && row["elapsed_ms"].is_u64(), "{row}");
    }
    let verdict = events.last().expect("a verdict");
    assert_eq!((&verdict["verdict"], &verdict["seed"]), (&"pass".into(), &1.into()));
    assert_eq!((&verdict["evidence"]["found"], &verdict["evidence"]["flagged"]), (&2.into(), &0.into()));
    let kept = fs::read_to_string(dir.path().join("mutants.json")).expect("the matrix");
    let kept: Value = serde_json::from_str(&kept).expect("JSON");
    assert_eq!(kept["rows"].as_array().expect("rows").len(), 3);
}

#[test]
fn a_mutant_that_nobody_finds_is_a_failure_that_names_it() {
    let output = run("mutants --only lost-write --without linear,zero,durable,tag,flush --ops 3000 --json");
    assert_eq!(code(&output), 2, "{}", text(&output.stdout));
    let events = events(&output);
    let findings = of_kind(&events, "finding");
    assert_eq!(findings.first().expect("a finding")["what"], "nobody finds lost-write");
}

/// A mutant that this oracle is the only one to find, within a few thousand operations.
fn found_by_it_alone(oracle: Oracle) -> Mutant {
    match oracle {
        Oracle::Tag => Mutant::BitflipRead,
        Oracle::Linear => Mutant::LaggingMirror,
        Oracle::Durable => Mutant::TornBelowAtomic,
        Oracle::Zero => Mutant::UnwrittenExtent,
        Oracle::Errors => Mutant::ErrorSticky,
        Oracle::Flush => Mutant::FlushSubmitted,
        Oracle::Watchdog => Mutant::CqeDropped,
        Oracle::CrossDevice => Mutant::CrossDeviceBleed,
        Oracle::Resources => Mutant::RoNotEnforced,
    }
}

#[test]
fn each_oracle_finds_a_mutant_that_nobody_finds_without_it() {
    for oracle in Oracle::ALL {
        let mutant = found_by_it_alone(oracle);
        let line = format!("mutants --only {mutant} --ops 4000 --json");
        let output = run(&line);
        assert_eq!(code(&output), 0, "{oracle}: {}", text(&output.stdout));
        let told = events(&output);
        let rows = of_kind(&told, "matrix_row");
        let by = (&rows[0]["found"]["signature"]["oracle"], &rows[0]["only_killer"]);
        assert_eq!(by, (&oracle.name().into(), &true.into()), "{mutant}");
        let output = run(&format!("{line} --without {oracle}"));
        assert_eq!(code(&output), 2, "{oracle}: {}", text(&output.stdout));
        let told = events(&output);
        let finding = of_kind(&told, "finding").first().copied().expect("a finding").to_string();
        assert!(finding.contains(&format!("nobody finds {mutant}")), "{oracle}: {finding}");
    }
}

#[test]
fn a_mutant_that_never_strikes_proves_nothing() {
    let output = run("mutants --only lost-write --ops 1 --json");
    assert_eq!(code(&output), 2);
    assert!(text(&output.stdout).contains("never struck, so that nothing is known of lost-write"));
}

#[test]
fn the_matrix_on_devices_needs_ublk() {
    if !fs::exists("/dev/ublk-control").unwrap_or(false) {
        assert_eq!(code(&run("mutants --device-mode --only lost-write")), 4);
    }
}

#[test]
fn a_sound_device_passes_and_too_little_work_does_not() {
    let output = run("torture --sim --seed 3 --ops 40000 --json");
    assert_eq!(code(&output), 0, "{}", text(&output.stdout));
    let verdict = events(&output).pop().expect("a verdict");
    assert_eq!(verdict["repro"], "ublk-torture torture --sim --ops 40000 --seed 3");
    for name in ["verified_bytes", "overlaps", "power_cuts_in_flight", "kills", "injections"] {
        assert!(verdict["evidence"][name].as_u64().is_some_and(|count| count > 0), "{name}: {verdict}");
    }
    assert_eq!(code(&run("torture --sim --seed 3 --ops 100")), 5);
    assert_eq!(code(&run("torture --sim --seed 3 --ops 40000 --mutant written-twice")), 0, "odd, but right");
}

#[test]
fn the_first_failure_is_the_same_however_many_threads_run() {
    let failures: Vec<Value> = ["1", "3"]
        .map(|threads| {
            let line = "torture --sim --seed 5 --ops 60000 --mutant late-retry --json --threads";
            let output = run(&format!("{line} {threads}"));
            assert_eq!(code(&output), 2, "{}", text(&output.stdout));
            of_kind(&events(&output), "mismatch").first().copied().expect("a mismatch").clone()
        })
        .into();
    assert_eq!(failures[0], failures[1]);
}

#[test]
fn a_planted_bug_leaves_a_bundle_that_fails_again() {
    let dir = tempfile::tempdir().expect("temp dir");
    let report = path(dir.path());
    let output = run(&format!("torture --sim --mutant lost-write --seed 1 --ops 20000 --report {report}"));
    assert_eq!(code(&output), 2, "{}", text(&output.stdout));
    let told = text(&output.stdout);
    assert!(told.contains("smallest script") && told.contains("worker 0 writes sectors"), "{told}");
    let bundle = dir.path().join("bundle");
    assert!(told.contains(&format!("ublk-torture replay {}", path(&bundle))), "{told}");

    assert_eq!(code(&run(&format!("replay {report}"))), 2, "the directory of the report will do");
    let output = run(&format!("replay {} --full --json --times 3", path(&bundle)));
    assert_eq!(code(&output), 2);
    let verdict = events(&output).pop().expect("a verdict");
    assert_eq!(verdict["evidence"]["runs"], 3);
    assert!(verdict["evidence"]["failed_in_the_same_way"].as_u64().is_some_and(|count| count > 0), "{verdict}");

    let again = dir.path().join("again");
    let script = bundle.join("shrunk.json");
    assert_eq!(code(&run_words(&["replay", path(&script), "--report", path(&again)])), 2);
    assert!(fs::read_to_string(again.join("trace.txt")).expect("a trace").lines().count() > 3);

    // Without the bug there is nothing to find.
    let mut sound: Value = serde_json::from_str(&fs::read_to_string(&script).expect("a script")).expect("JSON");
    sound["mutant"] = Value::Null;
    let right = dir.path().join("right.json");
    fs::write(&right, sound.to_string()).expect("write");
    assert_eq!(code(&run_words(&["replay", path(&right), "--times", "20"])), 5);

    // The command in the page shows it without the bundle.
    let page = fs::read_to_string(bundle.join("report.txt")).expect("the page");
    let repro = page.lines().find_map(|line| line.trim().strip_prefix("ublk-torture ")).expect("a command");
    assert_eq!(code(&run(repro)), 2, "{repro}");
}
