//! Deadlines, and a watchdog that sees to them.
//!
//! Every wait has a deadline. When one passes, the watchdog's thread looks at where every thread stands, asks whoever
//! registered for what they know, and hands all of it over, once. It shares no lock with what it watches: guards talk to
//! it through a channel, and those who are asked are each given a thread of their own, all at the same time, and limited
//! time. So a report takes no longer than [`REPORT_MAX`], whatever hangs.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::event::Hang;
use crate::threads::{ThreadDump, dump_threads};

/// How long the kernel may take to say where the threads stand. It answers at once, but for a process in `execve`.
const LOOK: Duration = Duration::from_secs(1);
/// How long those who are asked for more may take, all together.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a report takes at most.
pub const REPORT_MAX: Duration = Duration::from_secs(LOOK.as_secs() + PATIENCE.as_secs());

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
#[derive(Clone)]
pub struct WatchdogOptions {
    /// `/proc`, but in tests.
    pub proc_root: PathBuf,
    /// Says which processes are watched beside this one, such as a server under test. Asked when a deadline has passed.
    pub processes: Option<Arc<Processes>>,
    /// Says where the threads of processes stand in user space, within the time that it is given, and why some are
    /// missing. Nobody can say so by default.
    pub backtraces: Option<Arc<Backtraces>>,
}

/// What says which processes are watched: see [`WatchdogOptions::processes`].
pub type Processes = dyn Fn() -> Vec<u32> + Send + Sync;

/// Where one thread stands in user space.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserStack {
    /// The process.
    pub pid: u32,
    /// The thread.
    pub tid: u32,
    /// Its functions, innermost first.
    pub frames: Vec<String>,
}

/// What says where the threads of processes stand in user space: see [`WatchdogOptions::backtraces`].
pub type Backtraces = dyn Fn(&[u32], Duration) -> (Vec<UserStack>, Vec<String>) + Send + Sync;

/// A thread that waits for deadlines to pass. Dropping it ends the thread; guards that are left watch no more.
#[derive(Debug)]
pub struct Watchdog {
    sender: Sender<Message>,
    next_id: AtomicU64,
    expired: Arc<AtomicBool>,
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
    Ask { who: String, tell: Arc<Tell> },
    Expire { what: String, allowed: Duration },
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
        let expired = Arc::new(AtomicBool::new(false));
        let tell = Arc::clone(&expired);
        let watch = move || {
            let mut watch = Watch { options, expired: tell, ..Watch::default() };
            if let Some(report) = watch.until_a_deadline_passes(&receiver) {
                on_hang(report);
            }
        };
        let thread = thread::Builder::new().name("watchdog".to_owned()).spawn(watch)?;
        Ok(Self { sender, next_id: AtomicU64::new(0), expired, thread: Some(thread) })
    }

    /// Watches `what` until the guard is dropped or `allowed` is over. For steps, not for single operations: each guard is
    /// two messages to another thread.
    pub fn guard(&self, what: impl Into<String>, allowed: Duration) -> Guard {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let deadline = Deadline::after(allowed);
        self.tell(Message::Arm { id, what: what.into(), deadline });
        Guard { id, deadline, sender: self.sender.clone() }
    }

    /// Reports `what` as a hang now: it was given up in an orderly way, after `allowed`.
    pub fn expire(&self, what: impl Into<String>, allowed: Duration) {
        self.tell(Message::Expire { what: what.into(), allowed });
    }

    /// Asks `tell` for more lines when a deadline passes, on a thread of its own, which is left behind if it does not
    /// answer within five seconds.
    pub fn ask(&self, who: impl Into<String>, tell: impl Fn() -> Vec<String> + Send + Sync + 'static) {
        self.tell(Message::Ask { who: who.into(), tell: Arc::new(tell) });
    }

    /// Whether a deadline has passed: what is found out since, or comes to an end, changes nothing any more.
    #[must_use]
    pub fn has_expired(&self) -> bool {
        self.expired.load(Ordering::SeqCst)
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
    expired: Arc<AtomicBool>,
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
                Ok(Message::Ask { who, tell }) => self.asked.push((who, tell)),
                Ok(Message::Expire { what, allowed }) => return Some(self.report(what, allowed)),
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
        self.expired.store(true, Ordering::SeqCst);
        let (proc_root, processes) = (self.options.proc_root.clone(), self.options.processes.clone());
        let own = std::process::id();
        // Before all else: to be asked, and to be looked at, wakes some of them.
        let look = Left::begin("look", move || {
            let mut pids = vec![own];
            pids.extend(processes.map(|processes| processes()).unwrap_or_default());
            let threads = pids.iter().flat_map(|pid| dump_threads(&proc_root, *pid)).collect::<Vec<_>>();
            (pids, threads)
        });
        let mut notes = Vec::new();
        let (pids, mut threads) = look.end(Instant::now() + LOOK).unwrap_or_else(|why| {
            notes.push(format!("kernel stacks: {why}"));
            (vec![own], Vec::new())
        });
        let until = Instant::now() + PATIENCE;
        let backtraces = self.options.backtraces.clone().map(|backtraces| {
            // It ends by itself, a little earlier, with what it has by then.
            Left::begin("backtraces", move || backtraces(&pids, PATIENCE * 9 / 10))
        });
        let asked: Vec<_> = self
            .asked
            .iter()
            .map(|(who, tell)| {
                let tell = Arc::clone(tell);
                (who, Left::begin("asked", move || tell()))
            })
            .collect();
        for (who, answer) in asked {
            match answer.end(until) {
                Ok(lines) => notes.extend(lines.into_iter().map(|line| format!("{who}: {line}"))),
                Err(why) => notes.push(format!("{who}: {why}")),
            }
        }
        match backtraces.map(|backtraces| backtraces.end(until)) {
            Some(Ok((stacks, remarks))) => {
                put(&mut threads, stacks);
                notes.extend(remarks);
            }
            Some(Err(why)) => notes.push(format!("backtraces: {why}")),
            None => {}
        }
        HangReport { what, allowed, threads, notes }
    }
}

