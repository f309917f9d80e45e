//! Flushes: what is acknowledged as durable reached the storage, after the writes that it covers.
//!
//! On a device with a volatile cache, a flush that was in flight from `a` to `b` and was acknowledged needs a successful
//! FLUSH of the backend that lies between the two: everything acknowledged before `a` had ended in the backend by then, and
//! only a FLUSH that begins later covers it. A write that has to be durable needs, for each of its sectors, a durable write
//! of the backend between the two, or a plain one and then such a FLUSH.
//!
//! That what is acknowledged has ended in the backend is checked too: each sector of a write that was acknowledged was in
//! a call that began and ended while the write was in flight.
//!
//! Calls and operations are told in any order, and in different ones, as when they come from two processes; all stamps are
//! from one clock. [`horizon`](Flushes::horizon) has to be told how far all is told, and memory is bounded by what happens
//! between two horizons.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::errors::leads_to;
use crate::event::Finding;
use crate::ledger::OpId;
use crate::near::{Near, subtract};
use crate::oracle::Oracle;
use crate::plan::OpKind;
use crate::range::SectorRange;
use crate::stamp::Stamp;
use crate::vacuity::Evidence;

/// What was acknowledged against what the backend did.
#[derive(Debug)]
pub struct Flushes {
    volatile_cache: bool,
    /// Calls that write.
    writes: Near<Write>,
    /// When the cache was cleared: successful flushes, when they began and ended. Both rise: one that ended later and began earlier is of no use.
    cleared: BTreeMap<Stamp, Stamp>,
    /// What was acknowledged and is not known to be right yet, by when it was acknowledged.
    owed: BTreeMap<(Stamp, u64), Owed>,
    next: u64,
    /// Calls that began before may never be told.
    blind: Stamp,
    counts: FlushCounts,
}

/// What was checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlushCounts {
    /// Flushes of the backend that succeeded.
    pub calls: u64,
    /// Flushes that were acknowledged.
    pub flushes: u64,
    /// Durable writes that were acknowledged.
    pub durable_writes: u64,
    /// Other writes that were acknowledged, zeroes included.
    pub writes: u64,
}

/// A call that writes.
#[derive(Clone, Copy, Debug)]
struct Write {
    began: Stamp,
    ended: Stamp,
    ok: bool,
    kind: OpKind,
}

/// An operation that was acknowledged.
#[derive(Clone, Copy, Debug)]
struct Owed {
    id: OpId,
    kind: OpKind,
    range: SectorRange,
    began: Stamp,
    ended: Stamp,
}

/// What an operation that was acknowledged lacks.
enum Lack {
    /// A flush of the backend.
    Flush,
    /// Calls for these sectors.
    Calls(Vec<SectorRange>),
    /// For these sectors a durable write, or a flush after the write.
    Durable(Vec<SectorRange>),
}

impl Flushes {
    /// Nothing was acknowledged yet. Without a volatile cache what is acknowledged is durable, and flushes are not checked.
    #[must_use]
    pub fn new(volatile_cache: bool) -> Self {
        Self {
            volatile_cache,
            writes: Near::default(),
            cleared: BTreeMap::new(),
            owed: BTreeMap::new(),
            next: 0,
            blind: 0,
            counts: FlushCounts::default(),
        }
    }

    /// A call of the backend began at `began` and ended at `ended`, with success or not.
    pub fn call(&mut self, kind: OpKind, range: SectorRange, began: Stamp, ended: Stamp, ok: bool) {
        match kind {
            OpKind::Read | OpKind::Discard => {}
            OpKind::Flush => {
                if ok && self.volatile_cache {
                    self.counts.calls += 1;
                    self.flushed(began, ended);
                }
            }
            OpKind::Write | OpKind::WriteFua | OpKind::WriteZeroes => {
                self.writes.insert(range, began, Write { began, ended, ok, kind });
            }
        }
    }

    fn flushed(&mut self, began: Stamp, ended: Stamp) {
        if self.cleared.range(began..).next().is_some_and(|(_, other)| *other <= ended) {
            return;
        }
        while let Some((&other, _)) = self.cleared.range(..=began).next_back().filter(|(_, other)| **other >= ended) {
            self.cleared.remove(&other);
        }
        self.cleared.insert(began, ended);
    }

    /// Whether a flush of the backend lies between two stamps.
    fn flushed_between(&self, from: Stamp, to: Stamp) -> bool {
        self.cleared.range(from..).next().is_some_and(|(_, ended)| *ended <= to)
    }

    /// When the last flush of the backend began that ended by `to`.
    fn last_flush(&self, to: Stamp) -> Option<Stamp> {
        // The ends rise with the beginnings. Few are later than what is looked at.
        self.cleared.iter().rev().find(|(_, ended)| **ended <= to).map(|(began, _)| *began)
    }

