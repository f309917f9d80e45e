//! A device that is served on the library's raw level, for bugs that the other levels do not let a server have.
//!
//! Each queue's thread fetches its tags, serves what comes, one request after the other, and commits the results, with
//! nothing but a channel for raw commands between itself and the driver. Without a bug it is a right server, small and slow.
//!
//! STOP waits for every request that the server has, and cannot be interrupted: sent by this process, it would keep it from
//! being killed while a request is never committed, and the driver would wait for that process. So another one sends it.

mod bug;
mod data;
mod queue;

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ublkit::ctrl::{AddDevice, DeviceInfo, block_path, character_path};
use ublkit::raw::parameters;
use ublkit::sys::ublk::Features;
use ublkit::{Backend, Controller, ErrorKind, Geometry};
use ublkit_harness::Mutant;
use ublkit_harness::mutant::{Planted, Plot, Turn, gives_id_back};

use self::queue::Queue;
use super::protocol::Reply;
use super::stack::Stack;
use crate::cli::complain;
use crate::role::say;
use crate::scenario::Failure;
use crate::target::{Mode, TargetArgs};

/// The argument with which this program sends STOP for a server.
pub(crate) const STOP_ARGUMENT: &str = "stop-for-server";

/// How long the queues may take to fetch, and START to be done.
const START_DEADLINE: Duration = Duration::from_secs(15);
/// The most that STOP may take.
const STOP_DEADLINE: Duration = Duration::from_secs(15);
/// How long a process that sends STOP waits for it, which may come to be far too long.
const STOP_PATIENCE: Duration = Duration::from_secs(60);
/// How long threads may take to end, and nodes to appear.
const SHORT: Duration = Duration::from_secs(5);
/// How long STOP may take of a device that is given up: the kernel takes back what its queues had in the background.
const GIVEN_UP: Duration = Duration::from_secs(20);
/// How long a server that is going to drop what it has in hand waits for that.
const BEFORE_STOP: Duration = Duration::from_secs(3);
const LOOK_AROUND: Duration = Duration::from_millis(2);

/// What the queues of a device have in common.
struct Common {
    depth: u16,
    max_io_bytes: u32,
    mode: Mode,
    io_flusher: bool,
    planted: Option<Planted>,
    plot: Plot,
    backend: Arc<dyn Backend>,
    requests: AtomicU64,
    /// The queues are to end, whatever they have in hand.
    given_up: AtomicBool,
    error: Mutex<Option<String>>,
}

impl Common {
    fn turn(&self) -> Option<Turn> {
        self.planted.map(|planted| Turn::new(planted, &self.plot))
    }

