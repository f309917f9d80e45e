//! Torture with workers that overlap, faults, power cuts and servers that die: a right server passes, and each of them finds
//! what only it can find.

use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;
use ublkit_harness::bundle::{Bundle, FoundOn};
use ublkit_harness::event::Event;
use ublkit_harness::script::{Act, Script};

use super::runner::cases;
use super::scenarios::{verdict, verdict_into};

cases!("torture":
    overlapping_workers_pass_inline in 60 s,
    overlapping_workers_pass_on_two_queues_with_workers in 60 s,
    overlapping_workers_pass_copied_by_the_server in 60 s,
    overlapping_workers_find_a_stale_cache in 60 s,
    power_cuts_pass_on_a_right_server in 60 s,
    power_cuts_find_a_block_that_is_torn in 60 s,
    a_flush_that_does_nothing_is_found in 60 s,
    every_fault_is_accounted_for in 60 s,
    a_swallowed_error_is_found in 60 s,
    a_control_that_admits_to_its_errors_passes in 60 s,
    another_server_takes_over in 60 s,
    swapped_tags_are_found in 60 s,
    a_dropped_completion_is_a_hang in 60 s,
    threads_that_are_no_part_of_the_io_path_are_found in 60 s,
    a_read_only_device_takes_nothing in 60 s,
    a_read_only_device_that_may_be_written_is_found in 60 s,
    a_failure_is_kept_and_made_small_and_fails_again in 170 s,
    a_script_that_a_right_device_passes_is_told_apart in 60 s,
    a_hang_is_kept_and_hangs_again in 90 s,
    what_the_simulator_found_fails_on_a_device in 90 s,
);

/// Small, so that places are met again and again.
const SMALL: &str = "--size 16M --region 1M --max-io 64k --io-depth 8";

fn count(verdict: &Value, name: &str) -> u64 {
    verdict["evidence"][name].as_u64().unwrap_or_else(|| panic!("no {name} in {verdict}"))
}

fn passes(arguments: &str) -> Value {
    verdict(&format!("torture {SMALL} {arguments}"), 0)
}

fn finds(arguments: &str) {
    let verdict = verdict(&format!("torture {SMALL} --shrink 0s {arguments}"), 2);
    assert!(count(&verdict, "mutant_hits") > 0, "{verdict}");
}

fn overlapping_workers_pass_inline() {
    let verdict = passes("--seed 1 --duration 2s --sharing overlapping");
    assert!(count(&verdict, "overlaps") > 10, "{verdict}");
}

fn overlapping_workers_pass_on_two_queues_with_workers() {
    passes("--seed 2 --duration 2s --queues 2 --workers-backend 4 --sharing both");
}

fn overlapping_workers_pass_copied_by_the_server() {
    passes("--seed 3 --duration 2s --mode user-copy --backend file --sharing overlapping");
}

fn overlapping_workers_find_a_stale_cache() {
    finds("--seed 4 --duration 20s --sharing overlapping --mutant stale-cache");
}

fn power_cuts_pass_on_a_right_server() {
    let verdict = passes("--seed 5 --duration 5s --backend medium --cut-every 1s --queues 2 --workers-backend 2");
    assert!(count(&verdict, "power_cuts") > 0, "{verdict}");
}

fn power_cuts_find_a_block_that_is_torn() {
    finds("--seed 6 --duration 30s --backend medium --cut-every 1s --logical-block 4k --mutant torn-below-atomic");
}

fn a_flush_that_does_nothing_is_found() {
    finds("--seed 7 --duration 30s --backend medium --cut-every 1s --mutant flush-noop");
}

fn every_fault_is_accounted_for() {
    let plan = "--faults any_rate_1/40:_error_EIO_partway;any_rate_1/100:_delay_2".replace('_', "\u{a0}");
    let verdict = passes(&format!("--seed 8 --duration 4s --queues 2 --workers-backend 4 {plan}"));
    assert!(count(&verdict, "errors_injected") > 0 && count(&verdict, "errors_seen") > 0, "{verdict}");
}

fn a_swallowed_error_is_found() {
    finds("--seed 9 --duration 20s --faults draw --mutant error-swallowed:20");
}

/// One operation in three fails, those of the final passes too, and is admitted to.
fn a_control_that_admits_to_its_errors_passes() {
    let verdict = passes("--seed 24 --duration 3s --mutant partial-then-error:3");
    assert!(count(&verdict, "mutant_hits") > 0, "{verdict}");
}

fn another_server_takes_over() {
    let verdict = passes("--seed 10 --duration 5s --restart-every 1s");
    assert!(count(&verdict, "restarts") > 0, "{verdict}");
}

fn swapped_tags_are_found() {
    finds("--seed 11 --duration 20s --mutant tag-swap");
}

fn a_dropped_completion_is_a_hang() {
    let verdict = verdict(&format!("torture {SMALL} --seed 12 --duration 30s --stall 3s --mutant cqe-dropped"), 3);
    assert!(count(&verdict, "mutant_hits") > 0, "{verdict}");
}

