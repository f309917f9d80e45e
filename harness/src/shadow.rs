//! The shadow: what each sector of one worker's region may hold now.
//!
//! The worker announces each operation before it is submitted and says how it ended; the shadow gives writes their
//! payload and judges what reads return. It holds four bytes per sector, under 1 % of the region, and
//! only for the parts that were touched.
//!
//! An operation whose fate is unknown leaves each of its sectors *unsettled*: it holds the old content or the new. The
//! first read that sees it settles which, and from then on it may not change again. Unsettled sectors, which only
//! failures make, are kept in a table beside.
//!
//! Operations in flight do not overlap, so a write changes the shadow when it ends, and until then the sector's next
//! generation is its own.

mod history;
mod state;
mod table;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use self::history::{Entry, History};
use self::state::{Kind, Previous, State};
use self::table::Table;
use crate::classify::{Class, Classifier, Content, Expected};
use crate::mismatch::{Mismatch, SectorDump};
use crate::oracle::Oracle;
use crate::outcome::Outcome;
use crate::plan::OpKind;
use crate::range::SectorRange;
use crate::sector::{Generation, Pattern, SECTOR, is_zero};

/// How many wrong sectors of one check are named.
const NAMED_SECTORS: usize = 256;

/// What a device promises of a discarded sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiscardPromise {
    /// It reads as zeroes.
    Zeroes,
    /// Nothing.
    Nothing,
}

/// What an operation needs of the sectors it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// That nothing changes them meanwhile.
    Read,
    /// That nothing else touches them meanwhile.
    Change,
}

/// What a shadow is for.
#[derive(Clone, Debug)]
pub struct ShadowOptions {
    /// The sectors it covers.
    pub region: SectorRange,
    /// The worker, for reports.
    pub worker: u32,
    /// What this run writes to this device.
    pub pattern: Arc<Pattern>,
    /// What other devices and runs hold, for naming bytes that come from there.
    pub foreign: Arc<[Pattern]>,
    /// The size of the device, in sectors.
    pub device_sectors: u64,
    /// Whether the sectors are known to be zeroes before the first write; otherwise anything may be there.
    pub initially_zero: bool,
}

/// An operation in flight; give it back to [`Shadow::finish`] or [`Shadow::finish_read`].
#[derive(Debug)]
#[must_use = "an operation that never finishes keeps its sectors in flight"]
pub struct Ticket {
    id: u64,
}

/// A check that found nothing wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Bytes that were compared.
    pub bytes: u64,
    /// Bytes that may hold anything and were not.
    pub unknown_bytes: u64,
    /// Sectors of unknown fate that now have a known content.
    pub settled_sectors: u64,
}

/// What each sector of one region may hold.
#[derive(Debug)]
pub struct Shadow {
    options: ShadowOptions,
    table: Table,
    unsettled: HashMap<u64, Vec<Content>>,
    in_flight: Vec<Flight>,
    history: History,
    next_id: u64,
}

#[derive(Clone, Copy, Debug)]
struct Flight {
    id: u64,
    range: SectorRange,
    kind: OpKind,
    promise: DiscardPromise,
    /// Where the history notes its outcome.
    entry: u64,
    op: u64,
}

/// How a closer look at one sector came out.
enum Look {
    Right,
    Settled,
    Wrong,
}

impl Shadow {
    /// The shadow of a region that nothing was written to yet.
    #[must_use]
    pub fn new(options: ShadowOptions) -> Self {
        let sectors = options.region.sectors;
        Self {
            table: Table::new(sectors),
            unsettled: HashMap::new(),
            in_flight: Vec::with_capacity(64),
            history: History::for_region(sectors),
            next_id: 0,
            options,
        }
    }

    /// What the shadow is for.
    #[must_use]
    pub const fn options(&self) -> &ShadowOptions {
        &self.options
    }

    /// Begins a write, number `op` of the worker's plan: fills `buf`, as long as `range`, with its payload.
    ///
    /// # Panics
    /// When `range` is not in the region, `buf` is not as long, or something in flight is in the way.
    pub fn begin_write(&mut self, op: u64, range: SectorRange, buf: &mut [u8]) -> Ticket {
        self.begin_any_write(op, OpKind::Write, range, buf)
    }

