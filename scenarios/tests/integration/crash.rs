//! Power cuts: a right server passes, on the raw device and under file systems, and lies about what is durable are found.

use serde_json::Value;

use super::runner::cases;
use super::scenarios::verdict;

cases!("crash":
    a_right_disk_passes_under_power_cuts in 120 s,
    a_right_disk_passes_under_ext4_that_journals_data in 120 s,
    a_torn_block_is_found in 60 s,
    a_commit_block_that_is_lost_is_found_by_ext4 in 120 s,
    a_hidden_cache_is_found_by_ext4 in 120 s,
);

fn count(verdict: &Value, name: &str) -> u64 {
    verdict["evidence"][name].as_u64().unwrap_or_else(|| panic!("no {name} in {verdict}"))
}

fn a_right_disk_passes_under_power_cuts() {
    let verdict = verdict("crash --seed 1 --size 1M --cuts 1 --images 2 --on raw,ext4,xfs", 0);
    for part in ["raw", "ext4", "xfs"] {
        assert!(count(&verdict, &format!("lost_sectors_{part}")) > 0, "{verdict}");
    }
    assert_eq!(count(&verdict, "fscks"), 4, "{verdict}");
    assert!(count(&verdict, "journals_replayed") >= 2 && count(&verdict, "files_promised") > 0, "{verdict}");
}

fn a_right_disk_passes_under_ext4_that_journals_data() {
    verdict("crash --seed 2 --cuts 1 --images 2 --on ext4-journal", 0);
}

fn finds(arguments: &str) {
    let verdict = verdict(&format!("crash --size 1M {arguments}"), 2);
    assert_eq!(verdict["verdict"], "fail", "{verdict}");
}

fn a_torn_block_is_found() {
    finds("--seed 3 --on raw --cuts 3 --images 2 --mutant torn-below-atomic");
}

fn a_commit_block_that_is_lost_is_found_by_ext4() {
    finds("--seed 4 --on ext4 --cuts 12 --images 4 --mutant fua-ignored");
}

fn a_hidden_cache_is_found_by_ext4() {
    finds("--seed 5 --on ext4 --cuts 6 --images 3 --mutant no-volatile-cache");
}