fn a_read_only_device_takes_nothing() {
    let verdict = passes("--seed 21 --duration 2s --read-only");
    assert!(count(&verdict, "refusals") >= 18 && count(&verdict, "reads") > 100, "{verdict}");
    assert_eq!(count(&verdict, "discards"), 0, "{verdict}");
}

fn a_read_only_device_that_may_be_written_is_found() {
    finds("--seed 22 --duration 20s --read-only --mutant ro-not-enforced");
}

fn threads_that_are_no_part_of_the_io_path_are_found() {
    finds("--seed 23 --duration 20s --queues 2 --mutant no-io-flusher");
}

/// A run that fails, and the bundle that it leaves.
fn leaves_bundle(arguments: &str, code: i32) -> (TempDir, Bundle) {
    let reports = tempfile::tempdir().expect("a directory");
    verdict_into(reports.path(), arguments, code);
    let bundle = Bundle::load(&reports.path().join("bundle")).expect("a bundle");
    (reports, bundle)
}

fn replays(path: &Path, arguments: &str, code: i32) -> Value {
    verdict(&format!("replay {} {arguments}", path.display()).trim_end().replace("  ", " "), code)
}

fn a_failure_is_kept_and_made_small_and_fails_again() {
    let (reports, bundle) = leaves_bundle(
        "torture --size 16M --region 64k --max-io 64k --io-depth 8 --seed 24 --duration 30s --shrink 90s --workers 2 \
         --mix read=40,write=40,zeroes=20 --mutant write-zeroes-ignored:3",
        2,
    );
    assert_eq!(
        bundle.found_on,
        FoundOn::Served(
            [("backend", json!("Memory")), ("mode", json!("Copy")), ("workers_backend", json!(0))]
                .map(|(name, value)| (name.to_owned(), value))
                .into()
        )
    );
    let (all, Some(shrunk)) = (bundle.script.actions.len(), &bundle.shrunk) else { panic!("it is made smaller") };
    assert!(shrunk.script.actions.len() <= 5 && all > 10, "{all} actions: {}", shrunk.script.to_json());
    assert!(shrunk.rate.failed > 0 && shrunk.rate.of > 0, "{}", shrunk.rate);
    let page = bundle.report();
    assert!(page.contains("The smallest script that fails: ") && page.contains("--seed 24"), "{page}");
    // The directory of the report will do.
    let small = replays(reports.path(), "--times 3", 2);
    assert_eq!(count(&small, "failed_in_the_same_way"), 3, "{small}");
    let whole = replays(reports.path(), "--full", 2);
    assert!(count(&whole, "ops") > 5 && count(&whole, "mutant_hits") > 0, "{whole}");
    replays(reports.path(), "--sim", 2);
    replays(reports.path(), "--mode user-copy --workers-backend 2", 2);
}

fn a_script_that_a_right_device_passes_is_told_apart() {
    let (reports, bundle) =
        leaves_bundle(&format!("torture {SMALL} --seed 25 --duration 30s --shrink 0s --mutant lost-write:100"), 2);
    assert!(bundle.shrunk.is_none(), "there was no time");
    assert_eq!(bundle.script.actions.last().map(|action| action.act), Some(Act::Sweep));
    let right = reports.path().join("right.json");
    Script { mutant: None, ..bundle.script.clone() }.save(&right).expect("a file");
    let passes = replays(&right, "--device-mode --times 2", 5);
    assert!(count(&passes, "ops") > 20 && count(&passes, "overlaps") > 0, "{passes}");
    assert_eq!((count(&passes, "runs"), count(&passes, "failed")), (2, 0), "{passes}");
    assert!(count(&passes, "storage_verified_bytes") > 0 && count(&passes, "compared_in_passes") > 0, "{passes}");
    replays(reports.path(), "", 2);
}

fn a_hang_is_kept_and_hangs_again() {
    // Once faults are on: whoever looks at every new disk is not to be met.
    let plan = "write_every_40:_delay_30000".replace('_', "\u{a0}");
    let (reports, bundle) =
        leaves_bundle(&format!("torture {SMALL} --seed 26 --duration 30s --stall 2s --faults {plan}"), 3);
    let Event::Hang(hang) = &bundle.failure.event else { panic!("{:?}", bundle.failure) };
    assert!(hang.what.contains("did not complete") && !bundle.threads.is_empty(), "{hang:?}");
    assert_eq!(bundle.script.faults.to_string().trim(), plan.replace('\u{a0}', " "));
    replays(reports.path(), "--stall 2s", 3);
}

fn what_the_simulator_found_fails_on_a_device() {
    for (mutant, seed) in [("discard-off-by-one", 1), ("flush-noop", 2)] {
        let (reports, bundle) =
            leaves_bundle(&format!("torture --sim --seed {seed} --ops 20000 --mutant {mutant}"), 2);
        assert_eq!(bundle.found_on, FoundOn::Simulator);
        let failed = replays(reports.path(), "--device-mode --times 3", 2);
        assert!(count(&failed, "failed_in_the_same_way") > 0, "{mutant}: {failed}");
    }
}
