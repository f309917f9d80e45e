//! Processes of this program in another role: they serve devices, so that this one can load them, look on, and outlive
//! them.
//!
//! Each speaks JSON, a line for each word. It is registered from its beginning until its status was taken: it is watched,
//! it ends with the others when all has to, and its number is used for nothing once it may be somebody else's.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use ublkit_harness::event::Event;
use ublkit_harness::threads::stacks;

use crate::cli::EXIT_INTERNAL;
use crate::scenario::{Broken, Failure};
use crate::server;

/// How long a killed process may take to be gone.
pub(crate) const KILL_LIMIT: Duration = Duration::from_secs(20);
/// How long one may take to be gone whose pipes have ended.
const LAST_STEPS: Duration = Duration::from_secs(5);

/// What became of processes that did not end as they should, at a time when nobody could be told.
static BAD_ENDS: Mutex<Vec<Failure>> = Mutex::new(Vec::new());

/// Takes what became of processes that did not end as they should, at a time when nobody could be told.
pub(crate) fn bad_ends() -> Vec<Failure> {
    std::mem::take(&mut *BAD_ENDS.lock().unwrap_or_else(PoisonError::into_inner))
}

/// A process of this program in another role. Killed when dropped.
#[derive(Debug)]
pub(crate) struct Role {
    child: Child,
    /// What it is, for people.
    what: &'static str,
    /// None once it is to end.
    ears: Option<ChildStdin>,
    status: Option<ExitStatus>,
    /// A thread of it that this thread has stopped, and so has to bury.
    traced: Option<Pid>,
}

impl Role {
    /// Starts this program with `argument`; `what` completes "failed to start …". It reads what it is [told](Self::tell),
    /// and what it says is read from the pipe that is returned.
    pub(crate) fn start(argument: &str, what: &'static str) -> Result<(Self, ChildStdout), Failure> {
        Self::start_as(argument, what, |_| {})
    }

    /// As [`start`](Self::start), with changes to how it is started.
    pub(crate) fn start_as(
        argument: &str,
        what: &'static str,
        change: impl FnOnce(&mut Command),
    ) -> Result<(Self, ChildStdout), Failure> {
        let mut command = Command::new("/proc/self/exe");
        // Ctrl-C is for the process that decides what becomes of it.
        command.arg(argument).stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        change(&mut command);
        let mut child =
            command.spawn().map_err(|error| Failure::Environment(format!("failed to start {what}: {error}")))?;
        server::adopt(child.id());
        let (ears, words) = (child.stdin.take(), child.stdout.take());
        let this = Self { child, what, ears, status: None, traced: None };
        let words = words.ok_or_else(|| Failure::Internal(format!("{what} has no pipes")))?;
        Ok((this, words))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Says something to it.
    pub(crate) fn tell(&mut self, word: &impl Serialize) -> Result<(), Failure> {
        let mut line = serde_json::to_vec(word).map_err(|error| {
            Failure::Internal(format!("what {} is to be told cannot be written: {error}", self.what))
        })?;
        line.push(b'\n');
        let ears = self.ears.as_mut().ok_or_else(|| Failure::Internal(format!("{} was told to end", self.what)))?;
        match ears.write_all(&line) {
            Ok(()) => Ok(()),
            Err(error) => Err(self.lost(&error.to_string())),
        }
    }

    /// It does not listen or say anything any more, which it is not to do by itself: what became of it.
    pub(crate) fn lost(&mut self, why: &str) -> Failure {
        match self.wait(LAST_STEPS) {
            Ok(Some(status)) => self.ended(status, why),
            _ => Failure::broke("server", format!("{} is lost: {why}", self.what)),
        }
    }

    fn ended(&self, status: ExitStatus, why: &str) -> Failure {
        let what = format!("{} ended: {status} ({why})", self.what);
        // It says itself that it is the harness that is at fault.
        if status.code() == Some(EXIT_INTERNAL.into()) {
            Failure::Internal(what)
        } else {
            Failure::broke("server", what)
        }
    }

    /// A thread of it has a tracer: this thread.
    pub(crate) fn is_traced(&mut self, thread: Pid) {
        self.traced = Some(thread);
    }

    /// SIGKILL, and no waiting.
    pub(crate) fn kill(&mut self) {
        // One that was waited for is sent nothing: its number may be somebody else's.
        let _ended_already = self.child.kill();
    }

    /// Takes its status, once it has ended.
    pub(crate) fn reap(&mut self, limit: Duration) -> Result<ExitStatus, Failure> {
        self.wait(limit)?.ok_or_else(|| {
            let (what, pid) = (self.what, self.pid());
            Failure::Hang(format!("{what} (process {pid}) has not ended within {limit:?}:\n{}", stacks(pid)))
        })
    }

    /// Tells it that it is to end, and waits until it has: by itself, in time, and without a complaint.
    pub(crate) fn end(&mut self, limit: Duration) -> Result<(), Failure> {
        self.ears = None;
        if self.status.is_some() {
            return Ok(());
        }
        let status = self.reap(limit)?;
        if status.success() { Ok(()) } else { Err(self.ended(status, "when it was told to")) }
    }

    /// As [`end`](Self::end), where nobody can be told: whoever judges the run [is](bad_ends).
    pub(crate) fn end_unheard(&mut self, limit: Duration) {
        if let Err(failure) = self.end(limit) {
            BAD_ENDS.lock().unwrap_or_else(PoisonError::into_inner).push(failure);
        }
    }

    fn wait(&mut self, limit: Duration) -> Result<Option<ExitStatus>, Failure> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.status {
                return Ok(Some(status));
            }
            if let Some(thread) = self.traced {
                // The process is not gone before its tracer has seen each traced thread go.
                let _ = waitpid(thread, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG));
            }
            match self.child.try_wait() {
                Ok(Some(status)) => {
                    self.status = Some(status);
                    server::forget(self.pid());
                }
                Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
                Ok(None) => return Ok(None),
                Err(error) => {
                    return Err(Failure::Internal(format!("failed to wait for {}: {error}", self.what)));
                }
            }
        }
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        if self.status.is_none() {
            self.kill();
            // If it does not end it is left in the list of those that are killed when all has to end.
            let _ = self.wait(KILL_LIMIT);
        }
    }
}

