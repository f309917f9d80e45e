//! Bundles: what is kept of a failure, as it comes from somebody else.
//!
//! The input is a bundle's `bundle.json`, a NUL, the text of every script that it names, a NUL, and what its events and the
//! kernel's log hold.

use std::fs;
use std::path::PathBuf;

use ublkit_harness::bundle::Bundle;

pub(super) fn run(bytes: &[u8]) {
    if let Some(bundle) = load(bytes) {
        assert!(!bundle.report().is_empty(), "a page says something");
    }
}

/// The bundle that the input is, if it is one.
pub(super) fn load(bytes: &[u8]) -> Option<Bundle> {
    let mut parts = bytes.splitn(3, |byte| *byte == 0);
    let mut next = || parts.next().unwrap_or_default();
    let (about, script, lines) = (next(), next(), next());
    let dir = directory();
    // A disk that is full says nothing about bundles.
    fs::create_dir_all(&dir).ok()?;
    for (name, bytes) in [
        ("bundle.json", about),
        ("script.json", script),
        ("shrunk.json", script),
        ("events.jsonl", lines),
        ("kernel.log", lines),
    ] {
        fs::write(dir.join(name), bytes).ok()?;
    }
    Bundle::load(&dir).ok()
}

/// One for each thread: inputs come one after another.
fn directory() -> PathBuf {
    let (process, thread) = (std::process::id(), std::thread::current().id());
    std::env::temp_dir().join(format!("ublkit-fuzz-bundle-{process}-{thread:?}"))
}
