//! The scenario's side of a process that holds a device.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::ARGUMENT;
use super::protocol::{Call, Reply};
use crate::scenario::Failure;
use crate::server;

/// How long a call may take beyond what it is told to wait.
const CALL_DEADLINE: Duration = Duration::from_secs(20);
/// How long a killed process may take to be gone.
const REAP_DEADLINE: Duration = Duration::from_secs(40);

/// A process that holds a device. It is killed when this is dropped.
#[derive(Debug)]
pub(super) struct Peer {
    child: Child,
    calls: ChildStdin,
    replies: Receiver<Reply>,
}

impl Peer {
    pub(super) fn start() -> Result<Self, Failure> {
        let cannot = |error| Failure::Environment(format!("cannot start this program once more: {error}"));
        let mut child = Command::new("/proc/self/exe")
            .arg(ARGUMENT)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Ctrl-C is for the process that decides what becomes of it.
            .process_group(0)
            .spawn()
            .map_err(cannot)?;
        let (Some(calls), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Failure::Internal("a child without pipes".to_owned()));
        };
        server::adopt(child.id());
        let (sender, replies) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let Ok(reply) = serde_json::from_str(&line) else { break };
                if sender.send(reply).is_err() {
                    break;
                }
            }
        });
        Ok(Self { child, calls, replies })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Has it do something.
    pub(super) fn call(&mut self, call: &Call) -> Result<Reply, Failure> {
        let line = serde_json::to_string(call).map_err(|error| Failure::Internal(error.to_string()))?;
        let lost = |error| Failure::Internal(format!("process {} cannot be told {call:?}: {error}", self.child.id()));
        writeln!(self.calls, "{line}").map_err(lost)?;
        let patience = match call {
            Call::Io { patience_ms, .. } | Call::Held { patience_ms } | Call::HasRead { patience_ms } => *patience_ms,
            _ => 0,
        };
        self.replies.recv_timeout(Duration::from_millis(patience) + CALL_DEADLINE).map_err(|_| {
            Failure::Hang(format!("process {} did not do {call:?}:\n{}", self.child.id(), stacks(self.child.id())))
        })
    }

    /// As [`call`](Self::call), of what has to succeed.
    pub(super) fn done(&mut self, call: &Call) -> Result<i32, Failure> {
        match self.call(call)? {
            Reply::Result(result) if result >= 0 => Ok(result),
            Reply::Lacking(what) => Err(Failure::Environment(what)),
            other => Err(Failure::broke("control", format!("{call:?} gives {other:?}"))),
        }
    }

    /// Kills it, and does not wait.
    pub(super) fn kill(&self) {
        // It was not waited for, so its id is nobody else's.
        let _ended = kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGKILL);
    }

    /// Kills it, and waits for its end.
    pub(super) fn end(mut self) -> Result<(), Failure> {
        self.kill();
        let until = Instant::now() + REAP_DEADLINE;
        loop {
            match self.child.try_wait() {
                Ok(Some(_)) => {
                    server::forget(self.child.id());
                    return Ok(());
                }
                Ok(None) if Instant::now() < until => thread::sleep(Duration::from_millis(2)),
                Ok(None) => {
                    let pid = self.child.id();
                    return Err(Failure::Hang(format!(
                        "process {pid} was killed and does not end:\n{}",
                        stacks(pid)
                    )));
                }
                Err(error) => return Err(Failure::Internal(format!("cannot wait for a child: {error}"))),
            }
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.kill();
        // Reaped if it has ended by now; the rest is init's.
        let _ = self.child.try_wait();
    }
}

/// Where every thread of a process stands in the kernel.
pub(super) fn stacks(pid: u32) -> String {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return format!("process {pid} is gone") };
    let read = |path: &std::path::Path, name: &str| std::fs::read_to_string(path.join(name)).unwrap_or_default();
    let lines = tasks.flatten().map(|task| {
        let path = task.path();
        let state = read(&path, "stat").rsplit_once(") ").map_or(' ', |(_, rest)| rest.chars().next().unwrap_or(' '));
        format!("{} {} {state}\n{}", path.display(), read(&path, "comm").trim(), read(&path, "stack"))
    });
    lines.collect::<Vec<_>>().join("\n")
}