/// Puts each stack to its thread. A thread that began since is none that hangs, but one of those that look.
fn put(threads: &mut [ThreadDump], stacks: Vec<UserStack>) {
    for UserStack { pid, tid, frames } in stacks {
        if let Some(thread) = threads.iter_mut().find(|thread| (thread.pid, thread.tid) == (pid, tid)) {
            thread.user = frames;
        }
    }
}

/// Something that is done on a thread which is left behind if it does not come back.
struct Left<T> {
    begun: Instant,
    receiver: io::Result<Receiver<T>>,
}

impl<T: Send + 'static> Left<T> {
    fn begin(name: &str, work: impl FnOnce() -> T + Send + 'static) -> Self {
        let (sender, receiver) = mpsc::channel();
        let begun = Instant::now();
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || sender.send(work()));
        Self { begun, receiver: thread.map(|_left_behind| receiver) }
    }

    /// What it made, or why there is nothing.
    fn end(self, until: Instant) -> Result<T, String> {
        let receiver = self.receiver.map_err(|error| format!("could not be asked: {error}"))?;
        receiver.recv_timeout(until.saturating_duration_since(Instant::now())).map_err(|error| match error {
            RecvTimeoutError::Timeout => format!("no answer within {:.1} s", self.begun.elapsed().as_secs_f64()),
            RecvTimeoutError::Disconnected => "panicked when asked".to_owned(),
        })
    }
}

impl Default for WatchdogOptions {
    fn default() -> Self {
        Self { proc_root: PathBuf::from("/proc"), processes: None, backtraces: None }
    }
}

impl fmt::Debug for WatchdogOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { proc_root, processes, backtraces } = self;
        f.debug_struct("WatchdogOptions")
            .field("proc_root", proc_root)
            .field("processes", &processes.is_some())
            .field("backtraces", &backtraces.is_some())
            .finish()
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Arm { .. } => "Arm",
            Self::Disarm(_) => "Disarm",
            Self::Ask { .. } => "Ask",
            Self::Expire { .. } => "Expire",
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
        assert!(watchdog.has_expired());
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

    /// Those who hold the lock that the hung thread waits for cannot hold up the report, however many they are.
    #[test]
    fn who_does_not_answer_is_passed_over() {
        let (watchdog, reports) = watchdog();
        for _ in 0..5 {
            watchdog.ask("silent", || {
                loop {
                    thread::park();
                }
            });
        }
        watchdog.ask("talkative", || vec!["here".to_owned()]);
        let begun = Instant::now();
        let _stuck = watchdog.guard("stuck", Duration::from_millis(1));
        let report = reports.recv_timeout(PATIENCE * 5).expect("it hangs");
        assert!(begun.elapsed() < REPORT_MAX * 2, "they are asked at the same time");
        assert_eq!(report.notes.len(), 6, "{report}");
        assert!(report.notes[0].starts_with("silent: no answer within 5."), "{report}");
        assert_eq!(report.notes[5], "talkative: here");
    }

    #[test]
    fn what_was_given_up_is_reported_with_backtraces() {
        let (sender, reports) = mpsc::channel();
        let own = std::process::id();
        let parent = std::os::unix::process::parent_id();
        let backtraces = move |pids: &[u32], _: Duration| {
            assert_eq!(pids, [own, parent]);
            let frames = vec!["main at main.rs:1".to_owned()];
            (vec![UserStack { pid: pids[0], tid: pids[0], frames }], vec!["one is missing".to_owned()])
        };
        let options = WatchdogOptions {
            processes: Some(Arc::new(move || vec![parent])),
            backtraces: Some(Arc::new(backtraces)),
            ..WatchdogOptions::default()
        };
        let watchdog = Watchdog::start(options, move |report| drop(sender.send(report))).expect("a thread");
        watchdog.expire("close", Duration::from_secs(3));
        let report = reports.recv_timeout(PATIENCE * 5).expect("reported");
        assert_eq!((report.what.as_str(), report.allowed.as_secs()), ("close", 3));
        let main = report.threads.iter().find(|thread| thread.tid == own).expect("the first thread");
        assert_eq!(main.user, ["main at main.rs:1"]);
        assert!(report.threads.iter().any(|thread| thread.pid == parent), "{report}");
        assert!(report.to_string().contains("\n    - main at main.rs:1"), "{report}");
        assert_eq!(report.notes, ["one is missing"]);
    }

    #[test]
    fn deadlines_run_out() {
        let deadline = Deadline::after(Duration::ZERO);
        assert!(deadline.is_over() && deadline.remaining().is_zero());
        let deadline = Deadline::after(Duration::from_secs(3600));
        assert!(!deadline.is_over() && deadline.elapsed() < deadline.allowed());
    }
}
