//! Where in its life a server is killed.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::mode::Mode;
use crate::gates::{self, Gate};

/// A point in the life of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Point {
    /// After ADD: there is an id and nothing else
    Added,
    /// One queue has fetched its tags, another has not
    MidFetch,
    /// Every tag is fetched, START was not sent
    Fetched,
    /// While START is at it; at a drawn time
    Starting,
    /// START is done, its server has not looked for the node yet
    Started,
    /// The kernel reads the partition table, and the server has those reads in hand
    Scanning,
    /// Nothing is in flight
    Idle,
    /// Under load, at a drawn time
    Working,
    /// The server has every tag in hand
    AllTags,
    /// The storage has the write, the driver was not told
    Uncommitted,
    /// The server has a flush in hand
    Flushing,
    /// STOP writes dirty pages back, and the server has those writes in hand
    Stopping,
    /// DEL waits for somebody who has the device open
    Deleting,
    /// The next server dies too while it takes over, at a drawn phase
    Recovering,
    /// The next server dies too as soon as it serves
    Twice,
    /// A queue's thread ends, and the process lives on
    QueueThread,
    /// Under load, and nobody takes over: the device is deleted with everything that waits
    Abandoned,
}

impl Point {
    /// The bug of some kernels that does not let this be done.
    pub(super) const fn gate(self) -> Option<&'static Gate> {
        match self {
            Self::MidFetch | Self::Fetched => Some(&gates::ABANDONED_START),
            Self::Starting => Some(&gates::KILLED_START),
            Self::Scanning => Some(&gates::KILLED_SCAN),
            Self::AllTags => Some(&gates::FULL_QUEUE),
            _ => None,
        }
    }
}

/// How far the next server comes that is killed while it takes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Reached {
    /// The recovery has begun, or there is an id and nothing else
    Added,
    /// It has the character device open
    Configured,
    /// One queue has fetched its tags, another has not
    MidFetch,
    /// Every tag is fetched, and the recovery, or START, was not ended
    Fetched,
}

impl Reached {
    /// The bugs of some kernels that do not let this be done. Where nothing is recovered, a new device is begun.
    pub(super) const fn gates(self, mode: Mode) -> &'static [&'static Gate] {
        match self {
            Self::Added | Self::Configured => &[],
            Self::MidFetch | Self::Fetched if !mode.recovers() => &[&gates::ABANDONED_START],
            Self::MidFetch => &[&gates::KILLED_RECOVERY, &gates::HALF_RECOVERED_DEATH],
            Self::Fetched => &[&gates::KILLED_RECOVERY],
        }
    }
}
