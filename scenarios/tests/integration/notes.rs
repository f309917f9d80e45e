//! What became of each trial, one JSON line each, for tables of many kernels: in the file that a variable names.
//!
//! A trial that begins and is ended from outside has no second line, and shows as one that did not end.

use std::fs::OpenOptions;
use std::io::Write;
use std::time::Duration;

use serde_json::{Value, json};

/// Names the file. Without it nothing is noted.
pub(crate) const VARIABLE: &str = "UBLKIT_TRIALS";

pub(crate) fn begun(trial: &str) {
    note(&json!({"trial": trial, "outcome": "begun"}));
}

pub(crate) fn ended(trial: &str, passed: bool, took: Duration) {
    let outcome = if passed { "passed" } else { "failed" };
    note(&json!({"trial": trial, "outcome": outcome, "elapsed_ms": took.as_millis() as u64}));
}

pub(crate) fn gated(trial: &str, gate: &str) {
    note(&json!({"trial": trial, "outcome": "gated", "gate": gate}));
}

fn note(line: &Value) {
    let Some(path) = std::env::var_os(VARIABLE).filter(|path| !path.is_empty()) else { return };
    // One write each: processes that append at once do not mix their lines.
    let written = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()));
    if let Err(error) = written {
        eprintln!("failed to note a trial in {}: {error}", path.display());
    }
}
