//! The last operations, in a ring of fixed size.

use crate::classify::Content;
use crate::ledger::OpId;
use crate::mismatch::PastOp;
use crate::outcome::Outcome;
use crate::plan::OpKind;
use crate::range::SectorRange;
use crate::ring::Ring;
use crate::sector::{Generation, previous_generation};

/// How many operations on a wrong block are told.
const TOLD: usize = 16;

/// The last operations in the order in which they began, oldest overwritten first.
#[derive(Clone, Debug)]
pub(super) struct Recent {
    ring: Ring<Entry>,
    /// How many had been when the power was last cut.
    cut: Option<u64>,
}

/// An operation, and how it ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) op: OpId,
    pub(super) kind: OpKind,
    pub(super) range: SectorRange,
    /// None while it is in flight.
    pub(super) outcome: Option<Outcome>,
}

impl Recent {
    pub(super) fn for_blocks(blocks: u64) -> Self {
        Self { ring: Ring::new((blocks / 8).clamp(256, 16_384) as usize), cut: None }
    }

    /// Remembers an operation; the number it returns is for [`finish`](Self::finish).
    #[inline]
    pub(super) fn remember(&mut self, entry: Entry) -> u64 {
        self.ring.push(entry)
    }

    #[inline]
    pub(super) fn finish(&mut self, number: u64, outcome: Outcome) {
        if let Some(entry) = self.ring.get_mut(number) {
            entry.outcome = Some(outcome);
        }
    }

    /// The last operations on `sector`, whose newest generation is `newest`, oldest first.
    ///
    /// The ring keeps no generations. But each write gave the sector the next one when it began, so that counting back from
    /// the newest names them all.
    pub(super) fn of_sector(&self, sector: u64, newest: Generation) -> Vec<PastOp> {
        let mut left = newest;
        let mut told = Vec::new();
        for entry in self.ring.newest_first().filter(|entry| entry.range.contains(sector)) {
            let writes = matches!(entry.kind, OpKind::Write | OpKind::WriteFua);
            let generation = writes.then_some(left);
            if writes && left != 0 {
                left = previous_generation(left);
            }
            told.push(PastOp {
                worker: entry.op.worker,
                op: Some(entry.op.index),
                kind: entry.kind,
                range: entry.range,
                generation,
                outcome: entry.outcome,
            });
            if told.len() == TOLD {
                break;
            }
        }
        told.reverse();
        told
    }

    /// What the last acknowledged change of `sector` replaced, where the one before it was acknowledged too and nothing of
    /// unknown fate was between or beside them.
    pub(super) fn replaced(&self, sector: u64, newest: Generation) -> Option<Content> {
        let mut left = newest;
        let mut changes = 0;
        for entry in self.ring.newest_first().filter(|entry| entry.kind.changes() && entry.range.contains(sector)) {
            let writes = matches!(entry.kind, OpKind::Write | OpKind::WriteFua);
            if entry.outcome != Some(Outcome::Done) {
                return None;
            }
            changes += 1;
            if changes == 2 {
                return Some(if writes { Content::Written(left) } else { Content::Zero });
            }
            if writes && left != 0 {
                left = previous_generation(left);
            }
        }
        None
    }

    /// The power is cut.
    pub(super) fn cut(&mut self) {
        self.cut = Some(self.ring.count());
    }

    /// Whether nobody has changed `sector` since the power was cut, or read it, but for the last operation that ended.
    pub(super) fn is_unseen_since_cut(&self, sector: u64) -> bool {
        let Some(cut) = self.cut else { return false };
        let since = (self.ring.count() - cut) as usize;
        if since >= self.ring.capacity() {
            return false;
        }
        let since = self.ring.newest_first().take(since);
        let touching = since.filter(|entry| entry.range.contains(sector));
        let telling = touching.filter(|entry| entry.kind.changes() || entry.outcome == Some(Outcome::Done));
        // The read that asks is one of them.
        telling.count() <= 1
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.ring.memory_bytes()
    }
}
