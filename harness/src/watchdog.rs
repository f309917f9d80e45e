//! Deadlines, and a watchdog that sees to them.

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::event::Hang;
use crate::threads::ThreadDump;

/// A point in time by which something has to be over.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    started: Instant,
    allowed: Duration,
}

/// What did not end, and where everything stood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HangReport {
    /// What did not end.
    pub what: String,
    /// How long it might have taken.
    pub allowed: Duration,
    /// Where each thread of the watched processes stood.
    pub threads: Vec<ThreadDump>,
    /// What the watched parts said of themselves.
    pub notes: Vec<String>,
}

/// Where a watchdog looks.
#[derive(Clone, Debug)]
pub struct WatchdogOptions {
    /// `/proc`, but in tests.
    pub proc_root: PathBuf,
}

/// A thread that waits for deadlines to pass.
#[derive(Debug)]
pub struct Watchdog {}

/// A step under watch, until dropped.
#[derive(Debug)]
#[must_use = "a step is watched only as long as its guard lives"]
pub struct Guard {
    deadline: Deadline,
}

impl Deadline {
    /// `allowed` from now.
    #[must_use]
    pub fn after(allowed: Duration) -> Self {
        Self { started: Instant::now(), allowed }
    }

    /// The time left; zero when there is none.
    #[must_use]
    pub fn remaining(&self) -> Duration {
        self.allowed.saturating_sub(self.started.elapsed())
    }

    /// The time since it was set.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// The time there was.
    #[must_use]
    pub const fn allowed(&self) -> Duration {
        self.allowed
    }

    /// Whether no time is left.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.remaining().is_zero()
    }
}

impl Watchdog {
    /// Starts the thread. `on_hang` is called on it, once, for the first deadline that passes: it reports the hang and
    /// ends the process.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(options: WatchdogOptions, on_hang: impl FnOnce(HangReport) + Send + 'static) -> io::Result<Self> {
        let _ = (options, on_hang);
        todo!()
    }

    /// Watches `what` until the guard is dropped or `allowed` is over.
    pub fn guard(&self, what: impl Into<String>, allowed: Duration) -> Guard {
        let _ = what.into();
        Guard { deadline: Deadline::after(allowed) }
    }

    /// Has the threads of this process in the dump too, such as a server under test.
    pub fn watch_process(&self, pid: u32) {
        let _ = pid;
        todo!()
    }

    /// Asks `tell` for more lines when a deadline passes. One that does not answer within two seconds is passed over.
    pub fn ask(&self, who: impl Into<String>, tell: impl Fn() -> Vec<String> + Send + Sync + 'static) {
        let _ = (who.into(), tell);
        todo!()
    }
}

impl Guard {
    /// The deadline.
    #[must_use]
    pub const fn deadline(&self) -> Deadline {
        self.deadline
    }
}

impl Default for WatchdogOptions {
    fn default() -> Self {
        Self { proc_root: PathBuf::from("/proc") }
    }
}

impl From<HangReport> for Hang {
    fn from(report: HangReport) -> Self {
        Self {
            what: report.what,
            deadline_ms: report.allowed.as_millis() as u64,
            threads: report.threads,
            notes: report.notes,
        }
    }
}
