//! The loading process's side: starts the server, talks to it, and sees to it that it ends.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ublkit::{Controller, ErrorKind};
use ublkit_harness::fault::FaultPlan;
use ublkit_harness::sim::medium::CutReport;
use ublkit_harness::{Event, EventSink, Seed};

use super::ARGUMENT;
use super::protocol::{Call, Closing, Moment, Reply, Served, Status};
use super::witness::Testimony;
use crate::context::Context;
use crate::flush_trace::Recording;
use crate::scenario::Failure;
use crate::target::TargetArgs;
use crate::torture::outage::Outage;

/// How long a server may take to end once its pipe is closed; it has its own bounds for closing devices.
const END_DEADLINE: Duration = Duration::from_secs(60);
/// How long killed servers may take to vanish.
const KILL_DEADLINE: Duration = Duration::from_millis(1500);
/// How long their devices may take to be deleted, all together.
const DELETE_DEADLINE: Duration = Duration::from_millis(1200);
/// How long to try for a lock that is held for moments only.
const LOCK_PATIENCE: Duration = Duration::from_millis(100);

/// In place of a server's process, for a device that goes through the hands of several.
const NOBODY: u32 = 0;

/// A server that runs, and the ids of its devices.
#[derive(Clone, Debug)]
pub(crate) struct Running {
    pub(crate) pid: u32,
    pub(crate) ids: Vec<u32>,
}

/// Every server of this process, for the case that all has to end at once.
static RUNNING: Mutex<Vec<Running>> = Mutex::new(Vec::new());

fn running() -> MutexGuard<'static, Vec<Running>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has a device deleted when all has to end at once, whoever serves it then; or no longer.
pub(crate) fn watch_over_device(id: u32, on: bool) {
    let mut running = running();
    running.retain(|one| one.pid != NOBODY || !one.ids.contains(&id));
    if on {
        running.push(Running { pid: NOBODY, ids: vec![id] });
    }
}

/// Every server of this process, with the devices that it has open, whether or not it has told of them. To be asked while
/// anything may hang.
pub(crate) fn running_now() -> Vec<Running> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    let mut servers = loop {
        match RUNNING.try_lock() {
            Ok(servers) => break servers.clone(),
            Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner().clone(),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(TryLockError::WouldBlock) => break Vec::new(),
        }
    };
    for server in &mut servers {
        server.ids.extend(open_devices(server.pid));
        server.ids.sort_unstable();
        server.ids.dedup();
    }
    servers
}

/// The ids of the devices whose character devices process `pid` has open: those that it serves, or is about to.
fn open_devices(pid: u32) -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    let links = entries.flatten().filter_map(|entry| std::fs::read_link(entry.path()).ok());
    links.filter_map(|link| link.to_str()?.strip_prefix("/dev/ublkc")?.parse().ok()).collect()
}

/// Kills every server and deletes its devices, because something hangs: what this process waits for then fails, and it
/// can end. Says what could not be done, within [`KILL_DEADLINE`] and [`DELETE_DEADLINE`].
pub(crate) fn kill_all() -> Vec<String> {
    let servers = running_now();
    for server in servers.iter().filter(|server| server.pid != NOBODY) {
        // One that has ended by itself is what is wanted.
        let _ = kill(Pid::from_raw(server.pid.cast_signed()), Signal::SIGKILL);
    }
    let deadline = Instant::now() + KILL_DEADLINE;
    let alive = |pid: u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
    };
    while servers.iter().any(|server| alive(server.pid)) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut left: Vec<_> = servers
        .iter()
        .filter(|server| alive(server.pid))
        .map(|server| format!("server process {} was killed and does not end", server.pid))
        .collect();
    // Each on a thread of its own: whoever holds the driver's lock holds up a DEL for ever.
    let deadline = Instant::now() + DELETE_DEADLINE;
    let (sender, receiver) = mpsc::channel();
    let ids: Vec<u32> = servers.iter().flat_map(|server| server.ids.clone()).collect();
    for &id in &ids {
        let sender = sender.clone();
        let _ = std::thread::Builder::new().name("delete".to_owned()).spawn(move || {
            let _ = sender.send((id, delete(id)));
        });
    }
    drop(sender);
    let mut told = Vec::new();
    while let Ok((id, deleted)) = receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        told.push(id);
        if let Err(error) = deleted {
            left.push(format!("device {id} is left to the next run: failed to {error}"));
        }
    }
    let missing = ids.iter().filter(|id| !told.contains(id));
    left.extend(missing.map(|id| format!("device {id} is left to the next run: its deletion does not end")));
    left
}

fn delete(id: u32) -> Result<(), String> {
    let controller = Controller::open().map_err(|error| error.to_string())?;
    let deleted = match controller.delete(id, DELETE_DEADLINE / 2) {
        // This process still holds it open, in whatever it is that hangs: it goes when this process ends.
        Err(error) if error.kind() == ErrorKind::TimedOut => controller.delete_async(id),
        other => other,
    };
    match deleted {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error.to_string()),
        _ => Ok(()),
    }
}

/// A process of another role that serves devices: it ends with the servers when all has to.
pub(crate) fn adopt(pid: u32) {
    running().push(Running { pid, ids: Vec::new() });
}

/// Such a process has a device of this id.
pub(crate) fn note_made(pid: u32, id: u32) {
    if let Some(own) = running().iter_mut().find(|one| one.pid == pid) {
        own.ids.push(id);
    }
}

/// It has it no more.
pub(crate) fn note_gone(pid: u32, id: u32) {
    if let Some(own) = running().iter_mut().find(|one| one.pid == pid) {
        own.ids.retain(|other| *other != id);
    }
}

/// Such a process has ended.
pub(crate) fn forget(pid: u32) {
    running().retain(|one| one.pid != pid);
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

    /// Its process id.
    pub(crate) const fn pid(&self) -> u32 {
        self.pid
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

    /// Gives a device other faults. They are off.
    pub(crate) fn replan(
        &self,
        served: &Served,
        plan: &FaultPlan,
        seed: ublkit_harness::Seed,
    ) -> Result<(), Failure> {
        match self.call(&Call::Replan { device: served.device, plan: plan.clone(), seed })? {
            Reply::Switched => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// How many requests are held.
    pub(crate) fn held(&self, served: &Served) -> Result<u64, Failure> {
        match self.call(&Call::Held { device: served.device })? {
            Reply::Held(count) => Ok(count),
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

    /// The calls of a device's storage that were recorded.
    pub(crate) fn recording(&self, served: &Served) -> Result<Recording, Failure> {
        match self.call(&Call::Recording { device: served.device })? {
            Reply::Recording(recording) => Ok(recording),
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
    pub(crate) fn close(&self, served: &Served, faults_stay: bool) -> Result<Closing, Failure> {
        match self.call(&Call::Close { device: served.device, faults_stay })? {
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
