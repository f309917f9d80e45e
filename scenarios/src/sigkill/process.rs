//! The loading process's side: starts a server, listens to it, and kills it.

use std::process::Stdio;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use ublkit_harness::{Event, EventSink};

use super::protocol::{Command, Order, What, Word};
use super::role::ARGUMENT;
use crate::context::Context;
use crate::role::{self, KILL_LIMIT, Role};
use crate::scenario::Failure;

/// How long a server may take to say what is waited for. Emulated machines are slow, and there may be others on them.
pub(super) const WORD_LIMIT: Duration = Duration::from_secs(40);

/// A server that runs.
pub(super) struct Process {
    role: Role,
    words: Receiver<(Word, Vec<u8>)>,
    heard: Vec<Word>,
    sink: EventSink,
}

/// How a server was killed.
pub(super) struct Killed {
    /// How long its process took to vanish.
    pub(super) took: Duration,
    /// What it said, from the first word to the last.
    pub(super) words: Vec<Word>,
}

impl Process {
    pub(super) fn start(context: &Context, order: &Order) -> Result<Self, Failure> {
        let (mut role, words) = Role::start_as(ARGUMENT, "the server", |program| {
            // It panics on purpose where a queue's thread is to end; what it has to tell it says on its standard output.
            program.stderr(Stdio::null()).env("RUST_BACKTRACE", "0");
        })?;
        let words = role::listen(words)?;
        role.tell(order)?;
        Ok(Self { role, words, heard: Vec::new(), sink: context.sink().clone() })
    }

    pub(super) fn pid(&self) -> u32 {
        self.role.pid()
    }

    pub(super) fn tell(&mut self, command: &Command) -> Result<(), Failure> {
        self.role.tell(command)
    }

    fn heard(&mut self, word: Word) {
        if let What::Note(text) = &word.what {
            self.sink.send(Event::note(format!("server {}: {text}", self.pid())));
        }
        self.heard.push(word);
    }

    /// Waits for a word that `wanted` takes, among those that were not heard yet.
    pub(super) fn wait_for<T>(
        &mut self,
        what: &str,
        mut wanted: impl FnMut(&What) -> Option<T>,
    ) -> Result<T, Failure> {
        let deadline = Instant::now() + WORD_LIMIT;
        loop {
            match self.words.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok((word, _)) => {
                    let found = wanted(&word.what);
                    let failed = match &word.what {
                        What::Failed(why) => Some(why.clone()),
                        _ => None,
                    };
                    self.heard(word);
                    if let Some(found) = found {
                        return Ok(found);
                    }
                    if let Some(why) = failed {
                        return Err(Failure::broke("server", format!("while {what} was awaited: {why}")));
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    return Err(Failure::Hang(format!(
                        "the server did not come to {what} within {WORD_LIMIT:?}; its last word: {:?}",
                        self.heard.last().map(|word| &word.what)
                    )));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let last = self.heard.last().map(|word| &word.what);
                    return Err(self.role.lost(&format!("while {what} was awaited; its last word: {last:?}")));
                }
            }
        }
    }

    /// Stops one thread of it for good, wherever that is, while the others go on. Only a tracer can do so to one thread.
    pub(super) fn stop_thread(&mut self, thread: i32) -> Result<(), Failure> {
        let thread = Pid::from_raw(thread);
        let cannot = |errno| Failure::Environment(format!("failed to stop a thread of the server: {errno} (ptrace)"));
        ptrace::seize(thread, ptrace::Options::empty()).map_err(cannot)?;
        self.role.is_traced(thread);
        ptrace::interrupt(thread).map_err(cannot)?;
        let deadline = Instant::now() + KILL_LIMIT;
        while Instant::now() < deadline {
            match waitpid(thread, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG)).map_err(cannot)? {
                WaitStatus::StillAlive => std::thread::sleep(Duration::from_millis(1)),
                _ => return Ok(()),
            }
        }
        Err(Failure::Hang(format!("a thread of the server did not stop within {KILL_LIMIT:?}")))
    }

    /// SIGKILL; returns when the process is gone.
    pub(super) fn kill(mut self) -> Result<Killed, Failure> {
        let begun = Instant::now();
        self.role.kill();
        self.role.reap(KILL_LIMIT)?;
        let took = begun.elapsed();
        self.hear_out()?;
        Ok(Killed { took, words: self.heard })
    }

    /// Waits for the end of a server that ends by itself.
    pub(super) fn end(mut self) -> Result<(), Failure> {
        self.role.end(WORD_LIMIT)?;
        self.hear_out()
    }

    /// Everything that it said and nobody has heard yet: its pipe has ended, and so does the listener.
    fn hear_out(&mut self) -> Result<(), Failure> {
        let deadline = Instant::now() + KILL_LIMIT;
        loop {
            match self.words.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok((word, _)) => self.heard(word),
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Err(RecvTimeoutError::Timeout) => {
                    return Err(Failure::Internal(format!(
                        "the pipe of a server does not end within {KILL_LIMIT:?}"
                    )));
                }
            }
        }
    }
}
