//! The loading process's side: starts a server, listens to it, and kills it.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command as Program, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::protocol::{Command, Order, What, Word};
use super::role::ARGUMENT;
use crate::context::Context;
use crate::scenario::Failure;
use crate::server;

/// How long a server may take to say what is waited for. Emulated machines are slow, and there may be others on them.
pub(super) const WORD_LIMIT: Duration = Duration::from_secs(40);
/// How long a killed server may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(20);

/// A server that runs.
pub(super) struct Process {
    child: Child,
    orders: Option<ChildStdin>,
    words: Receiver<Word>,
    listener: Option<JoinHandle<()>>,
    heard: Vec<Word>,
    gone: bool,
    /// A thread of it that this thread has stopped, and so has to bury.
    stopped: Option<Pid>,
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
        let cannot = |error: io::Error| Failure::Environment(format!("failed to start a server process: {error}"));
        let mut child = Program::new("/proc/self/exe")
            .arg(ARGUMENT)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // It panics on purpose where a queue's thread is to end; what it has to tell it says on its standard output.
            .stderr(Stdio::null())
            .env("RUST_BACKTRACE", "0")
            // Ctrl-C is for the process that decides what becomes of it.
            .process_group(0)
            .spawn()
            .map_err(cannot)?;
        server::adopt(child.id());
        context.watchdog().watch_process(child.id());
        let (orders, replies) = (child.stdin.take(), child.stdout.take());
        let (sender, words) = mpsc::channel();
        let mut this = Self { child, orders, words, listener: None, heard: Vec::new(), gone: false, stopped: None };
        let Some(replies) = replies else { return Err(Failure::Internal("a server has no pipes".to_owned())) };
        let listen = move || listen(replies, &sender);
        this.listener = Some(std::thread::Builder::new().name("listener".to_owned()).spawn(listen).map_err(cannot)?);
        this.write(order)?;
        Ok(this)
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn tell(&mut self, command: &Command) -> Result<(), Failure> {
        self.write(command)
    }

    fn write(&mut self, line: &impl serde::Serialize) -> Result<(), Failure> {
        let mut line = serde_json::to_string(line)
            .map_err(|error| Failure::Internal(format!("an order cannot be written: {error}")))?;
        line.push('\n');
        let orders = self.orders.as_mut().ok_or_else(|| Failure::Internal("the server has no ears".to_owned()))?;
        orders
            .write_all(line.as_bytes())
            .map_err(|error| Failure::broke("server", format!("the server does not listen: {error}")))
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
                Ok(word) => {
                    let found = wanted(&word.what);
                    let failed = match &word.what {
                        What::Failed(why) => Some(why.clone()),
                        _ => None,
                    };
                    self.heard.push(word);
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
                    let status = self.child.try_wait();
                    return Err(Failure::broke(
                        "server",
                        format!(
                            "the server ended ({status:?}) while {what} was awaited; its last word: {:?}",
                            self.heard.last().map(|word| &word.what)
                        ),
                    ));
                }
            }
        }
    }

    /// Stops one thread of it for good, wherever that is, while the others go on. Only a tracer can do so to one thread.
    pub(super) fn stop_thread(&mut self, thread: i32) -> Result<(), Failure> {
        let thread = Pid::from_raw(thread);
        let cannot = |errno| Failure::Environment(format!("failed to stop a thread of the server: {errno} (ptrace)"));
        ptrace::seize(thread, ptrace::Options::empty()).map_err(cannot)?;
        self.stopped = Some(thread);
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
        self.child.kill().map_err(|error| Failure::Internal(format!("failed to kill the server: {error}")))?;
        self.reap(KILL_LIMIT)?;
        let took = begun.elapsed();
        self.hear_out();
        Ok(Killed { took, words: std::mem::take(&mut self.heard) })
    }

    /// Waits for the end of a server that ends by itself.
    pub(super) fn end(mut self) -> Result<(), Failure> {
        self.orders = None;
        self.reap(WORD_LIMIT)?;
        self.hear_out();
        Ok(())
    }

    fn reap(&mut self, limit: Duration) -> Result<(), Failure> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(thread) = self.stopped {
                // The process is not gone before its tracer has seen each traced thread go.
                let _ = waitpid(thread, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG));
            }
            match self.child.try_wait() {
                Ok(Some(_)) => break,
                Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
                Ok(None) => {
                    return Err(Failure::Hang(format!(
                        "the server's process {} has not ended within {limit:?}:\n{}",
                        self.pid(),
                        stacks(self.pid())
                    )));
                }
                Err(error) => return Err(Failure::Internal(format!("failed to wait for the server: {error}"))),
            }
        }
        self.gone = true;
        server::forget(self.pid());
        Ok(())
    }

    /// Everything that it said and nobody has heard yet.
    fn hear_out(&mut self) {
        if let Some(listener) = self.listener.take() {
            // Its pipe has ended, and so does it.
            let _ = listener.join();
        }
        self.heard.extend(self.words.try_iter());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.gone {
            return;
        }
        let _ = self.child.kill();
        // If it does not end it is left in the list of those that are killed when all has to end.
        let _ = self.reap(KILL_LIMIT);
        if self.gone {
            self.hear_out();
        }
    }
}

fn listen(replies: ChildStdout, words: &mpsc::Sender<Word>) {
    for line in BufReader::new(replies).lines().map_while(Result::ok) {
        // The last one may be cut short by the kill.
        if let Ok(word) = serde_json::from_str(&line)
            && words.send(word).is_err()
        {
            return;
        }
    }
}

/// Where the threads of a process stand in the kernel.
pub(super) fn stacks(pid: u32) -> String {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return String::new() };
    let read = |path: std::path::PathBuf| std::fs::read_to_string(path).unwrap_or_default();
    tasks
        .flatten()
        .map(|task| {
            let path = task.path();
            format!("{} {}\n{}", task.file_name().display(), read(path.join("comm")).trim(), read(path.join("stack")))
        })
        .collect::<Vec<_>>()
        .join("\n")
}
