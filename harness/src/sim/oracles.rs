//! The oracles of a simulated run, and what each is told. Everything that is observed passes through here.

use std::sync::Arc;

use crate::event::{Event, Finding, Hang};
use crate::mismatch::Mismatch;
use crate::oracle::{Oracle, Oracles};
use crate::outcome::Outcome;
use crate::plan::OpKind;
use crate::range::SectorRange;
use crate::script::Setup;
use crate::sector::{Pattern, SECTOR};
use crate::seed::Seed;
use crate::shadow::{DiscardPromise, Verified};
use crate::sim::calls::{Call, CallLog};
pub(crate) use crate::sim::stub::{Ledger, LedgerOptions, OpId, Ticket};
use crate::stamp::Stamp;

/// What a run ended with, and whose operation it was.
pub(crate) type Failure = Box<(Oracle, Event, Option<OpId>)>;

/// An operation as the oracles know it while it is in flight.
#[derive(Debug)]
pub(crate) struct Watched {
    ticket: Ticket,
    /// When it began, by the clock of the calls.
    began: Stamp,
}

/// How an operation of the application ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ended {
    pub(crate) op: OpId,
    pub(crate) kind: OpKind,
    pub(crate) range: SectorRange,
    /// 0 for success.
    pub(crate) errno: i32,
}

/// All oracles of a run.
#[derive(Debug)]
pub(crate) struct Judges {
    oracles: Oracles,
    ledger: Ledger,
    clock: CallLog,
}

impl Judges {
    pub(crate) fn new(
        setup: &Setup,
        seed: Seed,
        oracles: Oracles,
        foreign: Arc<[Pattern]>,
        initially_zero: bool,
        clock: Option<CallLog>,
    ) -> Self {
        let region = SectorRange::device(setup.bytes);
        let ledger = Ledger::new(LedgerOptions {
            region,
            block_sectors: setup.logical_block / SECTOR as u32,
            pattern: Arc::new(Pattern::new(seed, 0)),
            foreign,
            device_sectors: region.sectors,
            initially_zero,
            discard: if setup.discard_zeroes { DiscardPromise::Zeroes } else { DiscardPromise::Nothing },
            volatile_cache: setup.volatile_cache,
            torn_by_races: false,
            oracles,
        });
        Self { oracles, ledger, clock: clock.unwrap_or_default() }
    }

    /// An operation of the application begins; fills the payload of a write.
    pub(crate) fn observe_begin(
        &mut self,
        op: OpId,
        kind: OpKind,
        range: SectorRange,
        payload: &mut [u8],
    ) -> Watched {
        Watched { ticket: self.ledger.begin(op, kind, range, payload), began: self.clock.tick() }
    }

    /// An operation of the application ended; a read that was right returned `data`.
    pub(crate) fn observe_end(&mut self, watched: Watched, ended: Ended, data: &[u8]) -> Result<Verified, Failure> {
        let Watched { ticket, began } = watched;
        let now = self.clock.tick();
        self.observe_result(ended, began, now);
        match (ended.errno, ended.kind) {
            (0, OpKind::Read) => {
                return self.ledger.end_read(ticket, data).map_err(|mismatch| wrong(ended.op, mismatch));
            }
            (0, _) => self.ledger.end(ticket, Outcome::Done),
            _ => self.ledger.end(ticket, Outcome::Failed),
        }
        Ok(Verified::default())
    }

    /// An operation of the application will not be heard of again.
    pub(crate) fn observe_lost(&mut self, watched: Watched) {
        self.ledger.end(watched.ticket, Outcome::Unknown);
    }

    /// The result that the application saw, for the oracles of errors and of flushes.
    #[expect(clippy::unused_self, reason = "where other oracles are told")]
    fn observe_result(&mut self, ended: Ended, began: Stamp, now: Stamp) {
        let _ = (ended, began, now);
    }

    /// A call that reached the storage, for the oracles of errors and of flushes.
    #[expect(clippy::unused_self, reason = "where other oracles are told")]
    pub(crate) fn observe_call(&mut self, call: Call) {
        let _ = call;
    }

    /// The calls that reached the storage since the last time.
    pub(crate) fn observe_calls(&mut self) {
        let clock = self.clock.clone();
        clock.drain(|call| self.observe_call(call));
    }

    /// The power was cut and is back. Nothing is in flight.
    pub(crate) fn observe_power_cut(&mut self) {
        self.ledger.power_cut();
    }

    /// The run is over, and everything has ended: what the oracles of errors and of flushes have to say.
    #[expect(clippy::unnecessary_wraps, reason = "where other oracles judge")]
    pub(crate) fn observe_finish(&mut self) -> Result<(), Failure> {
        self.observe_calls();
        Ok(())
    }

    /// Something is not given back, or not kept, unless nobody is to judge that.
    pub(crate) fn resources(&self, what: &str, detail: Vec<String>) -> Result<(), Failure> {
        if !self.oracles.has(Oracle::Resources) {
            return Ok(());
        }
        let finding = Finding { oracle: Oracle::Resources.name().to_owned(), what: what.to_owned(), detail };
        Err(Box::new((Oracle::Resources, Event::Finding(finding), None)))
    }

    /// Something does not end. The run does, whoever judges.
    pub(crate) fn hang(&self, what: String, notes: Vec<String>, op: Option<OpId>) -> Option<Failure> {
        let hang = Hang { what, deadline_ms: 0, threads: Vec::new(), notes };
        self.oracles.has(Oracle::Watchdog).then(|| Box::new((Oracle::Watchdog, Event::Hang(hang), op)))
    }
}

fn wrong(op: OpId, mismatch: Box<Mismatch>) -> Failure {
    let oracle = mismatch.oracle();
    Box::new((oracle, Event::Mismatch(mismatch), Some(op)))
}