/// What a process says.
pub(crate) trait Word: DeserializeOwned + Send + 'static {
    /// How many bytes follow the line.
    fn bytes(&self) -> usize {
        0
    }
}

/// Hears what a process says, on a thread that ends with it: each word, and the bytes that follow it. The last one may be cut
/// short by a kill.
pub(crate) fn listen<W: Word>(words: ChildStdout) -> Result<Receiver<(W, Vec<u8>)>, Failure> {
    let (sender, heard) = mpsc::channel();
    let hear = move || {
        let mut words = BufReader::new(words);
        let mut line = String::new();
        loop {
            line.clear();
            if !words.read_line(&mut line).is_ok_and(|read| read > 0) {
                return;
            }
            let Ok(word) = serde_json::from_str::<W>(&line) else { return };
            let mut bytes = vec![0; word.bytes()];
            if words.read_exact(&mut bytes).is_err() || sender.send((word, bytes)).is_err() {
                return;
            }
        }
    };
    match std::thread::Builder::new().name("listener".to_owned()).spawn(hear) {
        Ok(_detached) => Ok(heard),
        Err(error) => Err(Failure::Environment(format!("failed to start a thread: {error}"))),
    }
}

/// One line, and what follows it, in one piece: words come from several threads. A reader that is gone is noticed at the
/// orders.
pub(crate) fn say(word: &impl Serialize, bytes: &[u8]) -> io::Result<()> {
    static TURN: Mutex<()> = Mutex::new(());
    let mut line = serde_json::to_vec(word)?;
    line.push(b'\n');
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut out = io::stdout().lock();
    out.write_all(&line)?;
    out.write_all(bytes)?;
    out.flush()
}

/// A failure on its way from one process to another.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Trouble {
    Usage(String),
    Environment(String),
    Hang(String),
    Internal(String),
    Interrupted,
    Broke {
        oracle: String,
        what: String,
        detail: Vec<String>,
    },
    /// A broken promise that says more than that.
    Told(Box<Event>),
}

impl Trouble {
    pub(crate) fn broke(oracle: &str, what: impl Into<String>) -> Self {
        Self::Broke { oracle: oracle.to_owned(), what: what.into(), detail: Vec::new() }
    }
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Usage(what) => Self::Usage(what),
            Failure::Environment(what) => Self::Environment(what),
            Failure::Hang(what) => Self::Hang(what),
            Failure::Internal(what) => Self::Internal(what),
            Failure::Interrupted => Self::Interrupted,
            Failure::DeviceBroke(Broken { event, .. }) => match *event {
                Event::Finding(finding) => {
                    Self::Broke { oracle: finding.oracle, what: finding.what, detail: finding.detail }
                }
                other => Self::Told(Box::new(other)),
            },
        }
    }
}

