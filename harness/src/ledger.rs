//! What each block may hold now, when operations overlap and run side by side.
//!
//! One ledger covers a device, or a part of it, for any number of workers. Each operation is announced before it is
//! submitted and ended once its end was seen: between the two it may have taken effect at any moment, block by block.
//! The ledger gives writes their payload, whose generations are unique within a block, and judges what reads return:
//!
//! * [`Linear`] says what order allows: what a read may return that began when it did;
//! * [`Durable`] says what a power cut may leave;
//! * bytes that neither explains are decoded and get a [`Class`].
//!
//! A block is one logical block of the device: the unit in which nothing is ever torn. All sectors of a block are written
//! together, so that they always have the same generation.
//!
//! For one worker that has its sectors to itself there is [`Shadow`](crate::Shadow), which does less and is faster.

mod recent;
mod report;
#[cfg(test)]
mod tests;

use std::collections::{HashSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use self::recent::{Entry, Recent};
use crate::classify::{Class, Content, Expected};
use crate::durable::Durable;
use crate::linear::Linear;
use crate::mismatch::Mismatch;
use crate::oracle::{Oracle, Oracles};
use crate::outcome::Outcome;
use crate::plan::OpKind;
use crate::range::SectorRange;
use crate::sector::{Generation, Pattern, SECTOR, TABLE_SECTORS, WORDS, is_newer, is_zero, next_generation};
use crate::shadow::{DiscardPromise, Verified};
use crate::sparse::Sparse;
use crate::stamp::Stamp;

/// What a ledger is for.
#[derive(Clone, Debug)]
pub struct LedgerOptions {
    /// The sectors it covers: whole blocks.
    pub region: SectorRange,
    /// Sectors in a logical block.
    pub block_sectors: u32,
    /// What this run writes to this device.
    pub pattern: Arc<Pattern>,
    /// What other devices and runs hold, for naming bytes that come from there.
    pub foreign: Arc<[Pattern]>,
    /// The size of the device, in sectors.
    pub device_sectors: u64,
    /// Whether the sectors are known to be zeroes before the first write; otherwise anything may be there.
    pub initially_zero: bool,
    /// What is promised of discarded sectors.
    pub discard: DiscardPromise,
    /// Whether what was acknowledged may be lost at a power cut until a flush.
    pub volatile_cache: bool,
    /// Whether a read may find a block torn while a write to it is under way, as through a page cache that copies without a
    /// lock. Such a block is not judged, but for its bytes all being from contents that it may have.
    pub torn_by_races: bool,
    /// Which oracles judge.
    pub oracles: Oracles,
}

/// Whose operation, and which.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct OpId {
    /// The worker.
    pub worker: u32,
    /// Its place among the worker's operations, from 0.
    pub index: u64,
}

/// An operation in flight; give it back to [`Ledger::end`] or [`Ledger::end_read`].
#[derive(Debug)]
#[must_use = "an operation that never ends keeps its blocks in flight"]
pub struct Ticket {
    slot: usize,
    began: Stamp,
}

/// What each block of one region may hold.
#[derive(Clone, Debug)]
pub struct Ledger {
    options: LedgerOptions,
    linear: Linear,
    durable: Durable,
    /// The newest generation of each block.
    newest: Sparse<Generation>,
    flights: Vec<Flight>,
    free: Vec<usize>,
    /// When operations began that may be in flight, oldest first, with their slots.
    order: VecDeque<(Stamp, usize)>,
    now: Stamp,
    /// Blocks that nobody has looked at since a power cut.
    after_cut: HashSet<u64>,
    /// Which blocks were changed or read since the last power cut, where nobody is to judge what that left.
    seen_since_cut: Option<Sparse<bool>>,
    recent: Recent,
}

#[derive(Clone, Debug, Default)]
struct Flight {
    /// 0 for none.
    began: Stamp,
    op: OpId,
    kind: Option<OpKind>,
    range: SectorRange,
    /// The generation of each block, for writes.
    generations: Vec<Generation>,
    entry: u64,
}

/// What the blocks of a read turned out to be.
#[derive(Default)]
struct Looked {
    unknown: u64,
    settled: u64,
    racing: u64,
}

