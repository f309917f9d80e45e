//! Scripts: a run written out, action by action.
//!
//! A seed and options say the same in one line, but a script can be cut: what is left of a failing run when everything
//! that does not matter is gone is a script. It is JSON with a version, and replays on the simulator and on a device.

mod draw;
mod file;
#[cfg(test)]
mod tests;
mod text;

use serde::{Deserialize, Serialize};

pub use self::draw::{Actions, Workload};
pub use self::file::ScriptError;
use crate::fault::FaultPlan;
use crate::mutant::Planted;
use crate::plan::OpKind;
use crate::range::SectorRange;
use crate::seed::Seed;

/// The version of the format that is written. Readers refuse others.
pub const VERSION: u32 = 1;

/// A run, written out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Script {
    /// The version of the format.
    pub version: u32,
    /// What payloads and the order of events are drawn from.
    pub seed: Seed,
    /// The device and how it is driven.
    pub setup: Setup,
    /// The bug that is planted.
    pub mutant: Option<Planted>,
    /// The faults that are injected.
    pub faults: FaultPlan,
    /// What is done, in the order in which it is begun.
    pub actions: Vec<Action>,
}

/// One action of one worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Action {
    /// The worker. Actions that are nobody's, such as a power cut, are worker 0's.
    pub worker: u32,
    /// What is done.
    pub act: Act,
}

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Act {
    /// An operation on the device.
    Op {
        /// What it does.
        kind: OpKind,
        /// The sectors it is for; empty for a flush.
        range: SectorRange,
    },
    /// The power is cut: whatever is not durable may be lost. The device is started again.
    PowerCut,
    /// The server dies. What it held is treated as the device's recovery mode says, and another one takes over.
    Kill,
    /// Everything ends in order, the device is closed and opened again.
    Reopen,
    /// No faults from now on.
    FaultsOff,
    /// Faults again.
    FaultsOn,
    /// When all is done, the whole device is read and checked.
    Sweep,
}

/// What happens to requests when a server dies (`UBLK_F_USER_RECOVERY…`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recovery {
    /// All fail, and the device is gone.
    #[default]
    None,
    /// Those that the server had fail; others wait for the next server.
    Wait,
    /// Those that the server had are given to the next server once more.
    Reissue,
    /// Those that the server had fail, and so do others until there is a next server.
    FailIo,
}

/// The device, and how it is driven.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "each is a property of its own")]
pub struct Setup {
    /// The size of the device, in bytes.
    pub bytes: u64,
    /// The size of a logical block, in bytes.
    pub logical_block: u32,
    /// The largest request the driver hands over, in bytes.
    pub max_io_bytes: u32,
    /// Queues.
    pub queues: u16,
    /// Requests in flight for each queue.
    pub queue_depth: u16,
    /// Workers, all of them on the whole device.
    pub workers: u32,
    /// Operations that each worker keeps in flight.
    pub io_depth: u32,
    /// Acknowledged writes may be lost until a flush.
    pub volatile_cache: bool,
    /// The device takes writes that are durable when acknowledged.
    pub fua: bool,
    /// The device can discard.
    pub discard: bool,
    /// What is discarded reads as zeroes.
    pub discard_zeroes: bool,
    /// The device can write zeroes.
    pub write_zeroes: bool,
    /// The device refuses writes.
    pub read_only: bool,
    /// What happens to requests when a server dies.
    pub recovery: Recovery,
    /// Adjacent requests are merged.
    pub merges: bool,
    /// How far completions stray from the order of submission, from 0 to 100.
    pub reorder: u8,
    /// Memory is short: whoever needs some waits for writeback.
    pub memory_pressure: bool,
    /// How much of a payload can be compressed away, in percent; more than 90 are as 90. 0 in scripts that do not say.
    #[serde(default)]
    pub compressible: u8,
}
