//! The oracles of a simulated run, and what each is told. Everything that is observed passes through here.

use std::sync::Arc;

use crate::errors::{ErrorLedger, ErrorOptions, Seen};
use crate::event::{Event, Finding, Hang};
use crate::fault::{Faults, Injection};
use crate::flushes::Flushes;
use crate::ledger::{Ledger, LedgerOptions, OpId, Ticket};
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
use crate::sim::driver::Bio;
use crate::stamp::Stamp;
use crate::vacuity::Evidence;

/// After how many operations it is looked what can be judged for good.
const HORIZON: u32 = 256;

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
    /// The error is the driver's own, as when a server died.
    pub(crate) excused: bool,
}

impl Ended {
    pub(crate) fn of(bio: &Bio) -> Self {
        Self { op: bio.id, kind: bio.kind, range: bio.range, errno: bio.errno, excused: bio.excused }
    }
}

/// All oracles of a run.
#[derive(Debug)]
pub(crate) struct Judges {
    oracles: Oracles,
    ledger: Ledger,
    clock: CallLog,
    faults: Option<Faults>,
    /// `None` where nobody is to judge errors.
    errors: Option<ErrorLedger>,
    /// `None` where nobody is to judge what it finds.
    flushes: Option<Flushes>,
    /// When operations in flight began, and how many have ended since it was last looked.
    in_flight: Vec<Stamp>,
    ended: u32,
    /// How many faults were made.
    injections: u64,
    /// `None` where errors are made in the calls for operations, and nowhere else.
    below: Option<Below>,
}

/// Errors in the storage below a backend.
#[derive(Clone, Copy, Debug, Default)]
struct Below {
    count: u64,
    /// When the last one was made.
    last: Stamp,
    /// When the last flush was begun that succeeded.
    flushed: Stamp,
}

impl Below {
    /// Whether an operation that began at `began` may fail because of one. A flush may be where an earlier one is told of.
    fn excuses(&self, kind: OpKind, began: Stamp) -> bool {
        self.count > 0 && (self.last >= began || kind == OpKind::Flush && self.last > self.flushed)
    }
}

impl Judges {
    pub(crate) fn new(
        setup: &Setup,
        seed: Seed,
        oracles: Oracles,
        foreign: Arc<[Pattern]>,
        initially_zero: bool,
        clock: Option<CallLog>,
        faults: Option<Faults>,
    ) -> Self {
        let region = SectorRange::device(setup.bytes);
        let ledger = Ledger::new(LedgerOptions {
            region,
            block_sectors: setup.logical_block / SECTOR as u32,
            pattern: Arc::new(setup.pattern(seed, 0)),
            foreign,
            device_sectors: region.sectors,
            initially_zero,
            discard: if setup.discard_zeroes { DiscardPromise::Zeroes } else { DiscardPromise::Nothing },
            volatile_cache: setup.volatile_cache,
            torn_by_races: false,
            oracles,
        });
        let errors = oracles.has(Oracle::Errors).then(|| ErrorLedger::new(ErrorOptions::default()));
        // Without calls to look at there is nothing to hold what is acknowledged against.
        let judged = clock.is_some() && (oracles.has(Oracle::Flush) || oracles.has(Oracle::Linear));
        let flushes = judged.then(|| Flushes::new(setup.volatile_cache));
        let clock = clock.unwrap_or_default();
        if !judged {
            clock.switch_off();
        }
        Self {
            oracles,
            ledger,
            clock,
            faults,
            errors,
            flushes,
            in_flight: Vec::new(),
            ended: 0,
            injections: 0,
            below: None,
        }
    }

    /// Errors are made in the storage below the backend. Nobody has to see those, and who does is not known beforehand.
    pub(crate) fn expect_errors_below(&mut self) {
        self.below = Some(Below::default());
    }

