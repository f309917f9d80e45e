//! The accounts of errors and flushes: what operations were told, against what happened at the storage.
//!
//! Both processes read the same clock. Operations are told as they end; what happened at the storage is fetched from the
//! server now and then. What is older than everything in flight is then settled.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ublkit_harness::errors::{ErrorLedger, ErrorOptions, KERNEL, Seen};
use ublkit_harness::event::{Event, Finding};
use ublkit_harness::flushes::Flushes;
use ublkit_harness::{Evidence, OpId, OpKind};

use super::flights::Flight;
use crate::clock::nanoseconds;
use crate::scenario::Failure;
use crate::target::Target;

/// The accounts of a run.
#[derive(Debug)]
pub(crate) struct Accounts {
    books: Mutex<Books>,
    /// For each worker a moment before which all of its operations have ended and been told.
    told: Vec<AtomicU64>,
    /// Whether operations may fail at all.
    errors: bool,
}

#[derive(Debug)]
struct Books {
    errors: ErrorLedger,
    flushes: Flushes,
    /// Faults of every kind that happened at the storage.
    faults: u64,
}

/// How an operation ended.
#[derive(Clone, Copy, Debug)]
pub(crate) enum End {
    Done,
    Failed(i32),
    /// In an outage.
    CutShort,
}

impl Accounts {
    /// With `errors`, operations may fail as long as something made them.
    pub(crate) fn new(workers: u32, errors: bool, volatile_cache: bool) -> Self {
        // Whoever looks for partitions or file systems uses the device too, and what happened at the storage is told late.
        let options = ErrorOptions { allowances: KERNEL, others: true, calls_late: true };
        let books = Books { errors: ErrorLedger::new(options), flushes: Flushes::new(volatile_cache), faults: 0 };
        Self { books: Mutex::new(books), told: (0..workers).map(|_| AtomicU64::new(0)).collect(), errors }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether operations may fail.
    pub(crate) const fn errors_may_be(&self) -> bool {
        self.errors
    }

    /// An operation has ended.
    pub(crate) fn ended(&self, worker: u32, flight: &Flight, end: End) {
        let flushes = matches!(end, End::Done) && matches!(flight.op.kind, OpKind::Flush | OpKind::WriteFua);
        if !flushes && !self.errors {
            return;
        }
        let (kind, range, began, ended) = (flight.op.kind, flight.op.range, flight.began, nanoseconds());
        let id = OpId { worker, index: flight.op.index };
        let mut books = self.books();
        if flushes {
            books.flushes.acknowledged(id, kind, range, began, ended);
        }
        if self.errors {
            let seen = match end {
                End::Done => Seen::Done,
                End::Failed(errno) => Seen::Failed(errno),
                End::CutShort => Seen::Unknown,
            };
            books.errors.observed(id, kind, range, seen, began, ended);
        }
    }

    /// All operations of a worker that began before `oldest` have ended and been told.
    pub(crate) fn told(&self, worker: u32, oldest: u64) {
        self.told[worker as usize].store(oldest, Ordering::Release);
    }

    /// Faults were switched on or off.
    pub(crate) fn switched(&self, on: bool) {
        let now = nanoseconds();
        let mut books = self.books();
        if on { books.errors.faults_on(now) } else { books.errors.faults_off(now) }
    }

    /// Asks what happened at the storage, and settles what can be settled.
    pub(crate) fn settle(&self, target: &Target) -> Result<(), Failure> {
        // In this order: what began before and was told has ended, and so have the calls made for it.
        let oldest = self.told.iter().map(|told| told.load(Ordering::Acquire)).min().unwrap_or(0);
        self.fetch(target)?;
        let mut books = self.books();
        books.errors.horizon(oldest).map_err(broke)?;
        books.flushes.horizon(oldest).map_err(broke)
    }

    fn fetch(&self, target: &Target) -> Result<(), Failure> {
        let testimony = target.testimony()?;
        let mut books = self.books();
        for call in testimony.calls {
            books.flushes.call(call.kind, call.range, call.began, call.ended, call.ok);
        }
        books.faults += testimony.injections.len() as u64;
        for injection in testimony.injections {
            books.errors.injected(&injection, injection.began, injection.ended);
        }
        Ok(())
    }

    /// All workers have ended: settles everything, and says what there was.
    pub(crate) fn judge(&self, target: &Target) -> Result<Evidence, Failure> {
        self.fetch(target)?;
        let mut books = self.books();
        let mut evidence = Evidence::new();
        books.flushes.judge().map_err(broke)?.add_to(&mut evidence);
        books.errors.judge().map_err(broke)?.add_to(&mut evidence);
        evidence.add("faults", books.faults);
        Ok(evidence)
    }
}

fn broke(finding: Finding) -> Failure {
    Event::Finding(finding).into()
}