impl Ledger {
    /// The ledger of a region that nothing was written to yet.
    ///
    /// # Panics
    /// When the region does not consist of whole blocks.
    #[must_use]
    pub fn new(options: LedgerOptions) -> Self {
        let block = u64::from(options.block_sectors);
        let SectorRange { first, sectors } = options.region;
        assert!(block > 0 && first.is_multiple_of(block) && sectors.is_multiple_of(block), "whole blocks");
        let blocks = sectors / block;
        let initial = if options.initially_zero { Content::Zero } else { Content::Unknown };
        Self {
            linear: Linear::new(blocks, initial),
            durable: Durable::new(blocks, initial, options.volatile_cache),
            newest: Sparse::new(blocks),
            flights: Vec::new(),
            free: Vec::new(),
            order: VecDeque::new(),
            now: 0,
            after_cut: HashSet::new(),
            seen_since_cut: None,
            recent: Recent::for_blocks(blocks),
            options,
        }
    }

    /// What the ledger is for.
    #[must_use]
    pub const fn options(&self) -> &LedgerOptions {
        &self.options
    }

    /// Begins an operation, and fills the payload of a write; for everything else `payload` is left alone.
    ///
    /// # Panics
    /// When `range` is not in the region or not whole blocks, or the payload of a write is not as long.
    pub fn begin(&mut self, op: OpId, kind: OpKind, range: SectorRange, payload: &mut [u8]) -> Ticket {
        assert!(self.options.region.covers(range) || range.is_empty(), "{range} is in {}", self.options.region);
        self.now += 1;
        let began = self.now;
        let slot = self.free.pop().unwrap_or_else(|| {
            self.flights.push(Flight::default());
            self.flights.len() - 1
        });
        let blocks = self.blocks(range);
        if kind.changes() && self.seen_since_cut.is_some() {
            self.take_as_unknown(blocks.clone());
        }
        let mut generations = std::mem::take(&mut self.flights[slot].generations);
        generations.clear();
        match kind {
            OpKind::Write | OpKind::WriteFua => {
                assert_eq!(payload.len() as u64, range.len_bytes(), "the payload is as long as the range");
                self.newest.update(blocks.clone(), |newest| {
                    *newest = next_generation(*newest);
                    generations.push(*newest);
                });
                self.fill(range, &generations, payload);
                let first = blocks.start;
                let content = |block: u64| Content::Written(generations[(block - first) as usize]);
                self.linear.begin_change(blocks.clone(), content, began);
                self.durable.begin_change(blocks, content, began);
            }
            OpKind::Discard | OpKind::WriteZeroes => {
                let content = self.cleared(kind);
                self.linear.begin_change(blocks.clone(), |_| content, began);
                self.durable.begin_change(blocks, |_| content, began);
            }
            OpKind::Read | OpKind::Flush => {}
        }
        let entry = self.recent.remember(Entry { op, kind, range, outcome: None });
        self.flights[slot] = Flight { began, op, kind: Some(kind), range, generations, entry };
        self.order.push_back((began, slot));
        Ticket { slot, began }
    }

    /// Ends an operation. A read ends here only if it failed.
    ///
    /// # Panics
    /// When the ticket is another ledger's.
    pub fn end(&mut self, ticket: Ticket, outcome: Outcome) {
        let flight = self.land(ticket, outcome);
        let (began, now) = (flight.began, self.now);
        let blocks = self.blocks(flight.range);
        match flight.kind {
            Some(OpKind::Write | OpKind::WriteFua) => {
                let first = blocks.start;
                let content = |block: u64| Content::Written(flight.generations[(block - first) as usize]);
                let through = flight.kind == Some(OpKind::WriteFua);
                self.linear.end_change(blocks.clone(), content, began, now, outcome);
                self.durable.end_change(blocks, began, now, outcome, through);
            }
            Some(kind @ (OpKind::Discard | OpKind::WriteZeroes)) => {
                let content = self.cleared(kind);
                self.linear.end_change(blocks.clone(), |_| content, began, now, outcome);
                self.durable.end_change(blocks, began, now, outcome, false);
            }
            Some(OpKind::Flush) if outcome == Outcome::Done => self.durable.flush_done(began),
            _ => {}
        }
        self.recycle(flight);
    }

    /// Ends a read that returned `data`.
    ///
    /// # Errors
    /// When a block holds what it may not hold.
    ///
    /// # Panics
    /// When `data` is not as long as the read, or the ticket is another ledger's.
    pub fn end_read(&mut self, ticket: Ticket, data: &[u8]) -> Result<Verified, Box<Mismatch>> {
        let flight = self.land(ticket, Outcome::Done);
        let verified = self.check(flight.op, flight.range, flight.began, data);
        // Not before: what the read might see is kept for as long as it is in flight.
        self.recycle(flight);
        verified
    }

