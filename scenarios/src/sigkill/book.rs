//! What the device may hold, across the deaths of its servers.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ublkit_harness::ledger::Ticket;
use ublkit_harness::{
    DiscardPromise, Ledger, LedgerOptions, Mismatch, OpId, OpKind, Oracles, Outcome, Pattern, SECTOR, SectorRange,
    Seed,
};

use super::mode::Mode;
use super::store::BLOCK;
use super::timeline::{Ended, Judged, Timeline};
use crate::aligned::AlignedBuf;
use crate::clock::nanoseconds;
use crate::scenario::Failure;

/// Sectors in a block.
pub(super) const BLOCK_SECTORS: u64 = (BLOCK / SECTOR) as u64;
/// How much is read at once when everything is.
const CHUNK_BYTES: u64 = 256 << 10;
/// Whose operations those are that belong to no worker.
const DIRECTOR: u32 = u32::MAX;

/// What the operations of a cell came to.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) done: AtomicU64,
    /// Of those, flushes.
    pub(super) flushed: AtomicU64,
    /// Of those, the ones that were in flight while nobody served.
    pub(super) survived: AtomicU64,
    pub(super) failed: AtomicU64,
    /// Of those, writes and flushes.
    pub(super) failed_changes: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) verified_bytes: AtomicU64,
}

/// The book of one device: what it may hold, and what may become of operations.
#[derive(Debug)]
pub(super) struct Book {
    ledger: Mutex<Ledger>,
    timeline: Mutex<Timeline>,
    /// Writes that failed while the server's process may still have been at them.
    limbo: Mutex<Vec<Ticket>>,
    pub(super) tally: Tally,
    pub(super) bytes: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Book {
    pub(super) fn new(mode: Mode, bytes: u64, seed: Seed) -> Self {
        let sectors = bytes / SECTOR as u64;
        let ledger = Ledger::new(LedgerOptions {
            region: SectorRange::new(0, sectors),
            block_sectors: BLOCK_SECTORS as u32,
            pattern: Arc::new(Pattern::new(seed, 0)),
            foreign: Arc::new([]),
            device_sectors: sectors,
            initially_zero: true,
            discard: DiscardPromise::Nothing,
            // A disk that is pulled may lose what was not flushed. One that goes on has to have everything.
            volatile_cache: mode == Mode::None,
            torn_by_races: false,
            oracles: Oracles::ALL,
        });
        Self {
            ledger: Mutex::new(ledger),
            timeline: Mutex::new(Timeline::new(mode)),
            limbo: Mutex::default(),
            tally: Tally::default(),
            bytes,
        }
    }

    pub(super) fn timeline(&self) -> MutexGuard<'_, Timeline> {
        lock(&self.timeline)
    }

    pub(super) fn begin(&self, worker: u32, index: u64, kind: OpKind, range: SectorRange, data: &mut [u8]) -> Ticket {
        lock(&self.ledger).begin(OpId { worker, index }, kind, range, data)
    }

