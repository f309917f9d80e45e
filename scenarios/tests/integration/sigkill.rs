//! `sigkill` as its users run it: the grid passes over a sound server, and each planted bug is caught.

use super::runner::cases;
use super::scenarios::verdict;

cases!("sigkill":
    every_point_passes_in_a_mode_each in 240 s,
    a_server_that_commits_before_it_writes_is_caught in 90 s,
    a_server_that_flushes_into_its_own_memory_is_caught in 90 s,
    a_server_that_serves_an_older_storage_is_caught in 90 s,
    a_server_that_forgets_what_is_issued_again_is_caught in 90 s,
    an_id_that_is_leaked_is_caught in 90 s,
);

fn every_point_passes_in_a_mode_each() {
    let verdict = verdict("sigkill --sample --seed 1", 0);
    assert_eq!(verdict["verdict"], "pass", "{verdict}");
    let count = |name: &str| verdict["evidence"][name].as_u64().unwrap_or(0);
    assert!(count("cells") > 4, "{verdict}");
    // All but START, which is hit by luck alone, where the kernel lets it be tried at all.
    let starts = u64::from(count("gated_killed_start") == 0);
    assert_eq!(count("cells_in_place") + starts, count("cells"), "{verdict}");
    assert_eq!(count("ids_reused"), count("cells"), "{verdict}");
}

/// With the arguments of the registry, as `suite` runs them.
fn caught(arguments: &str) {
    let verdict = verdict(&format!("sigkill --seed 1 --sample {arguments}"), 2);
    assert_eq!(verdict["verdict"], "fail", "{verdict}");
}

fn a_server_that_commits_before_it_writes_is_caught() {
    caught("--plant commit-before-write --phase working,uncommitted,idle --mode wait,reissue");
}

fn a_server_that_flushes_into_its_own_memory_is_caught() {
    caught("--plant flush-not-persisted --phase working,idle --mode none");
}

fn a_server_that_serves_an_older_storage_is_caught() {
    caught("--plant stale-storage --phase working,idle");
}

fn a_server_that_forgets_what_is_issued_again_is_caught() {
    caught("--plant forget-reissued --phase all-tags,working --mode reissue");
}

fn an_id_that_is_leaked_is_caught() {
    caught("--plant leaked-id --phase idle,working --mode none");
}
