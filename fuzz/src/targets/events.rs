//! Lines of a report: events, mismatches, and the texts that are made of them.

use ublkit_harness::classify::{Class, Expected};
use ublkit_harness::mismatch::SectorDump;
use ublkit_harness::{Event, Mismatch, Oracles};

use super::round_trips;

pub(super) fn run(bytes: &[u8]) {
    if let Ok(event) = serde_json::from_slice::<Event>(bytes) {
        // Compared as text: some decimal numbers are not quite what they were once they have been read.
        let json = serde_json::to_string(&event).expect("what was read can be written");
        assert!(!json.contains('\n'), "an event is one line");
        assert!(serde_json::from_str::<Event>(&json).is_ok(), "{json}");
        if let Event::Mismatch(mismatch) = event {
            text_of(&mismatch);
        }
    }
    if let Ok(mismatch) = serde_json::from_slice::<Mismatch>(bytes) {
        text_of(&mismatch);
    }
    if let Ok(class) = serde_json::from_slice::<Class>(bytes) {
        assert!(class.to_string().starts_with(&class.name().replace('_', " ")));
        round_trips(&class);
    }
    if let Ok(expected) = serde_json::from_slice::<Expected>(bytes) {
        round_trips(&expected);
    }
    if let Ok(dump) = serde_json::from_slice::<SectorDump>(bytes) {
        round_trips(&dump);
    }
    if let Ok(oracles) = serde_json::from_slice::<Oracles>(bytes) {
        round_trips(&oracles);
    }
}

fn text_of(mismatch: &Mismatch) {
    assert!(mismatch.to_string().starts_with("sector "));
    round_trips(mismatch);
}
