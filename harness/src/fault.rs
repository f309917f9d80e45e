//! Plans of faults, and a backend that has them.
//!
//! A fault is not a coin that is tossed in the backend but a line of a plan: when it happens, and what. Plans are drawn
//! from the seed or written by hand, printed with a run, replayed with it, and can be switched off, so that what comes
//! after a fault can be checked too:
//!
//! ```
//! use ublkit_harness::fault::FaultPlan;
//! let plan: FaultPlan = "
//!     write rate 1/1000 range 0+2048: error EIO after   # after it was stored, that is
//!     flush nth 3 state 0: error ENOSPC before then 1   # from here on in state 1, in which
//!     write,fua state 1 times 2: error EROFS partway    # two writes fail, part of which is stored
//!     read burst 2/100: delay 5; any every 500: hold
//! "
//! .parse()?;
//! assert_eq!(plan.rules.len(), 5);
//! assert_eq!(plan.to_string().parse(), Ok(plan));
//! # Ok::<(), ublkit_harness::fault::FaultError>(())
//! ```
//!
//! A [`FaultBackend`] does what its plan says to every call that reaches it. Faults of time, which are delays, requests
//! that are held and short results, are not a backend's to have: whoever serves requests asks for them with
//! [`Faults::timing`] before the backend is called.

mod backend;
mod draw;
mod engine;
pub mod errno;
#[cfg(test)]
mod tests;
mod text;

use serde::{Deserialize, Serialize};

pub use self::backend::FaultBackend;
pub use self::engine::{Clock, Faults, RuleCounts};
pub use self::errno::Errno;
pub use self::text::FaultError;
use crate::plan::OpKind;
use crate::range::SectorRange;
use crate::stamp::Stamp;

/// Which faults happen when. As text one rule a line, or separated by semicolons; as JSON a list of such lines.
///
/// Every rule counts the calls that it is for, whatever the other rules do. Where several fire at once, the first does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FaultPlan {
    /// The rules.
    pub rules: Vec<Rule>,
}

/// When something happens, and what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Rule {
    /// The operations that it is for.
    pub ops: Ops,
    /// Only calls that have a sector in common with these; a flush has none.
    pub range: Option<SectorRange>,
    /// Only in this state. A plan begins in state 0.
    pub state: Option<u32>,
    /// Which of the calls that are left.
    pub trigger: Trigger,
    /// Only from the first to the second of these calls, counted from 1, both included.
    pub calls: Option<(u64, u64)>,
    /// At most so often.
    pub times: Option<u64>,
    /// What happens.
    pub effect: Effect,
    /// The state of the plan from then on.
    pub then: Option<u32>,
}

/// A set of operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ops(u8);

/// Which of the calls that a rule is for it fires on, counted from 1 for each rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Trigger {
    /// All.
    #[default]
    Always,
    /// The nth alone.
    Nth(u64),
    /// The nth, and every nth after it.
    Every(u64),
    /// So many of so many, drawn for each.
    Rate {
        /// So many…
        hits: u64,
        /// …of so many.
        out_of: u64,
    },
    /// The first so many of every so many.
    Burst {
        /// So many…
        hits: u64,
        /// …of so many.
        out_of: u64,
    },
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Effect {
    /// The call fails.
    Error {
        /// With this error.
        errno: Errno,
        /// After this much was done.
        stage: Stage,
    },
    /// Part of the request is done and completed as such; the rest comes again. Reads and writes only.
    Short,
    /// The request waits: so many steps in the simulator, milliseconds on a device.
    Delay(u64),
    /// The request waits until it is released.
    Hold,
    /// Nothing is done, success is reported.
    Lost,
    /// The first blocks are changed, the others not; success is reported.
    Torn,
    /// Other blocks are read or changed than should be.
    Misdirected,
    /// The read returns what its blocks held before they were changed.
    Stale,
    /// One bit is wrong: of what is returned, or of what is stored.
    Flipped,
    /// The backend panics.
    Panic,
}

/// How much of a call is done before it fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Nothing.
    Before,
    /// The first blocks, a drawn number of them.
    Partway,
    /// All.
    After,
}

/// What a request has to suffer before the backend is called for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timing {
    /// It waits: so many steps in the simulator, milliseconds on a device.
    Delay(u64),
    /// It waits until [`Faults::released`] says so.
    Hold(HoldId),
    /// Only this many of its blocks are done, at least one and not all of them.
    Short {
        /// How many, in logical blocks.
        blocks: u64,
    },
}

