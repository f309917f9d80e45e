//! What a power cut may leave behind.
//!
//! Each block gets a history of *changes*: writes, zeroes, discards. A change is in flight between its begin and its end.
//! One that failed has ended too, applied or not; one whose outcome is not known never ends. Change `a` is *ordered
//! before* `b` when `a` ended before `b` began.
//!
//! A change is *durable* when it was acknowledged, and
//!
//! * the device has no volatile cache, or
//! * it was a FUA write, which is acknowledged once it is on the medium, or
//! * a flush was submitted after the acknowledgement, and succeeded.
//!
//! The rules are those of the block layer, in `Documentation/block/writeback_cache_control.rst` of Linux: a flush makes
//! durable what was *completed before the flush was submitted*. What completes while the flush is under way is not
//! covered, and a flush that fails proves nothing: everything since the last good one stays as uncertain as it was.
//!
//! After a cut a block holds any one of its *survivors*: the changes that no durable change is ordered after, and what was
//! there at first if no change is durable. Unacknowledged changes are among them, since the medium may get them at
//! any time. So is a change that failed after a durable one, and a change whose outcome is not known, however long ago it
//! began: there is no end to order anything after. Blocks are independent of each other: of a write of two blocks, one may
//! survive.
//!
//! Then the survivors are what is there *at first*: exactly one of them is on the medium, and which one is known when it is
//! read ([`Durable::settle`]). Until then another cut leaves the same ones, and the next durable change ends them all.
//!
//! A block that has one content and nothing in flight costs 4 bytes, in segments that exist once they are touched. Any
//! other one has a slot, with at most 64 versions and those in flight. Of older versions only the range of generations is
//! kept, and each generation in it counts as a survivor: too many are allowed then, never too few. Slots are given back as
//! time goes on, a few with each operation, so that a flush itself costs nothing.

mod cell;
mod lump;
mod slot;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;

use self::cell::Cell;
use self::slot::Slot;
use crate::classify::Content;
use crate::outcome::Outcome;
use crate::sparse::Sparse;
use crate::stamp::Stamp;

/// How many slots each change of a block looks at, to give them back. Each change adds at most one to the queue.
const TIDIED: usize = 2;

/// What each block of a device may hold after a power cut.
///
/// A block is one logical block, the unit that a power cut does not tear; blocks are counted from 0.
///
/// ```
/// use ublkit_harness::{Content, Outcome, durable::Durable};
///
/// let mut durable = Durable::new(8, Content::Zero, true);
/// let first = |_| Content::Written(1);
/// durable.begin_change(0..2, first, 1);
/// durable.end_change(0..2, 1, 2, Outcome::Done, false);
/// assert_eq!(durable.survivors(0), [Content::Zero, Content::Written(1)]);
///
/// // A flush that was submitted at 3 came back without an error.
/// durable.flush_done(3);
/// assert_eq!(durable.survivors(0), [Content::Written(1)]);
/// ```
#[derive(Clone)]
pub struct Durable {
    table: Sparse<Cell>,
    initial: Content,
    volatile_cache: bool,
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Slots that a flush may have settled, and when it has to be submitted for that.
    queue: VecDeque<(u32, Stamp)>,
    /// When the last flush was submitted of those that succeeded; 0 if there was none.
    flushed: Stamp,
}

impl Durable {
    /// A device of so many blocks, all of them with `initial` on the medium; with a volatile write cache or without.
    ///
    /// Takes a byte per thousand blocks, and that only as a promise of the operating system.
    #[must_use]
    pub fn new(blocks: u64, initial: Content, volatile_cache: bool) -> Self {
        Self {
            table: Sparse::new(blocks),
            initial,
            volatile_cache,
            slots: Vec::new(),
            free: Vec::new(),
            queue: VecDeque::new(),
            flushed: 0,
        }
    }

    /// A write, zeroing or discard begins. From now on a cut may leave its content.
    ///
    /// `content_of` is asked for each block: [`Content::Written`] with a generation that the block is given but once,
    /// [`Content::Zero`], or [`Content::Unknown`] for a discard without a promise.
    pub fn begin_change(&mut self, blocks: Range<u64>, content_of: impl Fn(u64) -> Content, now: Stamp) {
        let now = inner(now);
        for block in blocks {
            let slot = self.slot_for(block);
            slot.begin(content_of(block), now);
        }
    }

    /// The change that began at `began` ended. `through`: it was to be durable when acknowledged (FUA).
    ///
    /// `blocks` are the same as when it began; their contents are remembered from then. A change that began before the
    /// last power cut is left out: whether it survived was decided by the cut.
    pub fn end_change(&mut self, blocks: Range<u64>, began: Stamp, now: Stamp, outcome: Outcome, through: bool) {
        let (began, now) = (inner(began), inner(now));
        let durable = through || !self.volatile_cache;
        for block in blocks {
            let Some(id) = self.table.get(block).slot() else { continue };
            let slot = &mut self.slots[id as usize];
            slot.refresh(self.flushed);
            // A change from before the last cut is not found: the cut forgot when its survivors began.
            let waits = slot.end(began, now, outcome, durable);
            if let Some(cell) = slot.settled() {
                self.give_back(id, cell);
            } else if waits && !slot.queued {
                slot.queued = true;
                self.queue.push_back((id, now));
            }
            self.tidy(TIDIED);
        }
    }

    /// A flush that was submitted at `began` succeeded. Flushes that failed are not told.
    #[inline]
    pub fn flush_done(&mut self, began: Stamp) {
        self.flushed = self.flushed.max(inner(began));
    }

