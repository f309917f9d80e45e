//! What the two processes say to each other: JSON, one line each. Nothing is answered; the server says what happens as
//! it happens, with the time, so that its last words tell where it was when it was killed.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Plant;
use super::mode::Mode;
use crate::role;

/// What a server is told first.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Order {
    /// The id of the device.
    pub(super) id: u32,
    /// Take over the device that is there, instead of making one.
    pub(super) recover: bool,
    pub(super) mode: Mode,
    /// The storage, which outlives the server.
    pub(super) storage: PathBuf,
    /// An older copy of it, for a server that is planted to serve that.
    pub(super) older: Option<PathBuf>,
    /// How many servers this device has had.
    pub(super) lives: u32,
    pub(super) bytes: u64,
    pub(super) queues: u16,
    pub(super) depth: u16,
    /// Where to stop for good, to be killed.
    pub(super) hold: Option<Hold>,
    pub(super) plant: Option<Plant>,
}

/// Where a server stops, and waits to be killed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Hold {
    /// At a phase of the library's, by its name.
    Phase(String),
    /// While this queue is being opened; the queues before it go on.
    Open(u16),
    /// Every request of a kind, before the storage is touched or after.
    Requests(Kind, Stage),
}

/// Kinds of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Kind {
    Any,
    Writes,
    Flushes,
}

/// When a request is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Stage {
    /// The storage was not touched yet.
    Before,
    /// It is done, and the driver was not told yet.
    After,
}

/// What a server that runs is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Command {
    /// Stop there from now on.
    Hold(Hold),
    /// Go on where it is held; hold nothing from now on.
    Release,
    /// End the thread of the queue that gets the next request.
    EndQueue,
    /// Close the device, and end.
    Close,
}

/// What a server says.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Word {
    /// Nanoseconds of `CLOCK_MONOTONIC`.
    pub(super) at: u64,
    pub(super) what: What,
}

impl role::Word for Word {}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum What {
    /// The device has come to a phase of the library's.
    Phase(String),
    /// So many are held now; of these, so many change the storage or make it last.
    Holding {
        held: u32,
        changes: u32,
    },
    /// The device is served, with so much as the driver granted.
    Serving {
        queues: u16,
        depth: u16,
    },
    /// A queue's thread has ended before its time.
    QueueEnded(String),
    /// The device is closed; `None` if it was deleted at once.
    Closed(Option<String>),
    /// It cannot go on.
    Failed(String),
    Note(String),
}
