//! What the kernel says while a scenario runs is part of its verdict.

use std::io::Write as _;

use serde_json::Value;

use super::runner::{PLANTED, cases};
use super::scenarios::Underway;

cases!("kernel_log":
    a_warning_of_the_kernel_fails_a_run in 60 s,
    a_quiet_kernel_is_evidence in 60 s,
);

fn say(text: &str) {
    let mut log = std::fs::OpenOptions::new().write(true).open("/dev/kmsg").expect("open /dev/kmsg");
    // Without its end the line would stay open for what continues it, and be seen by whoever looks next.
    log.write_all(format!("{text}\n").as_bytes()).expect("write");
}

fn start(arguments: &str, report: &std::path::Path) -> Underway {
    let mut all = vec!["torture", "--seed", "4", "--size", "16M"];
    all.extend(arguments.split_whitespace());
    all.extend(["--report", report.to_str().expect("a path")]);
    Underway::start(&all)
}

fn events(report: &std::path::Path) -> Vec<Value> {
    let text = std::fs::read_to_string(report.join("events.jsonl")).expect("events");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

fn a_warning_of_the_kernel_fails_a_run() {
    let warning = format!("WARNING: CPU: 1 PID: 214 at {PLANTED}.c:305 blk_mq_never+0x8a/0xa0");
    // What was said before a run is no concern of its own.
    say(&warning);
    let report = tempfile::tempdir().expect("a directory");
    let mut run = start("--duration 3s", report.path());
    run.device();
    say(&warning);
    assert_eq!(run.wait().code(), Some(2));
    let events = events(report.path());
    let findings: Vec<_> = events.iter().filter(|event| event["event"] == "finding").collect();
    assert_eq!(findings.len(), 1, "one, and not the one from before: {findings:?}");
    assert_eq!(findings[0]["oracle"], "kernel");
    assert!(findings[0]["detail"].to_string().contains(PLANTED), "{}", findings[0]);
    assert_eq!(events.last().expect("a verdict")["verdict"], "fail");
    let kept = std::fs::read_to_string(report.path().join("kernel.log")).expect("kernel.log");
    assert!(kept.contains(PLANTED), "{kept}");
}

fn a_quiet_kernel_is_evidence() {
    let report = tempfile::tempdir().expect("a directory");
    // So short a run may have done too little to be a pass; the kernel was listened to all the same.
    let code = start("--ops 200 --faults none", report.path()).wait().code();
    assert!(matches!(code, Some(0 | 5)), "{code:?}");
    let events = events(report.path());
    let verdict = events.last().expect("a verdict");
    assert_eq!(verdict["evidence"]["kernel_log_scanned"], 1, "{verdict}");
    assert!(!report.path().join("kernel.log").exists(), "only where there is something to read");
}
