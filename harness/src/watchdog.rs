//! Deadlines, and a watchdog that sees to them.
//!
//! Every wait has a deadline. When one passes, the watchdog's thread looks at where every thread stands, asks whoever
//! registered for what they know, and hands all of it over, once. It shares no lock with what it watches: guards talk to
//! it through a channel, and those who are asked are each given a thread of their own and limited time.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::event::Hang;
use crate::threads::{ThreadDump, dump_threads};

/// How long someone who is asked for more lines may take.
const PATIENCE: Duration = Duration::from_secs(2);

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

/// A thread that waits for deadlines to pass. Dropping it ends the thread; guards that are left watch no more.
#[derive(Debug)]
pub struct Watchdog {
    sender: Sender<Message>,
    next_id: AtomicU64,
    thread: Option<JoinHandle<()>>,
}

/// A step under watch, until dropped.
#[derive(Debug)]
#[must_use = "a step is watched only as long as its guard lives"]
pub struct Guard {
    id: u64,
    deadline: Deadline,
    sender: Sender<Message>,
}

type Tell = dyn Fn() -> Vec<String> + Send + Sync;

enum Message {
    Arm { id: u64, what: String, deadline: Deadline },
    Disarm(u64),
    Process(u32),
    Ask { who: String, tell: Arc<Tell> },
    End,
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
        let (sender, receiver) = mpsc::channel();
        let watch = move || {
            let mut watch = Watch { options, pids: vec![std::process::id()], ..Watch::default() };
            if let Some(report) = watch.until_a_deadline_passes(&receiver) {
                on_hang(report);
            }
        };
        let thread = thread::Builder::new().name("watchdog".to_owned()).spawn(watch)?;
        Ok(Self { sender, next_id: AtomicU64::new(0), thread: Some(thread) })
    }

    /// Watches `what` until the guard is dropped or `allowed` is over. For steps, not for single operations: each guard is
    /// two messages to another thread.
    pub fn guard(&self, what: impl Into<String>, allowed: Duration) -> Guard {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let deadline = Deadline::after(allowed);
        self.tell(Message::Arm { id, what: what.into(), deadline });
        Guard { id, deadline, sender: self.sender.clone() }
    }

    /// Has the threads of this process in the dump too, such as a server under test.
    pub fn watch_process(&self, pid: u32) {
        self.tell(Message::Process(pid));
    }

    /// Asks `tell` for more lines when a deadline passes. One that does not answer within two seconds is passed over.
    pub fn ask(&self, who: impl Into<String>, tell: impl Fn() -> Vec<String> + Send + Sync + 'static) {
        self.tell(Message::Ask { who: who.into(), tell: Arc::new(tell) });
    }

    fn tell(&self, message: Message) {
        // The thread is gone only after a hang, when all is lost anyway.
        let _gone = self.sender.send(message);
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.tell(Message::End);
        if let Some(thread) = self.thread.take() {
            // `on_hang` may drop the watchdog itself, and a thread cannot wait for itself.
            if thread.thread().id() != thread::current().id() {
                let _panicked = thread.join();
            }
        }
    }
}

impl Guard {
    /// The deadline.
    #[must_use]
    pub const fn deadline(&self) -> Deadline {
        self.deadline
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _gone = self.sender.send(Message::Disarm(self.id));
    }
}

/// What the thread knows.
#[derive(Default)]
struct Watch {
    options: WatchdogOptions,
    pids: Vec<u32>,
    armed: Vec<(u64, String, Deadline)>,
    asked: Vec<(String, Arc<Tell>)>,
}

impl Watch {
    fn until_a_deadline_passes(&mut self, receiver: &Receiver<Message>) -> Option<HangReport> {
        loop {
            let next = self.armed.iter().map(|(_, _, deadline)| deadline.remaining()).min();
            let message = match next {
                None => receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
                // What was sent in time counts, even if this thread is late to read it: a message that is there is
                // taken before the time is looked at.
                Some(remaining) => receiver.recv_timeout(remaining),
            };
            match message {
                Ok(Message::Arm { id, what, deadline }) => self.armed.push((id, what, deadline)),
                Ok(Message::Disarm(id)) => self.armed.retain(|(armed, _, _)| *armed != id),
                Ok(Message::Process(pid)) => self.pids.push(pid),
                Ok(Message::Ask { who, tell }) => self.asked.push((who, tell)),
                Ok(Message::End) | Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {
                    if let Some((_, what, deadline)) = self.armed.iter().find(|(_, _, deadline)| deadline.is_over()) {
                        return Some(self.report(what.clone(), deadline.allowed()));
                    }
                }
            }
        }
    }

