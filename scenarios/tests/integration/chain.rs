//! The scenario `chain`: sound devices pass stacked on each other, and what one link does wrong is found.

use super::runner::cases;
use super::scenarios::verdict;

cases!("chain":
    two_links_in_one_process_pass in 90 s,
    three_links_in_processes_of_their_own_pass in 120 s,
    a_link_that_swallows_flushes_is_found in 60 s,
    a_link_that_drops_fua_is_found in 60 s,
    a_link_that_flattens_errnos_is_found in 60 s,
    a_link_that_is_off_by_one_block_is_found in 60 s,
    writes_under_memory_pressure_end_and_are_right in 120 s,
    a_flush_that_is_swallowed_is_found_one_by_one in 60 s,
    a_fua_that_is_dropped_is_found_one_by_one in 60 s,
    a_flush_that_is_swallowed_is_found_by_a_power_cut in 60 s,
    a_write_that_is_cut_short_is_found_by_the_file_system in 60 s,
    an_error_that_is_swallowed_is_found_errno_by_errno in 60 s,
    an_error_that_is_swallowed_is_found_when_the_bottom_is_gone in 60 s,
);

fn two_links_in_one_process_pass() {
    let verdict = verdict("chain --seed 1 --links 2 --size 64M", 0);
    let count = |name: &str| verdict["evidence"][name].as_u64().unwrap_or_else(|| panic!("no {name} in {verdict}"));
    assert!(count("flushes_at_the_bottom") >= 8 && count("errnos") > 50, "{verdict}");
    assert!(count("holders_named") == 1 && count("power_cuts") > 0, "{verdict}");
}

fn three_links_in_processes_of_their_own_pass() {
    verdict("chain --seed 2 --links 3 --processes --size 64M --only load,errors,files", 0);
}

fn a_link_that_swallows_flushes_is_found() {
    verdict("chain --seed 3 --links 2 --size 64M --only load --plant swallowed-flush", 2);
}

fn a_link_that_drops_fua_is_found() {
    verdict("chain --seed 4 --links 2 --size 64M --only load --plant dropped-fua", 2);
}

fn a_link_that_flattens_errnos_is_found() {
    verdict("chain --seed 5 --links 2 --size 64M --only errors --plant flat-errno", 2);
}

fn a_link_that_is_off_by_one_block_is_found() {
    verdict("chain --seed 6 --links 2 --size 64M --only load --plant off-by-one", 2);
}

fn writes_under_memory_pressure_end_and_are_right() {
    let verdict = verdict("chain --seed 7 --links 2 --processes --size 64M --only pressure", 0);
    let count = |name: &str| verdict["evidence"][name].as_u64().unwrap_or_else(|| panic!("no {name} in {verdict}"));
    assert!(count("memory_limit_hits") > 0 && count("pages_scanned_for_memory") > 0, "{verdict}");
}

fn a_flush_that_is_swallowed_is_found_one_by_one() {
    verdict("chain --seed 8 --links 2 --size 64M --only errors --plant swallowed-flush", 2);
}

fn a_fua_that_is_dropped_is_found_one_by_one() {
    verdict("chain --seed 9 --links 2 --size 64M --only errors --plant dropped-fua", 2);
}

fn a_flush_that_is_swallowed_is_found_by_a_power_cut() {
    verdict("chain --seed 10 --links 2 --size 64M --only power --plant swallowed-flush", 2);
}

fn a_write_that_is_cut_short_is_found_by_the_file_system() {
    verdict("chain --seed 11 --links 2 --size 64M --only files --plant shorn-write", 2);
}

fn an_error_that_is_swallowed_is_found_errno_by_errno() {
    verdict("chain --seed 12 --links 2 --size 64M --only errors --plant swallowed-error", 2);
}

fn an_error_that_is_swallowed_is_found_when_the_bottom_is_gone() {
    verdict("chain --seed 13 --links 2 --size 64M --only closing --plant swallowed-error", 2);
}
