//! One of the threads, and what all of them share.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ublkit::{Backend, Geometry, WriteFlags, ZeroFlags};

use super::super::watch::panic_words;
use super::super::{Check, Factory};
use super::Field;
use crate::bundle::Failure;
use crate::event::{Event, Finding};
use crate::ledger::{Ledger, LedgerOptions, OpId};
use crate::oracle::{Oracle, Oracles};
use crate::outcome::Outcome;
use crate::plan::OpKind;
use crate::range::SectorRange;
use crate::sector::{Pattern, SECTOR};
use crate::seed::{Seed, SeededRng};
use crate::shadow::DiscardPromise;
use crate::vacuity::Evidence;

/// What all threads share.
#[derive(Debug)]
pub(super) struct Shared {
    ledger: Mutex<Books>,
    calls: AtomicU64,
    over: AtomicBool,
}

#[derive(Debug)]
struct Books {
    ledger: Ledger,
    verified_bytes: u64,
    overlaps: u64,
    failure: Option<Failure>,
    /// What each thread is at.
    at: Vec<Option<String>>,
}

/// One thread.
pub(super) struct Caller {
    backend: Arc<dyn Backend>,
    shared: Arc<Shared>,
    worker: u32,
    index: u64,
    block: u64,
    field: Field,
    /// The largest discard and the largest zeroing, in blocks.
    most: (u64, u64),
    rng: SeededRng,
    data: Vec<u8>,
}

impl<F: Factory<M>, M> Check<F, M> {
    /// What is known of the blocks that are raced for.
    pub(super) fn ledger_options(&self, seed: Seed, geometry: Geometry, field: &Field) -> LedgerOptions {
        let block_sectors = geometry.logical_block / SECTOR as u32;
        LedgerOptions {
            region: SectorRange::new(0, field.blocks * u64::from(block_sectors)),
            block_sectors,
            pattern: Arc::new(Pattern::new(seed, 0)),
            foreign: Arc::new([]),
            device_sectors: geometry.sectors(),
            initially_zero: self.initially_zero(),
            discard: if self.discard_reads_zeroes { DiscardPromise::Zeroes } else { DiscardPromise::Nothing },
            volatile_cache: geometry.volatile_cache,
            torn_by_races: self.torn_by_races,
            oracles: Oracles::ALL,
        }
    }
}

impl Shared {
    pub(super) fn new(options: LedgerOptions) -> Self {
        let ledger = Ledger::new(options);
        let books = Books { ledger, verified_bytes: 0, overlaps: 0, failure: None, at: Vec::new() };
        Self { ledger: Mutex::new(books), calls: AtomicU64::new(0), over: AtomicBool::new(false) }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many calls have ended.
    pub(super) fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// The calls that have not ended.
    pub(super) fn in_flight(&self) -> Vec<String> {
        self.books().at.iter().flatten().cloned().collect()
    }

    /// What was done, or what was wrong.
    pub(super) fn result(&self) -> Result<Evidence, Box<Failure>> {
        let mut books = self.books();
        if let Some(failure) = books.failure.take() {
            return Err(Box::new(failure));
        }
        let mut evidence = Evidence::new();
        evidence.add("thread_calls", self.calls());
        evidence.add("thread_overlaps", books.overlaps);
        evidence.add("verified_bytes", books.verified_bytes);
        Ok(evidence)
    }
}

impl Caller {
    pub(super) fn new(
        backend: &Arc<dyn Backend>,
        shared: &Arc<Shared>,
        seed: Seed,
        worker: u32,
        geometry: Geometry,
        field: &Field,
    ) -> Self {
        let block = u64::from(geometry.logical_block);
        let blocks = |most: Option<u64>| (most.unwrap_or(0) / block).max(1);
        let most = (blocks(geometry.discard.map(|limits| limits.max_bytes)), blocks(geometry.write_zeroes));
        Self {
            backend: Arc::clone(backend),
            shared: Arc::clone(shared),
            worker,
            index: 0,
            block,
            field: field.clone(),
            most,
            rng: seed.derive("caller", worker.into()).rng(),
            data: Vec::new(),
        }
    }

    /// Makes so many calls, or as many as there are until something is wrong.
    pub(super) fn calls(&mut self, calls: u64) {
        for _ in 0..calls {
            if self.shared.over.load(Ordering::Relaxed) {
                break;
            }
            let (kind, range) = self.draw();
            self.call(kind, range);
        }
    }