/// A request that is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HoldId(u64);

/// A fault that happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Injection {
    /// Its place among those of the run, from 0.
    pub number: u64,
    /// The place of its rule in the plan, from 0.
    pub rule: u32,
    /// What was called.
    pub kind: OpKind,
    /// The sectors it was for.
    pub range: SectorRange,
    /// What happened to it.
    pub effect: Effect,
    /// The errno that the backend returned, if it failed. The application may see another, see [`Errno::seen`].
    pub errno: Option<i32>,
    /// When the call began; 0 where there is no [`Clock`].
    pub began: Stamp,
    /// When the call ended; 0 where there is no [`Clock`].
    pub ended: Stamp,
}

impl FaultPlan {
    /// No faults.
    pub const NONE: Self = Self { rules: Vec::new() };

    /// Whether there are no faults in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Whether every fault in it shows itself: errors, delays, short results. The others corrupt in silence.
    #[must_use]
    pub fn is_loud(&self) -> bool {
        self.rules.iter().all(|rule| rule.effect.is_loud())
    }

    /// Whether none of the rules contradicts itself.
    ///
    /// # Errors
    /// Names the first that does. A plan that was read from text or JSON is valid.
    pub fn validate(&self) -> Result<(), FaultError> {
        self.rules.iter().try_for_each(Rule::validate)
    }
}

impl Rule {
    /// A rule for every call of these operations.
    #[must_use]
    pub const fn new(ops: Ops, effect: Effect) -> Self {
        Self { ops, range: None, state: None, trigger: Trigger::Always, calls: None, times: None, effect, then: None }
    }

    /// Whether it is for a call of `kind` on `range` in `state`.
    fn is_for(&self, kind: OpKind, range: SectorRange, state: u32) -> bool {
        self.ops.has(kind)
            && self.effect.suits(kind)
            && self.range.is_none_or(|own| own.overlaps(range))
            && self.state.is_none_or(|own| own == state)
    }
}

impl Ops {
    /// Every operation.
    pub const ANY: Self = Self((1 << OpKind::ALL.len()) - 1);
    /// No operation.
    pub const NONE: Self = Self(0);
    /// Writes, durable or not.
    pub const WRITES: Self = Self::NONE.with(OpKind::Write).with(OpKind::WriteFua);

    /// `kind` alone.
    #[must_use]
    pub const fn only(kind: OpKind) -> Self {
        Self::NONE.with(kind)
    }

    /// This set and `kind`.
    #[must_use]
    pub const fn with(self, kind: OpKind) -> Self {
        Self(self.0 | 1 << kind as u8)
    }

    /// Whether `kind` is in the set.
    #[must_use]
    pub const fn has(self, kind: OpKind) -> bool {
        self.0 & 1 << kind as u8 != 0
    }

    /// The operations in the set.
    pub fn iter(self) -> impl Iterator<Item = OpKind> {
        OpKind::ALL.into_iter().filter(move |kind| self.has(*kind))
    }
}

impl Effect {
    /// Whether it is for whoever serves requests and not for the backend.
    #[must_use]
    pub const fn is_timing(self) -> bool {
        matches!(self, Self::Short | Self::Delay(_) | Self::Hold)
    }

    /// Whether it shows itself; what is not loud corrupts in silence.
    #[must_use]
    pub const fn is_loud(self) -> bool {
        self.is_timing() || matches!(self, Self::Error { .. } | Self::Panic)
    }

    /// Whether it can happen to an operation.
    #[must_use]
    pub const fn suits(self, kind: OpKind) -> bool {
        match self {
            Self::Error { .. } | Self::Delay(_) | Self::Hold | Self::Panic => true,
            Self::Short | Self::Flipped => matches!(kind, OpKind::Read | OpKind::Write | OpKind::WriteFua),
            Self::Lost => !matches!(kind, OpKind::Read),
            Self::Torn => kind.changes(),
            Self::Misdirected => !matches!(kind, OpKind::Flush),
            Self::Stale => matches!(kind, OpKind::Read),
        }
    }

    /// The errno that the application sees, if it sees one: a backend that panics is a request that fails with `EIO`.
    #[must_use]
    pub const fn errno(self) -> Option<Errno> {
        match self {
            Self::Error { errno, .. } => Some(errno),
            Self::Panic => Some(Errno::EIO),
            _ => None,
        }
    }
}