    fn check(&mut self, op: OpId, range: SectorRange, began: Stamp, data: &[u8]) -> Result<Verified, Box<Mismatch>> {
        assert_eq!(data.len() as u64, range.len_bytes(), "the data is as long as the range");
        let mut looked = Looked::default();
        let block_bytes = self.options.block_sectors as usize * SECTOR;
        let first_block = self.blocks(range).start;
        for (block, bytes) in (first_block..).zip(data.chunks_exact(block_bytes)) {
            if self.seen_since_cut.is_some() {
                self.take_as_it_is(block, bytes);
            }
            let right = match self.linear.settled(block) {
                Some(Content::Unknown) => {
                    looked.unknown += 1;
                    self.after_cut.remove(&block);
                    continue;
                }
                Some(content) => self.holds(block, bytes, content),
                None => false,
            };
            if (!right || !self.after_cut.is_empty() && self.after_cut.contains(&block))
                && let Err(mut mismatch) = self.look_closer(block, bytes, began, &mut looked)
            {
                mismatch.worker = op.worker;
                mismatch.op = Some(op.index);
                mismatch.range = range;
                self.count_wrong(&mut mismatch, data, began);
                return Err(mismatch);
            }
        }
        let sectors = u64::from(self.options.block_sectors);
        let unknown_bytes = (looked.unknown + looked.racing) * sectors * SECTOR as u64;
        Ok(Verified {
            bytes: range.len_bytes() - unknown_bytes,
            unknown_bytes,
            settled_sectors: looked.settled * sectors,
        })
    }

    /// A server died, and what it had in hand is given to the next one: whatever is in flight may take effect twice.
    pub fn reissued(&mut self) {
        self.now += 1;
        let Self { flights, linear, now, .. } = self;
        for flight in flights.iter() {
            let Some(kind) = flight.kind.filter(|kind| kind.changes()) else { continue };
            let first = flight.range.first - self.options.region.first;
            let block = u64::from(self.options.block_sectors);
            let blocks = first / block..(first + flight.range.sectors) / block;
            let start = blocks.start;
            let content = |block: u64| match kind {
                OpKind::Write | OpKind::WriteFua => Content::Written(flight.generations[(block - start) as usize]),
                OpKind::Discard if self.options.discard == DiscardPromise::Nothing => Content::Unknown,
                _ => Content::Zero,
            };
            linear.repeat(blocks, content, flight.began, *now);
        }
    }

    /// The power was cut, and is back. Nothing is in flight: what was has ended, with [`Outcome::Unknown`] where nobody
    /// knows how.
    ///
    /// # Panics
    /// When something is in flight.
    pub fn power_cut(&mut self) {
        assert_eq!(self.in_flight(), 0, "a power cut ends everything");
        self.now += 1;
        self.recent.cut();
        if !self.options.oracles.has(Oracle::Durable) {
            self.seen_since_cut =
                Some(Sparse::new(self.options.region.sectors / u64::from(self.options.block_sectors)));
            return;
        }
        let Self { linear, durable, after_cut, now, .. } = self;
        durable.power_cut(*now, |block, survivors| {
            linear.reset(block, survivors, *now);
            after_cut.insert(block);
        });
    }

    /// What this ledger would be if the power was cut now: nobody knows how what is in flight ended. This one goes on as it
    /// is, so that many things that a cut could leave can be held against one moment.
    #[must_use]
    pub fn crashed(&self) -> Self {
        let mut crashed = self.clone();
        for slot in 0..crashed.flights.len() {
            if crashed.flights[slot].kind.is_some() {
                let began = crashed.flights[slot].began;
                crashed.end(Ticket { slot, began }, Outcome::Unknown);
            }
        }
        crashed.power_cut();
        crashed
    }