    /// Ends an operation that began at `began`. `data` is what a read returned.
    pub(super) fn end(
        &self,
        ticket: Ticket,
        kind: OpKind,
        began: u64,
        how: Ended,
        data: &[u8],
    ) -> Result<Judged, Failure> {
        let ended = nanoseconds();
        let (judged, at_large) = {
            let timeline = self.timeline();
            let at_large = timeline.open().is_some_and(|death| death.gone.is_none());
            (timeline.judge(began, ended, how), at_large)
        };
        let tally = &self.tally;
        match how {
            Ended::Done if kind == OpKind::Read => {
                let verified = lock(&self.ledger).end_read(ticket, data)?;
                tally.verified_bytes.fetch_add(verified.bytes, Ordering::Relaxed);
            }
            Ended::Done => lock(&self.ledger).end(ticket, Outcome::Done),
            // Its server may be at it still.
            _ if at_large && kind != OpKind::Read => lock(&self.limbo).push(ticket),
            _ => lock(&self.ledger).end(ticket, Outcome::Failed),
        }
        if kind == OpKind::Flush && how == Ended::Done {
            tally.flushed.fetch_add(1, Ordering::Relaxed);
        }
        let counter = match judged {
            Judged::Fine | Judged::Wrong(_) => &tally.done,
            Judged::Survived => {
                tally.done.fetch_add(1, Ordering::Relaxed);
                &tally.survived
            }
            Judged::InFlight => {
                tally.failed_changes.fetch_add(u64::from(kind != OpKind::Read), Ordering::Relaxed);
                &tally.failed
            }
            Judged::Refused => &tally.refused,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        match judged {
            Judged::Wrong(why) => {
                let how = match how {
                    Ended::Done => "was done".to_owned(),
                    Ended::Short => "was done in part".to_owned(),
                    Ended::Failed(errno) => format!("failed with {}", nix::errno::Errno::from_raw(errno)),
                };
                let detail = vec![
                    format!("it began at {began} ns and its end was seen at {ended} ns"),
                    format!("{:?}", *self.timeline()),
                ];
                Err(Failure::broke_with("sigkill", format!("a {kind} {how}: {why}"), detail))
            }
            judged => Ok(judged),
        }
    }

    /// The server is dead: what failed because of that is decided.
    pub(super) fn settle(&self) {
        let limbo = std::mem::take(&mut *lock(&self.limbo));
        let mut ledger = lock(&self.ledger);
        for ticket in limbo {
            ledger.end(ticket, Outcome::Failed);
        }
    }

    /// The server is dead, and what it had in hand is given to the next one.
    pub(super) fn reissued(&self) {
        lock(&self.ledger).reissued();
    }

    /// The device died with its server, and nothing is in flight any more.
    pub(super) fn pulled(&self) -> Result<(), Failure> {
        self.settle();
        let mut ledger = lock(&self.ledger);
        match ledger.in_flight() {
            0 => {
                ledger.power_cut();
                Ok(())
            }
            left => Err(Failure::Internal(format!("{left} operations are in flight on a device that is gone"))),
        }
    }

    /// Writes something to all of the storage, before there is a device: what was there, and made to last, long ago.
    pub(super) fn fill(&self, storage: &File) -> Result<(), Failure> {
        let mut buf = vec![0; CHUNK_BYTES as usize];
        for range in self.chunks() {
            let data = &mut buf[..range.len_bytes() as usize];
            let ticket = self.begin(DIRECTOR, 0, OpKind::Write, range, data);
            storage
                .write_all_at(data, range.offset_bytes())
                .map_err(|error| Failure::Environment(format!("failed to fill the storage: {error}")))?;
            lock(&self.ledger).end(ticket, Outcome::Done);
        }
        let flush = self.begin(DIRECTOR, 0, OpKind::Flush, SectorRange::new(0, 0), &mut []);
        lock(&self.ledger).end(flush, Outcome::Done);
        Ok(())
    }

    /// Reads all of the device, or of its storage, and compares it.
    pub(super) fn verify(&self, what: &str, file: &File) -> Result<(), Failure> {
        let mut buf = AlignedBuf::zeroed(CHUNK_BYTES as usize);
        for range in self.chunks() {
            let data = &mut buf[..range.len_bytes() as usize];
            let ticket = self.begin(DIRECTOR, 0, OpKind::Read, range, &mut []);
            if let Err(error) = file.read_exact_at(data, range.offset_bytes()) {
                lock(&self.ledger).end(ticket, Outcome::Failed);
                return Err(Failure::io(format_args!("read {what} at {}", range.offset_bytes()), &error));
            }
            let verified = lock(&self.ledger).end_read(ticket, data).map_err(|mut mismatch: Box<Mismatch>| {
                mismatch.op = None;
                mismatch
            })?;
            self.tally.verified_bytes.fetch_add(verified.bytes, Ordering::Relaxed);
        }
        Ok(())
    }

    fn chunks(&self) -> impl Iterator<Item = SectorRange> {
        SectorRange::new(0, self.bytes / SECTOR as u64).chunks(CHUNK_BYTES / SECTOR as u64)
    }
}
