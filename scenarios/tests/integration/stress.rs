//! `stress` as its users run it: sound devices pass, each planted bug is found, and nothing is left however it ends.

use std::time::Duration;

use nix::sys::signal::Signal;

use super::runner::cases;
use super::scenarios::{Underway, run, verdict, wait_for};

cases!("stress":
    churn_passes_and_says_where_the_time_goes in 90 s,
    closing_under_load_passes in 60 s,
    closing_from_many_threads_passes in 60 s,
    many_devices_pass in 60 s,
    held_devices_pass in 90 s,
    what_leaks_in_each_cycle_is_found in 120 s,
    memory_that_leaks_in_each_cycle_is_found in 120 s,
    a_forgotten_deletion_is_found in 90 s,
    a_server_that_ends_before_its_device_is_found in 60 s,
    what_is_lost_in_flight_is_found in 150 s,
    a_close_that_tells_its_callers_wrong_is_found in 90 s,
    devices_that_are_not_apart_are_found in 90 s,
    a_holder_that_is_dealt_with_badly_is_found in 90 s,
    a_duration_is_how_long_it_goes_on in 90 s,
    an_interrupted_stress_leaves_nothing in 60 s,
    a_killed_stress_leaves_nothing in 60 s,
);

fn passes(arguments: &str) -> serde_json::Value {
    let verdict = verdict(arguments, 0);
    assert_eq!(verdict["verdict"], "pass", "{verdict}");
    verdict
}

/// The bug is found, and by the oracle that is there for it: the first finding says `what`.
fn finds(arguments: &str, oracle: &str, what: &str) {
    let arguments = format!("stress {arguments}");
    let output = run(&arguments);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(2), "ublk-torture {arguments}:\n{out}\n{err}");
    let events: Vec<serde_json::Value> = out.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let found = events.iter().find(|event| event["event"] == "finding" || event["event"] == "mismatch");
    let found = found.unwrap_or_else(|| panic!("ublk-torture {arguments} names no finding:\n{out}\n{err}"));
    // What differs from what was written is an event of its own.
    let of = if found["event"] == "mismatch" { "mismatch" } else { found["oracle"].as_str().unwrap_or_default() };
    assert!(
        of == oracle && found.to_string().contains(what),
        "ublk-torture {arguments} is not {oracle}, {what}: {found}"
    );
    let verdict = events.last().expect("a verdict");
    assert_eq!(verdict["verdict"], "fail", "{verdict}");
}

fn churn_passes_and_says_where_the_time_goes() {
    let verdict = passes("stress churn --seed 1 --cycles 24");
    let count = |name: &str| verdict["evidence"][name].as_u64().unwrap_or(0);
    assert!(count("dirty_closes") >= 3 && count("looks") >= 4 && count("cycle_mean_us") > 0, "{verdict}");
}

fn closing_under_load_passes() {
    passes("stress io-while-close --seed 2 --rounds 2");
}

fn closing_from_many_threads_passes() {
    passes("stress concurrent-close --seed 3 --rounds 1");
}

fn many_devices_pass() {
    passes("stress many --seed 4 --devices 12");
}

fn held_devices_pass() {
    passes("stress held --seed 5 --rounds 1");
}

fn what_leaks_in_each_cycle_is_found() {
    for (plant, what) in [
        ("leaked-fd", "descriptors grow"),
        // The kernel makes one map of what lies side by side.
        ("leaked-map", "address space grow"),
        ("leaked-thread", "threads grow"),
    ] {
        finds(&format!("churn --seed 6 --cycles 12 --plant {plant}"), "leak", what);
    }
}

fn memory_that_leaks_in_each_cycle_is_found() {
    // It takes longer to be more than what anybody may keep.
    finds("churn --seed 6 --cycles 48 --plant leaked-memory", "leak", "memory grow");
}

fn a_forgotten_deletion_is_found() {
    finds("churn --seed 7 --cycles 8 --plant skipped-delete", "leak", "ids are still taken");
    finds("concurrent-close --seed 7 --rounds 1 --plant skipped-delete", "leak", "ids are still taken");
}

fn a_server_that_ends_before_its_device_is_found() {
    finds("churn --seed 8 --cycles 8 --plant kill-instead-of-stop", "writeback", "did not reach the storage");
    finds("io-while-close --seed 8 --rounds 1 --plant kill-instead-of-stop", "mismatch", "");
}

fn a_duration_is_how_long_it_goes_on() {
    // Alone: one crowd of two would do otherwise, and takes a fraction of this.
    let verdict = passes("stress many --seed 13 --devices 2 --duration 6s");
    assert!(verdict["evidence"]["crowds"].as_u64().is_some_and(|count| count > 1), "{verdict}");
    // With a number that would take hours.
    passes("stress io-while-close --seed 13 --rounds 100000 --duration 1s");
    passes("stress concurrent-close --seed 13 --rounds 100000 --duration 1s");
}

fn what_is_lost_in_flight_is_found() {
    finds("io-while-close --seed 9 --rounds 1 --plant lost-in-flight", "mismatch", "");
    let verdict = verdict("stress io-while-close --seed 9 --rounds 1 --plant forgotten-request --deadline 6s", 3);
    assert_eq!(verdict["verdict"], "hang", "{verdict}");
}

fn a_close_that_tells_its_callers_wrong_is_found() {
    finds("concurrent-close --seed 10 --rounds 1 --plant early-answer", "close", "still there");
    finds("concurrent-close --seed 10 --rounds 1 --plant split-answer", "close", "told different things");
}

fn devices_that_are_not_apart_are_found() {
    finds("many --seed 11 --devices 4 --plant cross-talk", "mismatch", "");
    finds("many --seed 11 --devices 4 --plant double-served", "identity", "have the id");
    finds("many --seed 11 --devices 4 --plant closed-neighbour", "io", "failed to");
}

fn a_holder_that_is_dealt_with_badly_is_found() {
    finds("held --seed 12 --rounds 1 --plant unnamed-holder", "close", "the close says");
    finds("held --seed 12 --rounds 1 --plant never-deleted", "close", "not said to wait");
    finds("held --seed 12 --rounds 1 --plant dropped-pages", "writeback", "are in the storage after the close");
}

/// A run that has made its first devices is sent a signal; nothing of it is left.
fn ended_by(signal: Signal, arguments: &[&str]) {
    let mut run = Underway::start(&[&["stress"], arguments].concat());
    run.device();
    std::thread::sleep(Duration::from_millis(300));
    run.signal(signal);
    let status = run.wait();
    if signal == Signal::SIGINT {
        // Judged by the work it had done: a pass or vacuous.
        assert!(matches!(status.code(), Some(0 | 5)), "{status}");
        assert!(run.devices().is_empty(), "{:?}", run.devices());
    }
    wait_for("the end of the devices", || run.devices().is_empty().then_some(()));
}

fn an_interrupted_stress_leaves_nothing() {
    ended_by(Signal::SIGINT, &["many", "--devices", "400"]);
    ended_by(Signal::SIGINT, &["churn", "--cycles", "100000"]);
}

fn a_killed_stress_leaves_nothing() {
    ended_by(Signal::SIGKILL, &["many", "--devices", "400"]);
    ended_by(Signal::SIGKILL, &["io-while-close", "--rounds", "1000"]);
}
