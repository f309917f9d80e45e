//! What the two processes say to each other: JSON, one line each, a reply for each call.

use serde::{Deserialize, Serialize};
use ublkit_harness::Seed;
use ublkit_harness::fault::FaultPlan;
use ublkit_harness::observe::Counts;
use ublkit_harness::sim::medium::CutReport;

use super::witness::Testimony;
use crate::flush_trace::Recording;
use crate::role::Trouble;
use crate::target::TargetArgs;
use crate::torture::outage::Outage;

/// When a storage stops letting requests through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Moment {
    /// At once.
    Now,
    /// Behind so many more requests.
    Requests(u64),
    /// Behind so many more of those that make something durable: flushes and FUA writes.
    Durable(u64),
}

/// What the loading process asks for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Call {
    /// Serve a device, on new storage or on some that is there.
    Serve { args: TargetArgs, seed: Seed, storage: Option<usize> },
    /// Bytes of a storage, past the device.
    Read { storage: usize, offset: u64, len: usize },
    /// Let no request through to a storage, from a moment on, or from when patience is over.
    Freeze { storage: usize, moment: Moment, patience_ms: u64 },
    /// Copy a frozen storage into new memory, and let requests through again.
    CopyAndThaw { storage: usize },
    /// Copy a frozen disk, its cache included, and let requests through again.
    ForkAndThaw { storage: usize },
    /// What a disk could be after a power cut, as another storage; it stays as it is itself.
    Crash { storage: usize, seed: Seed },
    /// Give the memory of a storage back that nobody serves or looks at any more.
    Forget { storage: usize },
    /// Let every request to a device fail, and drop whatever is between the kernel and the storage; what a power cut loses
    /// is lost.
    Kill { device: usize, outage: Outage },
    /// Serve a device again.
    Revive { device: usize },
    /// Switch the faults of a device on or off.
    Faults { device: usize, on: bool },
    /// Give a device other faults; they are off.
    Replan { device: usize, plan: FaultPlan, seed: Seed },
    /// How many requests are held.
    Held { device: usize },
    /// What happened at a device's storage since the last time.
    Testify { device: usize },
    /// The calls of a device's storage that were recorded.
    Recording { device: usize },
    /// How a device is doing.
    Status { device: usize },
    /// Close a device; with its faults as they are, requests that are held included, or without them.
    Close { device: usize, faults_stay: bool },
}

/// What the server says.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Reply {
    /// Not a reply: something that happened meanwhile.
    Note(String),
    /// Not a reply either: there is a device of this id, which may not be served yet.
    Made(u32),
    /// Nor this: so often the bug struck that is planted in a device which could not be started.
    Hits(u64),
    Served(Served),
    /// So many bytes follow the line.
    Bytes(usize),
    Frozen,
    /// What the power cut took, if it was one and there was something to take.
    Dead(Option<CutReport>),
    Alive,
    Switched,
    Held(u64),
    Testimony(Testimony),
    Recording(Recording),
    Copied {
        storage: usize,
    },
    Crashed {
        storage: usize,
        report: CutReport,
    },
    Forgotten,
    Status(Status),
    Closed(Closing),
    Failed(Trouble),
}

/// A device that is being served.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Served {
    pub(super) device: usize,
    pub(super) storage: usize,
    pub(crate) id: u32,
    pub(crate) queues: u16,
    pub(crate) depth: u16,
    pub(crate) max_io_bytes: u32,
}

/// How a device is doing.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Status {
    /// What the kernel has asked of the backend.
    pub(crate) counts: Counts,
    /// Requests that came through the queues.
    pub(crate) requests: u64,
    /// How often the planted bug was hit.
    pub(crate) hits: Option<u64>,
    /// The first error that a queue could not serve past.
    pub(crate) error: Option<String>,
}

/// How a device was closed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Closing {
    pub(crate) last: Status,
    /// Who holds the device, if it could not be deleted at once.
    pub(crate) deferred: Option<String>,
    /// Descriptors and threads of the server that were not there before its first device, once the last is closed.
    pub(crate) left: Vec<String>,
}