    /// An operation of the application begins; fills the payload of a write.
    pub(crate) fn observe_begin(
        &mut self,
        op: OpId,
        kind: OpKind,
        range: SectorRange,
        payload: &mut [u8],
    ) -> Watched {
        let watched = Watched { ticket: self.ledger.begin(op, kind, range, payload), began: self.clock.tick() };
        self.in_flight.push(watched.began);
        watched
    }

    /// An operation of the application ended; a read that was right returned `data`.
    pub(crate) fn observe_end(&mut self, watched: Watched, ended: Ended, data: &[u8]) -> Result<Verified, Failure> {
        let Watched { ticket, began } = watched;
        let now = self.clock.tick();
        let seen = if ended.errno == 0 { Seen::Done } else { Seen::Failed(ended.errno) };
        self.observe_result(ended, seen, began, now);
        self.observe_horizon()?;
        match (ended.errno, ended.kind) {
            (0, OpKind::Read) => {
                return self.ledger.end_read(ticket, data).map_err(|mismatch| wrong(ended.op, mismatch));
            }
            (0, _) => self.ledger.end(ticket, Outcome::Done),
            _ => self.ledger.end(ticket, Outcome::Failed),
        }
        Ok(Verified::default())
    }

    /// An operation of the application will not be heard of again: the power was cut.
    pub(crate) fn observe_lost(&mut self, watched: Watched, ended: Ended) {
        let now = self.clock.tick();
        self.observe_result(ended, Seen::Unknown, watched.began, now);
        self.ledger.end(watched.ticket, Outcome::Unknown);
    }

    /// The result that the application saw, for the oracles of errors and of flushes.
    fn observe_result(&mut self, ended: Ended, seen: Seen, began: Stamp, now: Stamp) {
        if let Some(at) = self.in_flight.iter().position(|other| *other == began) {
            self.in_flight.swap_remove(at);
        }
        if let (Some(flushes), Seen::Done) = (&mut self.flushes, seen) {
            flushes.acknowledged(ended.op, ended.kind, ended.range, began, now);
        }
        if let (Some(below), OpKind::Flush, Seen::Done) = (&mut self.below, ended.kind, seen) {
            below.flushed = below.flushed.max(began);
        }
        let Some(errors) = &mut self.errors else { return };
        if ended.excused {
            errors.excuse(ended.op, None, "the driver itself");
        } else if matches!(seen, Seen::Failed(_)) && self.below.is_some_and(|below| below.excuses(ended.kind, began))
        {
            errors.excuse(ended.op, None, "an error of its storage");
        }
        errors.observed(ended.op, ended.kind, ended.range, seen, began, now);
    }

    /// Now and then: what can be judged for good.
    fn observe_horizon(&mut self) -> Result<(), Failure> {
        self.ended += 1;
        if self.ended < HORIZON {
            return Ok(());
        }
        self.ended = 0;
        let now = self.clock.tick();
        let oldest = self.in_flight.iter().copied().min().unwrap_or(now);
        // Errors first: one that was swallowed says more than that something was not done.
        let errors = self.errors.as_mut().map_or(Ok(()), |errors| errors.horizon(oldest));
        errors.map_err(|finding| found(Oracle::Errors, finding))?;
        self.judge_flushes(oldest)
    }

    /// What was acknowledged and is not right, if anyone is to judge that: all that began before `oldest` has been told.
    fn judge_flushes(&mut self, oldest: Stamp) -> Result<(), Failure> {
        let Some(flushes) = &mut self.flushes else { return Ok(()) };
        while let Err(finding) = flushes.horizon(oldest) {
            let oracle = if finding.oracle == Oracle::Linear.name() { Oracle::Linear } else { Oracle::Flush };
            if self.oracles.has(oracle) {
                return Err(found(oracle, finding));
            }
        }
        Ok(())
    }

    /// A call that reached the storage, for the oracle of flushes.
    fn observe_call(&mut self, call: Call) {
        if let Some(flushes) = &mut self.flushes {
            let Call { kind, range, began, ended, errno } = call;
            flushes.call(kind, range, began, ended, errno.is_none());
        }
    }

