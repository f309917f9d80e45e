//! A device that is served: its threads, its health, what it tells.

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, ThreadId};
use std::time::{Duration, Instant};

use crate::backend::{Backend, Geometry};
use crate::builder::DeviceBuilder;
use crate::close::Closed;
use crate::ctrl::{Controller, DeviceInfo};
use crate::detach::DetachedDevice;
use crate::error::{Error, ErrorKind, Result};
use crate::launch::Fetching;
use crate::orphan::{self, Identity};
use crate::queue::Handler;
use crate::ring::loans;
use crate::signals::Signals;
use crate::stats::{Event, Phase, QueueShared, QueueStats};
use crate::turn::Turn;
use crate::workers::Workers;

/// How long queue threads may take to end once they can.
pub(crate) const JOIN_DEADLINE: Duration = Duration::from_secs(5);
/// How often [`Device::wait_for_signal`] looks whether the device still works.
const HEALTH_SLICE: Duration = Duration::from_millis(200);

/// One queue of a running device.
#[derive(Debug)]
pub(crate) struct QueueHandle {
    pub(crate) shared: Arc<QueueShared>,
    pub(crate) tags: Arc<loans::Shared>,
    pub(crate) thread: Option<JoinHandle<()>>,
}

/// What a device's threads share.
#[derive(Debug, Default)]
pub(crate) struct Health {
    state: Mutex<HealthState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct HealthState {
    first_error: Option<Error>,
    serving: usize,
    /// This process is ending the device.
    closing: bool,
    /// This process lets the device go for another server, or the driver has taken the tags back without having been asked
    /// to by this process.
    given_up: bool,
}

impl Health {
    fn lock(&self) -> MutexGuard<'_, HealthState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A queue's thread begins.
    pub(crate) fn began(&self) {
        self.lock().serving += 1;
    }

    /// A queue's thread ends, well or not.
    pub(crate) fn ended(&self) {
        self.lock().serving -= 1;
        self.changed.notify_all();
    }

    /// Keeps the first error.
    pub(crate) fn fail(&self, error: Error) {
        self.lock().first_error.get_or_insert(error);
        self.changed.notify_all();
    }

    /// From here on a queue that ends does so because it is to.
    pub(crate) fn closing(&self) {
        self.lock().closing = true;
    }

    /// As [`closing`](Self::closing), and the device is to be another server's. Returns whether that was so before.
    pub(crate) fn give_up(&self) -> bool {
        let mut state = self.lock();
        state.closing = true;
        std::mem::replace(&mut state.given_up, true)
    }

    pub(crate) fn has_given_up(&self) -> bool {
        self.lock().given_up
    }

    /// Whether every queue's thread has ended, joined or not.
    pub(crate) fn have_ended(&self) -> bool {
        self.lock().serving == 0
    }

    /// A queue has ended well. If nobody here wanted that, `error` is the device's first one; returns whether it is.
    pub(crate) fn ended_by_somebody_else(&self, error: &Error) -> bool {
        let mut state = self.lock();
        let unwanted = !state.closing && state.first_error.is_none();
        if unwanted {
            state.first_error = Some(error.clone());
            state.given_up = true;
            self.changed.notify_all();
        }
        unwanted
    }

    pub(crate) fn first_error(&self) -> Option<Error> {
        self.lock().first_error.clone()
    }

    fn wait_error(&self, timeout: Duration) -> Option<Error> {
        let state = self.lock();
        let wait = self.changed.wait_timeout_while(state, timeout, |state| state.first_error.is_none());
        wait.unwrap_or_else(PoisonError::into_inner).0.first_error.clone()
    }

    fn wait_ended(&self, timeout: Duration) -> bool {
        let state = self.lock();
        let wait = self.changed.wait_timeout_while(state, timeout, |state| state.serving > 0);
        wait.unwrap_or_else(PoisonError::into_inner).0.serving == 0
    }
}

/// Bounds of a device's own waiting.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadlines {
    pub(crate) start: Duration,
    pub(crate) stop: Duration,
    pub(crate) delete: Duration,
}

impl Deadlines {
    /// How long threads may take to end once they were told to: no longer than whoever bounds the stop is patient.
    pub(crate) fn grace(&self) -> Duration {
        self.stop.min(JOIN_DEADLINE)
    }
}

impl Default for Deadlines {
    fn default() -> Self {
        Self { start: Duration::from_secs(30), stop: Duration::from_secs(30), delete: Duration::from_secs(3) }
    }
}

/// How a device's life has ended, if it has.
#[derive(Debug)]
pub(crate) enum Closure {
    Open,
    /// It is being closed or detached.
    Closing,
    Closed(Result<Closed>),
    Detached(Result<DetachedDevice>),
}

