//! The bugs of a server on the raw level: what each of them does at the moment when it errs.
//!
//! The driver refuses what is wrong by itself: a second commit of a tag that is the driver's gets `EBUSY`, and the data of a
//! request that is not there `EINVAL`. What it cannot know is which request a server means.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::Ordering;

use ublkit::sys::ublk::user_copy_offset;
use ublkit::{Io, Operation, SECTOR_SIZE, WriteFlags};
use ublkit_harness::Mutant;
use ublkit_harness::mutant::Turn;

use super::super::bridge::kind_of;

/// How many turns of its queue a deferred write waits for its buffer to be used again.
const WAITS: u32 = 64;

/// A write that was committed and not done.
pub(super) struct Deferred {
    pub(super) offset: u64,
    pub(super) data: Vec<u8>,
    pub(super) flags: WriteFlags,
    turns_left: u32,
}

/// The bug of a queue, if it has one.
pub(super) struct Bug {
    turn: Option<Turn>,
    /// Results that are committed once more, by tag.
    doubled: BTreeMap<u16, i32>,
    deferred: BTreeMap<u16, Deferred>,
    /// It is to take another queue's data once there are any.
    owed: Cell<bool>,
}

impl Bug {
    pub(super) fn new(turn: Option<Turn>) -> Self {
        Self { turn, doubled: BTreeMap::new(), deferred: BTreeMap::new(), owed: Cell::new(false) }
    }

    /// Its turns, if it is this bug.
    fn is(&self, mutant: Mutant) -> Option<&Turn> {
        self.turn.as_ref().filter(|turn| turn.planted().mutant == mutant)
    }

    /// As [`is`](Self::is), when its turn comes.
    fn comes(&self, mutant: Mutant) -> Option<&Turn> {
        self.is(mutant).filter(|turn| turn.comes().is_some())
    }

    /// Whether a tag is handed to the driver at the beginning: all are, but for one.
    pub(super) fn fetches(&self, queue: u16, tag: u16) -> bool {
        let missing = self.is(Mutant::FetchMissing).filter(|_| (queue, tag) == (0, 0));
        missing.inspect(|turn| turn.hit()).is_none()
    }

    /// Whether a request is never committed, for the server is to stop.
    pub(super) fn drops(&self) -> bool {
        let stops = self.is(Mutant::StopWithInflight).filter(|turn| turn.plot().stopping.load(Ordering::Relaxed));
        stops.inspect(|turn| turn.hit()).is_some()
    }

    /// The result of a request that fails for no reason: its errno, without the sign.
    pub(super) fn fails(&self, io: &Io) -> Option<i32> {
        let turn = self.comes(Mutant::ErrnoSign)?;
        turn.hit();
        turn.error(kind_of(io), io.offset(), io.len()).raw_os_error()
    }

    /// The result of an earlier request, which is committed a second time, for this one. Not for one that is shorter: that is
    /// what the driver sees, and it warns of it.
    pub(super) fn committed_again(&mut self, io: &Io) -> Option<i32> {
        let earlier = *self.doubled.get(&io.tag()).filter(|earlier| i64::from(**earlier) <= io.len() as i64)?;
        self.doubled.remove(&io.tag());
        self.turn.iter().for_each(Turn::hit);
        Some(earlier)
    }

    /// What is committed where `result` should be.
    pub(super) fn result(&mut self, io: &Io, result: i32) -> i32 {
        let moves = matches!(io.operation(), Operation::Read | Operation::Write);
        if let Some(turn) = self.is(Mutant::ErrnoSign).filter(|_| result < 0) {
            turn.hit();
            return result.saturating_neg();
        }
        if moves
            && result > 0
            && let Some(turn) = self.is(Mutant::WrongResultLen)
            && let Some(mut rng) = turn.comes()
        {
            turn.hit();
            let status = io.operation() == Operation::Read && rng.chance(1, 2);
            return if status { 0 } else { result / SECTOR_SIZE as i32 };
        }
        if self.comes(Mutant::DoubleCommit).is_some() {
            self.doubled.insert(io.tag(), result);
        }
        result
    }

    /// Whether a write is committed now and done later.
    pub(super) fn defers(&mut self, io: &Io, data: &[u8]) -> bool {
        let defers = self.comes(Mutant::BufferReuse).is_some();
        if defers {
            // From now on it can be seen: the write is late, and may have other data.
            self.turn.iter().for_each(Turn::hit);
            let (offset, data, flags) = (io.offset(), data.to_vec(), io.write_flags());
            self.deferred.insert(io.tag(), Deferred { offset, data, flags, turns_left: WAITS });
        }
        defers
    }

    /// The deferred write of this tag, whose buffer now holds the data of another one.
    pub(super) fn meets_deferred(&mut self, tag: u16, buffer: &[u8]) -> Option<Deferred> {
        let mut deferred = self.deferred.remove(&tag)?;
        let common = buffer.len().min(deferred.data.len());
        deferred.data[..common].copy_from_slice(&buffer[..common]);
        Some(deferred)
    }

    /// A turn of the queue is over: the deferred writes that have waited in vain. They are late, and right.
    pub(super) fn due(&mut self) -> Vec<Deferred> {
        for deferred in self.deferred.values_mut() {
            deferred.turns_left = deferred.turns_left.saturating_sub(1);
        }
        let due = |deferred: &Deferred| deferred.turns_left == 0;
        let due: Vec<_> = self.deferred.iter().filter(|(_, deferred)| due(deferred)).map(|(tag, _)| *tag).collect();
        due.into_iter().filter_map(|tag| self.deferred.remove(&tag)).collect()
    }

    pub(super) fn all_deferred(&mut self) -> Vec<Deferred> {
        std::mem::take(&mut self.deferred).into_values().collect()
    }

