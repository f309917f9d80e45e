//! The loading process's side: starts the server, talks to it, and sees to it that it ends.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ublkit::Controller;
use ublkit_harness::sim::medium::CutReport;
use ublkit_harness::{Event, EventSink, Seed};

use super::ARGUMENT;
use super::protocol::{Call, Closing, Moment, Reply, Served, Status};
use super::witness::Testimony;
use crate::context::Context;
use crate::scenario::Failure;
use crate::target::TargetArgs;
use crate::torture::outage::Outage;

/// How long a server may take to end once its pipe is closed; it has its own bounds for closing devices.
const END_DEADLINE: Duration = Duration::from_secs(60);
/// How long a killed server may take to vanish, and its devices to be deleted.
const KILL_DEADLINE: Duration = Duration::from_secs(5);

/// A server that runs, and the ids of its devices.
#[derive(Debug)]
struct Running {
    pid: u32,
    ids: Vec<u32>,
}

/// Every server of this process, for the case that all has to end at once.
static RUNNING: Mutex<Vec<Running>> = Mutex::new(Vec::new());

fn running() -> MutexGuard<'static, Vec<Running>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Kills every server and deletes its devices, because something hangs: what this process waits for then fails, and it
/// can end.
pub(crate) fn kill_all() {
    let servers = std::mem::take(&mut *running());
    for server in &servers {
        // One that has ended by itself is what is wanted.
        let _ = kill(Pid::from_raw(server.pid.cast_signed()), Signal::SIGKILL);
    }
    let deadline = Instant::now() + KILL_DEADLINE;
    let alive = |pid: u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
    };
    while servers.iter().any(|server| alive(server.pid)) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    if let Ok(controller) = Controller::open() {
        for id in servers.iter().flat_map(|server| &server.ids) {
            // Left to the next run if this fails.
            let _ = controller.delete(*id, KILL_DEADLINE);
        }
    }
}

#[derive(Debug)]
struct Pipes {
    /// None once it is to end.
    calls: Option<ChildStdin>,
    replies: BufReader<ChildStdout>,
}

/// The server process. It closes its devices and ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Server {
    child: Mutex<Child>,
    pid: u32,
    pipes: Mutex<Pipes>,
    sink: EventSink,
}

