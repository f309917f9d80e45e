//! One worker: a stream of operations, many in flight, each checked as it completes.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ublkit::{BlockClient, WriteFlags, ZeroSpace, blkdev};
use ublkit_harness::plan::{OpKind, WorkerPlan};
use ublkit_harness::{
    Access, DiscardPromise, Op, Outcome, Pattern, Plan, SECTOR, SectorRange, Shadow, ShadowOptions, Ticket, Watchdog,
};

use super::device::Opened;
use crate::context::{Context, SharedEvidence};
use crate::scenario::Failure;

/// How long a worker may see none of its operations complete before that is a hang.
const STALL: Duration = Duration::from_secs(60);
/// How often the stall clock is wound up, at most.
const REARM_EVERY: Duration = Duration::from_secs(1);
/// How long one wait for completions lasts before the worker looks around.
const LOOK_AROUND: Duration = Duration::from_millis(500);
/// Passes over the whole region take about one part in this many of a worker's time.
const PASS_SHARE: u32 = 5;
/// Operations between two passes, at least.
const PASS_EVERY: u64 = 500;
/// Operations between two looks at the clock.
const CLOCK_EVERY: u64 = 32;

/// When a worker ends by itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// After so many operations.
    pub(super) ops: Option<u64>,
    /// At this time.
    pub(super) until: Option<Instant>,
}

macro_rules! tally {
    ($($name:ident),*) => {
        /// Work done, counted.
        #[derive(Debug, Default)]
        pub(super) struct Tally { $($name: AtomicU64),* }

        impl Tally {
            /// Adds the counts of `other`.
            fn merge(&self, other: &Self) {
                $(self.$name.fetch_add(other.$name.load(Ordering::Relaxed), Ordering::Relaxed);)*
            }

            /// Adds the counts to the evidence of the run.
            pub(super) fn add_to(&self, evidence: &SharedEvidence) {
                evidence.add("ops", self.ops());
                evidence.add("verified_bytes", self.verified_bytes());
                $(evidence.add(stringify!($name), self.$name.load(Ordering::Relaxed));)*
            }
        }
    };
}
tally!(
    reads,
    writes,
    fua_writes,
    flushes,
    discards,
    zeroes,
    read_bytes,
    written_bytes,
    compared_in_reads,
    compared_in_passes,
    passes,
    longer_than_max_io,
    held_back,
    draw_us
);

impl Tally {
    fn count(counter: &AtomicU64, by: u64) {
        // One writer: a plain add, that the thread which tells of progress may read at any time.
        counter.store(counter.load(Ordering::Relaxed) + by, Ordering::Relaxed);
    }

    fn get(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }

    /// Operations completed.
    pub(super) fn ops(&self) -> u64 {
        [&self.reads, &self.writes, &self.fua_writes, &self.flushes, &self.discards, &self.zeroes]
            .into_iter()
            .map(Self::get)
            .sum()
    }

    /// Bytes moved.
    pub(super) fn bytes(&self) -> u64 {
        Self::get(&self.read_bytes) + Self::get(&self.written_bytes)
    }

    /// Bytes compared.
    pub(super) fn verified_bytes(&self) -> u64 {
        Self::get(&self.compared_in_reads) + Self::get(&self.compared_in_passes)
    }
}

/// What the workers of a run share.
#[derive(Debug)]
pub(super) struct Shared {
    limits: Limits,
    passes: bool,
    prefill: bool,
    max_io_bytes: u64,
    stop: AtomicBool,
    tallies: Mutex<Vec<Arc<Tally>>>,
    told: Mutex<Instant>,
    watchdog: Arc<Watchdog>,
}

impl Shared {
    pub(super) fn new(context: &Context, opened: &Opened, limits: Limits, passes: bool, prefill: bool) -> Self {
        Self {
            limits,
            passes,
            prefill,
            max_io_bytes: opened.max_io_bytes,
            stop: AtomicBool::new(false),
            tallies: Mutex::default(),
            told: Mutex::new(Instant::now()),
            watchdog: Arc::clone(context.watchdog()),
        }
    }