    /// Reads everything, when nobody else is there.
    pub(super) fn sweep(&mut self) {
        let unit = self.block / SECTOR as u64;
        for block in 0..self.field.blocks {
            if !self.shared.over.load(Ordering::Relaxed) {
                self.call(OpKind::Read, SectorRange::new(block * unit, unit));
            }
        }
    }

    fn draw(&mut self) -> (OpKind, SectorRange) {
        let Self { rng, field, .. } = self;
        // Reads and writes are two thirds of what is done; the rest is shared by all kinds.
        let kind = match rng.below(6) {
            0 | 1 => OpKind::Read,
            2 | 3 if field.kinds.contains(&OpKind::Write) => OpKind::Write,
            _ => rng.pick(&field.kinds).copied().unwrap_or(OpKind::Read),
        };
        if kind == OpKind::Flush {
            return (kind, SectorRange::default());
        }
        let most = match kind {
            OpKind::Discard => field.longest.min(self.most.0),
            OpKind::WriteZeroes => field.longest.min(self.most.1),
            _ => field.longest,
        };
        let blocks = if rng.chance(1, 2) { 1 } else { rng.within(1..=most) };
        // Half of it within a few blocks, where threads meet.
        let room = field.blocks - blocks;
        let first = if rng.chance(1, 2) { rng.within(0..=room.min(7)) } else { rng.within(0..=room) };
        let unit = self.block / SECTOR as u64;
        (kind, SectorRange::new(first * unit, blocks * unit))
    }

    fn call(&mut self, kind: OpKind, range: SectorRange) {
        let op = OpId { worker: self.worker, index: self.index };
        self.index += 1;
        let (offset, len) = (range.offset_bytes(), range.len_bytes());
        let moves = matches!(kind, OpKind::Read | OpKind::Write | OpKind::WriteFua);
        self.data.resize(if moves { len as usize } else { 0 }, 0);
        let ticket = {
            let mut books = self.shared.books();
            let at = self.worker as usize;
            if books.at.len() <= at {
                books.at.resize(at + 1, None);
            }
            books.at[at] = Some(format!("{kind} {range}"));
            books.overlaps += u64::from(books.ledger.overlaps_in_flight(range, kind));
            books.ledger.begin(op, kind, range, &mut self.data)
        };
        let (backend, data) = (&self.backend, &mut self.data);
        let no_unmap = self.rng.chance(1, 2);
        let result = catch_unwind(AssertUnwindSafe(|| match kind {
            OpKind::Read => backend.read_at(data, offset),
            OpKind::Write => backend.write_at(data, offset, WriteFlags::NONE),
            OpKind::WriteFua => backend.write_at(data, offset, WriteFlags::FUA),
            OpKind::Flush => backend.flush(),
            OpKind::Discard => backend.discard(offset, len),
            OpKind::WriteZeroes => {
                backend.write_zeroes(offset, len, if no_unmap { ZeroFlags::NO_UNMAP } else { ZeroFlags::NONE })
            }
        }));
        let mut books = self.shared.books();
        books.at[self.worker as usize] = None;
        let calls = self.shared.calls.fetch_add(1, Ordering::Relaxed);
        let failure = match result {
            Ok(Ok(())) if kind == OpKind::Read => match books.ledger.end_read(ticket, &self.data) {
                Ok(verified) => {
                    books.verified_bytes += verified.bytes;
                    None
                }
                Err(mismatch) => Some((mismatch.oracle, Event::Mismatch(mismatch))),
            },
            Ok(Ok(())) => {
                books.ledger.end(ticket, Outcome::Done);
                None
            }
            Ok(Err(error)) => {
                books.ledger.end(ticket, Outcome::Failed);
                Some(failed(kind, range, &error))
            }
            Err(panic) => {
                books.ledger.end(ticket, Outcome::Failed);
                let words = panic_words(&*panic);
                Some(failed(kind, range, &io::Error::other(format!("it panicked: {words}"))))
            }
        };
        if let Some((oracle, event)) = failure {
            self.shared.over.store(true, Ordering::Relaxed);
            books.failure.get_or_insert(Failure { oracle, event, after_ops: calls });
        }
    }
}

fn failed(kind: OpKind, range: SectorRange, error: &io::Error) -> (Oracle, Event) {
    let what = format!("{kind} {range} failed, and nothing was made to fail: {error}");
    let finding = Finding { oracle: Oracle::Errors.name().to_owned(), what, detail: Vec::new() };
    (Oracle::Errors, Event::Finding(finding))
}
