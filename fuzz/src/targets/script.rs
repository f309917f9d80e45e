//! Scripts: read, and run on the simulator if they are right.

use ublkit_harness::script::Script;
use ublkit_harness::sim::RunOptions;
use ublkit_harness::trial::replay;

use super::round_trips;

/// What is larger is right, but takes memory and time.
const BYTES_MAX: u64 = 8 << 20;
const ACTIONS_MAX: usize = 200;
const IN_FLIGHT_MAX: u64 = 1 << 12;

pub(super) fn run(bytes: &[u8]) {
    let Ok(script) = serde_json::from_slice::<Script>(bytes) else { return };
    round_trips(&script);
    let setup = &script.setup;
    let tags = u64::from(setup.queues) * u64::from(setup.queue_depth);
    let depth = u64::from(setup.workers).saturating_mul(u64::from(setup.io_depth));
    let small = setup.bytes <= BYTES_MAX
        && u64::from(setup.max_io_bytes) <= BYTES_MAX
        && tags <= IN_FLIGHT_MAX
        && depth <= IN_FLIGHT_MAX
        && script.actions.len() <= ACTIONS_MAX;
    if small && script.validate().is_ok() {
        let options = RunOptions { patience: 500, ..RunOptions::default() };
        let ran = replay(&script, &options).ran;
        assert_eq!(ran.digest, replay(&script, &options).ran.digest, "a script is one run");
        assert!(ran.failure.is_none() || script.mutant.is_some() || !script.faults.is_loud(), "{:?}", ran.failure);
    }
}