    /// A fault that was made, for the oracle of errors.
    fn observe_injection(&mut self, injection: &Injection) {
        self.injections += 1;
        if let (Some(below), Some(_)) = (&mut self.below, injection.errno) {
            below.count += 1;
            below.last = self.clock.tick();
        } else if let Some(errors) = &mut self.errors {
            errors.injected(injection, injection.began, injection.ended);
        }
    }

    /// The calls that reached the storage and the faults that were made since the last time.
    pub(crate) fn observe_calls(&mut self) {
        let clock = self.clock.clone();
        clock.drain(|call| self.observe_call(call));
        let injections = self.faults.as_ref().map(Faults::take_injections).unwrap_or_default();
        for injection in &injections {
            self.observe_injection(injection);
        }
    }

    /// The server died; what it had in hand may be given to the next one. Its calls are known all the same: the oracle of
    /// flushes has nothing to forgive.
    pub(crate) fn observe_death(&mut self, reissues: bool) {
        let now = self.clock.tick();
        if reissues {
            self.ledger.reissued();
        }
        if let Some(errors) = &mut self.errors {
            errors.server_died(now);
        }
    }

    /// Faults from now on, or none.
    pub(crate) fn observe_switch(&mut self, on: bool) {
        let now = self.clock.tick();
        match &mut self.errors {
            Some(errors) if on => errors.faults_on(now),
            Some(errors) => errors.faults_off(now),
            None => {}
        }
    }

    /// The power was cut and is back. Nothing is in flight.
    pub(crate) fn observe_power_cut(&mut self) -> Result<(), Failure> {
        self.ledger.power_cut();
        let now = self.clock.tick();
        self.judge_flushes(now)
    }

    /// The run is over, and everything has ended.
    pub(crate) fn observe_finish(&mut self) -> Result<(), Failure> {
        self.observe_calls();
        let errors = self.errors.as_mut().map_or(Ok(()), |errors| errors.judge().map(drop));
        errors.map_err(|finding| found(Oracle::Errors, finding))?;
        self.judge_flushes(Stamp::MAX)
    }

    /// Adds what was judged to `evidence`.
    pub(crate) fn add_to(&self, evidence: &mut Evidence) {
        evidence.add("injections", self.injections);
        if let Some(below) = &self.below {
            evidence.add("storage_errors", below.count);
        }
        evidence.add("loose_reads", self.ledger.loose_reads());
        if let Some(errors) = &self.errors {
            errors.counts().add_to(evidence);
        }
        if let Some(flushes) = &self.flushes {
            flushes.counts().add_to(evidence);
        }
    }

    /// Something is not given back, or not kept, unless nobody is to judge that.
    pub(crate) fn resources(&self, what: &str, detail: Vec<String>) -> Result<(), Failure> {
        if !self.oracles.has(Oracle::Resources) {
            return Ok(());
        }
        let finding = Finding { oracle: Oracle::Resources.name().to_owned(), what: what.to_owned(), detail };
        Err(found(Oracle::Resources, finding))
    }

    /// Something does not end. The run does, whoever judges.
    pub(crate) fn hang(&self, what: String, notes: Vec<String>, op: Option<OpId>) -> Option<Failure> {
        let hang = Hang { what, deadline_ms: 0, threads: Vec::new(), notes };
        self.oracles.has(Oracle::Watchdog).then(|| Box::new((Oracle::Watchdog, Event::Hang(hang), op)))
    }
}

fn found(oracle: Oracle, finding: Finding) -> Failure {
    Box::new((oracle, Event::Finding(finding), None))
}

fn wrong(op: OpId, mismatch: Box<Mismatch>) -> Failure {
    let oracle = mismatch.oracle;
    Box::new((oracle, Event::Mismatch(mismatch), Some(op)))
}
