//! Threads that call a backend at the same time, on the same few blocks.
//!
//! What one thread at a time never shows is a backend that is not as thread-safe as it says: a read-modify-write without a
//! lock, a map that is looked up in one moment and used in the next. Every call is told to one ledger before it begins and
//! after it ended, which knows what reads may then return.

mod caller;

use std::fmt;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use ublkit::{Backend, Geometry};

use self::caller::{Caller, Shared};
use super::{Check, Factory, Found, misuse};
use crate::bundle::Failure;
use crate::event::{Event, Hang};
use crate::oracle::Oracle;
use crate::plan::OpKind;
use crate::seed::Seed;
use crate::shrink::{Rate, Signature};
use crate::vacuity::Evidence;

/// How many calls all threads make together.
const CALLS: u64 = 20_000;

/// How much of the device they share, in bytes and in blocks, at most.
const REGION: u64 = 128 << 10;
const BLOCKS: u64 = 128;

/// The longest call, in blocks.
const LONGEST: u64 = 24;

/// For how long no call may end.
const PATIENCE: Duration = Duration::from_secs(20);

/// For how long a race is made simpler.
const SHRINKING: Duration = Duration::from_secs(2);

/// How often a simpler race is tried before it counts as right, and how often the simplest to see how often it fails.
const TRIES: u64 = 4;
const RATE_RUNS: u64 = 20;

/// Who races for what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Field {
    pub(super) threads: u32,
    pub(super) calls: u64,
    pub(super) blocks: u64,
    pub(super) longest: u64,
    pub(super) kinds: Vec<OpKind>,
}

/// The simplest race that fails.
#[derive(Clone, Debug)]
pub(super) struct Race {
    pub(super) field: Field,
    pub(super) rate: Rate,
    /// The last calls on the sector that is wrong, oldest first.
    pub(super) calls: Vec<String>,
    /// A block was torn, and that is not said to be right.
    pub(super) torn: bool,
}

impl<F: Factory<M>, M> Check<F, M> {
    /// Lets threads race, and counts what they did.
    pub(super) fn race(&self, seed: Seed, geometry: Geometry) -> Result<Evidence, Box<Found>> {
        let field = Field::new(self.threads, &geometry);
        let failure = match self.run_race(seed, geometry, &field)? {
            Ok(evidence) => return Ok(evidence),
            Err(failure) => failure,
        };
        // Threads that hang are still there, and so may be what they hold.
        if matches!(failure.event, Event::Hang(_)) {
            return Err(self.raced(seed, *failure, field, Rate { failed: 1, of: 1 }));
        }
        let (mut best, mut found) = (field, failure);
        let wanted = Signature::of(found.oracle, &found.event).class;
        let until = Instant::now() + SHRINKING;
        let mut attempt = 0;
        while let Some(simpler) = best.simpler().into_iter().find_map(|simpler| {
            (0..TRIES).find_map(|_| {
                attempt += 1;
                let seed = seed.derive("race", attempt);
                if Instant::now() > until {
                    return None;
                }
                let failure = self.run_race(seed, geometry, &simpler).ok()?.err()?;
                let same = Signature::of(failure.oracle, &failure.event).class == wanted;
                same.then(|| (simpler.clone(), failure))
            })
        }) {
            (best, found) = simpler;
        }
        let mut rate = Rate::default();
        let until = Instant::now() + SHRINKING / 4;
        while rate.of == 0 || rate.of < RATE_RUNS && Instant::now() < until {
            let failed = self.run_race(seed.derive("rate", rate.of), geometry, &best);
            rate.of += 1;
            rate.failed += u64::from(matches!(failed, Ok(Err(_))));
        }
        Err(self.raced(seed, *found, best, rate))
    }

    fn raced(&self, seed: Seed, failure: Failure, field: Field, rate: Rate) -> Box<Found> {
        let (calls, torn) = match &failure.event {
            Event::Mismatch(mismatch) => (
                mismatch.history.iter().map(ToString::to_string).collect(),
                !self.torn_by_races && mismatch.class.name() == "torn",
            ),
            _ => (Vec::new(), false),
        };
        Box::new(Found { race: Some(Race { field, rate, calls, torn }), ..Found::new(seed, failure) })
    }

