//! The load: workers with many operations in flight, on one region, overlapping as they will.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::libc;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use ublkit::{BlockClient, WriteFlags};
use ublkit_harness::ledger::Ticket;
use ublkit_harness::{OpKind, SectorRange, Seed, SeededRng};

use super::book::{BLOCK_SECTORS, Book};
use super::store::BLOCK;
use super::timeline::{Ended, Judged};
use crate::clock::nanoseconds;
use crate::scenario::Failure;

/// The longest operation, in blocks.
const BLOCKS_MAX: u64 = 4;
/// How many flushes a load has done before it counts as under way.
const FLUSHES: u64 = 2;
/// How long one wait for completions lasts before a worker looks around.
const LOOK_AROUND: Duration = Duration::from_millis(20);
/// How long a worker waits before it tries again where it was turned away.
const AGAIN: Duration = Duration::from_millis(2);
/// How long the last operations may take once the workers were told to end, or the device is gone.
const END_LIMIT: Duration = Duration::from_secs(40);

/// Workers that are at it.
pub(super) struct Load {
    told: Arc<Told>,
    threads: Vec<JoinHandle<Result<(), Failure>>>,
    book: Arc<Book>,
}

/// What workers are told, and say.
#[derive(Default)]
struct Told {
    stop: AtomicBool,
    /// Operations in flight, by their own count.
    in_flight: AtomicU64,
}

/// An operation in flight.
struct Flight {
    ticket: Ticket,
    kind: OpKind,
    range: SectorRange,
    began: u64,
}

struct Worker {
    index: u32,
    rng: SeededRng,
    book: Arc<Book>,
    told: Arc<Told>,
    client: BlockClient,
    flights: Vec<Option<Flight>>,
    operations: u64,
}

/// Opens the device, past the page cache.
pub(super) fn open(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(path)
}

impl Load {
    /// Starts one worker on each of `cpus`, so that each queue has one.
    pub(super) fn start(
        path: &Path,
        book: &Arc<Book>,
        cpus: &[usize],
        io_depth: u16,
        seed: Seed,
    ) -> Result<Self, Failure> {
        let mut this = Self { told: Arc::default(), threads: Vec::new(), book: Arc::clone(book) };
        for (index, &cpu) in cpus.iter().enumerate() {
            let file = open(path).map_err(|error| Failure::io(format_args!("open {}", path.display()), &error))?;
            let (told, book) = (Arc::clone(&this.told), Arc::clone(book));
            let rng = seed.derive("worker", index as u64).rng();
            let run = move || {
                // Where it may not choose, it runs anywhere, and fills the queues all the same, if less surely.
                let mut set = CpuSet::new();
                let _ = set.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
                let client = BlockClient::new(file, io_depth, BLOCKS_MAX as usize * BLOCK)
                    .map_err(|error| Failure::Environment(format!("failed to set up I/O for a worker: {error}")))?;
                let flights = (0..io_depth).map(|_| None).collect();
                Worker { index: index as u32, rng, book, told, client, flights, operations: 0 }.run()
            };
            let thread = std::thread::Builder::new()
                .name(format!("load-{index}"))
                .spawn(run)
                .map_err(|error| Failure::Environment(format!("failed to start a thread: {error}")))?;
            this.threads.push(thread);
        }
        Ok(this)
    }

    /// Waits until so many more operations were done, two flushes among them: what was never flushed is promised to nobody.
    pub(super) fn warm_up(&self, operations: u64) -> Result<(), Failure> {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let tally = &self.book.tally;
        let (done, flushed) = (count(&tally.done) + operations, count(&tally.flushed) + FLUSHES);
        self.wait_until(&format!("{operations} more operations and {FLUSHES} flushes were done"), || {
            count(&tally.done) >= done && count(&tally.flushed) >= flushed
        })
    }

    /// Operations in flight now.
    pub(super) fn in_flight(&self) -> u64 {
        self.told.in_flight.load(Ordering::Relaxed)
    }

