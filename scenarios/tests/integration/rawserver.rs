//! A server on the library's raw level: right without a bug, found with each of those that the other levels do not let a server
//! have, and nothing is left of it.

use serde_json::Value;
use ublkit::Controller;

use super::runner::{cases, ids};
use super::scenarios::verdict;

cases!("rawserver":
    a_right_one_that_copies_passes in 60 s,
    an_error_without_its_sign_is_found in 60 s,
    a_second_commit_is_found in 60 s,
    another_queues_data_are_found in 60 s,
    segments_taken_for_one_are_found in 60 s,
    requests_dropped_at_the_end_are_a_hang in 60 s,
    a_device_that_is_left_is_found_and_goes_with_the_next_run_which_passes in 60 s,
);

/// Small, so that places are met again and again.
const SMALL: &str = "--size 16M --region 1M --io-depth 8 --depth 64";

fn ends(arguments: &str, status: i32) -> Value {
    verdict(&format!("torture {SMALL} --shrink 0s {arguments}"), status)
}

fn count(verdict: &Value, name: &str) -> u64 {
    verdict["evidence"][name].as_u64().unwrap_or_else(|| panic!("no {name} in {verdict}"))
}

fn finds(arguments: &str, status: i32) {
    let verdict = ends(arguments, status);
    assert!(count(&verdict, "mutant_hits") > 0, "{verdict}");
}

fn a_right_one_that_copies_passes() {
    ends("--raw-server --max-io 128k --seed 32 --ops 400 --queues 2 --mode user-copy", 0);
}

fn an_error_without_its_sign_is_found() {
    // Reads and writes would go on for ever with what is left of them.
    finds("--mutant errno-sign:10 --max-io 64k --seed 33 --duration 20s --mix flush=1,discard=4,zeroes=4,read=1", 2);
}

fn a_second_commit_is_found() {
    finds("--mutant double-commit:20 --max-io 64k --seed 34 --duration 20s --mix read=9,write=9", 2);
}

fn another_queues_data_are_found() {
    finds("--mutant user-copy-offset:5 --max-io 64k --seed 36 --duration 20s --mode user-copy --queues 2", 2);
}

fn segments_taken_for_one_are_found() {
    finds("--mutant sgl-contiguity --max-io 128k --seed 37 --duration 20s --mode user-copy", 2);
}

fn requests_dropped_at_the_end_are_a_hang() {
    finds("--mutant stop-with-inflight --max-io 64k --seed 39 --ops 200 --deadline 6s", 3);
}

fn a_device_that_is_left_is_found_and_goes_with_the_next_run_which_passes() {
    let before = ids();
    finds("--mutant minor-leak --max-io 64k --seed 40 --ops 200", 2);
    let left: Vec<_> = ids().difference(&before).copied().collect();
    assert_eq!(left.len(), 1, "a planted leak is there");
    let info = Controller::open().and_then(|controller| controller.get_dev_info(left[0])).expect("it is described");
    assert_eq!(info.state(), ublkit::ctrl::State::Dead, "and nobody serves it");
    let right = ends(
        "--raw-server --max-io 64k --seed 41 --ops 400 --mix read=8,write=8,fua=1,flush=1,discard=1,zeroes=1",
        0,
    );
    assert!(count(&right, "flushes") > 0 && count(&right, "discards") > 0, "{right}");
    assert_eq!(ids(), before, "the next run deletes it");
}