    /// Tells the workers to end.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// What all of them have done.
    pub(super) fn total(&self) -> Tally {
        let total = Tally::default();
        for tally in self.tallies.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            total.merge(tally);
        }
        total
    }

    /// Time since progress was told.
    pub(super) fn since_progress(&self) -> Duration {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }

    /// Winds that clock up, and returns what it said.
    pub(super) fn mark_progress(&self) -> Duration {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *told, Instant::now()).elapsed()
    }
}

/// An operation in flight.
struct Flight {
    op: Op,
    /// None for a flush, which the shadow does not need to know of.
    ticket: Option<Ticket>,
}

/// One worker and its region.
pub(super) struct Worker {
    index: u32,
    plan: WorkerPlan,
    shadow: Shadow,
    tally: Arc<Tally>,
    shared: Arc<Shared>,
    file: io::Result<File>,
    depth: u16,
    slot_bytes: usize,
    discard: DiscardPromise,
    unmap_zeroes: bool,
}

impl Worker {
    pub(super) fn new(index: u32, plan: &Plan, opened: &Opened, pattern: Arc<Pattern>, shared: Arc<Shared>) -> Self {
        let stream = plan.worker(index);
        let shadow = Shadow::new(ShadowOptions {
            region: stream.region(),
            worker: index,
            pattern,
            foreign: Arc::new([]),
            device_sectors: opened.bytes / SECTOR as u64,
            initially_zero: opened.zeroed,
        });
        let tally = Arc::new(Tally::default());
        shared.tallies.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&tally));
        Self {
            index,
            plan: stream,
            shadow,
            tally,
            shared,
            file: opened.file.try_clone(),
            depth: plan.options().depth as u16,
            slot_bytes: plan.options().longest_bytes() as usize,
            discard: opened.discard,
            unmap_zeroes: opened.unmap_zeroes,
        }
    }

    /// What its region may hold.
    pub(super) fn shadow(&mut self) -> &mut Shadow {
        &mut self.shadow
    }

    /// What it has done.
    pub(super) fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Works until a limit is reached, something is wrong, or it is told to end. Then nothing is in flight, and what its
    /// region may hold is known again.
    pub(super) fn run(mut self) -> (Self, Result<(), Failure>) {
        let result = self.work();
        if result.is_err() {
            // The first wrong byte ends the run: what the others would find after it says less.
            self.shared.stop();
        }
        (self, result)
    }

    fn work(&mut self) -> Result<(), Failure> {
        let lacking = |error: &io::Error| Failure::Environment(format!("failed to set up I/O for a worker: {error}"));
        let file = std::mem::replace(&mut self.file, Err(io::ErrorKind::NotFound.into()));
        let file = file.map_err(|error| lacking(&error))?;
        let client = BlockClient::new(file, self.depth, self.slot_bytes).map_err(|error| lacking(&error))?;
        let mut flights = Flights::new(client, self.index, &self.shared);
        let result = self.all_of_it(&mut flights);
        if result.is_err() {
            self.settle(&mut flights);
        }
        result
    }

    fn all_of_it(&mut self, flights: &mut Flights) -> Result<(), Failure> {
        if self.shared.prefill {
            self.prefill(flights)?;
        }
        let began = Instant::now();
        self.draw(flights)?;
        // Summed over the workers: time in which they drew operations, without setting up and filling before.
        Tally::count(&self.tally.draw_us, began.elapsed().as_micros() as u64);
        if self.shared.passes && !self.shared.stopped() {
            self.pass(flights)?;
        }
        Ok(())
    }

    /// Sees what is in flight to its end after something went wrong, without judging it.
    fn settle(&mut self, flights: &mut Flights) {
        while flights.client.in_flight() > 0 && flights.client.submit_and_wait(1, LOOK_AROUND).is_ok() {
            while let Some((slot, result)) = flights.client.next_completion() {
                flights.progressed = true;
                let Some(Flight { op, ticket: Some(ticket) }) = flights.ops[usize::from(slot)].take() else {
                    continue;
                };
                let whole = op.kind != OpKind::Read && self.whole(op, result).is_ok();
                self.shadow.finish(ticket, if whole { Outcome::Done } else { Outcome::Failed });
            }
            flights.rearm(&self.shared);
        }
    }

    /// Writes every sector of the region once.
    fn prefill(&mut self, flights: &mut Flights) -> Result<(), Failure> {
        let chunk = self.shared.max_io_bytes.min(self.slot_bytes as u64) / SECTOR as u64;
        let chunks: Vec<_> = self.shadow.options().region.chunks(chunk).collect();
        for range in chunks {
            while flights.free.is_empty() {
                self.reap(flights, 1)?;
            }
            if self.shared.stopped() {
                break;
            }
            self.begin(flights, Op { index: 0, kind: OpKind::Write, range })?;
        }
        self.drain(flights)
    }

    /// Draws operations and keeps as many in flight as there are slots.
    fn draw(&mut self, flights: &mut Flights) -> Result<(), Failure> {
        let start = Instant::now();
        let mut in_passes = Duration::ZERO;
        let mut begun = 0u64;
        let mut next_clock = CLOCK_EVERY;
        let mut next_pass = PASS_EVERY;
        let mut held: Option<Op> = None;
        let mut ending = false;
        loop {
            while !ending && !flights.free.is_empty() {
                if self.shared.stopped() || self.shared.limits.ops.is_some_and(|ops| begun >= ops) {
                    ending = true;
                    break;
                }
                let Some(op) = held.take().or_else(|| self.plan.next()) else { break };
                let access = if op.kind == OpKind::Read { Access::Read } else { Access::Change };
                if op.kind != OpKind::Flush && self.shadow.overlaps_in_flight(op.range, access) {
                    // Order is kept: nothing overtakes an operation that has to wait.
                    if held.is_none() {
                        Tally::count(&self.tally.held_back, 1);
                    }
                    held = Some(op);
                    break;
                }
                self.begin(flights, op)?;
                begun += 1;
            }
            let in_flight = flights.client.in_flight();
            if in_flight == 0 && ending {
                return Ok(());
            }
            // In batches where there are many: one enter for a quarter of them.
            self.reap(flights, (in_flight / 4).max(1))?;
            if begun >= next_clock {
                next_clock = begun + CLOCK_EVERY;
                let now = Instant::now();
                ending |= self.shared.limits.until.is_some_and(|until| now >= until);
                if self.shared.passes && !ending && begun >= next_pass && in_passes * PASS_SHARE <= now - start {
                    self.drain(flights)?;
                    let pass = Instant::now();
                    self.pass(flights)?;
                    in_passes += pass.elapsed();
                    next_pass = begun + PASS_EVERY;
                }
            }
        }
    }

    /// Reads the whole region and compares it. Nothing else is in flight.
    fn pass(&mut self, flights: &mut Flights) -> Result<(), Failure> {
        let chunk = self.shared.max_io_bytes.min(self.slot_bytes as u64) / SECTOR as u64;
        let mut chunks: Vec<_> = self.shadow.options().region.chunks(chunk).collect();
        chunks.reverse();
        let mut whole = true;
        loop {
            while let (Some(&slot), Some(range)) = (flights.free.last(), chunks.last().copied()) {
                if self.shared.stopped() {
                    chunks.clear();
                    whole = false;
                    break;
                }
                flights.free.pop();
                chunks.pop();
                flights.client.read(slot, range.offset_bytes(), range.len_bytes() as usize);
                flights.passing[usize::from(slot)] = Some(range);
            }
            if flights.client.in_flight() == 0 {
                break;
            }
            self.reap(flights, 1)?;
        }
        if whole {
            Tally::count(&self.tally.passes, 1);
        }
        Ok(())
    }

    fn drain(&mut self, flights: &mut Flights) -> Result<(), Failure> {
        while flights.client.in_flight() > 0 {
            self.reap(flights, 1)?;
        }
        Ok(())
    }

    /// Starts one operation; its sectors are free and so is a slot.
    fn begin(&mut self, flights: &mut Flights, op: Op) -> Result<(), Failure> {
        let Op { index, kind, range } = op;
        let (offset, len) = (range.offset_bytes(), range.len_bytes() as usize);
        if len as u64 > self.shared.max_io_bytes {
            Tally::count(&self.tally.longer_than_max_io, 1);
        }
        if kind == OpKind::Discard {
            return self.discard(flights, op);
        }
        let Some(slot) = flights.free.pop() else {
            return Err(Failure::Internal("an operation was begun without a free slot".to_owned()));
        };
        let client = &mut flights.client;
        let ticket = match kind {
            OpKind::Read => {
                client.read(slot, offset, len);
                Some(self.shadow.begin_read(index, range))
            }
            OpKind::Write => {
                let ticket = self.shadow.begin_write(index, range, &mut client.buffer_mut(slot)[..len]);
                client.write(slot, offset, len, WriteFlags::NONE);
                Some(ticket)
            }
            OpKind::WriteFua => {
                let ticket = self.shadow.begin_write_fua(index, range, &mut client.buffer_mut(slot)[..len]);
                client.write(slot, offset, len, WriteFlags::FUA);
                Some(ticket)
            }
            OpKind::WriteZeroes => {
                let unmap = self.unmap_zeroes && index.is_multiple_of(2);
                client.write_zeroes(
                    slot,
                    offset,
                    len as u64,
                    if unmap { ZeroSpace::MayUnmap } else { ZeroSpace::Keep },
                );
                Some(self.shadow.begin_write_zeroes(index, range))
            }
            OpKind::Flush => {
                client.sync_data(slot);
                None
            }
            OpKind::Discard => None,
        };
        flights.ops[usize::from(slot)] = Some(Flight { op, ticket });
        Ok(())
    }

    /// Discards have no io_uring operation on all kernels that matter, so they are done at once, beside what is in flight.
    fn discard(&mut self, flights: &mut Flights, op: Op) -> Result<(), Failure> {
        let ticket = self.shadow.begin_discard(op.index, op.range, self.discard);
        let result = blkdev::discard(flights.client.file(), op.range.offset_bytes(), op.range.len_bytes());
        self.shadow.finish(ticket, if result.is_ok() { Outcome::Done } else { Outcome::Failed });
        result.map_err(|error| self.failed(op, &error))?;
        Tally::count(&self.tally.discards, 1);
        Ok(())
    }

    /// Waits for `want` completions and judges what came.
    fn reap(&mut self, flights: &mut Flights, want: u32) -> Result<(), Failure> {
        flights
            .client
            .submit_and_wait(want, LOOK_AROUND)
            .map_err(|error| Failure::Internal(format!("the io_uring of worker {} failed: {error}", self.index)))?;
        while let Some((slot, result)) = flights.client.next_completion() {
            flights.free.push(slot);
            flights.progressed = true;
            if let Some(range) = flights.passing[usize::from(slot)].take() {
                self.end_pass_read(flights, slot, range, result)?;
            } else if let Some(flight) = flights.ops[usize::from(slot)].take() {
                self.end(flights, slot, flight, result)?;
            }
        }
        flights.rearm(&self.shared);
        Ok(())
    }

    fn end_pass_read(
        &mut self,
        flights: &Flights,
        slot: u16,
        range: SectorRange,
        result: io::Result<usize>,
    ) -> Result<(), Failure> {
        let op = Op { index: 0, kind: OpKind::Read, range };
        self.whole(op, result)?;
        let verified = self.shadow.verify(range, &flights.client.buffer(slot)[..range.len_bytes() as usize])?;
        Tally::count(&self.tally.compared_in_passes, verified.bytes);
        Ok(())
    }

    fn end(
        &mut self,
        flights: &Flights,
        slot: u16,
        flight: Flight,
        result: io::Result<usize>,
    ) -> Result<(), Failure> {
        let Flight { op, ticket } = flight;
        let moved = op.range.len_bytes();
        if let Err(failure) = self.whole(op, result) {
            if let Some(ticket) = ticket {
                self.shadow.finish(ticket, Outcome::Failed);
            }
            return Err(failure);
        }
        match (op.kind, ticket) {
            (OpKind::Read, Some(ticket)) => {
                let verified = self.shadow.finish_read(ticket, &flights.client.buffer(slot)[..moved as usize])?;
                Tally::count(&self.tally.reads, 1);
                Tally::count(&self.tally.read_bytes, moved);
                Tally::count(&self.tally.compared_in_reads, verified.bytes);
            }
            (kind, ticket) => {
                if let Some(ticket) = ticket {
                    self.shadow.finish(ticket, Outcome::Done);
                }
                let (counter, bytes) = match kind {
                    OpKind::Write => (&self.tally.writes, moved),
                    OpKind::WriteFua => (&self.tally.fua_writes, moved),
                    OpKind::WriteZeroes => (&self.tally.zeroes, 0),
                    _ => (&self.tally.flushes, 0),
                };
                Tally::count(counter, 1);
                Tally::count(&self.tally.written_bytes, bytes);
            }
        }
        Ok(())
    }

    /// Every operation here must succeed, and move all of its bytes.
    fn whole(&self, op: Op, result: io::Result<usize>) -> Result<(), Failure> {
        let expected = match op.kind {
            OpKind::Read | OpKind::Write | OpKind::WriteFua => op.range.len_bytes() as usize,
            _ => 0,
        };
        match result {
            Ok(moved) if moved == expected => Ok(()),
            Ok(moved) => Err(Failure::broke(
                "io",
                format!(
                    "worker {}: a {} of {expected} bytes at {} moved only {moved}",
                    self.index,
                    op.kind,
                    op.range.offset_bytes()
                ),
            )),
            Err(error) => Err(self.failed(op, &error)),
        }
    }

    fn failed(&self, op: Op, error: &io::Error) -> Failure {
        Failure::broke(
            "io",
            format!(
                "worker {}: operation {}, a {} of {} bytes at {}, failed: {error}",
                self.index,
                op.index,
                op.kind,
                op.range.len_bytes(),
                op.range.offset_bytes()
            ),
        )
    }
}

/// A worker's operations in flight, and the clock that says when none of them moves any more.
struct Flights {
    client: BlockClient,
    free: Vec<u16>,
    ops: Vec<Option<Flight>>,
    /// Reads of a pass over the whole region.
    passing: Vec<Option<SectorRange>>,
    progressed: bool,
    armed: Instant,
    guard: Option<ublkit_harness::Guard>,
    what: String,
}

impl Flights {
    fn new(client: BlockClient, worker: u32, shared: &Shared) -> Self {
        let slots = usize::from(client.slots());
        let what = format!("an operation of worker {worker}, none of which completed for {STALL:?}");
        Self {
            free: (0..client.slots()).collect(),
            client,
            ops: (0..slots).map(|_| None).collect(),
            passing: vec![None; slots],
            progressed: false,
            armed: Instant::now(),
            guard: Some(shared.watchdog.guard(what.clone(), STALL)),
            what,
        }
    }

    /// Winds the clock up if something completed since.
    fn rearm(&mut self, shared: &Shared) {
        if self.progressed && self.armed.elapsed() >= REARM_EVERY {
            self.guard = None;
            self.guard = Some(shared.watchdog.guard(self.what.clone(), STALL));
            self.armed = Instant::now();
            self.progressed = false;
        }
    }
}