    /// Whether a request that has several segments is moved as if they lay side by side.
    pub(super) fn takes_to_be_contiguous(&self) -> bool {
        self.comes(Mutant::SglContiguity).inspect(|turn| turn.hit()).is_some()
    }

    /// Where another queue's request has its data, whose are taken for this one's.
    pub(super) fn other_queue(&self, io: &Io, at: usize) -> Option<u64> {
        let turn = self.is(Mutant::UserCopyOffset).filter(|_| at == 0)?;
        let other = io.queue().checked_sub(1)?;
        let now = turn.comes().is_some() || self.owed.get();
        self.owed.set(now);
        now.then(|| user_copy_offset(other, io.tag(), 0))
    }

    /// How many bytes were moved to or from the wrong request. None where the driver knows of no such request there: then the
    /// right one is asked for, and the wrong one another time.
    pub(super) fn taken(&self, moved: io::Result<usize>) -> usize {
        let moved = moved.unwrap_or(0);
        if moved > 0 {
            self.owed.set(false);
            self.turn.iter().for_each(Turn::hit);
        }
        moved
    }
}

#[cfg(test)]
mod tests {
    use ublkit::sys::ublk::{IO_OP_FLUSH, IO_OP_READ, IO_OP_WRITE, IoDesc};
    use ublkit_harness::Seed;
    use ublkit_harness::mutant::{Planted, Plot};

    use super::*;

    fn bug(mutant: Mutant) -> (Bug, Plot) {
        let plot = Plot::new(Seed::new(1));
        (Bug::new(Some(Turn::new(Planted { mutant, every: 1 }, &plot))), plot)
    }

    fn io(queue: u16, op_flags: u32, nr_sectors: u32) -> Io {
        Io::new(queue, 3, IoDesc { op_flags, nr_sectors, start_sector: 8, addr: 0 })
    }

    #[test]
    fn without_a_bug_nothing_is_wrong() {
        let mut right = Bug::new(None);
        assert!(right.fetches(0, 0) && !right.drops() && right.fails(&io(0, IO_OP_WRITE, 8)).is_none());
        assert_eq!(right.result(&io(0, IO_OP_READ, 8), 4096), 4096);
        assert_eq!(right.result(&io(0, IO_OP_READ, 8), -5), -5);
        assert!(
            right.committed_again(&io(0, IO_OP_WRITE, 8)).is_none() && !right.defers(&io(0, IO_OP_WRITE, 8), &[])
        );
        assert!(!right.takes_to_be_contiguous() && right.other_queue(&io(1, IO_OP_READ, 8), 0).is_none());
    }

    #[test]
    fn results_are_wrong_in_length_or_in_sign() {
        let (mut bug, plot) = self::bug(Mutant::WrongResultLen);
        assert_eq!(bug.result(&io(0, IO_OP_WRITE, 8), 4096), 8);
        assert_eq!(bug.result(&io(0, IO_OP_FLUSH, 0), 0), 0);
        assert_eq!(plot.hits.count(), 1);
        let (mut bug, plot) = self::bug(Mutant::ErrnoSign);
        assert_eq!((bug.fails(&io(0, IO_OP_FLUSH, 0)), bug.result(&io(0, IO_OP_READ, 8), -28)), (Some(5), 28));
        assert_eq!(plot.hits.count(), 2);
    }

    #[test]
    fn a_result_is_committed_for_the_next_request_once() {
        let (mut bug, plot) = self::bug(Mutant::DoubleCommit);
        assert_eq!(bug.result(&io(0, IO_OP_READ, 8), 4096), 4096);
        let next = io(0, IO_OP_WRITE, 16);
        assert_eq!((bug.committed_again(&next), bug.committed_again(&next)), (Some(4096), None));
        assert_eq!(bug.result(&io(0, IO_OP_READ, 8), 4096), 4096);
        assert_eq!(bug.committed_again(&io(0, IO_OP_READ, 7)), None, "the driver would see that");
        assert_eq!(bug.committed_again(&io(0, IO_OP_READ, 8)), Some(4096));
        assert_eq!(plot.hits.count(), 2);
    }

    #[test]
    fn a_deferred_write_has_what_its_buffer_holds_or_is_late() {
        let (mut bug, plot) = self::bug(Mutant::BufferReuse);
        assert!(bug.meets_deferred(3, &[1]).is_none() && bug.defers(&io(0, IO_OP_WRITE, 8), &[7; 4]));
        let met = bug.meets_deferred(3, &[9; 2]).expect("it was deferred");
        assert_eq!((met.offset, met.data), (4096, vec![9, 9, 7, 7]));
        assert!(bug.defers(&io(0, IO_OP_WRITE, 8), &[7; 4]));
        let due: Vec<_> = (0..WAITS).flat_map(|_| bug.due()).map(|deferred| deferred.data).collect();
        assert_eq!((due, plot.hits.count()), (vec![vec![7; 4]], 2));
    }

    #[test]
    fn another_queues_data_are_asked_for_until_there_are_any() {
        let (bug, plot) = self::bug(Mutant::UserCopyOffset);
        assert!(
            bug.other_queue(&io(0, IO_OP_READ, 8), 0).is_none()
                && bug.other_queue(&io(1, IO_OP_READ, 8), 8).is_none()
        );
        assert_eq!(bug.other_queue(&io(1, IO_OP_READ, 8), 0), Some(user_copy_offset(0, 3, 0)));
        assert_eq!(bug.taken(Err(io::ErrorKind::InvalidInput.into())), 0);
        assert!(bug.owed.get() && plot.hits.count() == 0);
        assert_eq!(bug.taken(Ok(512)), 512);
        assert!(!bug.owed.get() && plot.hits.count() == 1);
    }
}
