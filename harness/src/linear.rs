//! Linearizability of overlapping, concurrent operations, per block, streaming.
//!
//! A block is a register: what is read from it must be explained by an order of all operations in which each takes
//! effect at one moment between its begin and its end, and each read returns what was written last. Blocks are judged
//! one by one: a history is linearizable when each of its registers is (Herlihy & Wing, "Linearizability: a correctness
//! condition for concurrent objects", ACM TOPLAS 1990).
//!
//! # The rule
//! Each write of a block has a content of its own, so that what a read saw names its write. A write and the reads that
//! saw it are a *cluster* `v`; let `f(v)` be the first end in it and `s(v)` the last begin. Then `v` was there no later
//! than `f(v)` and no earlier than `s(v)`; where `f(v) < s(v)` it was there all the time between. A history is
//! linearizable exactly when no read ends before its write begins, and there are no two clusters `u` and `v` with
//! `f(u) < s(v)` and `f(v) < s(u)`, each there before the other (Gibbons & Korach, "Testing shared memories", SIAM J.
//! Comput. 26, 1997; in terms of zones: Golab, Li & Shah, "Analyzing consistency properties for fun and profit", PODC
//! 2011).
//!
//! Here it is applied event by event. With each cluster stands `until(v)`, the least `f(u)` of the clusters with `f(v) <
//! s(u)`: a read of `v` is wrong exactly when it, or an earlier one of the cluster, began after that. `until` only falls,
//! so a cluster whose `until` is before the begin of everything in flight is done with. A block with one cluster left
//! and nothing in flight is *quiet* and takes four bytes.
//!
//! # What has no content of its own
//! * Zeroes, from several sources. A read of zeroes that has several explanations that make a difference is followed in
//!   as many *worlds*; a world in which something is wrong is dropped, and so is one that permits nothing another does
//!   not. When the last is gone, the read is wrong. The worlds of a block are bounded: a read beyond the
//!   bound must still have an explanation in one of them, but nothing follows from it. [`Linear::loose_reads`] counts
//!   those, for whoever asks what a pass is worth.
//! * Unknown content explains everything that is read from it, and is followed in the same way.
//! * A failed change may have taken effect, until its end; one of unknown fate may at any time from its begin on. What
//!   never was seen is held against nothing.
//!
//! # What is not sharp
//! While an operation stays in flight for long, what is overwritten meanwhile could still be seen by a read as old. Of
//! such values a block remembers 64 one by one. What is more becomes one vague value that explains every generation
//! between the oldest and the newest of them, for as long as the last of them could be seen; nothing that is right is
//! ever called wrong. [`Linear::blurred`] counts them.

mod block;
mod entry;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use self::block::{Block, Judged, Sweep, Unexplained, VALUES_MAX, Zone};
use self::entry::Entry;
use crate::classify::Content;
use crate::outcome::Outcome;
use crate::sector::is_newer;
use crate::sparse::Sparse;
use crate::stamp::Stamp;

/// Judges reads by the order of operations, block by block.
///
/// Blocks are numbered from 0. Events are told in the order of their stamps: a change when it begins and when it ends, a
/// read when it ends.
///
/// # Panics
/// Every method does when a block is not below the number of blocks there are.
#[derive(Clone, Debug)]
pub struct Linear {
    initial: Content,
    table: Sparse<Entry>,
    blocks: Vec<Block>,
    /// Which of `blocks` are not in use.
    free: Vec<u32>,
    /// Which are to be swept once the horizon is past a stamp, in the order of stamps.
    queue: VecDeque<(Stamp, u32)>,
    /// The begin of the oldest operation in flight, plus one.
    horizon: Stamp,
    /// The stamp of the last event, plus one.
    latest: Stamp,
    blurred: u64,
    loose_reads: u64,
    /// How many values of a block are remembered one by one.
    values_max: usize,
    spare: Vec<Zone>,
}

/// A read that no order of operations explains.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disorder {
    /// The block.
    pub block: u64,
    /// What was seen.
    pub seen: Content,
    /// What is wrong with it.
    pub kind: DisorderKind,
    /// What it could have been. [`Content::Unknown`] is anything.
    pub candidates: Vec<Content>,
}

/// What is wrong with a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DisorderKind {
    /// It was overwritten before the read began, or before an earlier read that showed so.
    Stale,
    /// It is from a write that had not begun when the read ended.
    Future,
    /// It is none of what was ever there.
    Foreign,
}

impl fmt::Display for DisorderKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Stale => "stale",
            Self::Future => "future",
            Self::Foreign => "foreign",
        })
    }
}