    /// How many operations are in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.flights.len() - self.free.len()
    }

    /// Whether an operation in flight has a sector in common with `range`, and one of the two changes it.
    #[must_use]
    pub fn overlaps_in_flight(&self, range: SectorRange, kind: OpKind) -> bool {
        self.flights.iter().any(|flight| {
            flight.kind.is_some_and(|other| other.changes() || kind.changes()) && flight.range.overlaps(range)
        })
    }

    /// What a read of `sector` that begins now may return.
    ///
    /// # Panics
    /// When it is not in the region.
    #[must_use]
    pub fn expected(&self, sector: u64) -> Expected {
        assert!(self.options.region.contains(sector), "sector {sector} is in {}", self.options.region);
        self.expected_of(self.blocks(SectorRange::new(sector, 1)).start, self.now + 1)
    }

    /// The memory that the ledger takes now, in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        size_of::<Self>()
            + self.linear.memory_bytes()
            + self.durable.memory_bytes()
            + self.newest.memory_bytes()
            + self.recent.memory_bytes()
            + self.flights.capacity() * size_of::<Flight>()
            + self.flights.iter().map(|flight| flight.generations.capacity() * size_of::<Generation>()).sum::<usize>()
            + self.free.capacity() * size_of::<usize>()
            + self.order.capacity() * size_of::<(Stamp, usize)>()
            + self.seen_since_cut.as_ref().map_or(0, Sparse::memory_bytes)
            + self.after_cut.capacity() * size_of::<u64>()
    }

    /// Reads that were right in some order, of more orders than could be followed; see [`Linear::loose_reads`].
    #[must_use]
    pub const fn loose_reads(&self) -> u64 {
        self.linear.loose_reads()
    }

    /// Blocks, counted from the beginning of the region, that have a sector in `range`.
    fn blocks(&self, range: SectorRange) -> Range<u64> {
        if range.is_empty() {
            return 0..0;
        }
        let block = u64::from(self.options.block_sectors);
        let first = range.first - self.options.region.first;
        first / block..(first + range.sectors).div_ceil(block)
    }

    fn first_sector(&self, block: u64) -> u64 {
        self.options.region.first + block * u64::from(self.options.block_sectors)
    }

    fn cleared(&self, kind: OpKind) -> Content {
        if kind == OpKind::Discard && self.options.discard == DiscardPromise::Nothing {
            Content::Unknown
        } else {
            Content::Zero
        }
    }

    fn fill(&self, range: SectorRange, generations: &[Generation], payload: &mut [u8]) {
        let block = self.options.block_sectors as usize;
        for ((lba, sector), at) in (range.first..).zip(payload.as_chunks_mut::<SECTOR>().0).zip(0..) {
            self.options.pattern.fill_sector(sector, lba, generations[at / block]);
        }
    }

    #[expect(clippy::needless_pass_by_value, reason = "a ticket is used up")]
    fn land(&mut self, ticket: Ticket, outcome: Outcome) -> Flight {
        self.now += 1;
        let Ticket { slot, began } = ticket;
        let flight = std::mem::take(&mut self.flights[slot]);
        assert_eq!(flight.began, began, "a ticket is given back to the ledger it came from");
        self.recent.finish(flight.entry, outcome);
        self.free.push(slot);
        flight
    }

    /// Keeps what a flight allocated, and lets the oracles forget what can no longer matter.
    fn recycle(&mut self, flight: Flight) {
        if let Some(&slot) = self.free.last() {
            self.flights[slot].generations = flight.generations;
        }
        let mut moved = false;
        while let Some(&(began, slot)) = self.order.front() {
            if self.flights[slot].began == began {
                break;
            }
            self.order.pop_front();
            moved = true;
        }
        if moved {
            let oldest = self.order.front().map_or(self.now + 1, |&(began, _)| began);
            self.linear.horizon(oldest);
            self.durable.tidy_up();
        }
    }

    fn holds(&self, block: u64, bytes: &[u8], content: Content) -> bool {
        let pattern = &*self.options.pattern;
        let sectors = bytes.as_chunks::<SECTOR>().0;
        match content {
            Content::Unknown => true,
            Content::Zero => sectors.iter().all(is_zero),
            Content::Written(generation) => (self.first_sector(block)..)
                .zip(sectors)
                .all(|(lba, sector)| pattern.sector_matches(sector, lba, generation)),
        }
    }

    /// What a block holds, if it is zeroes or a generation of its own.
    fn decode(&self, block: u64, bytes: &[u8]) -> Content {
        if self.holds(block, bytes, Content::Zero) {
            return Content::Zero;
        }
        let lba = self.first_sector(block);
        let word = bytes.as_chunks::<8>().0.first().map_or(0, |word| u64::from_le_bytes(*word));
        let position = (lba % TABLE_SECTORS as u64) as usize * WORDS;
        let origin = self.options.pattern.decode_word(word, position, self.options.device_sectors);
        let seen = origin.filter(|origin| origin.lba == lba).map(|origin| Content::Written(origin.generation));
        seen.filter(|&seen| self.holds(block, bytes, seen)).unwrap_or(Content::Unknown)
    }

    /// Nobody is to judge what a power cut left: of blocks that were not seen since the last one nothing is known.
    #[cold]
    fn take_as_unknown(&mut self, blocks: Range<u64>) {
        let Self { linear, seen_since_cut: Some(seen), now, .. } = self else { return };
        let mut next = blocks.start;
        seen.update(blocks, |seen| {
            if !std::mem::replace(seen, true) {
                linear.reset(next, &[Content::Unknown], *now);
            }
            next += 1;
        });
    }

    /// Nobody is to judge what a power cut left: what a read sees first is what is there, if it was ever to be.
    #[cold]
    fn take_as_it_is(&mut self, block: u64, bytes: &[u8]) {
        if self.seen_since_cut.as_ref().is_none_or(|seen| seen.get(block)) {
            return;
        }
        let unpromised = self.linear.candidates(block, self.now).contains(&Content::Unknown);
        let content = match self.decode(block, bytes) {
            _ if unpromised => Content::Unknown,
            Content::Written(generation) if is_newer(generation, self.newest.get(block)) => return,
            // Torn is for whoever judges power cuts to say; what else is no content of the block's is not.
            Content::Unknown if self.mismatch(block, bytes, self.now).oracle != Oracle::Durable => return,
            content => content,
        };
        self.linear.reset(block, &[content], self.now);
        if let Some(seen) = &mut self.seen_since_cut {
            seen.update(block..block + 1, |seen| *seen = true);
        }
    }

    /// Sees which of several contents a block has, or what is wrong with it.
    fn look_closer(
        &mut self,
        block: u64,
        bytes: &[u8],
        began: Stamp,
        looked: &mut Looked,
    ) -> Result<(), Box<Mismatch>> {
        let candidates = self.linear.candidates(block, began);
        let seen = candidates
            .iter()
            .copied()
            .find(|&content| content != Content::Unknown && self.holds(block, bytes, content));
        let Some(seen) = seen else {
            if candidates.contains(&Content::Unknown) {
                let seen = self.decode(block, bytes);
                if self.linear.read(block, seen, began, self.now).is_err() {
                    return self.judge(block, bytes, began, Some(seen));
                }
                looked.unknown += 1;
                self.after_cut.remove(&block);
                return Ok(());
            }
            if self.options.torn_by_races && candidates.len() > 1 && self.is_mixture(block, bytes, &candidates) {
                looked.racing += 1;
                return Ok(());
            }
            return self.judge(block, bytes, began, None);
        };
        if self.linear.read(block, seen, began, self.now).is_err() {
            return self.judge(block, bytes, began, Some(seen));
        }
        looked.settled += u64::from(candidates.len() > 1);
        // What was replaced for good while the read was under way says nothing of what is there now.
        if self.after_cut.remove(&block) && self.durable.survives(block, seen) {
            self.durable.settle(block, seen);
        }
        Ok(())
    }

    /// Whether every byte is from one of these contents: a copy that is not one instruction may be caught within a word.
    fn is_mixture(&self, block: u64, bytes: &[u8], contents: &[Content]) -> bool {
        let first = self.first_sector(block);
        (first..).zip(bytes.as_chunks::<SECTOR>().0).all(|(lba, got)| {
            let mut rights = contents.iter().map(|&content| {
                let mut right = [0; SECTOR];
                if let Content::Written(generation) = content {
                    self.options.pattern.fill_sector(&mut right, lba, generation);
                }
                right
            });
            let rights: Vec<_> = rights.by_ref().collect();
            (0..SECTOR).all(|at| rights.iter().any(|right| right[at] == got[at]))
        })
    }

    /// Names what is wrong with a block; right after all if the oracle that says so does not judge here. `out_of_order` is a
    /// content that it might have, if others had not been seen before.
    #[cold]
    fn judge(
        &mut self,
        block: u64,
        bytes: &[u8],
        began: Stamp,
        out_of_order: Option<Content>,
    ) -> Result<(), Box<Mismatch>> {
        let mut mismatch = self.mismatch(block, bytes, began);
        if let (Some(seen), Class::Good) = (out_of_order, &mismatch.class) {
            mismatch.class = match seen {
                Content::Written(generation) => Class::Stale { generation },
                Content::Zero | Content::Unknown => Class::Zero,
            };
            mismatch.oracle = Oracle::Linear;
        }
        if mismatch.class != Class::Good && self.options.oracles.has(mismatch.oracle) {
            return Err(mismatch);
        }
        Ok(())
    }
}
