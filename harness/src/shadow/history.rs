//! The last operations of one region, in a ring of fixed size.

use super::state::State;
use crate::mismatch::PastOp;
use crate::outcome::Outcome;
use crate::plan::OpKind;
use crate::range::SectorRange;
use crate::ring::Ring;
use crate::sector::previous_generation;

/// How many operations on a wrong sector are told.
const TOLD: usize = 16;

/// The last operations, oldest overwritten first.
#[derive(Debug)]
pub(super) struct History {
    ring: Ring<Entry>,
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
        Self { ring: Ring::new((sectors / 64).clamp(64, 16_384) as usize) }
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

    /// The last operations on `sector`, whose state is now `state`, oldest first.
    ///
    /// The ring keeps no generations. But each write that ended gave the sector the next one, so that counting back from
    /// the newest names them all.
    pub(super) fn of_sector(&self, worker: u32, sector: u64, state: State) -> Vec<PastOp> {
        let mut newest_left = state.newest();
        let mut told = Vec::new();
        for entry in self.ring.newest_first().filter(|entry| entry.range.contains(sector)) {
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
        self.ring.memory_bytes()
    }
}