impl Server {
    /// Starts a server.
    pub(crate) fn start(context: &Context) -> Result<Arc<Self>, Failure> {
        let cannot = |error: io::Error| Failure::Environment(format!("failed to start a server process: {error}"));
        let mut child = Command::new("/proc/self/exe")
            .arg(ARGUMENT)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Ctrl-C is for the process that decides what becomes of it.
            .process_group(0)
            .spawn()
            .map_err(cannot)?;
        let pid = child.id();
        let (Some(calls), Some(replies)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Failure::Internal("a server process has no pipes".to_owned()));
        };
        running().push(Running { pid, ids: Vec::new() });
        context.watchdog().watch_process(pid);
        Ok(Arc::new(Self {
            child: Mutex::new(child),
            pid,
            pipes: Mutex::new(Pipes { calls: Some(calls), replies: BufReader::new(replies) }),
            sink: context.sink().clone(),
        }))
    }

    /// Serves a device, on new storage or on `storage`.
    pub(crate) fn serve(
        &self,
        args: &TargetArgs,
        seed: Seed,
        storage: Option<usize>,
    ) -> Result<(Served, usize), Failure> {
        match self.call(&Call::Serve { args: args.clone(), seed, storage })? {
            Reply::Served(served) => {
                self.note_ids(|ids| ids.push(served.id));
                Ok((served, served.storage))
            }
            other => Err(unexpected(&other)),
        }
    }

    /// Reads a storage past the device.
    pub(crate) fn read(&self, storage: usize, buf: &mut [u8], offset: u64) -> Result<(), Failure> {
        let mut pipes = self.pipes();
        match self.exchange(&mut pipes, &Call::Read { storage, offset, len: buf.len() })? {
            Reply::Bytes(len) if len == buf.len() => pipes.replies.read_exact(buf).map_err(|error| self.gone(&error)),
            other => Err(unexpected(&other)),
        }
    }

    /// Lets no request through to a storage, calls `then`, and copies the storage. Returns the copy.
    pub(crate) fn copy<T>(&self, storage: usize, then: impl FnOnce() -> T) -> Result<(T, usize), Failure> {
        self.freeze(storage, Moment::Now, Duration::ZERO)?;
        let then = then();
        match self.call(&Call::CopyAndThaw { storage })? {
            Reply::Copied { storage } => Ok((then, storage)),
            other => Err(unexpected(&other)),
        }
    }

    /// From a moment on, lets no request through to a disk, calls `then`, and copies the disk with its cache. Returns the
    /// copy. The moment is now when `patience` is over.
    pub(crate) fn fork<T>(
        &self,
        storage: usize,
        moment: Moment,
        patience: Duration,
        then: impl FnOnce() -> T,
    ) -> Result<(T, usize), Failure> {
        self.freeze(storage, moment, patience)?;
        let then = then();
        match self.call(&Call::ForkAndThaw { storage })? {
            Reply::Copied { storage } => Ok((then, storage)),
            other => Err(unexpected(&other)),
        }
    }

    fn freeze(&self, storage: usize, moment: Moment, patience: Duration) -> Result<(), Failure> {
        let patience_ms = patience.as_millis() as u64;
        match self.call(&Call::Freeze { storage, moment, patience_ms })? {
            Reply::Frozen => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// What a power cut could leave of a disk, as another storage.
    pub(crate) fn crash(&self, storage: usize, seed: Seed) -> Result<(usize, CutReport), Failure> {
        match self.call(&Call::Crash { storage, seed })? {
            Reply::Crashed { storage, report } => Ok((storage, report)),
            other => Err(unexpected(&other)),
        }
    }

    /// Gives back the memory of a storage that is used no more.
    pub(crate) fn forget(&self, storage: usize) -> Result<(), Failure> {
        match self.call(&Call::Forget { storage })? {
            Reply::Forgotten => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Lets every request fail, and drops whatever is between kernel and storage. Returns what a power cut took from a disk.
    pub(crate) fn kill(&self, served: &Served, outage: Outage) -> Result<Option<CutReport>, Failure> {
        match self.call(&Call::Kill { device: served.device, outage })? {
            Reply::Dead(report) => Ok(report),
            other => Err(unexpected(&other)),
        }
    }

    /// Serves a device again.
    pub(crate) fn revive(&self, served: &Served) -> Result<(), Failure> {
        match self.call(&Call::Revive { device: served.device })? {
            Reply::Alive => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Switches the faults of a device on or off.
    pub(crate) fn faults(&self, served: &Served, on: bool) -> Result<(), Failure> {
        match self.call(&Call::Faults { device: served.device, on })? {
            Reply::Switched => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// What happened at a device's storage since the last time.
    pub(crate) fn testimony(&self, served: &Served) -> Result<Testimony, Failure> {
        match self.call(&Call::Testify { device: served.device })? {
            Reply::Testimony(testimony) => Ok(testimony),
            other => Err(unexpected(&other)),
        }
    }

    /// How a device is doing.
    pub(crate) fn status(&self, served: &Served) -> Result<Status, Failure> {
        match self.call(&Call::Status { device: served.device })? {
            Reply::Status(status) => Ok(status),
            other => Err(unexpected(&other)),
        }
    }

    /// Closes a device.
    pub(crate) fn close(&self, served: &Served) -> Result<Closing, Failure> {
        match self.call(&Call::Close { device: served.device })? {
            Reply::Closed(closing) => {
                self.note_ids(|ids| ids.retain(|id| *id != served.id));
                Ok(closing)
            }
            other => Err(unexpected(&other)),
        }
    }

    fn note_ids(&self, change: impl FnOnce(&mut Vec<u32>)) {
        if let Some(own) = running().iter_mut().find(|one| one.pid == self.pid) {
            change(&mut own.ids);
        }
    }

    fn pipes(&self) -> MutexGuard<'_, Pipes> {
        self.pipes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call(&self, call: &Call) -> Result<Reply, Failure> {
        self.exchange(&mut self.pipes(), call)
    }

    fn exchange(&self, pipes: &mut Pipes, call: &Call) -> Result<Reply, Failure> {
        let mut line = serde_json::to_string(call)
            .map_err(|error| Failure::Internal(format!("a call to the server cannot be written: {error}")))?;
        line.push('\n');
        let calls = pipes.calls.as_mut().ok_or_else(|| Failure::Internal("the server was told to end".to_owned()))?;
        calls.write_all(line.as_bytes()).map_err(|error| self.gone(&error))?;
        loop {
            line.clear();
            let read = pipes.replies.read_line(&mut line).map_err(|error| self.gone(&error))?;
            if read == 0 {
                return Err(self.gone(&io::ErrorKind::UnexpectedEof.into()));
            }
            match serde_json::from_str(&line) {
                Ok(Reply::Note(text)) => self.sink.send(Event::note(text)),
                Ok(Reply::Failed(complaint)) => return Err(complaint.into()),
                Ok(reply) => return Ok(reply),
                Err(error) => {
                    return Err(Failure::Internal(format!("the server said what cannot be understood: {error}")));
                }
            }
        }
    }

    /// The server has ended, which it is not to do by itself.
    fn gone(&self, error: &io::Error) -> Failure {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        // It may be on its way out.
        let deadline = Instant::now() + Duration::from_secs(1);
        loop {
            match child.try_wait() {
                Ok(Some(status)) => return Failure::broke("server", format!("the server process ended: {status}")),
                Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                _ => return Failure::broke("server", format!("the server process does not answer: {error}")),
            }
        }
    }
}

fn unexpected(reply: &Reply) -> Failure {
    Failure::Internal(format!("the server answered another question: {reply:?}"))
}

impl Drop for Server {
    fn drop(&mut self) {
        self.pipes().calls = None;
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        let deadline = Instant::now() + END_DEADLINE;
        while let Ok(None) = child.try_wait() {
            if Instant::now() >= deadline {
                // What it leaves behind is in this run's record, for the next one to clean.
                let _ = child.kill();
                let _ = child.wait();
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        running().retain(|one| one.pid != self.pid);
    }
}