impl From<ublkit::Error> for Trouble {
    fn from(error: ublkit::Error) -> Self {
        Failure::from(error).into()
    }
}

impl From<Trouble> for Failure {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Usage(what) => Self::Usage(what),
            Trouble::Environment(what) => Self::Environment(what),
            Trouble::Hang(what) => Self::Hang(what),
            Trouble::Internal(what) => Self::Internal(what),
            Trouble::Interrupted => Self::Interrupted,
            Trouble::Broke { oracle, what, detail } => Self::broke_with(oracle, what, detail),
            Trouble::Told(event) => (*event).into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use ublkit_harness::shadow::{Shadow, ShadowOptions};
    use ublkit_harness::{Mismatch, Pattern, SectorRange, Seed};

    use super::*;

    fn mismatch() -> Box<Mismatch> {
        let region = SectorRange::new(0, 8);
        let mut shadow = Shadow::new(ShadowOptions {
            region,
            worker: 0,
            pattern: Arc::new(Pattern::new(Seed::new(1), 0)),
            foreign: Arc::default(),
            device_sectors: 8,
            initially_zero: true,
        });
        shadow.verify(region, &[1; 8 * 512]).expect_err("it held zeroes")
    }

    /// Every failure comes out of the other process as what it went in, and so with the same exit status.
    #[test]
    fn failures_are_the_same_on_the_other_side() {
        let what = || "what".to_owned();
        let failures: [fn(String) -> Failure; 4] =
            [Failure::Usage, Failure::Environment, Failure::Hang, Failure::Internal];
        let all = failures.into_iter().map(|failure| failure(what())).chain([
            Failure::Interrupted,
            Failure::broke_with("oracle", what(), vec!["one".to_owned(), "two".to_owned()]),
            mismatch().into(),
        ]);
        for failure in all {
            let before = format!("{failure:?}");
            let line = serde_json::to_string(&Trouble::from(failure)).expect("written");
            let trouble: Trouble = serde_json::from_str(&line).expect("read");
            assert_eq!(format!("{:?}", Failure::from(trouble)), before, "{line}");
        }
    }

    /// Something else in place of this program.
    fn role(script: &str) -> Role {
        let mut child = Command::new("/bin/sh")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a shell");
        server::adopt(child.id());
        let ears = child.stdin.take();
        Role { child, what: "a shell", ears, status: None, traced: None }
    }

    #[test]
    fn an_end_is_to_come_by_itself_in_time_and_without_a_complaint() {
        const LONG: Duration = Duration::from_secs(60);
        assert!(role("read -r _; exit 0").end(LONG).is_ok());
        assert!(matches!(role("read -r _; exit 1").end(LONG), Err(Failure::DeviceBroke(_))));
        assert!(matches!(role("read -r _; kill -SEGV $$").end(LONG), Err(Failure::DeviceBroke(_))));
        assert!(matches!(role("read -r _; exit 70").end(LONG), Err(Failure::Internal(_))));
        let late = role("exec sleep 60").end(Duration::from_millis(50)).expect_err("it does not end");
        assert!(matches!(&late, Failure::Hang(what) if what.contains("has not ended")), "{late}");
    }

    #[test]
    fn who_was_waited_for_is_known_no_more() {
        let mut gone = role("exit 3");
        let pid = gone.pid();
        assert!(server::pids().contains(&pid));
        let lost = gone.lost("its output ended");
        assert!(
            lost.to_string().contains("exit status: 3") && lost.to_string().contains("its output ended"),
            "{lost}"
        );
        assert!(!server::pids().contains(&pid));
        assert!(gone.end(Duration::ZERO).is_ok(), "told already");
        role("read -r _; exit 3").end_unheard(KILL_LIMIT);
        let told = bad_ends();
        assert!(matches!(&told[..], [Failure::DeviceBroke(_)]), "{told:?}");
        let mut killed = role("exec sleep 60");
        killed.kill();
        assert!(!killed.reap(KILL_LIMIT).expect("ends").success());
        assert!(!server::pids().contains(&killed.pid()));
    }
}
