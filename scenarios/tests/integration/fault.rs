//! The scenario `fault`: a right server passes, and every bug that it is for is found.

use super::runner::cases;
use super::scenarios::verdict;

cases!("fault":
    a_right_server_passes in 170 s,
    what_the_device_does_not_offer_is_not_asked_for in 60 s,
    an_errno_that_is_lost_is_found in 60 s,
    an_errno_that_is_lost_is_found_by_each_part in 60 s,
    an_error_that_is_swallowed_is_found in 60 s,
    an_error_that_outlives_its_cause_is_found in 60 s,
);

fn a_right_server_passes() {
    let verdict = verdict("fault --seed 1 --size 64M --cells 30", 0);
    let count = |name: &str| verdict["evidence"][name].as_u64().unwrap_or_else(|| panic!("no {name} in {verdict}"));
    assert!(count("errors_seen") > 50 && count("cells") >= 30 && count("errnos") > 100, "{verdict}");
    assert!(count("failed_by_close") == 3 && count("answers_in_pieces") >= 10, "{verdict}");
}

fn an_errno_that_is_lost_is_found() {
    verdict("fault --seed 2 --size 64M --plant errno-lost", 2);
}

fn what_the_device_does_not_offer_is_not_asked_for() {
    verdict("fault --seed 5 --size 64M --only grid --cells 6 --capabilities flush", 0);
}

fn an_errno_that_is_lost_is_found_by_each_part() {
    verdict("fault --seed 6 --size 64M --only plain --plant errno-lost", 2);
}

fn an_error_that_is_swallowed_is_found() {
    verdict("fault --seed 3 --size 64M --mutant error-swallowed:1", 2);
}

fn an_error_that_outlives_its_cause_is_found() {
    verdict("fault --seed 4 --size 64M --mutant error-sticky:200", 2);
}