    /// An operation that began at `began` was acknowledged at `ended`. Those that failed are not told.
    pub fn acknowledged(&mut self, id: OpId, kind: OpKind, range: SectorRange, began: Stamp, ended: Stamp) {
        let owed = Owed { id, kind, range, began, ended };
        match kind {
            OpKind::Read | OpKind::Discard => return,
            OpKind::Flush => self.counts.flushes += 1,
            OpKind::WriteFua => self.counts.durable_writes += 1,
            OpKind::Write | OpKind::WriteZeroes => self.counts.writes += 1,
        }
        if self.lack(&owed).is_some() {
            // Calls that it needs may be told later.
            self.next += 1;
            self.owed.insert((ended, self.next), owed);
        }
    }

    fn lack(&mut self, owed: &Owed) -> Option<Lack> {
        let Owed { kind, range, began, ended, .. } = *owed;
        if kind == OpKind::Flush {
            let right = !self.volatile_cache || self.flushed_between(began, ended);
            return (!right).then_some(Lack::Flush);
        }
        let last_flush = self.last_flush(ended);
        let (mut missing, mut volatile) = (vec![range], vec![range]);
        for (sectors, write) in self.writes.on(range) {
            if leads_to(kind, write.kind) && write.began >= began && write.ended <= ended {
                subtract(&mut missing, sectors);
                let flushed = last_flush.is_some_and(|flush| flush >= write.ended);
                if write.ok && (write.kind == OpKind::WriteFua || flushed) {
                    subtract(&mut volatile, sectors);
                }
            }
        }
        if !missing.is_empty() {
            return Some(Lack::Calls(missing));
        }
        let durable = kind != OpKind::WriteFua || !self.volatile_cache || volatile.is_empty();
        (!durable).then_some(Lack::Durable(volatile))
    }

    /// Calls that began before `now` may never be told, as when the process that would tell them was killed. Operations
    /// that began earlier are not judged.
    pub fn calls_lost(&mut self, now: Stamp) {
        self.blind = self.blind.max(now);
    }

    /// All operations and calls that began before `oldest` have ended and been told.
    ///
    /// # Errors
    /// The first broken promise among them; asked again, the next.
    pub fn horizon(&mut self, oldest: Stamp) -> Result<(), Finding> {
        while let Some(entry) = self.owed.first_entry() {
            if entry.key().0 >= oldest && oldest != Stamp::MAX {
                break;
            }
            let owed = entry.remove();
            if owed.began >= self.blind
                && let Some(lack) = self.lack(&owed)
            {
                return Err(self.finding(&owed, &lack));
            }
        }
        // What is owed still may need calls from when it began.
        let oldest = self.owed.values().map(|owed| owed.began).min().unwrap_or(oldest).min(oldest);
        while self.writes.pop_due(oldest).is_some() {}
        while let Some(flush) = self.cleared.first_entry() {
            if *flush.key() >= oldest {
                break;
            }
            flush.remove();
        }
        Ok(())
    }

    /// All operations and calls have ended and been told. What was checked, if no promise was broken.
    ///
    /// # Errors
    /// The first broken promise; asked again, the next.
    pub fn judge(&mut self) -> Result<FlushCounts, Finding> {
        self.horizon(Stamp::MAX)?;
        Ok(self.counts)
    }

    /// What was checked so far.
    #[must_use]
    pub const fn counts(&self) -> FlushCounts {
        self.counts
    }

    /// How many calls and operations are kept.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.writes.len() + self.cleared.len() + self.owed.len()
    }

    fn finding(&self, owed: &Owed, lack: &Lack) -> Finding {
        let Owed { id, kind, range, began, ended } = *owed;
        let list = |ranges: &[SectorRange]| ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        // An early commit is an answer that comes before its cause: a matter of order.
        let (oracle, what) = match lack {
            Lack::Flush => (Oracle::Flush, "a flush was acknowledged, and the backend was not flushed".to_owned()),
            Lack::Calls(sectors) => (
                Oracle::Linear,
                format!("{kind} {range} was acknowledged before the backend had finished {}", list(sectors)),
            ),
            Lack::Durable(sectors) => (
                Oracle::Flush,
                format!(
                    "{kind} {range} was acknowledged, and {} was neither written through nor flushed",
                    list(sectors)
                ),
            ),
        };
        let mut detail =
            vec![format!("operation {} of worker {}, in flight from {began} to {ended}", id.index, id.worker)];
        let near = self.cleared.iter().rev().filter(|(_, to)| **to >= began).take(4);
        detail.extend(near.map(|(from, to)| format!("the backend was flushed from {from} to {to}")));
        Finding { oracle: oracle.name().to_owned(), what, detail }
    }
}

impl FlushCounts {
    /// Adds the counts to `evidence`, as `flushes_checked` and so on.
    pub fn add_to(&self, evidence: &mut Evidence) {
        evidence.add("flush_calls", self.calls);
        evidence.add("flushes_checked", self.flushes);
        evidence.add("durable_writes_checked", self.durable_writes);
        evidence.add("writes_checked", self.writes);
    }
}
