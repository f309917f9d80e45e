//! Calls to a disk that fail, because a plan says so.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::fault::{Errno, Faults, Stage};
use crate::plan::OpKind;
use crate::range::SectorRange;
use crate::sector::SECTOR;
use crate::seed::SeededRng;

/// Who is told of each call that fails: what it was, with which error, and how much of it was done.
pub(crate) type Tell = Arc<dyn Fn(OpKind, SectorRange, Errno, Stage) + Send + Sync>;

/// Which calls of a handle fail.
#[derive(Clone)]
pub(crate) struct Failing {
    /// The errors among its effects; the others are nothing to a disk.
    pub(crate) faults: Faults,
    /// None fails as long as this is not set.
    pub(crate) armed: Arc<AtomicBool>,
    pub(crate) tell: Tell,
}

/// What becomes of a call that fails.
pub(super) struct Failed {
    pub(super) error: io::Error,
    /// How much of it is done nevertheless, in bytes; `None` for nothing. All of a flush of everything has no bytes.
    pub(super) done: Option<u64>,
}

impl Failing {
    /// What becomes of a call, if it fails. What is done in part ends between units of `unit` bytes.
    pub(super) fn next(&self, kind: OpKind, offset: u64, len: u64, unit: u64) -> Option<Failed> {
        if !self.armed.load(Ordering::Relaxed) {
            return None;
        }
        let sector = SECTOR as u64;
        let (first, end) = (offset / sector, (offset + len).div_ceil(sector));
        let range = if kind == OpKind::Flush { SectorRange::default() } else { SectorRange::new(first, end - first) };
        let (errno, stage, mut rng) = self.faults.error_below(kind, range)?;
        (self.tell)(kind, range, errno, stage);
        let done = match stage {
            Stage::Before => None,
            Stage::Partway => part(&mut rng, offset, len, unit),
            Stage::After => Some(len),
        };
        Some(Failed { error: io::Error::from_raw_os_error(errno.number()), done })
    }
}

/// A drawn number of the first bytes, not all of them. What cannot be done in part is done or not.
fn part(rng: &mut SeededRng, offset: u64, len: u64, unit: u64) -> Option<u64> {
    if len == 0 {
        return rng.chance(1, 2).then_some(0);
    }
    let end = (offset + rng.below(len)) / unit * unit;
    end.checked_sub(offset).filter(|done| *done > 0)
}

impl fmt::Debug for Failing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Failing").field("faults", &self.faults).finish_non_exhaustive()
    }
}
