//! One worker: a stream of operations, many in flight, each checked as it completes.

mod operations;
mod scripted;

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ublkit::BlockClient;
use ublkit_harness::plan::{OpKind, WorkerPlan};
use ublkit_harness::{Op, SECTOR};

use super::book::Book;
use super::device::Opened;
use super::flights::Flights;
use super::scripted::Scripted;
use super::shared::Shared;
use super::tally::Tally;
use crate::scenario::Failure;

/// Passes over the whole region take about one part in this many of a worker's time.
const PASS_SHARE: u32 = 5;
/// Operations between two passes, at least.
const PASS_EVERY: u64 = 500;
/// Operations between two looks at the clock.
const CLOCK_EVERY: u64 = 32;

/// Where a worker's operations come from.
pub(crate) enum Source {
    /// Drawn from a seed, one after another, until a limit is reached.
    Plan(Box<WorkerPlan>),
    /// Its part of a script.
    Script(Arc<Scripted>),
}

/// What a worker is to do, and what it needs for that.
pub(crate) struct Work {
    pub(crate) source: Source,
    /// Operations in flight, at most.
    pub(crate) depth: u16,
    /// The longest of them.
    pub(crate) longest_bytes: usize,
    /// What its region may hold.
    pub(crate) book: Arc<Book>,
    /// Which part of the region it fills before anything else, and of how many.
    pub(crate) part: (u32, u32),
}

/// One worker, and the book of its region.
pub(crate) struct Worker {
    index: u32,
    source: Option<Source>,
    book: Arc<Book>,
    /// Which part of the region it fills before anything else, and of how many.
    part: (u32, u32),
    tally: Arc<Tally>,
    shared: Arc<Shared>,
    file: io::Result<File>,
    depth: u16,
    slot_bytes: usize,
    unmap_zeroes: bool,
    /// An outage is over: the whole region is to be looked at.
    sweep: bool,
}

impl Worker {
    pub(crate) fn new(index: u32, opened: &Opened, work: Work, shared: Arc<Shared>) -> Self {
        let Work { source, depth, longest_bytes, book, part } = work;
        Self {
            index,
            source: Some(source),
            book,
            part,
            tally: shared.tally(index),
            shared,
            file: opened.file.try_clone(),
            depth,
            slot_bytes: longest_bytes,
            unmap_zeroes: opened.unmap_zeroes,
            sweep: false,
        }
    }

    /// Works until a limit is reached, something is wrong, or it is told to end. Then nothing is in flight, and what its
    /// region may hold is known again.
    pub(crate) fn run(mut self) -> Result<(), Failure> {
        let result = self.work();
        if result.is_err() {
            // The first wrong byte ends the run: what the others would find after it says less.
            self.shared.stop();
        }
        if let Some(accounts) = &self.shared.accounts {
            accounts.told(self.index, u64::MAX);
        }
        self.shared.outages.leave();
        result
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
        if self.shared.orders.prefill {
            self.prefill(flights)?;
        }
        let began = Instant::now();
        match self.source.take() {
            Some(Source::Plan(plan)) => self.draw(flights, *plan)?,
            Some(Source::Script(script)) => self.follow(flights, &script)?,
            None => {}
        }
        // Summed over the workers: time in which they drew operations, without setting up and filling before.
        Tally::count(&self.tally.draw_us, began.elapsed().as_micros() as u64);
        if self.shared.orders.passes && !self.shared.stopped() {
            self.pass(flights)?;
        }
        Ok(())
    }

    /// Sectors that a slot has room for, in one request.
    fn chunk(&self) -> u64 {
        self.shared.orders.max_io_bytes.min(self.slot_bytes as u64) / SECTOR as u64
    }

    /// Writes every sector of its part of the region once.
    fn prefill(&mut self, flights: &mut Flights) -> Result<(), Failure> {
        let (part, parts) = self.part;
        let chunks: Vec<_> =
            self.book.region().chunks(self.chunk()).skip(part as usize).step_by(parts as usize).collect();
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
    fn draw(&mut self, flights: &mut Flights, mut plan: WorkerPlan) -> Result<(), Failure> {
        let start = Instant::now();
        let mut in_passes = Duration::ZERO;
        let mut begun = 0u64;
        let mut next_clock = CLOCK_EVERY;
        let mut next_pass = PASS_EVERY;
        let mut held: Option<Op> = None;
        let mut ending = false;
        loop {
            while !ending && !flights.free.is_empty() && !self.shared.outages.is_out() {
                if self.shared.stopped() || self.shared.orders.ops.is_some_and(|ops| begun >= ops) {
                    ending = true;
                    break;
                }
                let Some(op) = held.take().or_else(|| plan.next()) else { break };
                if self.book.has_to_wait(op) {
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
            if self.shared.orders.hang && self.index == 0 && begun > 20 {
                crate::server::never_returns();
            }
            let in_flight = flights.client.in_flight();
            if in_flight == 0 && ending {
                return Ok(());
            }
            // In batches where there are many: one enter for a quarter of them.
            self.reap(flights, (in_flight / 4).max(1))?;
            if begun >= next_clock || self.sweep {
                next_clock = begun + CLOCK_EVERY;
                let now = Instant::now();
                ending |= self.shared.orders.until.is_some_and(|until| now >= until);
                let due = self.shared.orders.passes && begun >= next_pass && in_passes * PASS_SHARE <= now - start;
                if self.sweep || due && !ending {
                    let pass = Instant::now();
                    self.pass(flights)?;
                    in_passes += pass.elapsed();
                    next_pass = begun + PASS_EVERY;
                }
            }
        }
    }

    /// Reads the whole region and compares it. Where operations may not overlap, nothing else is in flight.
    fn pass(&mut self, flights: &mut Flights) -> Result<(), Failure> {
        if !self.book.is_shared() {
            self.drain(flights)?;
        }
        self.sweep = false;
        let mut chunks: Vec<_> = self.book.region().chunks(self.chunk()).collect();
        chunks.reverse();
        let mut whole = true;
        loop {
            while let (Some(&slot), Some(range)) = (flights.free.last(), chunks.last().copied()) {
                if self.shared.stopped() {
                    chunks.clear();
                    whole = false;
                    break;
                }
                if self.shared.outages.is_out() {
                    break;
                }
                flights.free.pop();
                chunks.pop();
                self.begin_pass_read(flights, slot, range);
            }
            if chunks.is_empty() && flights.client.in_flight() == 0 {
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
}
