//! Scripts.

use ublkit_harness::script::Script;

use super::round_trips;

pub(super) fn run(bytes: &[u8]) {
    if let Ok(script) = serde_json::from_slice::<Script>(bytes) {
        round_trips(&script);
    }
}
