//! Outages: the power is cut, or the server dies, while every worker is at work.
//!
//! A machine without power answers nothing: from the cut on every request fails, until the power is back. It is back
//! only when all workers stand still, so that nothing that began before the cut can take effect after it. What failed
//! meanwhile ends as an outage says, and is no fault of the device's.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use ublkit_harness::Outcome;

/// What goes out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outage {
    /// The power: what is not durable may be lost, and the server begins anew.
    PowerCut,
    /// The server alone: another one takes over, on storage that has lost nothing.
    Restart,
}

impl Outage {
    /// How an operation ended that failed meanwhile.
    const fn outcome(self) -> Outcome {
        match self {
            Self::PowerCut => Outcome::Unknown,
            // Whatever the server had begun was over before another took over.
            Self::Restart => Outcome::Failed,
        }
    }
}

const NONE: u8 = 0;
const COMING: u8 = 1;
const OUT: u8 = 2;

/// The outage that is under way, if one is, and who stands still for it.
#[derive(Debug)]
pub(crate) struct Outages {
    phase: AtomicU8,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    outage: Outage,
    working: u32,
    waiting: u32,
    /// How many outages are over.
    over: u64,
}

impl Outages {
    pub(crate) fn new(workers: u32) -> Self {
        let state = State { outage: Outage::PowerCut, working: workers, waiting: 0, over: 0 };
        Self { phase: AtomicU8::new(NONE), state: Mutex::new(state), changed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether workers have to stand still.
    pub(crate) fn is_out(&self) -> bool {
        self.phase.load(Ordering::Acquire) == OUT
    }

    /// How an operation that failed now ended, if an outage explains it.
    pub(crate) fn explains(&self) -> Option<Outcome> {
        (self.phase.load(Ordering::Acquire) != NONE).then(|| self.state().outage.outcome())
    }

    /// From now on operations may fail. The workers go on, so that many are under way when it comes.
    pub(crate) fn coming(&self, outage: Outage) {
        self.state().outage = outage;
        self.phase.store(COMING, Ordering::Release);
    }

    /// It is there: returns when every worker stands still or has ended.
    pub(crate) fn out(&self) {
        self.phase.store(OUT, Ordering::Release);
        let mut state = self.state();
        while state.waiting < state.working {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// It is over.
    pub(crate) fn over(&self) {
        let mut state = self.state();
        self.phase.store(NONE, Ordering::Release);
        state.over += 1;
        // Those who have not woken up yet do not stand still any more.
        state.waiting = 0;
        self.changed.notify_all();
    }

    /// A worker with nothing in flight stands still until it is over.
    pub(crate) fn wait(&self) {
        let mut state = self.state();
        if !self.is_out() {
            return;
        }
        let over = state.over;
        state.waiting += 1;
        self.changed.notify_all();
        while state.over == over {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A worker has ended.
    pub(crate) fn leave(&self) {
        self.state().working -= 1;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybody_stands_still_until_it_is_over() {
        let outages = Outages::new(3);
        assert_eq!(outages.explains(), None);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !outages.is_out() {
                        std::thread::yield_now();
                    }
                    outages.wait();
                    assert_eq!(outages.explains(), None);
                    outages.leave();
                });
            }
            scope.spawn(|| outages.leave());
            outages.coming(Outage::Restart);
            assert!(!outages.is_out());
            assert_eq!(outages.explains(), Some(Outcome::Failed));
            outages.out();
            assert_eq!(outages.explains(), Some(Outcome::Failed));
            outages.over();
        });
        assert_eq!(outages.state().working, 0);
    }
}
