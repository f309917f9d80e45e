//! What became of each trial, one JSON line each, for tables of many kernels: in the file that a variable names.
//!
//! A trial that begins and is ended from outside has no second line, and shows as one that did not end.

use std::fs::OpenOptions;
use std::io::Write;
use std::time::Duration;

use serde::Serialize;

/// Names the file. Without it nothing is noted.
pub(crate) const VARIABLE: &str = "UBLKIT_TRIALS";

#[derive(Serialize)]
struct Note<'a> {
    trial: &'a str,
    outcome: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    elapsed_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gate: Option<&'a str>,
}

pub(crate) fn begun(trial: &str) {
    note(&Note { trial, outcome: "begun", elapsed_ms: None, gate: None });
}

pub(crate) fn ended(trial: &str, passed: bool, took: Duration) {
    let outcome = if passed { "passed" } else { "failed" };
    note(&Note { trial, outcome, elapsed_ms: Some(took.as_millis() as u64), gate: None });
}

pub(crate) fn gated(trial: &str, gate: &str) {
    note(&Note { trial, outcome: "gated", elapsed_ms: None, gate: Some(gate) });
}

fn note(note: &Note<'_>) {
    let Some(path) = std::env::var_os(VARIABLE).filter(|path| !path.is_empty()) else { return };
    let line = serde_json::to_string(note).expect("it is text and numbers");
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
