//! What the workers of a run share.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ublkit_harness::Watchdog;

use super::accounts::Accounts;
use super::outage::Outages;
use super::recorder::Recorder;
use super::tally::Tally;
use crate::context::Context;
use crate::in_flight::InFlight;

/// What the workers are told before they begin.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Orders {
    /// End after so many operations.
    pub(crate) ops: Option<u64>,
    /// End at this time.
    pub(crate) until: Option<Instant>,
    /// Read the whole region from time to time.
    pub(crate) passes: bool,
    /// Write every sector before anything else.
    pub(crate) prefill: bool,
    /// What the device takes in one request, at most.
    pub(crate) max_io_bytes: u64,
    /// How long an operation may take before that is a hang.
    pub(crate) stall: Duration,
    /// The first worker is to hang in its own code.
    pub(crate) hang: bool,
}

/// What the workers of a run share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) orders: Orders,
    pub(crate) outages: Outages,
    /// Where there is a storage to compare with.
    pub(crate) accounts: Option<Accounts>,
    pub(crate) watchdog: Arc<Watchdog>,
    /// What the workers wait for.
    pub(crate) in_flight: InFlight,
    /// Where what they do is kept, if it is to be done again.
    pub(crate) recorder: Option<Arc<Recorder>>,
    stop: AtomicBool,
    tallies: Vec<Arc<Tally>>,
    told: Mutex<Instant>,
}

impl Shared {
    pub(crate) fn new(orders: Orders, workers: u32, accounts: Option<Accounts>, context: &Context) -> Self {
        Self {
            orders,
            outages: Outages::new(workers),
            accounts,
            // It is asked for once for the whole run, however many crews there are.
            in_flight: context.in_flight.clone(),
            watchdog: Arc::clone(context.watchdog()),
            recorder: None,
            stop: AtomicBool::new(false),
            tallies: (0..workers).map(|_| Arc::default()).collect(),
            told: Mutex::new(Instant::now()),
        }
    }

    /// With someone who keeps what the workers do.
    pub(crate) fn recorded_by(self, recorder: Arc<Recorder>) -> Self {
        Self { recorder: Some(recorder), ..self }
    }

    /// What a worker has done.
    pub(crate) fn tally(&self, worker: u32) -> Arc<Tally> {
        Arc::clone(&self.tallies[worker as usize])
    }

    /// Tells the workers to end.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    pub(crate) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// What all of them have done.
    pub(crate) fn total(&self) -> Tally {
        let total = Tally::default();
        for tally in &self.tallies {
            total.merge(tally);
        }
        total
    }

    /// Time since progress was told.
    pub(crate) fn since_progress(&self) -> Duration {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }

    /// Winds that clock up, and returns what it said.
    pub(crate) fn mark_progress(&self) -> Duration {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *told, Instant::now()).elapsed()
    }
}