    /// Waits for something that the workers bring about, for as long as they are at it.
    pub(super) fn wait_until(&self, what: &str, there: impl Fn() -> bool) -> Result<(), Failure> {
        let deadline = Instant::now() + END_LIMIT;
        while !there() {
            if self.threads.iter().any(JoinHandle::is_finished) {
                // One that has ended says why when it is joined; without a word it met a dead disk.
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Failure::Hang(format!(
                    "{what}: not within {END_LIMIT:?}; {} operations are in flight",
                    self.in_flight()
                )));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Tells the workers to end, and waits for what they have in flight.
    pub(super) fn stop(self) -> Result<(), Failure> {
        self.told.stop.store(true, Ordering::Relaxed);
        self.join()
    }

    /// Waits for workers whose device is gone.
    pub(super) fn join(mut self) -> Result<(), Failure> {
        let deadline = Instant::now() + END_LIMIT;
        while !self.threads.iter().all(JoinHandle::is_finished) {
            if Instant::now() >= deadline {
                return Err(Failure::Hang(format!(
                    "{} operations have not ended within {END_LIMIT:?}",
                    self.in_flight()
                )));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let results = self.threads.drain(..).map(|thread| {
            thread.join().unwrap_or_else(|_panic| Err(Failure::Internal("a worker panicked".to_owned())))
        });
        results.collect::<Vec<_>>().into_iter().collect()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        // Threads that are left behind end with their I/O, and that ends with the device.
        self.told.stop.store(true, Ordering::Relaxed);
    }
}

impl Worker {
    fn run(mut self) -> Result<(), Failure> {
        let result = self.work();
        if result.is_err() {
            self.told.stop.store(true, Ordering::Relaxed);
            self.settle();
        }
        result
    }

    fn work(&mut self) -> Result<(), Failure> {
        let mut dead = false;
        loop {
            let stop = dead || self.told.stop.load(Ordering::Relaxed);
            while !stop && let Some(slot) = self.flights.iter().position(Option::is_none) {
                self.begin(slot as u16);
            }
            if self.client.in_flight() == 0 {
                return Ok(());
            }
            self.client.submit_and_wait(1, LOOK_AROUND).map_err(|error| {
                Failure::Internal(format!("the io_uring of worker {} failed: {error}", self.index))
            })?;
            let mut refused = false;
            while let Some((slot, result)) = self.client.next_completion() {
                match self.end(slot, result)? {
                    Judged::Refused => refused = true,
                    Judged::InFlight => dead |= self.book.timeline().mode == super::mode::Mode::None,
                    _ => {}
                }
            }
            if self.book.timeline().ending.is_some() {
                dead = true;
            }
            if refused {
                std::thread::sleep(AGAIN);
            }
        }
    }

    fn begin(&mut self, slot: u16) {
        let kind = match self.rng.below(16) {
            0..5 => OpKind::Read,
            5..13 => OpKind::Write,
            13..15 => OpKind::WriteFua,
            // The kernel sends a queue one flush at a time: a second one would have a tag that no server ever sees.
            _ if self.flights.iter().flatten().any(|flight| flight.kind == OpKind::Flush) => OpKind::Write,
            _ => OpKind::Flush,
        };
        let blocks = self.rng.within(1..=BLOCKS_MAX);
        let first = self.rng.below(self.book.bytes / BLOCK as u64 - blocks + 1);
        let range = match kind {
            OpKind::Flush => SectorRange::new(0, 0),
            _ => SectorRange::new(first * BLOCK_SECTORS, blocks * BLOCK_SECTORS),
        };
        let (offset, len) = (range.offset_bytes(), range.len_bytes() as usize);
        let payload = match kind {
            OpKind::Write | OpKind::WriteFua => &mut self.client.buffer_mut(slot)[..len],
            _ => &mut [],
        };
        let began = nanoseconds();
        let ticket = self.book.begin(self.index, self.operations, kind, range, payload);
        self.operations += 1;
        match kind {
            OpKind::Write => self.client.write(slot, offset, len, WriteFlags::NONE),
            OpKind::WriteFua => self.client.write(slot, offset, len, WriteFlags::FUA),
            OpKind::Read => self.client.read(slot, offset, len),
            _ => self.client.sync_data(slot),
        }
        self.told.in_flight.fetch_add(1, Ordering::Relaxed);
        self.flights[usize::from(slot)] = Some(Flight { ticket, kind, range, began });
    }

    fn end(&mut self, slot: u16, result: io::Result<usize>) -> Result<Judged, Failure> {
        self.told.in_flight.fetch_sub(1, Ordering::Relaxed);
        let Some(Flight { ticket, kind, range, began }) = self.flights[usize::from(slot)].take() else {
            return Err(Failure::Internal("a slot completed that had nothing in flight".to_owned()));
        };
        let whole = range.len_bytes() as usize;
        let how = match result {
            Ok(moved) if moved == whole => Ended::Done,
            Ok(_) => Ended::Short,
            Err(error) => Ended::Failed(error.raw_os_error().unwrap_or(libc::EIO)),
        };
        let data = match (kind, how) {
            (OpKind::Read, Ended::Done) => &self.client.buffer(slot)[..whole],
            _ => &[],
        };
        self.book.end(ticket, kind, began, how, data)
    }

    /// Sees what is in flight to its end after something went wrong, without judging it.
    fn settle(&mut self) {
        let deadline = Instant::now() + END_LIMIT;
        while self.client.in_flight() > 0 && Instant::now() < deadline {
            if self.client.submit_and_wait(1, LOOK_AROUND).is_err() {
                return;
            }
            while let Some((slot, result)) = self.client.next_completion() {
                let _ = self.end(slot, result);
            }
        }
    }
}
