//! Trials side by side, in the order of their numbers.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use ublkit_harness::event::{Event, Progress};
use ublkit_harness::sim::RunOptions;
use ublkit_harness::trial::{Trial, Tried};
use ublkit_harness::{Evidence, Planted, Seed};

use super::Tried as What;
use super::failed::Found;
use crate::context::{Context, Interruption};
use crate::scenario::Failure;

/// How many operations are done with one seed.
const OPS_PER_SEED: u64 = 5000;
/// How often progress is told.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);
/// How often it is looked whether that is due.
const LOOK: Duration = Duration::from_millis(20);

/// When to end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) until: Option<Instant>,
    pub(super) ops: Option<u64>,
}

/// One trial after another.
#[derive(Debug)]
pub(super) struct Trials {
    seed: Seed,
    planted: Option<Planted>,
    limits: Limits,
    what: What,
    next: AtomicU64,
    /// No trial from this number on is of interest: an earlier one failed.
    end: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    done: Evidence,
    found: Option<Found>,
    broken: Option<String>,
}

impl Trials {
    pub(super) fn new(seed: Seed, planted: Option<Planted>, limits: Limits, what: What) -> Self {
        let (next, end) = (AtomicU64::new(0), AtomicU64::new(u64::MAX));
        Self { seed, planted, limits, what, next, end, state: Mutex::default() }
    }

    /// Runs them, tells how far they are, and returns the first that failed: the one with the lowest number, whichever ended
    /// first.
    pub(super) fn run(self, threads: usize, context: &mut Context) -> Result<Option<Found>, Failure> {
        let start = Instant::now();
        let interruption = context.interruption().clone();
        thread::scope(|scope| {
            let handles: Vec<_> = (0..threads.max(1))
                .map(|index| {
                    thread::Builder::new()
                        .name(format!("trials-{index}"))
                        .spawn_scoped(scope, || self.work(&interruption))
                        .map_err(|error| Failure::Environment(format!("failed to start a thread: {error}")))
                })
                .collect();
            if handles.iter().any(Result::is_err) {
                self.end.store(0, Ordering::Relaxed);
            }
            let mut last = (Instant::now(), 0);
            while handles.iter().flatten().any(|handle| !handle.is_finished()) {
                thread::sleep(LOOK);
                if last.0.elapsed() >= PROGRESS_EVERY {
                    last = self.tell(context, start, last);
                }
            }
            handles.into_iter().try_for_each(|handle| {
                handle?.join().map_err(|_panic| Failure::Internal("a trial panicked".to_owned()))
            })
        })?;
        let State { done, found, broken } = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        context.evidence().merge(&done);
        context.evidence().add("work_ms", start.elapsed().as_millis() as u64);
        let (seeds, ops, bytes) = (done.count("seeds"), done.count("ops"), done.count("verified_bytes"));
        context.detail(format!("{ops} operations with {seeds} seeds, {bytes} bytes verified"));
        match broken {
            Some(why) => Err(Failure::Internal(why)),
            None => Ok(found),
        }
    }

    fn work(&self, interruption: &Interruption) {
        while !interruption.came() && self.limits.until.is_none_or(|until| Instant::now() < until) {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let before = number.saturating_mul(OPS_PER_SEED);
            let left = self.limits.ops.map_or(OPS_PER_SEED, |ops| ops.saturating_sub(before).min(OPS_PER_SEED));
            if left == 0 || number >= self.end.load(Ordering::Relaxed) {
                break;
            }
            self.one(number, before, left);
        }
    }

    fn one(&self, number: u64, before: u64, ops: u64) {
        let seed = Seed::new(self.seed.derive("run", number).get() >> 11);
        let trial = Trial::draw(seed, self.planted, self.what.workload(ops));
        let tried = trial.run(&RunOptions::default());
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Tried { ran, hits } = match tried {
            Ok(tried) => tried,
            Err(error) => {
                state.broken =
                    Some(format!("a setup that was drawn contradicts itself: {error}: {}", trial.header().setup));
                self.end.store(0, Ordering::Relaxed);
                return;
            }
        };
        state.done.merge(&ran.evidence);
        state.done.add("seeds", 1);
        if let Some(hits) = hits {
            state.done.add("mutant_hits", hits);
        }
        let Some(failure) = ran.failure else { return };
        self.end.fetch_min(number, Ordering::Relaxed);
        if state.found.as_ref().is_none_or(|found| found.number > number) {
            state.found = Some(Found { number, before, trial, failure });
        }
    }

    fn tell(&self, context: &Context, start: Instant, (at, ops_then): (Instant, u64)) -> (Instant, u64) {
        let done = self.state.lock().unwrap_or_else(PoisonError::into_inner).done.clone();
        let ops = done.count("ops");
        let elapsed = start.elapsed();
        let by_time = self.limits.until.map(|until| elapsed.as_secs_f64() / (until - start).as_secs_f64().max(1e-3));
        let by_ops = self.limits.ops.map(|limit| ops as f64 / limit.max(1) as f64);
        let fraction = match (by_time, by_ops) {
            (Some(time), Some(ops)) => Some(time.max(ops)),
            (one, other) => one.or(other),
        };
        let verified_bytes = done.count("verified_bytes");
        context.sink().send(Event::Progress(Progress {
            what: self.what.name().to_owned(),
            ops,
            bytes: verified_bytes,
            verified_bytes,
            elapsed_ms: elapsed.as_millis() as u64,
            ops_per_s: (ops - ops_then) as f64 / at.elapsed().as_secs_f64().max(1e-3),
            bytes_per_s: verified_bytes as f64 / elapsed.as_secs_f64().max(1e-3),
            fraction: fraction.map(|fraction| fraction.min(1.0)),
        }));
        (Instant::now(), ops)
    }
}