/// A block device that this process serves.
///
/// Dropping it closes it, as well as that can be done in bounded time; [`close`](Self::close) says how it went. That is so
/// with [`Recovery`](crate::Recovery) too: what is to outlive its server is [detached](Self::detach).
#[derive(Debug)]
pub struct Device {
    pub(crate) controller: Arc<Controller>,
    pub(crate) info: DeviceInfo,
    pub(crate) geometry: Geometry,
    pub(crate) health: Arc<Health>,
    pub(crate) deadlines: Deadlines,
    /// Threads of queues and workers, which must not close the device: it would wait for them.
    pub(crate) threads: Vec<ThreadId>,
    pub(crate) serving: Mutex<Serving>,
    pub(crate) stats: Vec<Arc<QueueShared>>,
    /// What this device is, whoever has its id.
    pub(crate) identity: Option<Identity>,
    pub(crate) phase: Mutex<Closure>,
    pub(crate) phase_changed: Condvar,
    /// Tells whether the device has another server in this process by now. `None` if it was never served.
    turn: Option<Turn>,
}

/// The threads of a device.
#[derive(Debug)]
pub(crate) struct Serving {
    pub(crate) queues: Vec<QueueHandle>,
    pub(crate) workers: Option<Workers>,
}

impl Serving {
    fn thread_ids(&self) -> Vec<ThreadId> {
        let queues = self.queues.iter().filter_map(|queue| Some(queue.thread.as_ref()?.thread().id()));
        queues.chain(self.workers.iter().flat_map(Workers::thread_ids)).collect()
    }

    pub(crate) fn abandon(&self) {
        for queue in &self.queues {
            queue.tags.abandon();
        }
    }

