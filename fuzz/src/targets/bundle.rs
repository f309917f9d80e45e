//! Bundles: what is kept of a failure, as it comes from somebody else.
//!
//! The input is a bundle's `bundle.json`, a NUL, and the text of every script that it names.

use std::fs;
use std::path::PathBuf;

use ublkit_harness::bundle::Bundle;

pub(super) fn run(bytes: &[u8]) {
    let (about, script) = match bytes.iter().position(|byte| *byte == 0) {
        Some(at) => (&bytes[..at], &bytes[at + 1..]),
        None => (bytes, &bytes[..0]),
    };
    let dir = directory();
    let put = |name: &str, bytes: &[u8]| fs::write(dir.join(name), bytes);
    // A disk that is full says nothing about bundles.
    if fs::create_dir_all(&dir).is_err() || put("bundle.json", about).is_err() {
        return;
    }
    for name in ["script.json", "shrunk.json"] {
        if put(name, script).is_err() {
            return;
        }
    }
    if let Ok(bundle) = Bundle::load(&dir) {
        assert!(!bundle.report().is_empty(), "a page says something");
    }
}

/// One for each process: inputs come one after another.
fn directory() -> PathBuf {
    std::env::temp_dir().join(format!("ublkit-fuzz-bundle-{}", std::process::id()))
}