    /// What a power cut now may leave in the block: the oldest first, each content once.
    ///
    /// [`Content::Unknown`] among them means that anything may be there. It also stands for more than a thousand
    /// generations of a block that was overwritten that often without a flush; [`survives`](Self::survives) is exact to
    /// the range of generations then.
    #[must_use]
    pub fn survivors(&self, block: u64) -> Vec<Content> {
        let cell = self.table.get(block);
        match cell.slot() {
            Some(id) => self.slots[id as usize].contents(self.flushed),
            None => vec![cell.content().unwrap_or(self.initial)],
        }
    }

    /// Whether a power cut now may leave `seen` in the block.
    ///
    /// Bytes that are none of the block's contents are [`Content::Unknown`], which survives only where anything may.
    #[inline]
    #[must_use]
    pub fn survives(&self, block: u64, seen: Content) -> bool {
        let cell = self.table.get(block);
        match cell.slot() {
            Some(id) => self.slots[id as usize].allows(seen, self.flushed),
            None => shows(cell.content().unwrap_or(self.initial), seen),
        }
    }

    /// The power is cut at `now`: nothing that began earlier is in flight any more.
    ///
    /// Calls `each(block, survivors)`, in the order of the blocks, for each block that has more than one survivor, or that
    /// something in flight or of unknown outcome touched. The survivors are as in [`survivors`](Self::survivors).
    pub fn power_cut(&mut self, now: Stamp, mut each: impl FnMut(u64, &[Content])) {
        debug_assert!(inner(now) > self.flushed, "a flush that succeeded was submitted before");
        self.queue.clear();
        let mut live: Vec<(u64, u32)> = (0..)
            .zip(&mut self.slots)
            .filter_map(|(id, slot)| {
                slot.queued = false;
                (!slot.is_free()).then_some((slot.block, id))
            })
            .collect();
        live.sort_unstable();
        for (block, id) in live {
            let slot = &mut self.slots[id as usize];
            slot.refresh(self.flushed);
            if slot.settled().is_none() {
                each(block, &slot.contents(self.flushed));
            }
            slot.cut();
            if let Some(cell) = slot.settled() {
                self.give_back(id, cell);
            }
        }
    }

    /// After a power cut a read saw `seen`: of what the cut may have left, that is what it left.
    ///
    /// Where anything may be there, that stays so, because nothing is promised of the next read either. Where something
    /// was written since the cut that may look like `seen`, nothing is learnt. A content that cannot be there is taken
    /// as it is if nothing was written since, so that one fault is not reported twice.
    pub fn settle(&mut self, block: u64, seen: Content) {
        let cell = self.table.get(block);
        if let Some(id) = cell.slot() {
            let slot = &mut self.slots[id as usize];
            slot.refresh(self.flushed);
            slot.settle(seen);
            if let Some(cell) = slot.settled() {
                self.give_back(id, cell);
            }
        } else if !shows(cell.content().unwrap_or(self.initial), seen) {
            self.table.set(block, Cell::new(seen));
        }
    }

    /// Gives back what flushes have settled.
    ///
    /// Nothing depends on it, and the work was paid for by the changes.
    pub fn tidy_up(&mut self) {
        self.tidy(usize::MAX);
    }

    /// Blocks that may have more than one survivor, or that something in flight touches.
    #[must_use]
    pub fn busy_blocks(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// What it takes now, in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        let slots: usize = self.slots.iter().map(Slot::memory_bytes).sum();
        let spare = (self.slots.capacity() - self.slots.len()) * size_of::<Slot>();
        let lists = self.free.capacity() * size_of::<u32>() + self.queue.capacity() * size_of::<(u32, Stamp)>();
        self.table.memory_bytes() + slots + spare + lists
    }

    /// The slot of the block, which is given one if it has none.
    #[inline]
    fn slot_for(&mut self, block: u64) -> &mut Slot {
        let cell = self.table.get(block);
        let id = if let Some(id) = cell.slot() {
            id
        } else {
            let id = self.free.pop().unwrap_or(self.slots.len() as u32);
            if id as usize == self.slots.len() {
                self.slots.push(Slot::default());
            }
            self.slots[id as usize].occupy(block, cell.content().unwrap_or(self.initial), self.flushed);
            self.table.set(block, Cell::in_slot(id));
            id
        };
        let slot = &mut self.slots[id as usize];
        slot.refresh(self.flushed);
        slot
    }

    fn give_back(&mut self, id: u32, cell: Cell) {
        let slot = &mut self.slots[id as usize];
        self.table.set(slot.block, cell);
        slot.vacate();
        self.free.push(id);
    }

    /// Looks at no more than `most` slots that wait for a flush which has been.
    fn tidy(&mut self, most: usize) {
        for _ in 0..most {
            let Some(&(id, _)) = self.queue.front().filter(|(_, ended)| *ended < self.flushed) else { return };
            self.queue.pop_front();
            let slot = &mut self.slots[id as usize];
            slot.queued = false;
            if slot.is_free() {
                continue;
            }
            slot.refresh(self.flushed);
            if let Some(cell) = slot.settled() {
                self.give_back(id, cell);
            } else if let Some(ended) = slot.awaits_flush() {
                // It ended after the flush began, so after what the slot was in the queue for: one more change, one more look.
                slot.queued = true;
                self.queue.push_back((id, ended));
            }
        }
    }
}

impl fmt::Debug for Durable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Durable")
            .field("blocks", &self.table.len())
            .field("busy_blocks", &self.busy_blocks())
            .field("volatile_cache", &self.volatile_cache)
            .finish_non_exhaustive()
    }
}

/// Whether a block that holds `content` may look like `seen`.
#[inline]
fn shows(content: Content, seen: Content) -> bool {
    content == Content::Unknown || content == seen
}

/// Stamps as they are kept: 0 is before everything.
#[inline]
const fn inner(stamp: Stamp) -> Stamp {
    stamp + 1
}