    fn report(&self, what: String, allowed: Duration) -> HangReport {
        // The threads first: asking may wake some of them.
        let threads = self.pids.iter().flat_map(|pid| dump_threads(&self.options.proc_root, *pid)).collect();
        let notes = self.asked.iter().flat_map(|(who, tell)| answer(who, Arc::clone(tell))).collect();
        HangReport { what, allowed, threads, notes }
    }
}

/// What `tell` says, from a thread that is left behind if it does not come back.
fn answer(who: &str, tell: Arc<Tell>) -> Vec<String> {
    let (sender, receiver) = mpsc::channel();
    let asked = thread::Builder::new().name("asked".to_owned()).spawn(move || sender.send(tell()));
    match asked.map(|_left_behind| receiver.recv_timeout(PATIENCE)) {
        Ok(Ok(lines)) => lines.into_iter().map(|line| format!("{who}: {line}")).collect(),
        Ok(Err(RecvTimeoutError::Timeout)) => vec![format!("{who}: no answer within {} s", PATIENCE.as_secs())],
        Ok(Err(RecvTimeoutError::Disconnected)) => vec![format!("{who}: panicked when asked")],
        Err(error) => vec![format!("{who}: could not be asked: {error}")],
    }
}

impl Default for WatchdogOptions {
    fn default() -> Self {
        Self { proc_root: PathBuf::from("/proc") }
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Arm { .. } => "Arm",
            Self::Disarm(_) => "Disarm",
            Self::Process(_) => "Process",
            Self::Ask { .. } => "Ask",
            Self::End => "End",
        })
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

/// What hung, then every thread, then every note.
impl fmt::Display for HangReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} did not end within {:.1} s", self.what, self.allowed.as_secs_f64())?;
        self.threads.iter().try_for_each(|thread| write!(f, "\n  {thread}"))?;
        self.notes.iter().try_for_each(|note| write!(f, "\n  {note}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watchdog() -> (Watchdog, Receiver<HangReport>) {
        let (sender, reports) = mpsc::channel();
        let on_hang = move |report| drop(sender.send(report));
        (Watchdog::start(WatchdogOptions::default(), on_hang).expect("a thread"), reports)
    }

    #[test]
    fn a_step_that_does_not_end_is_reported_with_every_thread() {
        let (watchdog, reports) = watchdog();
        watchdog.ask("in flight", || vec!["2 requests".to_owned()]);
        watchdog.ask("broken", || panic!("as a test should"));
        let _stuck = watchdog.guard("stuck", Duration::from_millis(30));
        let _patient = watchdog.guard("patient", Duration::from_secs(3600));
        let report = reports.recv_timeout(Duration::from_secs(10)).expect("it hangs");
        assert_eq!((report.what.as_str(), report.allowed), ("stuck", Duration::from_millis(30)));
        assert!(report.threads.iter().any(|thread| thread.comm == "watchdog"), "{report}");
        assert_eq!(report.notes, ["in flight: 2 requests", "broken: panicked when asked"]);
        assert!(report.to_string().starts_with("stuck did not end within 0.0 s\n  "), "{report}");
        // Only the first hang is reported, and what comes after does no harm.
        drop(watchdog.guard("later", Duration::ZERO));
        assert!(reports.recv_timeout(Duration::from_millis(50)).is_err());
        assert_eq!(Hang::from(report).deadline_ms, 30);
    }

    #[test]
    fn a_step_that_ends_is_not_reported() {
        let (watchdog, reports) = watchdog();
        for _ in 0..100 {
            let guard = watchdog.guard("quick", Duration::from_secs(5));
            assert!(!guard.deadline().is_over());
        }
        drop(watchdog.guard("over at once", Duration::from_millis(20)));
        thread::sleep(Duration::from_millis(60));
        drop(watchdog);
        assert!(reports.try_recv().is_err());
    }

    /// Someone who holds the lock that the hung thread waits for cannot hold up the report.
    #[test]
    fn who_does_not_answer_is_passed_over() {
        let (watchdog, reports) = watchdog();
        watchdog.ask("silent", || {
            loop {
                thread::park();
            }
        });
        let _stuck = watchdog.guard("stuck", Duration::from_millis(1));
        let report = reports.recv_timeout(PATIENCE * 5).expect("it hangs");
        assert_eq!(report.notes, ["silent: no answer within 2 s"]);
    }

    #[test]
    fn deadlines_run_out() {
        let deadline = Deadline::after(Duration::ZERO);
        assert!(deadline.is_over() && deadline.remaining().is_zero());
        let deadline = Deadline::after(Duration::from_secs(3600));
        assert!(!deadline.is_over() && deadline.elapsed() < deadline.allowed());
    }
}