    /// Has every queue complete what it has and take nothing more. Returns whether they all have.
    pub(crate) fn park(&self, deadline: Instant) -> bool {
        for queue in &self.queues {
            queue.tags.leave();
        }
        self.queues.iter().all(|queue| {
            let ended = || queue.thread.as_ref().is_none_or(JoinHandle::is_finished);
            while !queue.tags.has_parked() && !ended() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_micros(50));
            }
            queue.tags.has_parked() || ended()
        })
    }

    /// Has queues that have parked serve what the driver had on its way, and end.
    pub(crate) fn finish(&self) {
        for queue in &self.queues {
            queue.tags.finish();
        }
    }

    /// Ends the threads that can be ended by `deadline`; names the ones that cannot.
    pub(crate) fn join(&mut self, health: &Health, deadline: Instant) -> Result<()> {
        let queues = self.join_queues(health, deadline);
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(500));
        let ended = self.workers.as_mut().is_none_or(|workers| workers.close(Instant::now() + left));
        queues.and(if ended { Ok(()) } else { Err(still_inside("a worker")) })
    }

    /// As [`join`](Self::join), of the queues alone: they are what the driver waits for.
    pub(crate) fn join_queues(&mut self, health: &Health, deadline: Instant) -> Result<()> {
        if !health.wait_ended(deadline.saturating_duration_since(Instant::now())) {
            self.abandon();
            // One more chance for those that were only waiting: they look at the flag when they wake.
            health.wait_ended(Duration::from_millis(500));
        }
        let mut stuck = Vec::new();
        for queue in &mut self.queues {
            let Some(thread) = queue.thread.take() else { continue };
            let patience = Instant::now() + Duration::from_millis(500);
            // Its last act is to say that it ended; what is left after that takes microseconds.
            while !thread.is_finished() && health.have_ended() && Instant::now() < patience {
                std::thread::sleep(Duration::from_micros(50));
            }
            if thread.is_finished() {
                let _ = thread.join();
            } else {
                stuck.push(thread.thread().name().unwrap_or("unnamed").to_owned());
                queue.thread = Some(thread);
            }
        }
        if stuck.is_empty() { Ok(()) } else { Err(still_inside(&stuck.join(", "))) }
    }

    /// Waits for a sign of life from every queue's thread.
    pub(crate) fn await_answers(&self, deadline: Instant) -> Result<()> {
        let asked: Vec<u64> = self.queues.iter().map(|queue| queue.tags.ask()).collect();
        for (queue, asked) in self.queues.iter().zip(asked) {
            let Some(thread) = &queue.thread else { continue };
            while !queue.tags.has_answered(asked) && !thread.is_finished() {
                if Instant::now() >= deadline {
                    return Err(still_inside(thread.thread().name().unwrap_or("unnamed")));
                }
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        Ok(())
    }

    /// Whether no thread is inside the backend any more, joined or not.
    pub(crate) fn is_idle(&self, health: &Health) -> bool {
        health.have_ended() && self.workers.as_ref().is_none_or(Workers::have_ended)
    }

    /// Whether every queue's thread was joined, so that the driver has its character device back.
    pub(crate) fn queues_ended(&self) -> bool {
        self.queues.iter().all(|queue| queue.thread.is_none())
    }
}

pub(crate) fn still_inside(threads: &str) -> Error {
    Error::new(ErrorKind::TimedOut, format!("end the threads of the device: still inside the backend: {threads}"))
}

impl Device {
    /// Begins a device that `backend` serves.
    pub fn builder<B: Backend>(backend: B) -> DeviceBuilder<crate::builder::ServeBackend<B>> {
        DeviceBuilder::backend(backend)
    }

    /// Begins a device whose queues are served by [`Handler`]s: the raw level. `open` makes one for each queue, on that
    /// queue's thread.
    pub fn builder_with_handlers<H, F>(geometry: Geometry, open: F) -> DeviceBuilder<crate::builder::ServeHandlers<F>>
    where
        H: Handler,
        F: Fn(&crate::builder::QueueInfo) -> std::io::Result<H> + Send + Sync + 'static,
    {
        DeviceBuilder::handlers(geometry, open)
    }

    pub(crate) fn new(
        controller: Arc<Controller>,
        info: DeviceInfo,
        geometry: Geometry,
        health: Arc<Health>,
        deadlines: Deadlines,
        serving: Serving,
        turn: Option<Turn>,
    ) -> Self {
        Self {
            identity: orphan::identity(&controller, info.id()),
            controller,
            info,
            geometry,
            health,
            deadlines,
            threads: serving.thread_ids(),
            stats: serving.queues.iter().map(|queue| Arc::clone(&queue.shared)).collect(),
            serving: Mutex::new(serving),
            phase: Mutex::new(Closure::Open),
            phase_changed: Condvar::new(),
            turn,
        }
    }

    /// The device's id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.info.id()
    }

    /// Path of the block device, `/dev/ublkbN`.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.info.block_path()
    }

    /// What the driver granted: queues, depth, largest request, features. The state in it is the one at creation.
    #[must_use]
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// The controller that its commands go through; what they [cost](Controller::costs), say.
    #[must_use]
    pub fn controller(&self) -> &Arc<Controller> {
        &self.controller
    }

    /// The geometry it was built with.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Counters, one entry per queue.
    #[must_use]
    pub fn stats(&self) -> Vec<QueueStats> {
        self.stats.iter().map(|queue| queue.snapshot()).collect()
    }

    /// The first error that a queue could not serve past, if there was one; of the kind [`ErrorKind::State`] if somebody
    /// else stopped the device, or has it let go for another server (QUIESCE). A queue that is not served any longer takes
    /// the others with it: all I/O fails then, or, as the device's [recovery mode](crate::Recovery) says, waits.
    #[must_use]
    pub fn first_error(&self) -> Option<Error> {
        self.health.first_error()
    }

    /// Waits for that error, at most `timeout`.
    #[must_use]
    pub fn wait_error(&self, timeout: Duration) -> Option<Error> {
        self.health.wait_error(timeout)
    }

    /// Waits for SIGINT, SIGTERM or SIGHUP and returns its name.
    ///
    /// # Errors
    /// The device's first error, if it fails meanwhile; or the signals could not be caught.
    pub fn wait_for_signal(&self) -> Result<&'static str> {
        let signals = Signals::catch()?;
        loop {
            if let Some(signal) = signals.wait(HEALTH_SLICE) {
                return Ok(signal);
            }
            if let Some(error) = self.first_error() {
                return Err(error);
            }
        }
    }

    /// Ends what a failed start or recovery began. The builder deletes a new device afterwards.
    pub(crate) fn undo_start(&self, fetching: &Fetching) {
        *self.phase() = Closure::Closed(Err(Error::new(ErrorKind::State, "close the device: it was never started")));
        let mut serving = self.serving.lock().unwrap_or_else(PoisonError::into_inner);
        self.health.closing();
        fetching.decide(false);
        serving.abandon();
        // What is stuck in a handler's `open` cannot be ended; the start's own error tells more.
        let _ = serving.join(&self.health, Instant::now() + JOIN_DEADLINE);
    }

    /// An error on a thread that serves this device.
    pub(crate) fn refuse_own_threads(&self, verb: &str) -> Result<()> {
        if !self.threads.contains(&std::thread::current().id()) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::State,
            format!("{verb} a device from a thread that serves it: it would wait for itself; use another thread"),
        ))
    }

    pub(crate) fn phase(&self) -> MutexGuard<'_, Closure> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether somebody else serves the device, as far as can be told, or was the last to do so. Only for a device whose
    /// threads here have ended.
    pub(crate) fn is_anothers(&self, info: &DeviceInfo) -> bool {
        // Since Linux 6.18, -1 says that there is no server.
        let pid = info.server_pid();
        self.turn.as_ref().is_some_and(Turn::is_over) || pid != -1 && pid != std::process::id() as i32
    }

    /// Whether every queue has its thread.
    pub(crate) fn all_serve(&self) -> bool {
        self.health.lock().serving == self.stats.len()
    }

    pub(crate) fn tell(&self, phase: Phase) {
        self.tell_event(&Event::Phase(phase));
    }

    pub(crate) fn tell_event(&self, event: &Event) {
        if let Some(queue) = self.stats.first() {
            queue.tell(event);
        }
    }
}
