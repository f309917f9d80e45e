//! The states that a device can be in, as far as they make a difference to a command.

use std::fmt;

use crate::gates::KernelVersion;

macro_rules! states {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {
        /// A state of a device, and of the processes that hold it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub(super) enum State { $($(#[$doc])* $name,)* }

        impl State {
            pub(super) const ALL: &'static [Self] = &[$(Self::$name),*];

            pub(super) fn name(self) -> &'static str {
                match self { $(Self::$name => $text),* }
            }
        }
    };
}

states! {
    /// There is no such id, and never was.
    Absent = "absent";
    /// Added, nothing more.
    Added = "added";
    /// It has parameters.
    Configured = "configured";
    /// A server has the character device open, and nothing fetched.
    Opened = "opened";
    /// One of two tags is fetched.
    Partly = "partly-fetched";
    /// Every tag is fetched.
    Ready = "ready";
    /// Started, idle.
    Live = "live";
    /// Started, idle, with recovery and, where there is such a thing, quiescing.
    LiveRecoverable = "live-recoverable";
    /// Started, with a client's read in the server's hands.
    Held = "held";
    /// Stopped; server and a client have their nodes open.
    StoppedOpen = "stopped-open";
    /// Stopped; the server has the character device open.
    Stopped = "stopped";
    /// Its server was killed; without recovery.
    Dead = "dead";
    /// Its server was killed; I/O waits.
    Quiesced = "quiesced";
    /// A new server has fetched every tag of a device that was quiesced; recovery has not ended.
    Recovering = "recovering";
    /// Its server was killed; I/O fails.
    FailIo = "fail-io";
    /// Deleted without waiting, while a server has the character device open.
    Deleting = "deleting";
    /// Deleted for good.
    Deleted = "deleted";
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl State {
    /// Whether this kernel has it.
    pub(super) fn is_of(self, kernel: KernelVersion) -> bool {
        self != Self::FailIo || kernel >= KernelVersion(6, 16, 0)
    }

    /// What the driver says of it; `None` where there is no device.
    pub(super) fn told(self) -> Option<ublkit::ctrl::State> {
        use ublkit::ctrl::State as Told;
        match self {
            Self::Absent | Self::Deleted => None,
            Self::Live | Self::LiveRecoverable | Self::Held => Some(Told::Live),
            Self::Quiesced | Self::Recovering => Some(Told::Quiesced),
            Self::FailIo => Some(Told::FailIo),
            _ => Some(Told::Dead),
        }
    }
}
