//! A worker's operations in flight, and the clock that says when one of them does not end.

use std::time::{Duration, Instant};

use ublkit::BlockClient;
use ublkit_harness::{Guard, Op};

use super::book::Entry;
use super::shared::Shared;
use crate::clock::nanoseconds;
use crate::in_flight::Noted;

/// How often the stall clock is wound up, at most.
const REARM_EVERY: Duration = Duration::from_secs(1);

/// An operation in flight.
pub(crate) struct Flight {
    pub(crate) op: Op,
    pub(crate) entry: Entry,
    /// A read of a pass over the whole region.
    pub(crate) pass: bool,
    /// Its place in the table of what is in flight, for as long as this lives.
    #[expect(dead_code, reason = "to be dropped is what it is there for")]
    pub(crate) noted: Noted,
    /// When it was begun; see [`nanoseconds`](crate::clock::nanoseconds).
    pub(crate) began: u64,
}

/// A worker's operations in flight.
pub(crate) struct Flights {
    pub(crate) client: BlockClient,
    pub(crate) free: Vec<u16>,
    pub(crate) ops: Vec<Option<Flight>>,
    pub(crate) progressed: bool,
    stall: Duration,
    armed: Instant,
    guard: Option<Guard>,
    what: String,
}

impl Flights {
    pub(crate) fn new(client: BlockClient, worker: u32, shared: &Shared) -> Self {
        let slots = usize::from(client.slots());
        let stall = shared.orders.stall;
        let what = format!("an operation of worker {worker} that did not complete for {stall:?}");
        Self {
            free: (0..client.slots()).collect(),
            client,
            ops: (0..slots).map(|_| None).collect(),
            progressed: false,
            stall,
            armed: Instant::now(),
            guard: Some(shared.watchdog.guard(what.clone(), stall)),
            what,
        }
    }

    /// When the oldest of them began; `now` if there are none.
    pub(crate) fn oldest(&self, now: u64) -> u64 {
        self.ops.iter().flatten().map(|flight| flight.began).min().unwrap_or(now).min(now)
    }

    /// Winds the clock up if something completed since.
    pub(crate) fn rearm(&mut self, shared: &Shared) {
        if self.progressed && self.armed.elapsed() >= REARM_EVERY.min(self.stall / 4) {
            self.wind_up(shared);
        }
    }

    /// Winds the clock up: for the time that is left to the oldest operation.
    pub(crate) fn wind_up(&mut self, shared: &Shared) {
        let now = nanoseconds();
        let age = Duration::from_nanos(now - self.oldest(now));
        self.guard = None;
        self.guard = Some(shared.watchdog.guard(self.what.clone(), self.stall.saturating_sub(age)));
        self.armed = Instant::now();
        self.progressed = false;
    }

    /// Stops the clock: nothing is in flight.
    pub(crate) fn stop_clock(&mut self) {
        self.guard = None;
    }
}
