//! The last operations of one region, in a ring of fixed size.

use super::state::State;
use crate::mismatch::PastOp;
use crate::outcome::Outcome;
use crate::plan::OpKind;
use crate::range::SectorRange;
use crate::sector::previous_generation;

/// How many operations on a wrong sector are told.
const TOLD: usize = 16;

/// The last operations, oldest overwritten first.
#[derive(Debug)]
pub(super) struct History {
    ring: Vec<Entry>,
    capacity: usize,
    /// How many operations were ever remembered.
    count: u64,
}

/// An operation, and where its outcome is noted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    /// The index in the plan; [`Entry::PASS`] for a pass over the region.
    pub(super) op: u64,
    pub(super) range: SectorRange,
    pub(super) kind: OpKind,
    pub(super) outcome: Option<Outcome>,
}

impl Entry {
    pub(super) const PASS: u64 = u64::MAX;
}

impl History {
    /// A ring in proportion to the region: an eighth of what the generations take, and at least a few.
    pub(super) fn for_region(sectors: u64) -> Self {
        let capacity = (sectors / 64).clamp(64, 16_384) as usize;
        Self { ring: Vec::with_capacity(capacity), capacity, count: 0 }
    }

    /// Remembers an operation; the number it returns is for [`finish`](Self::finish).
    #[inline]
    pub(super) fn remember(&mut self, entry: Entry) -> u64 {
        let number = self.count;
        self.count += 1;
        if self.ring.len() < self.capacity {
            self.ring.push(entry);
        } else {
            let slot = self.slot(number);
            self.ring[slot] = entry;
        }
        number
    }

    #[inline]
    pub(super) fn finish(&mut self, number: u64, outcome: Outcome) {
        let slot = self.slot(number);
        if self.count - number <= self.capacity as u64
            && let Some(entry) = self.ring.get_mut(slot)
        {
            entry.outcome = Some(outcome);
        }
    }

    /// The last operations on `sector`, whose state is now `state`, oldest first.
    ///
    /// The ring keeps no generations. But each write that ended gave the sector the next one, so that counting back from
    /// the newest names them all.
    pub(super) fn of_sector(&self, worker: u32, sector: u64, state: State) -> Vec<PastOp> {
        let oldest = self.count - self.ring.len() as u64;
        let mut newest_left = state.newest();
        let mut told = Vec::new();
        for number in (oldest..self.count).rev() {
            let entry = self.ring[self.slot(number)];
            if !entry.range.contains(sector) {
                continue;
            }
            let writes = matches!(entry.kind, OpKind::Write | OpKind::WriteFua);
            let generation = match entry.outcome {
                _ if !writes => None,
                None => Some(state.next()),
                Some(_) => {
                    let given = newest_left;
                    newest_left = previous_generation(given);
                    Some(given)
                }
            };
            told.push(PastOp {
                worker,
                op: (entry.op != Entry::PASS).then_some(entry.op),
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

    pub(super) fn memory_bytes(&self) -> usize {
        self.capacity * size_of::<Entry>()
    }

    fn slot(&self, number: u64) -> usize {
        (number % self.capacity as u64) as usize
    }
}
