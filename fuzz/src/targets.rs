//! What is given arbitrary input, a file each.

mod bundle;
mod classifier;
mod descriptor;
mod events;
mod parsers;
mod plan;
mod script;

use crate::Target;

/// Every target.
pub const TARGETS: [Target; 7] = [
    Target { name: "bundle", run: bundle::run, in_tests: 1_000 },
    Target { name: "classifier", run: classifier::run, in_tests: 2_000 },
    Target { name: "descriptor", run: descriptor::run, in_tests: 20_000 },
    Target { name: "events", run: events::run, in_tests: 20_000 },
    Target { name: "parsers", run: parsers::run, in_tests: 20_000 },
    Target { name: "plan", run: plan::run, in_tests: 20_000 },
    Target { name: "script", run: script::run, in_tests: 5_000 },
];

/// Whether the input of `bundle` is one that is taken.
#[cfg(test)]
pub(crate) fn loads_bundle(bytes: &[u8]) -> bool {
    bundle::load(bytes).is_some()
}

/// Whether a value that was read comes out of JSON as it went in.
fn round_trips<T>(value: &T)
where
    T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let json = serde_json::to_string(value).expect("what was read can be written");
    let again: T = serde_json::from_str(&json).expect("what was written can be read");
    assert_eq!(&again, value, "{json}");
}
