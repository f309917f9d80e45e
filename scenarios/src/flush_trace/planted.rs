//! Bugs that `flush-trace` has to catch: servers that lie about time and order, and a recorder that forgets.

use clap::ValueEnum;

use crate::scenario::Plant;
use crate::server::Lie;

/// One record in so many is lost.
const LOSE: u64 = 7;

/// A bug that no backend has: the server's, or the recorder's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Bug {
    /// Writes are acknowledged and kept back; a flush goes to the backend before them.
    FlushBeforeWrites,
    /// Each request is held for 50 ms before the backend gets it.
    ServerStall,
    /// One call in seven is not recorded, and not counted.
    RecordsLost,
}

impl Bug {
    /// What the server is told to do wrong.
    pub(super) const fn lie(self) -> Option<Lie> {
        match self {
            Self::FlushBeforeWrites => Some(Lie::FlushBeforeWrites),
            Self::ServerStall => Some(Lie::Stall),
            Self::RecordsLost => None,
        }
    }

    /// One in how many records the recorder loses; 0 for none.
    pub(super) const fn lose(self) -> u64 {
        match self {
            Self::RecordsLost => LOSE,
            Self::FlushBeforeWrites | Self::ServerStall => 0,
        }
    }
}

/// The bugs, for the registry.
pub(crate) const PLANTS: &[Plant] = &[
    Plant {
        name: "flush-swallowed",
        about: "a server whose flush is a success that does nothing: fsync returns, and the backend was never asked",
        arguments: &["--mutant", "flush-noop"],
    },
    Plant {
        name: "flush-late",
        about: "a server that acknowledges a flush when it has queued it",
        arguments: &["--mutant", "flush-submitted:1"],
    },
    Plant {
        name: "no-volatile-cache",
        about: "a device that does not say that it has a cache: fsync returns, and nobody thought of a flush",
        arguments: &["--mutant", "no-volatile-cache"],
    },
    Plant {
        name: "flush-before-writes",
        about: "a server with a write-behind cache that flush goes past",
        arguments: &["--plant", "flush-before-writes"],
    },
    Plant {
        name: "server-stall",
        about: "a server that lets requests lie before it looks at them: a poll interval, a lock, a lost wake-up",
        arguments: &["--plant", "server-stall"],
    },
    Plant {
        name: "records-lost",
        about: "a trace with holes that do not show: a ring that wraps, a race for a slot",
        arguments: &["--plant", "records-lost"],
    },
];
