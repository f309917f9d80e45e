//! A device's life: built, started all or nothing, closed in bounded time.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, ThreadId};
use std::time::{Duration, Instant};

use crate::backend::{Backend, Geometry};
use crate::builder::DeviceBuilder;
use crate::ctrl::{Controller, DeviceInfo, State};
use crate::detach::DetachedDevice;
use crate::error::{Error, ErrorKind, Result};
use crate::holders::{self, Holder};
use crate::launch::Fetching;
use crate::orphan::{self, Identity};
use crate::queue::Handler;
use crate::recovery::Recovery;
use crate::ring::tags;
use crate::signals::Signals;
use crate::stats::{Event, Phase, QueueShared, QueueStats};
use crate::turn::Turn;
use crate::workers::Workers;
use crate::writeback;

/// How long queue threads may take to end once they can.
pub(crate) const JOIN_DEADLINE: Duration = Duration::from_secs(5);
/// How often [`Device::wait_for_signal`] looks whether the device still works.
const HEALTH_SLICE: Duration = Duration::from_millis(200);

/// One queue of a running device.
#[derive(Debug)]
pub(crate) struct QueueHandle {
    pub(crate) shared: Arc<QueueShared>,
    pub(crate) tags: Arc<tags::Shared>,
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

    fn has_given_up(&self) -> bool {
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

impl Default for Deadlines {
    fn default() -> Self {
        Self { start: Duration::from_secs(30), stop: Duration::from_secs(30), delete: Duration::from_secs(3) }
    }
}

/// How the id of a closed device was given back.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Deletion {
    /// The device is gone and its id is free.
    Complete,
    /// The block device is gone, but somebody still holds it open: the id becomes free when they let go.
    Deferred {
        /// Who they are, as far as `/proc` shows.
        holders: Vec<Holder>,
    },
}

/// How a device was closed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Closed {
    /// Whether the id is free.
    pub deletion: Deletion,
}

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.deletion {
            Deletion::Complete => f.write_str("closed"),
            Deletion::Deferred { holders } if holders.is_empty() => {
                f.write_str("stopped; its id becomes free when whoever holds it open lets go")
            }
            Deletion::Deferred { holders } => {
                f.write_str("stopped; its id becomes free when these let go: ")?;
                for (index, holder) in holders.iter().enumerate() {
                    if index > 0 {
                        f.write_str(", ")?;
                    }
                    write!(f, "{holder}")?;
                }
                Ok(())
            }
        }
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
/// with [`Recovery`] too: what is to outlive its server is [detached](Self::detach).
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
    fn join_queues(&mut self, health: &Health, deadline: Instant) -> Result<()> {
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
    fn is_idle(&self, health: &Health) -> bool {
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
    /// the others with it: all I/O fails then, or, as the device's [recovery mode](Recovery) says, waits.
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

    /// Closes the device: the kernel writes dirty pages back through the server, which is still there, waits for I/O in
    /// flight, and removes the block device; then the threads end and the id is given back.
    ///
    /// It may be called several times and from several threads; each call returns how the one closing went. It is bounded
    /// by the deadlines of the [builder](DeviceBuilder::stop_deadline). When somebody else holds the block device open, the
    /// device is stopped all the same, and deleted when they let go: [`Deletion::Deferred`] says who they are.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] when a backend call does not return; a thread is left inside it. If it is a worker, all I/O
    /// of the device fails and the device is gone. If it is a queue's own thread, the kernel keeps that queue's I/O waiting
    /// until the call returns or the process ends. Closing again, then, finishes what is left; so does dropping the
    /// device. [`ErrorKind::State`] when called from a thread that serves this device.
    ///
    /// Also [`ErrorKind::State`] for a device with a [recovery mode](Recovery) that is for another server: it was
    /// detached, somebody has made it quiescent, or another server has it already. It is left alone then; only the threads
    /// here are ended. A device whose queues have failed here is still this one's to close, as long as nobody else has recovered
    /// it: it is stopped and deleted, and what waits in it fails. [Detach](Self::detach) it to leave it for another server.
    pub fn close(&self) -> Result<Closed> {
        self.close_within(self.deadlines)
    }

    fn close_within(&self, deadlines: Deadlines) -> Result<Closed> {
        self.refuse_own_threads("close")?;
        {
            let mut phase = self.phase();
            let mut waited = false;
            loop {
                match &*phase {
                    Closure::Open | Closure::Detached(Err(_)) => break,
                    // What did not end in time may end now.
                    Closure::Closed(Err(error)) if error.kind() == ErrorKind::TimedOut && !waited => break,
                    Closure::Closed(result) => return result.clone(),
                    Closure::Detached(Ok(detached)) => {
                        let message = format!("close the device: {detached}");
                        return Err(Error::new(ErrorKind::State, message));
                    }
                    Closure::Closing => {
                        phase = self.phase_changed.wait(phase).unwrap_or_else(PoisonError::into_inner);
                        waited = true;
                    }
                }
            }
            *phase = Closure::Closing;
        }
        let result = self.close_once(deadlines);
        *self.phase() = Closure::Closed(result.clone());
        self.phase_changed.notify_all();
        result
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

    fn close_once(&self, deadlines: Deadlines) -> Result<Closed> {
        let mut serving = self.serving.lock().unwrap_or_else(PoisonError::into_inner);
        self.health.closing();
        // Somebody else deleted this device, and its id is another's by now: that one is not ours to stop.
        let now = orphan::identity(&self.controller, self.id());
        if self.identity.is_some() && now.is_some() && now != self.identity {
            serving.abandon();
            serving.join(&self.health, Instant::now() + JOIN_DEADLINE)?;
            return Ok(Closed { deletion: Deletion::Complete });
        }
        let until = Instant::now() + deadlines.stop;
        if let Some(state) = self.left_to_another(&mut serving, until)? {
            self.tell(Phase::Joined);
            let message =
                format!("close device {}: it is for another server now ({state}): leave it alone", self.id());
            return Err(Error::new(ErrorKind::State, message));
        }
        // No STOP while a queue's thread is inside the backend and does not come back: it would wait in the kernel for that
        // thread's request, beyond any signal, and this process, which holds the character device that would have to be
        // let go for the request to fail, would wait for the STOP: not even SIGKILL could end it.
        let stopped = serving
            .await_answers(until)
            .map(|()| self.tell(Phase::Stopping))
            .inspect(|()| self.write_back(until))
            .and_then(|()| self.controller.stop(self.id(), until.saturating_duration_since(Instant::now())));
        match stopped {
            Ok(()) => self.tell(Phase::Stopped),
            // Somebody else deleted it: only our side is left to end.
            Err(error) if error.kind() == ErrorKind::NotFound => serving.abandon(),
            Err(error) => {
                // Requests that the backend does not finish. Giving up the character device makes the kernel fail them,
                // and then the stop succeeds.
                self.health.fail(error);
                serving.abandon();
                // A queue that is inside the backend cannot give it up: another STOP, or a DEL, would only wait in the
                // kernel for the first one, and with DEL every other device of the machine for that.
                serving.join_queues(&self.health, Instant::now() + JOIN_DEADLINE)?;
                self.controller.stop(self.id(), JOIN_DEADLINE)?;
            }
        }
        let joined = serving.join(&self.health, Instant::now() + JOIN_DEADLINE);
        if !serving.queues_ended() {
            return joined.and(Err(still_inside("a queue")));
        }
        drop(serving);
        self.tell(Phase::Joined);
        // A worker that is stuck holds nothing of the device's.
        let deleted = self.delete(deadlines.delete);
        if deleted.is_ok() {
            self.tell(Phase::Deleted);
        }
        joined.and(deleted)
    }

    /// Whether the device was let go, by this process or by a QUIESCE from outside, or has another server already; its state
    /// then, once the threads that served it here have ended. What has failed here and is nobody else's yet is still ours.
    fn left_to_another(&self, serving: &mut Serving, until: Instant) -> Result<Option<State>> {
        if self.info.recovery() == Recovery::None || !(self.health.has_given_up() || self.health.have_ended()) {
            return Ok(None);
        }
        let info = match self.controller.get_dev_info(self.id()) {
            Ok(info) => info,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let waits = matches!(info.state(), State::Live | State::Quiesced | State::FailIo);
        if !(self.is_anothers(&info) || waits && self.health.has_given_up()) {
            return Ok(None);
        }
        let joined = serving.join(&self.health, until.max(Instant::now() + JOIN_DEADLINE));
        // A worker that is stuck holds nothing of the device's.
        if serving.queues_ended() { Ok(Some(info.state())) } else { joined.and(Err(still_inside("a queue"))) }
    }

    /// Whether somebody else serves the device, as far as can be told, or was the last to do so. Only for a device whose
    /// threads here have ended.
    pub(crate) fn is_anothers(&self, info: &DeviceInfo) -> bool {
        // Since Linux 6.18, -1 says that there is no server.
        let pid = info.server_pid();
        self.turn.as_ref().is_some_and(Turn::is_over) || pid != -1 && pid != std::process::id() as i32
    }

    /// STOP writes dirty pages back, but not those of a device whose I/O waits for a server: it fails that I/O first, with the
    /// server still there or not. Half of the time is left for the STOP itself.
    fn write_back(&self, until: Instant) {
        let half = until.saturating_duration_since(Instant::now()) / 2;
        // With a queue less, there is I/O that waits for the STOP.
        if self.info.recovery().waits()
            && self.all_serve()
            && let Err(error) = writeback::write_back(self.id(), Instant::now() + half)
        {
            self.tell_event(&Event::Degraded { what: error.to_string() });
        }
    }

    /// Whether every queue has its thread.
    pub(crate) fn all_serve(&self) -> bool {
        self.health.lock().serving == self.stats.len()
    }

    pub(crate) fn tell(&self, phase: Phase) {
        self.tell_event(&Event::Phase(phase));
    }

    fn tell_event(&self, event: &Event) {
        if let Some(queue) = self.stats.first() {
            queue.tell(event);
        }
    }

    fn delete(&self, deadline: Duration) -> Result<Closed> {
        match self.controller.delete(self.id(), deadline) {
            Ok(()) => Ok(Closed { deletion: Deletion::Complete }),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Closed { deletion: Deletion::Complete }),
            Err(error) if error.kind() == ErrorKind::TimedOut => {
                let holders = holders::of_device(&self.info);
                match self.controller.delete_async(self.id()) {
                    Ok(()) => Ok(Closed { deletion: Deletion::Deferred { holders } }),
                    Err(error) if error.kind() == ErrorKind::NotFound => Ok(Closed { deletion: Deletion::Complete }),
                    Err(error) => Err(error),
                }
            }
            Err(error) => Err(error),
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let failed = match &*self.phase() {
            // It is somebody else's now, or to be: it is not for this one to delete.
            Closure::Detached(_) => return,
            phase => matches!(phase, Closure::Closed(Err(_))),
        };
        if failed && !self.serving.lock().unwrap_or_else(PoisonError::into_inner).is_idle(&self.health) {
            // Closing was tried, and what it waited for in vain has not ended since.
            return;
        }
        let short = Duration::from_secs(5);
        let deadlines = Deadlines {
            stop: self.deadlines.stop.min(short),
            delete: self.deadlines.delete.min(Duration::from_millis(500)),
            ..self.deadlines
        };
        // There is nobody to tell; `close` is there for those who want to know.
        let _ = self.close_within(deadlines);
    }
}