    /// Begins a write that is to be durable when it is acknowledged.
    ///
    /// # Panics
    /// As [`begin_write`](Self::begin_write).
    pub fn begin_write_fua(&mut self, op: u64, range: SectorRange, buf: &mut [u8]) -> Ticket {
        self.begin_any_write(op, OpKind::WriteFua, range, buf)
    }

    /// Begins a write of zeroes.
    ///
    /// # Panics
    /// As [`begin_write`](Self::begin_write).
    pub fn begin_write_zeroes(&mut self, op: u64, range: SectorRange) -> Ticket {
        self.begin(op, OpKind::WriteZeroes, range, DiscardPromise::Zeroes)
    }

    /// Begins a discard.
    ///
    /// # Panics
    /// As [`begin_write`](Self::begin_write).
    pub fn begin_discard(&mut self, op: u64, range: SectorRange, promise: DiscardPromise) -> Ticket {
        self.begin(op, OpKind::Discard, range, promise)
    }

    /// Ends a write, a write of zeroes or a discard; also a read that failed.
    ///
    /// # Panics
    /// When the ticket is another shadow's.
    pub fn finish(&mut self, ticket: Ticket, outcome: Outcome) {
        let flight = self.land(ticket, outcome);
        let zero = self.options.initially_zero;
        match (flight.kind, outcome) {
            (OpKind::Read | OpKind::Flush, _) => {}
            (OpKind::Write | OpKind::WriteFua, Outcome::Done) => {
                self.change(flight.range, |state| state.written(zero));
            }
            (OpKind::Discard, _) if flight.promise == DiscardPromise::Nothing => {
                self.change(flight.range, State::forgotten);
            }
            (OpKind::Discard | OpKind::WriteZeroes, Outcome::Done) => {
                self.change(flight.range, |state| state.zeroed(zero));
            }
            (kind, Outcome::Failed | Outcome::Unknown) => self.unsettle(flight.range, kind),
        }
    }

    /// Begins a read.
    ///
    /// # Panics
    /// As [`begin_write`](Self::begin_write); reads do not get in each other's way.
    pub fn begin_read(&mut self, op: u64, range: SectorRange) -> Ticket {
        self.begin(op, OpKind::Read, range, DiscardPromise::Zeroes)
    }

    /// Ends a read that returned `buf`.
    ///
    /// # Errors
    /// When a sector holds what it may not hold.
    ///
    /// # Panics
    /// When `buf` is not as long as the read, or the ticket is another shadow's.
    pub fn finish_read(&mut self, ticket: Ticket, buf: &[u8]) -> Result<Verified, Box<Mismatch>> {
        let flight = self.land(ticket, Outcome::Done);
        self.check(Some(flight.op), flight.range, buf)
    }

    /// Checks what `range` holds, read at a moment when nothing in flight could change it.
    ///
    /// # Errors
    /// When a sector holds what it may not hold.
    ///
    /// # Panics
    /// When `range` is not in the region, `buf` is not as long, or something in flight changes it.
    pub fn verify(&mut self, range: SectorRange, buf: &[u8]) -> Result<Verified, Box<Mismatch>> {
        let ticket = self.begin(Entry::PASS, OpKind::Read, range, DiscardPromise::Zeroes);
        self.land(ticket, Outcome::Done);
        self.check(None, range, buf)
    }

    /// Whether something in flight forbids an operation that needs this access to `range`.
    #[inline]
    #[must_use]
    pub fn overlaps_in_flight(&self, range: SectorRange, access: Access) -> bool {
        let blocks = |flight: &Flight| access == Access::Change || flight.kind != OpKind::Read;
        self.in_flight.iter().any(|flight| flight.range.overlaps(range) && blocks(flight))
    }

    /// How many operations are in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// What `sector`, which is in the region, may hold now.
    ///
    /// # Panics
    /// When it is not in the region.
    #[must_use]
    pub fn expected(&self, sector: u64) -> Expected {
        assert!(self.options.region.contains(sector), "sector {sector} is in the region {}", self.options.region);
        let state = self.state(sector);
        Expected { allowed: self.contents(sector, state), previous: state.previous(), newest: state.newest() }
    }

