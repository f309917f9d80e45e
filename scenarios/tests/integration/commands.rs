//! The scenario `control`: a sound driver gives what the table says, and a planted bug is found.

use super::runner::cases;
use super::scenarios::verdict;

cases!("commands":
    commands_before_a_start_give_what_the_table_says in 90 s,
    commands_to_a_live_device_give_what_the_table_says in 90 s,
    a_walk_through_the_states_leaves_nothing in 90 s,
    a_tag_that_is_fetched_twice_is_noticed in 60 s,
    a_device_that_is_said_to_be_live_is_noticed in 60 s,
);

fn passes(arguments: &str, work: &str, minimum: u64) {
    let verdict = verdict(arguments, 0);
    let done = verdict["evidence"][work].as_u64();
    assert!(done.is_some_and(|done| done >= minimum), "{verdict}");
}

fn commands_before_a_start_give_what_the_table_says() {
    passes("control --seed 1 --states absent,added,configured", "cells", 260);
}

fn commands_to_a_live_device_give_what_the_table_says() {
    passes("control --seed 1 --states live", "cells", 90);
}

fn a_walk_through_the_states_leaves_nothing() {
    passes("control --seed 1 --fuzz --ops 400", "fuzz_steps", 400);
}

fn a_tag_that_is_fetched_twice_is_noticed() {
    verdict("control --seed 1 --plant double-fetch --states partly-fetched", 2);
}

fn a_device_that_is_said_to_be_live_is_noticed() {
    verdict("control --seed 1 --plant stale-state --states stopped", 2);
}
