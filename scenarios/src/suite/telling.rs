//! What of the evidence says most in one line.

use std::collections::BTreeMap;

use crate::units::format_rounded;

/// The names that say most, the most telling first. What is not among them comes after, as it comes.
const FIRST: [&str; 18] = [
    "rounds",
    "cycles",
    "kills",
    "power_cuts",
    "crash_states",
    "recoveries",
    "trials",
    "cells",
    "ops",
    "verified_bytes",
    "storage_verified_bytes",
    "injections",
    "errors_injected",
    "overlaps",
    "flushes",
    "mapped_writes",
    "files_verified_after_remount",
    "journals_replayed",
];
/// What the server was asked for, which is much the same everywhere, and what is told otherwise.
const LAST: [&str; 3] = ["backend_", "gated_", "served_"];
/// How many are told.
const TOLD: usize = 4;

/// The most telling of what was done, in one line.
pub(crate) fn telling(evidence: &BTreeMap<String, u64>) -> String {
    let rank = |name: &str| match FIRST.iter().position(|first| *first == name) {
        Some(rank) => rank,
        None if LAST.iter().any(|last| name.starts_with(last)) => FIRST.len() + 1,
        None => FIRST.len(),
    };
    let mut done: Vec<_> =
        evidence.iter().filter(|(name, count)| **count > 0 && !name.starts_with("gated_")).collect();
    done.sort_by_key(|(name, _)| rank(name));
    done.truncate(TOLD);
    let words = done.into_iter().map(|(name, &count)| match name.strip_suffix("_bytes") {
        Some(what) => format!("{} {}", format_rounded(count), what.replace('_', " ")),
        None => format!("{count} {}", name.replace('_', " ")),
    });
    words.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_work_comes_first_and_in_few_words() {
        let evidence: BTreeMap<String, u64> = [
            ("backend_reads", 9),
            ("gated_abandoned_start", 1),
            ("ops", 4711),
            ("verified_bytes", 3 << 20),
            ("zebras", 2),
            ("aardvarks", 0),
            ("served_requests", 3),
            ("kills", 7),
        ]
        .map(|(name, count)| (name.to_owned(), count))
        .into();
        assert_eq!(telling(&evidence), "7 kills, 4711 ops, 3.0 MiB verified, 2 zebras");
    }
}