impl fmt::Display for Disorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "block {}: {}: found {}, expected", self.block, self.kind, self.seen)?;
        for (at, content) in self.candidates.iter().enumerate() {
            let or = if at == 0 { "" } else { " or" };
            write!(f, "{or} {content}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Disorder {}

impl Linear {
    /// A device of `blocks` blocks, each of which holds `initial`: zeroes, or anything.
    #[must_use]
    pub fn new(blocks: u64, initial: Content) -> Self {
        Self {
            initial,
            table: Sparse::new(blocks),
            blocks: Vec::new(),
            free: Vec::new(),
            queue: VecDeque::new(),
            horizon: 0,
            latest: 0,
            blurred: 0,
            loose_reads: 0,
            values_max: VALUES_MAX,
            spare: Vec::new(),
        }
    }

    /// A write, a write of zeroes or a discard of `blocks` begins.
    ///
    /// `content_of` a block is what it is to hold: a generation one above the newest of the block, zeroes, or
    /// [`Content::Unknown`] for a discard that promises nothing.
    pub fn begin_change(&mut self, blocks: Range<u64>, content_of: impl Fn(u64) -> Content, now: Stamp) {
        self.check_range(&blocks);
        self.latest = now + 1;
        for number in blocks {
            let entry = self.table.get(number);
            let slot = entry.slot().unwrap_or_else(|| {
                let content = entry.content(self.initial);
                self.start(number, entry, &[content])
            });
            self.blocks[slot].begin(content_of(number), now + 1);
        }
    }

    /// The change of `blocks` that began at `began` ends; `content_of` is as when it began.
    ///
    /// [`Outcome::Unknown`] is the end of it as an operation: it is not in flight any more and will not be named again.
    ///
    /// # Panics
    /// When no change of one of `blocks` that began then is in flight.
    pub fn end_change(
        &mut self,
        blocks: Range<u64>,
        content_of: impl Fn(u64) -> Content,
        began: Stamp,
        now: Stamp,
        outcome: Outcome,
    ) {
        self.check_range(&blocks);
        self.latest = now + 1;
        for number in blocks {
            let slot = self.table.get(number).slot().expect("a change that ends is in flight");
            let block = &mut self.blocks[slot];
            self.blurred += block.end(content_of(number), began + 1, now + 1, outcome, self.values_max);
            if !block.queued {
                block.queued = true;
                self.queue.push_back((now + 1, slot as u32));
            }
        }
    }

    /// What began at `began` and is in flight may take effect a second time, from `now` on: its server died, and it is given
    /// to the next one again. What was written over it meanwhile may be gone then, and come back no more.
    ///
    /// # Panics
    /// When nothing that began then is in flight.
    pub fn repeat(&mut self, blocks: Range<u64>, content_of: impl Fn(u64) -> Content, began: Stamp, now: Stamp) {
        self.latest = now + 1;
        for number in blocks {
            let slot = self.table.get(number).slot().expect("a change that happens again is in flight");
            self.blocks[slot].repeat(content_of(number), began + 1, now + 1);
        }
    }

    /// The only content that any read of `block` may return now, if there is but one and nothing in flight touches the
    /// block.
    ///
    /// A read that sees just that needs no further judgement.
    #[inline]
    #[must_use]
    pub fn settled(&self, block: u64) -> Option<Content> {
        let entry = self.table.get(block);
        if entry.slot().is_some() { None } else { Some(entry.content(self.initial)) }
    }

    /// What a read of `block` that began at `began` and ends now may return; [`Content::Unknown`] is anything.
    ///
    /// Vague values (see [`blurred`](Self::blurred)) are listed as [`Content::Unknown`].
    #[must_use]
    pub fn candidates(&self, block: u64, began: Stamp) -> Vec<Content> {
        let entry = self.table.get(block);
        match entry.slot() {
            Some(slot) => self.blocks[slot].candidates(began + 1),
            None => vec![entry.content(self.initial)],
        }
    }

    /// A read of `block` that began at `began` and ends at `now` saw `seen`.
    ///
    /// `seen` is the generation that the bytes decode to, whether it is a candidate or not, and [`Content::Unknown`]
    /// when they are no generation of this block and not zeroes.
    ///
    /// # Errors
    /// When no order of operations explains it. It is then as if the read had not been.
    #[inline]
    pub fn read(&mut self, block: u64, seen: Content, began: Stamp, now: Stamp) -> Result<(), Disorder> {
        self.latest = now + 1;
        let entry = self.table.get(block);
        let result = if let Some(slot) = entry.slot() {
            let busy = &mut self.blocks[slot];
            if !busy.queued {
                busy.queued = true;
                self.queue.push_back((now + 1, slot as u32));
            }
            busy.read(seen, (began + 1, now + 1), self.horizon, &mut self.spare)
        } else {
            let content = entry.content(self.initial);
            if content == seen || content == Content::Unknown { Ok(Judged::Fully) } else { Err(Unexplained) }
        };
        let judged = result.map_err(|Unexplained| self.disorder(block, seen, began))?;
        self.loose_reads += u64::from(judged == Judged::Loosely);
        Ok(())
    }

    /// Every operation that began before `oldest` has ended. What cannot matter any more is dropped.
    ///
    /// `oldest` is the begin of the oldest operation in flight, reads included, or the next stamp when there is none. The
    /// work is amortised: constant for each block of each event.
    #[inline]
    pub fn horizon(&mut self, oldest: Stamp) {
        if oldest < self.horizon {
            return;
        }
        self.horizon = oldest + 1;
        // What is queued anew on the way waits for what is to come.
        for _ in 0..self.queue.len() {
            match self.queue.front() {
                Some((stamp, slot)) if *stamp < self.horizon => {
                    let slot = *slot as usize;
                    self.queue.pop_front();
                    self.sweep(slot);
                }
                _ => return,
            }
        }
    }

    /// The power was cut: from `now` on `block` holds exactly one of `candidates`, which the first read shows, and
    /// nothing that began earlier is in flight any more.
    ///
    /// # Panics
    /// When there are no candidates.
    pub fn reset(&mut self, block: u64, candidates: &[Content], now: Stamp) {
        assert!(!candidates.is_empty(), "a block holds something");
        self.latest = now + 1;
        let entry = self.table.get(block);
        let (mut newest, mut zeroed) = (entry.newest(), entry.zeroed());
        if let Some(slot) = entry.slot() {
            (newest, zeroed) = (self.blocks[slot].newest, self.blocks[slot].zeroed);
            self.stop(slot);
        }
        let mut contents = Vec::with_capacity(candidates.len());
        for content in candidates {
            if let Content::Written(generation) = *content
                && is_newer(generation, newest)
            {
                newest = generation;
            }
            if !contents.contains(content) {
                contents.push(*content);
            }
        }
        zeroed |= contents.contains(&Content::Zero);
        let quiet = if let [content] = contents[..] { Entry::quiet(content, newest, zeroed) } else { None };
        if let Some(entry) = quiet {
            self.table.set(block, entry);
        } else {
            let slot = self.start(block, Entry::UNTOUCHED, &contents);
            (self.blocks[slot].newest, self.blocks[slot].zeroed) = (newest, zeroed);
        }
    }

    /// How many blocks may hold one of several contents, or were so lately, or are being changed.
    #[must_use]
    pub fn busy_blocks(&self) -> usize {
        self.blocks.len() - self.free.len()
    }

    /// How many reads had more explanations than could be followed: they had to have one, and proved nothing more.
    #[must_use]
    pub const fn loose_reads(&self) -> u64 {
        self.loose_reads
    }

    /// How many values were too many to be remembered one by one.
    #[must_use]
    pub const fn blurred(&self) -> u64 {
        self.blurred
    }

    /// The memory it takes, in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        size_of::<Self>()
            + self.table.memory_bytes()
            + self.blocks.capacity() * size_of::<Block>()
            + self.blocks.iter().map(Block::memory_bytes).sum::<usize>()
            + self.free.capacity() * size_of::<u32>()
            + self.queue.capacity() * size_of::<(Stamp, u32)>()
            + self.spare.capacity() * size_of::<Zone>()
    }

    #[inline]
    fn check_range(&self, blocks: &Range<u64>) {
        let there = self.table.len();
        assert!(blocks.end <= there, "blocks {blocks:?} are on the device, which has {there}");
    }

    /// Makes `number` a busy block that holds one of `contents`.
    #[inline]
    fn start(&mut self, number: u64, entry: Entry, contents: &[Content]) -> usize {
        let slot = self.free.pop().map_or(self.blocks.len(), |slot| slot as usize);
        if slot == self.blocks.len() {
            self.blocks.push(Block::default());
        }
        self.blocks[slot].start(number, entry.newest(), entry.zeroed(), contents);
        self.table.set(number, Entry::busy(slot));
        slot
    }

    #[inline]
    fn stop(&mut self, slot: usize) {
        self.blocks[slot].stop();
        self.free.push(slot as u32);
    }

    #[inline]
    fn sweep(&mut self, slot: usize) {
        let block = &mut self.blocks[slot];
        // A block that was reset leaves its place in the queue behind.
        if block.is_stopped() {
            return;
        }
        block.queued = false;
        match block.sweep(self.horizon) {
            Sweep::Rest => {}
            Sweep::Again => {
                block.queued = true;
                self.queue.push_back((self.latest, slot as u32));
            }
            Sweep::Quiet(content) => {
                if let Some(entry) = Entry::quiet(content, block.newest, block.zeroed) {
                    self.table.set(block.number, entry);
                    self.stop(slot);
                }
            }
        }
    }

    #[cold]
    fn disorder(&self, block: u64, seen: Content, began: Stamp) -> Disorder {
        let entry = self.table.get(block);
        let (newest, zeroed) = entry.slot().map_or((entry.newest(), entry.zeroed()), |slot| {
            let busy = &self.blocks[slot];
            (busy.newest, busy.zeroed)
        });
        let kind = match seen {
            Content::Written(generation) if is_newer(generation, newest) => DisorderKind::Future,
            Content::Written(_) => DisorderKind::Stale,
            Content::Zero if zeroed || self.initial == Content::Zero => DisorderKind::Stale,
            Content::Zero | Content::Unknown => DisorderKind::Foreign,
        };
        Disorder { block, seen, kind, candidates: self.candidates(block, began) }
    }
}
