//! What the process that runs a stress and the one whose devices are stressed say to each other: one JSON object a line.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use ublkit_harness::Seed;

use super::Kind;
use super::cycle::Costs;
use super::extent::Extent;
use crate::footprint::Sample;
pub(super) use crate::role::Trouble;
use crate::role::Word;

/// A bug that is planted in the process whose devices are stressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(super) enum Plant {
    /// One descriptor is left open in each cycle
    LeakedFd,
    /// One map is left in each cycle
    LeakedMap,
    /// One thread is left in each cycle
    LeakedThread,
    /// 4 KiB of memory are left in each cycle
    LeakedMemory,
    /// A device is added, and its deletion forgotten
    SkippedDelete,
    /// The server is gone before the device is stopped: dirty pages cannot be written back
    KillInsteadOfStop,
    /// What is in flight when the device is closed is acknowledged and not stored
    LostInFlight,
    /// A request that is in flight when the device is closed is never answered
    ForgottenRequest,
    /// Who calls close beside another caller is told at once that all is done
    EarlyAnswer,
    /// Callers of one close are told different things
    SplitAnswer,
    /// Every second device keeps its bytes where the one before keeps its own
    CrossTalk,
    /// A device is served under an id that another one has
    DoubleServed,
    /// Another device is closed than the one that is to be
    ClosedNeighbour,
    /// Who holds a closed device open is not named
    UnnamedHolder,
    /// A device that somebody holds open is stopped, and never deleted
    NeverDeleted,
    /// Dirty pages of a file system are dropped by the close
    DroppedPages,
}

impl Plant {
    /// Where it makes a difference.
    pub(super) const fn kinds(self) -> &'static [Kind] {
        match self {
            Self::LeakedFd | Self::LeakedMap | Self::LeakedThread | Self::LeakedMemory => &[Kind::Churn],
            Self::SkippedDelete => &[Kind::Churn, Kind::ConcurrentClose],
            Self::KillInsteadOfStop | Self::LostInFlight | Self::DroppedPages => {
                &[Kind::Churn, Kind::IoWhileClose, Kind::Held]
            }
            Self::ForgottenRequest => &[Kind::IoWhileClose],
            Self::EarlyAnswer | Self::SplitAnswer => &[Kind::ConcurrentClose],
            Self::CrossTalk | Self::DoubleServed | Self::ClosedNeighbour => &[Kind::Many],
            Self::UnnamedHolder => &[Kind::Held],
            Self::NeverDeleted => &[Kind::IoWhileClose, Kind::Many, Kind::Held],
        }
    }
}

/// What is to be done.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Order {
    /// Start, write, read, close, again and again.
    Churn(ChurnOrder),
    /// Serve a device.
    Start { slot: u32, shape: Shape },
    /// Close it, with at least this many requests in flight, and let them go so many milliseconds after closing has begun.
    CloseInFlight { slot: u32, minimum: u64, release_ms: u64 },
    /// Close it.
    Close { slot: u32 },
    /// Close devices, from so many threads at once, each device from one of them.
    CloseMany { slots: Vec<u32>, callers: u32 },
    /// Close devices concurrently while others start.
    Concurrently(ConcurrentOrder),
    /// Read a storage past its device; also after the device was closed.
    Read { slot: u32, offset: u64, len: usize },
    /// Forget the storages of closed devices.
    Forget,
    /// Say what this process has now.
    Footprint { cycles: u64 },
    /// Say what is left that was not there at the beginning.
    Left,
    /// End what is under way early.
    Enough,
}

/// A device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Shape {
    pub(super) bytes: u64,
    pub(super) depth: u16,
    pub(super) max_io: u32,
    /// Threads that run the backend's calls.
    pub(super) workers: usize,
    /// How long a write takes, in milliseconds.
    pub(super) write_ms: u64,
    /// How long closing waits for others to let go, in milliseconds.
    pub(super) delete_ms: u64,
    /// How long closing waits for requests to end, in milliseconds.
    pub(super) stop_ms: u64,
    pub(super) plant: Option<Plant>,
}

/// Cycles to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct ChurnOrder {
    pub(super) extent: Extent,
    /// Tell of every device within its cycle, so that whoever looks on can clean up after it. Where times are measured,
    /// that is not to be in them.
    pub(super) announce: bool,
    pub(super) seed: Seed,
    pub(super) plant: Option<Plant>,
}

/// Concurrent closes to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct ConcurrentOrder {
    pub(super) extent: Extent,
    pub(super) devices: u32,
    pub(super) callers: u32,
    pub(super) seed: Seed,
    pub(super) plant: Option<Plant>,
}

/// What happened.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Report {
    /// There is a device of this id now.
    Made { id: u32 },
    /// The device of this id is closed, or so this process believes.
    Gone { id: u32 },
    /// So many cycles or devices are done, of so many, or of 0 where that is not known.
    Progress { done: u64, of: u64 },
    /// How the process stood after so many cycles.
    Sample(Sample),
    /// Something to tell.
    Note(String),
    /// The cycles are done.
    Churned(Churned),
    /// A device is served.
    Served { slot: u32, id: u32 },
    /// A device's closing has begun, at this [time](crate::clock::nanoseconds), with so many requests in flight.
    Stopping { in_flight: u64, at: u64 },
    /// It is stopped: whatever was to be written back is.
    Stopped,
    /// It is closed: who holds it, if its deletion had to be left to the kernel, and how long that took.
    Closed { slot: u32, deferred: Option<String>, elapsed_ms: u64 },
    /// All that were to be closed are.
    ClosedAll,
    /// Concurrent closing is done.
    Concurred(Concurred),
    /// So many bytes follow.
    Bytes { len: usize },
    /// It is done.
    Done,
    /// What is left.
    Left(Vec<String>),
    /// It could not be done.
    Failed(Trouble),
}

/// What cycles came to.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Churned {
    pub(super) cycles: u64,
    /// Of them, those in which dirty pages were left to the close.
    pub(super) dirty_cycles: u64,
    pub(super) bytes_verified: u64,
    /// Closes that had to leave the deletion to the kernel, because somebody looked at the device.
    pub(super) deferred: u64,
    /// Different ids that the devices had.
    pub(super) ids: u64,
    /// Of the cycles without dirty pages.
    pub(super) costs: Costs,
}

/// What concurrent closing came to.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Concurred {
    pub(super) closes: u64,
    pub(super) callers: u64,
    /// Devices that were started and closed while others were being closed.
    pub(super) started_meanwhile: u64,
    pub(super) bytes_verified: u64,
}

impl Word for Report {
    fn bytes(&self) -> usize {
        if let Self::Bytes { len } = self { *len } else { 0 }
    }
}
