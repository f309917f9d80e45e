//! `flush-trace` as its users run it: a right server passes and leaves a picture, a trace and numbers; planted bugs are
//! found, and called what they are. (The other bugs are in the registry.)

use std::fs;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::runner::cases;
use super::scenarios::verdict;

cases!("flush_trace":
    a_right_server_passes_and_is_drawn in 60 s,
    it_passes_inline_without_a_volatile_cache in 60 s,
    a_swallowed_flush_is_found in 60 s,
    a_cache_that_is_not_told_of_is_found in 60 s,
    a_flush_that_goes_past_writes_is_found in 60 s,
    a_server_that_stalls_is_named in 60 s,
    what_a_killed_run_changed_the_next_one_puts_back in 90 s,
    what_a_lost_run_changed_it_puts_back in 90 s,
    a_full_recording_proves_nothing in 60 s,
);

/// One round, with the kernel in a hurry to write back.
const SHORT: &str = "flush-trace --size 32M --rounds 1 --writeback-age 200ms";

/// The events of a run that ends with `code`, in order, and what it wrote.
fn run(arguments: &str, code: i32) -> (Vec<Value>, tempfile::TempDir) {
    let reports = tempfile::tempdir().expect("a directory");
    let output = Command::new(env!("CARGO_BIN_EXE_ublk-torture"))
        .args(SHORT.split(' ').chain(arguments.split_whitespace()))
        .args(["--json", "--report"])
        .arg(reports.path())
        .output()
        .expect("run ublk-torture");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{arguments}:\n{out}\n{err}");
    let parse = |line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"));
    (out.lines().map(parse).collect(), reports)
}

/// What the finding of a failed run says.
fn finding(arguments: &str) -> String {
    let (events, _reports) = run(arguments, 2);
    let found = events.iter().find(|event| event["event"] == "finding");
    found.unwrap_or_else(|| panic!("{events:#?}")).to_string()
}

fn a_right_server_passes_and_is_drawn() {
    let (events, reports) = run("--workers-backend 2", 0);
    let evidence = &events.last().expect("a verdict")["evidence"];
    assert_eq!(evidence["kernel_requests"], evidence["requests_matched"], "{evidence}");
    let read = |name: &str| fs::read_to_string(reports.path().join(name)).expect(name);
    assert!(read("timeline.svg").starts_with("<svg ") && read("timeline.svg").trim_end().ends_with("</svg>"));
    let trace: Value = serde_json::from_str(&read("trace.json")).expect("JSON");
    let calls = trace["traceEvents"].as_array().expect("events").iter().filter(|event| event["cat"] == "call");
    let numbers: Value = serde_json::from_str(&read("numbers.json")).expect("JSON");
    let phases = numbers["phases"].as_array().expect("phases");
    let counted: u64 = phases.iter().map(|phase| phase["calls"].as_u64().expect("calls")).sum();
    assert!(counted > 20 && calls.count() as u64 >= counted, "{counted} calls");
    for phase in phases {
        let parts = phase["shares_ns"].as_object().expect("shares").values().map(|part| part.as_u64().expect("ns"));
        assert_eq!(Some(parts.sum::<u64>()), phase["duration_ns"].as_u64(), "every moment has a reason: {phase}");
    }
}

fn it_passes_inline_without_a_volatile_cache() {
    run("--capabilities none --queues 2", 0);
}

fn a_swallowed_flush_is_found() {
    let found = finding("--mutant flush-noop");
    assert!(
        found.contains("completed without the backend") && found.contains("flush: the backend was never called"),
        "{found}"
    );
}

fn a_cache_that_is_not_told_of_is_found() {
    let found = finding("--mutant no-volatile-cache");
    assert!(found.contains("no flush and no FUA write had reached the backend"), "{found}");
}

fn a_flush_that_goes_past_writes_is_found() {
    let found = finding("--plant flush-before-writes");
    assert!(found.contains("a flush reached the backend before the write"), "{found}");
}

fn a_server_that_stalls_is_named() {
    let found = finding("--plant server-stall --workers-backend 1");
    assert!(found.contains("the server keeps requests") && found.contains("server, before the backend"), "{found}");
}

fn a_full_recording_proves_nothing() {
    let (events, _reports) = run("--records 60", 5);
    let evidence = &events.last().expect("a verdict")["evidence"];
    assert!(evidence["calls_not_recorded"].as_u64().is_some_and(|calls| calls > 0), "{evidence}");
}

fn setting() -> String {
    const SETTING: &str = "/proc/sys/vm/dirty_expire_centisecs";
    fs::read_to_string(SETTING).expect(SETTING)
}

fn is_mounted() -> bool {
    fs::read_to_string("/proc/self/mounts").expect("mounts").contains("ublk-torture-mount-")
}

fn what_a_lost_run_changed_it_puts_back() {
    let before = setting();
    // The kernel is waited for longer than any step may take.
    verdict("flush-trace --size 32M --rounds 1 --writeback-age 50s --deadline 6s", 3);
    // Another process unmounts, for whom a run that is lost does not wait for long.
    let until = Instant::now() + Duration::from_secs(10);
    while is_mounted() && Instant::now() < until {
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!((setting(), is_mounted()), (before, false));
}

fn what_a_killed_run_changed_the_next_one_puts_back() {
    let before = setting();
    let mut run = Command::new(env!("CARGO_BIN_EXE_ublk-torture"))
        .args("flush-trace --size 32M --writeback-age 9s".split(' '))
        .stdout(Stdio::null())
        .spawn()
        .expect("run ublk-torture");
    let until = Instant::now() + Duration::from_secs(40);
    while (setting() == before || !is_mounted()) && Instant::now() < until {
        thread::sleep(Duration::from_millis(20));
    }
    let changed = (setting(), is_mounted());
    run.kill().expect("kill");
    run.wait().expect("wait");
    assert_eq!(changed, ("900\n".to_owned(), true), "it was at work");
    assert_eq!(setting(), "900\n", "who is killed puts nothing back");
    verdict("fault --seed 1 --size 16M --only plain --capabilities none", 0);
    assert_eq!((setting(), is_mounted()), (before, false));
}