    /// The memory the shadow takes when every sector was touched, in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        let unsettled = self.unsettled.values().map(|contents| size_of_val(&contents[..])).sum::<usize>()
            + self.unsettled.capacity() * size_of::<(u64, Vec<Content>)>();
        size_of::<Self>()
            + self.table.memory_bytes()
            + self.history.memory_bytes()
            + self.in_flight.capacity() * size_of::<Flight>()
            + unsettled
    }

    #[inline]
    fn at(&self, sector: u64) -> u64 {
        sector - self.options.region.first
    }

    #[inline]
    fn state(&self, sector: u64) -> State {
        self.table.get(self.at(sector))
    }

    fn begin_any_write(&mut self, op: u64, kind: OpKind, range: SectorRange, buf: &mut [u8]) -> Ticket {
        assert_eq!(buf.len() as u64, range.len_bytes(), "the buffer is as long as the range");
        let ticket = self.begin(op, kind, range, DiscardPromise::Zeroes);
        let next = |sector: u64| self.state(sector).next();
        self.options.pattern.fill(buf, range.first, next);
        ticket
    }

    fn begin(&mut self, op: u64, kind: OpKind, range: SectorRange, promise: DiscardPromise) -> Ticket {
        assert!(self.options.region.covers(range), "{range} is in the region {}", self.options.region);
        let access = if kind == OpKind::Read { Access::Read } else { Access::Change };
        assert!(!self.overlaps_in_flight(range, access), "{range} is free of operations in flight");
        let entry = self.history.remember(Entry { op, range, kind, outcome: None });
        let id = self.next_id;
        self.next_id += 1;
        self.in_flight.push(Flight { id, range, kind, promise, entry, op });
        Ticket { id }
    }

    #[expect(clippy::needless_pass_by_value, reason = "a ticket is used up")]
    fn land(&mut self, ticket: Ticket, outcome: Outcome) -> Flight {
        let at = self.in_flight.iter().position(|flight| flight.id == ticket.id);
        let flight = self.in_flight.swap_remove(at.expect("a ticket is given back to the shadow it came from"));
        self.history.finish(flight.entry, outcome);
        flight
    }

    fn change(&mut self, range: SectorRange, to: impl Fn(State) -> State) {
        if !self.unsettled.is_empty() {
            self.forget_alternatives(range);
        }
        self.table.change(self.at(range.first), range.sectors, to);
    }

    #[cold]
    fn forget_alternatives(&mut self, range: SectorRange) {
        if range.sectors < self.unsettled.len() as u64 {
            for sector in range.first..range.end() {
                self.unsettled.remove(&sector);
            }
        } else {
            self.unsettled.retain(|sector, _| !range.contains(*sector));
        }
    }

    /// After a failed operation each sector may hold what it held, or what it was to hold.
    #[cold]
    fn unsettle(&mut self, range: SectorRange, kind: OpKind) {
        let writes = matches!(kind, OpKind::Write | OpKind::WriteFua);
        for sector in range.first..range.end() {
            let state = self.state(sector);
            let newest = if writes { state.next() } else { state.newest() };
            let mut contents = self.contents(sector, state);
            let new = if writes { Content::Written(newest) } else { Content::Zero };
            if !contents.contains(&new) {
                contents.push(new);
            }
            self.settle(sector, contents, newest);
        }
    }

    /// Notes what a sector may hold, in the shortest way there is.
    fn settle(&mut self, sector: u64, contents: Vec<Content>, newest: Generation) {
        let kind = match contents[..] {
            _ if contents.contains(&Content::Unknown) => Kind::Unknown,
            [Content::Zero] => Kind::Zeroed,
            [Content::Written(generation)] if generation == newest => Kind::Written,
            _ => Kind::Unsettled,
        };
        let state = State::new(kind, newest, Previous::Unknown);
        self.table.change(self.at(sector), 1, |_| state);
        if kind == Kind::Unsettled {
            self.unsettled.insert(sector, contents);
        } else {
            self.unsettled.remove(&sector);
        }
    }

    fn contents(&self, sector: u64, state: State) -> Vec<Content> {
        match state.kind() {
            Kind::Untouched if self.options.initially_zero => vec![Content::Zero],
            Kind::Untouched | Kind::Unknown => vec![Content::Unknown],
            Kind::Written => vec![Content::Written(state.newest())],
            Kind::Zeroed => vec![Content::Zero],
            Kind::Unsettled => self.unsettled.get(&sector).cloned().unwrap_or_default(),
        }
    }

    fn check(&mut self, op: Option<u64>, range: SectorRange, buf: &[u8]) -> Result<Verified, Box<Mismatch>> {
        assert_eq!(buf.len() as u64, range.len_bytes(), "the buffer is as long as the range");
        let (sectors, _none) = buf.as_chunks::<SECTOR>();
        let (mut unknown, mut settled) = (0, 0);
        let mut rest = range.first;
        while rest < range.end() {
            let left = &sectors[(rest - range.first) as usize..];
            let states = self.table.run(self.at(rest));
            let run = left.len().min(states.len());
            let right = self.right_run(rest, &left[..run], states, &mut unknown);
            rest += right as u64;
            if right == run {
                continue;
            }
            match self.look_closer(rest, &sectors[(rest - range.first) as usize]) {
                Look::Right => {}
                Look::Settled => settled += 1,
                Look::Wrong => return Err(self.mismatch(op, range, sectors, rest)),
            }
            rest += 1;
        }
        let unknown_bytes = unknown * SECTOR as u64;
        Ok(Verified { bytes: range.len_bytes() - unknown_bytes, unknown_bytes, settled_sectors: settled })
    }

    /// How many sectors from `first` on are right at first sight; adds those that may hold anything to `unknown`.
    fn right_run(&self, first: u64, sectors: &[[u8; SECTOR]], states: &[u32], unknown: &mut u64) -> usize {
        let pattern = &*self.options.pattern;
        let zero = self.options.initially_zero;
        // Most runs are right and written throughout. A sector that was not written is never of generation 0 either.
        let generation_of = |sector: u64| {
            let state = State::from_bits(states[(sector - first) as usize]);
            if state.kind() == Kind::Written { state.newest() } else { 0 }
        };
        if pattern.sectors_match(sectors, first, generation_of) {
            return sectors.len();
        }
        let wrong = (first..).zip(sectors).zip(states).position(|((sector, got), bits)| {
            let state = State::from_bits(*bits);
            match state.kind() {
                Kind::Written => !pattern.sector_matches(got, sector, state.newest()),
                Kind::Zeroed => !is_zero(got),
                Kind::Untouched if zero => !is_zero(got),
                Kind::Untouched | Kind::Unknown => {
                    *unknown += 1;
                    false
                }
                Kind::Unsettled => true,
            }
        });
        wrong.unwrap_or(sectors.len())
    }

    #[cold]
    fn look_closer(&mut self, sector: u64, got: &[u8; SECTOR]) -> Look {
        let state = self.state(sector);
        let contents = self.contents(sector, state);
        let pattern = &self.options.pattern;
        let seen = contents.iter().copied().find(|content| match content {
            Content::Zero => is_zero(got),
            Content::Written(generation) => pattern.sector_matches(got, sector, *generation),
            Content::Unknown => true,
        });
        match seen {
            None => Look::Wrong,
            Some(_) if contents.len() == 1 => Look::Right,
            Some(seen) => {
                self.settle(sector, vec![seen], state.newest());
                Look::Settled
            }
        }
    }

    #[cold]
    fn mismatch(&self, op: Option<u64>, range: SectorRange, sectors: &[[u8; SECTOR]], wrong: u64) -> Box<Mismatch> {
        let ShadowOptions { pattern, foreign, device_sectors, worker, .. } = &self.options;
        let classifier = Classifier { pattern, foreign, device_sectors: *device_sectors };
        let class_of = |sector: u64| {
            let got = &sectors[(sector - range.first) as usize];
            classifier.classify(got, sector, &self.expected(sector))
        };
        let mut wrong_sectors = BTreeMap::new();
        let mut first: Option<(u64, Class)> = None;
        let named = (wrong..range.end()).map(|sector| (sector, class_of(sector)));
        for (sector, class) in named.filter(|(_, class)| *class != Class::Good).take(NAMED_SECTORS) {
            *wrong_sectors.entry(class.name().to_owned()).or_default() += 1;
            if first.as_ref().is_none_or(|(_, first)| !first.is_telling() && class.is_telling()) {
                first = Some((sector, class));
            }
        }
        let (sector, class) = first.unwrap_or((wrong, Class::Garbage));
        let expected = self.expected(sector);
        Box::new(Mismatch {
            oracle: Oracle::of(&class, &expected),
            worker: *worker,
            op,
            range,
            sector,
            class,
            expected,
            got: SectorDump::new(&sectors[(sector - range.first) as usize]),
            wrong_sectors,
            history: self.history.of_sector(*worker, sector, self.state(sector)),
        })
    }
}

impl Ticket {
    /// A number that no other ticket of the same shadow has.
    #[must_use]
    pub const fn id(&self) -> u64 {
        self.id
    }
}