    fn fail(&self, error: &str) {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| error.to_owned());
    }

    fn error(&self) -> Option<String> {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A device that is served on the raw level. Ends when it is dropped, whatever that takes.
pub(super) struct Device {
    controller: Controller,
    info: DeviceInfo,
    common: Arc<Common>,
    threads: Vec<JoinHandle<()>>,
    stop: Option<Child>,
    /// Nothing is to be done about it any more.
    over: bool,
}

/// Fails where the bug has no chance, or this server lacks what is asked for.
fn check(stack: &Stack, args: &TargetArgs) -> Result<(), Failure> {
    if stack.handlers().is_some() {
        return Err(Failure::Usage("a server on the raw level has no handlers to plant that in".to_owned()));
    }
    let wants = |what: &str| {
        let name = args.mutant.map(|planted| planted.mutant.name()).unwrap_or_default();
        Err(Failure::Usage(format!("'{name}' has no chance to occur: add {what}")))
    };
    match args.mutant.map(|planted| planted.mutant) {
        Some(Mutant::UserCopyOffset | Mutant::SglContiguity) if args.mode != Mode::UserCopy => {
            wants("--mode user-copy")
        }
        Some(Mutant::UserCopyOffset) if args.queues < 2 => wants("--queues 2"),
        Some(Mutant::SglContiguity) if args.max_io as usize <= data::SEGMENT => wants("--max-io 128k"),
        _ => Ok(()),
    }
}

impl Device {
    pub(super) fn start(stack: &Stack, args: &TargetArgs, geometry: &Geometry) -> Result<Self, Failure> {
        check(stack, args)?;
        let controller = Controller::open()?;
        let features = match args.mode {
            Mode::Copy => Features::NONE,
            Mode::UserCopy => Features::USER_COPY,
        };
        let add = AddDevice { id: None, queues: args.queues, depth: args.depth, max_io_bytes: args.max_io, features };
        let info = controller.add(&add)?;
        // The reader is gone only when everything is about to end.
        let _ = say(&Reply::Made(info.id()), &[]);
        let common = Common {
            depth: info.depth(),
            max_io_bytes: info.max_io_bytes(),
            mode: args.mode,
            io_flusher: stack.io_flusher(),
            planted: args.mutant,
            plot: stack.plot().clone(),
            backend: stack.backend(),
            requests: AtomicU64::new(0),
            given_up: AtomicBool::new(false),
            error: Mutex::default(),
        };
        let common = Arc::new(common);
        let mut this = Self { controller, info, common, threads: Vec::new(), stop: None, over: false };
        this.begin(geometry)?;
        Ok(this)
    }

    fn begin(&mut self, geometry: &Geometry) -> Result<(), Failure> {
        let (id, deadline) = (self.info.id(), Instant::now() + START_DEADLINE);
        let left = || deadline.saturating_duration_since(Instant::now());
        self.controller.set_params(id, &parameters(geometry, self.info.max_io_bytes())?)?;
        // The threads have it: when they end, the kernel has to see the last of it.
        let device = Arc::new(open_character_device(id)?);
        let (ready, all_ready) = mpsc::channel();
        for number in 0..self.info.queues() {
            let (common, device, ready) = (Arc::clone(&self.common), Arc::clone(&device), ready.clone());
            let serve = move || {
                let served = Queue::new(number, Arc::clone(&common), device).and_then(|mut queue| {
                    queue.fetch()?;
                    // Nobody listens only if the start has failed.
                    let _ = ready.send(());
                    queue.serve()
                });
                if let Err(error) = served {
                    common.fail(&format!("queue {number}: {error}"));
                }
            };
            let spawned = std::thread::Builder::new().name(format!("ublk{id}-q{number}")).spawn(serve);
            self.threads.push(spawned.map_err(|error| crate::runner::no_thread(&error))?);
        }
        drop((device, ready));
        for _ in 0..self.info.queues() {
            match all_ready.recv_timeout(left()) {
                Ok(()) => {}
                Err(RecvTimeoutError::Timeout) => return Err(Failure::Hang("the queues do not fetch".to_owned())),
                Err(RecvTimeoutError::Disconnected) => {
                    let why = self.common.error().unwrap_or_default();
                    return Err(Failure::broke("server", format!("a queue failed: {why}")));
                }
            }
        }
        let failed = || self.common.error().is_some();
        self.controller.start(id, std::process::id(), left(), &failed)?;
        if until(SHORT, || block_path(id).exists()) {
            Ok(())
        } else {
            Err(Failure::Environment(format!("{} has not appeared", block_path(id).display())))
        }
    }

    pub(super) fn info(&self) -> &DeviceInfo {
        &self.info
    }

    pub(super) fn requests(&self) -> u64 {
        self.common.requests.load(Ordering::Relaxed)
    }

    pub(super) fn error(&self) -> Option<String> {
        self.common.error()
    }

    /// Stops the device while it is served, ends the queues, and gives the id back. Returns what keeps it from being given
    /// back at once.
    pub(super) fn close(&mut self, stop: Duration, delete: Duration) -> Result<Option<String>, Failure> {
        // What was waited for in vain is not waited for once more.
        let stop = if self.stop.is_none() { stop.min(STOP_DEADLINE) } else { Duration::ZERO };
        if self.common.planted.is_some_and(|planted| planted.mutant == Mutant::StopWithInflight) {
            until(BEFORE_STOP, || self.common.plot.hits.count() > 0);
        }
        if !self.stop(stop)? {
            return Err(Failure::Hang(format!(
                "STOP of device {} is not done within {stop:?}: it waits for requests that the server has",
                self.info.id()
            )));
        }
        if !self.join() {
            return Err(Failure::Hang(format!("the queues of device {} do not end", self.info.id())));
        }
        self.over = true;
        if self.common.planted.is_some_and(|planted| !gives_id_back(planted, &self.common.plot)) {
            return Ok(None);
        }
        match self.controller.delete(self.info.id(), delete) {
            Err(error) if error.kind() == ErrorKind::TimedOut => Ok(Some(error.to_string())),
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
            _ => Ok(None),
        }
    }

    /// Has the device stopped. Returns whether that was done in time.
    fn stop(&mut self, deadline: Duration) -> Result<bool, Failure> {
        let cannot = |what: &str, error: &io::Error| Failure::Environment(format!("failed to {what}: {error}"));
        let id = self.info.id();
        if self.stop.is_none() {
            let mut command = Command::new("/proc/self/exe");
            command.args([STOP_ARGUMENT, &id.to_string()]).stdin(Stdio::null()).stdout(Stdio::null());
            self.stop = Some(command.spawn().map_err(|error| cannot("start a process that stops a device", &error))?);
        }
        let Some(child) = &mut self.stop else { return Ok(false) };
        let mut ended = None;
        until(deadline, || {
            ended = child.try_wait().transpose();
            ended.is_some()
        });
        match ended {
            None => Ok(false),
            Some(Ok(status)) if status.success() => Ok(true),
            Some(Ok(status)) => Err(Failure::broke("control", format!("STOP of device {id} failed: {status}"))),
            Some(Err(error)) => Err(cannot("wait for a process that stops a device", &error)),
        }
    }

    /// Waits for the queues' threads. Returns whether they have ended.
    fn join(&mut self) -> bool {
        let over = until(SHORT, || self.threads.iter().all(JoinHandle::is_finished));
        if over {
            for thread in self.threads.drain(..) {
                // A panic was told where it was.
                let _ = thread.join();
            }
        }
        over
    }

    /// Ends it with whatever its queues have in hand, which the driver fails.
    fn abandon(&mut self) -> Result<(), Failure> {
        // In order first, while the queues answer: some kernels take back the tags of a live ring alone.
        let stopped = self.stop.is_none() && self.stop(SHORT)?;
        self.common.given_up.store(true, Ordering::Relaxed);
        let joined = self.join();
        let stopped = stopped || self.stop(GIVEN_UP)?;
        if !joined || !stopped {
            let id = self.info.id();
            return Err(Failure::Hang(format!("device {id} is not given up within {GIVEN_UP:?}: it is left behind")));
        }
        match self.controller.delete(self.info.id(), SHORT) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        if let Err(failure) = self.abandon() {
            // The kernel takes it from this process when it ends, and the next run deletes it.
            complain(&failure.to_string());
        }
    }
}

/// Waits until it is so, for as long as `patience`. Returns whether it came to be.
fn until(patience: Duration, mut so: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        if so() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(LOOK_AROUND);
    }
}

fn open_character_device(id: u32) -> Result<File, Failure> {
    let path = character_path(id);
    let mut opened = Err(io::ErrorKind::NotFound.into());
    until(SHORT, || {
        opened = OpenOptions::new().read(true).write(true).open(&path);
        opened.is_ok()
    });
    opened.map_err(|error| Failure::Environment(format!("failed to open {}: {error}", path.display())))
}

/// Sends STOP for a server, and returns the exit status of the process.
pub(crate) fn stop(arguments: &[OsString]) -> u8 {
    let id = arguments.first().and_then(|id| id.to_str()?.parse().ok());
    let Some(id) = id else { return crate::cli::EXIT_INTERNAL };
    let stopped = Controller::open().and_then(|controller| controller.stop(id, STOP_PATIENCE));
    match stopped {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            complain(&error.to_string());
            1
        }
        _ => 0,
    }
}