    /// One race on a new device.
    fn run_race(
        &self,
        seed: Seed,
        geometry: Geometry,
        field: &Field,
    ) -> Result<Result<Evidence, Box<Failure>>, Box<Found>> {
        let opened = self.open_new().map_err(|why_not| misuse(seed, &format!("it does not open: {why_not}")))?;
        let Some(backend) = opened.backend() else {
            return Err(misuse(seed, "threads can share what has blocking calls, and nothing else"));
        };
        let shared = Arc::new(Shared::new(self.ledger_options(seed, geometry, field)));
        Ok(race(&backend, &shared, seed, geometry, field))
    }
}

/// Begins the threads, and waits for them as long as calls end.
fn race(
    backend: &Arc<dyn Backend>,
    shared: &Arc<Shared>,
    seed: Seed,
    geometry: Geometry,
    field: &Field,
) -> Result<Evidence, Box<Failure>> {
    let (ended, all_ended) = channel::<()>();
    let threads: Vec<_> = (0..field.threads)
        .map(|worker| {
            let mut caller = Caller::new(backend, shared, seed, worker, geometry, field);
            let calls = field.calls / u64::from(field.threads);
            let ended = ended.clone();
            thread::spawn(move || {
                caller.calls(calls);
                drop(ended);
            })
        })
        .collect();
    drop(ended);
    let mut before = 0;
    loop {
        match all_ended.recv_timeout(PATIENCE) {
            Ok(()) | Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {}
        }
        let calls = shared.calls();
        if calls == before {
            let what = "what the threads have begun".to_owned();
            let notes = shared.in_flight();
            let hang = Hang { what, deadline_ms: PATIENCE.as_millis() as u64, threads: Vec::new(), notes };
            return Err(Box::new(Failure { oracle: Oracle::Watchdog, event: Event::Hang(hang), after_ops: calls }));
        }
        before = calls;
    }
    for thread in threads {
        // Panics of the backend are caught within; one that is not must not pass for success.
        if let Err(panic) = thread.join() {
            resume_unwind(panic);
        }
    }
    Caller::new(backend, shared, seed, field.threads, geometry, field).sweep();
    shared.result()
}

impl Field {
    fn new(threads: u32, geometry: &Geometry) -> Self {
        let block = u64::from(geometry.logical_block);
        let blocks = (geometry.size / block).min(BLOCKS).min((REGION / block).max(1));
        let read_only = geometry.read_only;
        let offers = |kind: &OpKind| match kind {
            OpKind::Read => true,
            OpKind::Flush => geometry.volatile_cache,
            OpKind::Write => !read_only,
            OpKind::WriteFua => !read_only && geometry.volatile_cache && geometry.fua,
            OpKind::Discard => !read_only && geometry.discard.is_some(),
            OpKind::WriteZeroes => !read_only && geometry.write_zeroes.is_some(),
        };
        let kinds = OpKind::ALL.into_iter().filter(offers).collect();
        Self { threads, calls: CALLS, blocks, longest: LONGEST.min(blocks), kinds }
    }

    /// Fields that are simpler in one respect.
    fn simpler(&self) -> Vec<Self> {
        let mut simpler = Vec::new();
        if self.threads > 2 {
            simpler.push(Self { threads: 2, ..self.clone() });
        }
        for kind in self.kinds.iter().filter(|kind| !matches!(kind, OpKind::Read | OpKind::Write)) {
            let kinds = self.kinds.iter().copied().filter(|other| other != kind).collect();
            simpler.push(Self { kinds, ..self.clone() });
        }
        if self.longest > 1 {
            simpler.push(Self { longest: 1, ..self.clone() });
        }
        if self.blocks > 2 {
            simpler.push(Self { blocks: 2, longest: self.longest.min(2), ..self.clone() });
            simpler.push(Self {
                blocks: self.blocks / 4,
                longest: self.longest.min(self.blocks / 4),
                ..self.clone()
            });
        }
        if self.calls > 500 {
            simpler.push(Self { calls: self.calls / 4, ..self.clone() });
        }
        simpler.retain(|field| field.blocks > 0 && field.longest > 0);
        simpler
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds: Vec<String> = self.kinds.iter().map(ToString::to_string).collect();
        let Self { threads, calls, blocks, longest, .. } = self;
        let (s, es) = (if *blocks == 1 { "" } else { "s" }, if *longest == 1 { "" } else { "s" });
        write!(
            f,
            "{threads} threads on the first {blocks} block{s}, {calls} calls of at most {longest} block{es}: "
        )?;
        f.write_str(&kinds.join(", "))
    }
}
