//! Ending a server without ending its device.

use std::fmt;
use std::path::PathBuf;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use crate::ctrl::{State, block_path};
use crate::device::{Closure, Device, JOIN_DEADLINE, Serving};
use crate::error::{Error, ErrorKind, Result};
use crate::orphan;
use crate::recovery::Recovery;
use crate::stats::Phase;
use crate::sys::ublk::Features;

/// How long QUIESCE looks for an idle tag in each queue. It is there at once or not at all, as the queues keep still meanwhile.
const QUIESCE_LIMIT: Duration = Duration::from_millis(10);
/// How often the state of a device that was let go is looked at.
const SLICE: Duration = Duration::from_millis(5);

/// A device that this process has served and that waits for another server.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DetachedDevice {
    /// The device's id, for [`recover`](crate::DeviceBuilder::recover).
    pub id: u32,
    /// Its state: [`State::Quiesced`] or [`State::FailIo`]; or [`State::Live`] if another server has it already.
    pub state: State,
}

impl DetachedDevice {
    /// Path of the block device.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        block_path(self.id)
    }
}

impl fmt::Display for DetachedDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.state {
            State::Live => write!(f, "device {} is detached, and another server has it", self.id),
            state => write!(f, "device {} is detached ({state}): recover it, or delete it by its id", self.id),
        }
    }
}

impl Device {
    /// Ends serving and leaves the device behind for another server: what is open or mounted stays so. Needs a
    /// [recovery mode](crate::DeviceBuilder::recovery).
    ///
    /// Requests that this server has are completed before it lets go. What comes after that waits for the next server,
    /// or fails at once with [`Recovery::FailIo`]. Who opens or closes the device meanwhile may wait as well: the
    /// kernel's look for partitions holds them up, and on kernels since 6.18 comes some time after the start. A request
    /// that the backend does not finish within the [stop's deadline](crate::DeviceBuilder::stop_deadline) is left to
    /// the mode, as if the server had been killed: it fails with `EIO`, or with [`Recovery::Reissue`] is issued again.
    ///
    /// Since Linux 6.16 the kernel takes part in this (QUIESCE) and no request gets lost between the two. Before, one that is
    /// handed to the server in the very moment in which it lets go is left to the mode as well. So a handover that
    /// applications are not to notice needs [`Recovery::Reissue`] there. Under load those kernels can also lose such a request
    /// for good, a bug of theirs: the device then never becomes recoverable, which ends in [`ErrorKind::TimedOut`], and cannot be
    /// deleted either. Detach it there while it is idle.
    ///
    /// It may be called several times and from several threads; each call returns how it went. Closing the device
    /// afterwards is refused, and dropping it does nothing: it is for another server now, or for
    /// [`orphan::clean_ids`].
    ///
    /// # Errors
    /// [`ErrorKind::State`] without a recovery mode, from a thread that serves this device, and for a device that was closed
    /// or deleted; nothing has happened then. [`ErrorKind::TimedOut`] when a backend call does not return: if it is a
    /// worker's the device is detached all the same, if it is a queue's own thread the device stays with this process until
    /// the call returns, and is let go then. Detaching again tells how that went; so does the end of the process.
    pub fn detach(&self) -> Result<DetachedDevice> {
        self.refuse_own_threads("detach")?;
        if self.info.recovery() == Recovery::None {
            return Err(Error::new(
                ErrorKind::State,
                format!(
                    "detach device {}: it was built without recovery and ends with its server; close it, or build it with \
                     a recovery mode",
                    self.id()
                ),
            ));
        }
        {
            let mut phase = self.phase();
            let mut waited = false;
            loop {
                match &*phase {
                    Closure::Open => break,
                    // What did not end in time may end now.
                    Closure::Detached(Err(error)) if error.kind() == ErrorKind::TimedOut && !waited => break,
                    Closure::Detached(result) => return result.clone(),
                    Closure::Closed(_) => {
                        let message = format!("detach device {}: it was closed", self.id());
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
        let result = self.detach_once();
        *self.phase() = Closure::Detached(result.clone());
        self.phase_changed.notify_all();
        result
    }

    fn detach_once(&self) -> Result<DetachedDevice> {
        let mut serving = self.serving.lock().unwrap_or_else(PoisonError::into_inner);
        let now = orphan::identity(&self.controller, self.id());
        if self.identity.is_some() && now != self.identity {
            self.health.closing();
            serving.abandon();
            serving.join(&self.health, Instant::now() + JOIN_DEADLINE)?;
            let message = format!("detach device {}: somebody else deleted it", self.id());
            return Err(Error::new(ErrorKind::State, message));
        }
        // Let go before, or made quiescent from outside, it may be another server's as soon as the threads here have ended.
        let ours = !self.health.give_up();
        let until = Instant::now() + self.deadlines.stop;
        if !self.health.have_ended() {
            self.let_go(&serving, ours, until)?;
        }
        let joined = serving.join(&self.health, until.max(Instant::now() + self.deadlines.grace()));
        if !serving.queues_ended() {
            return joined.and(Err(crate::device::still_inside("a queue")));
        }
        drop(serving);
        self.tell(Phase::Joined);
        let state = self.await_taken_back(until.max(Instant::now() + JOIN_DEADLINE))?;
        self.tell(Phase::Detached);
        joined.map(|()| DetachedDevice { id: self.id(), state })
    }

    /// Has the queues complete what they have and end. Only a device that is still `ours` may be made quiescent.
    fn let_go(&self, serving: &Serving, ours: bool, until: Instant) -> Result<()> {
        // A queue that is inside the backend for good cannot let go, and QUIESCE would wait for it with the driver's mutex. All
        // of them end as soon as they can: nobody would be there to end them later.
        serving.await_answers(until).inspect_err(|_| serving.abandon())?;
        self.tell(Phase::Stopping);
        let quiesce = self.info.features().contains(Features::QUIESCE);
        // QUIESCE takes idle tags away without a look at whether they are just being committed, and the kernel dies of one that
        // is (see docs/landmines.md). So the queues complete what they have, and keep still while it runs.
        if serving.park(until) && quiesce && ours && self.all_serve() {
            // It need not succeed: even when no tag is idle, the kernel holds new requests back from here on. What it had on its
            // way is served then.
            let _ = self.controller.quiesce(self.id(), QUIESCE_LIMIT);
            serving.finish();
        } else {
            serving.abandon();
        }
        Ok(())
    }

    /// The kernel takes a device back when the last of its server's rings is gone, which is some time after its threads.
    fn await_taken_back(&self, deadline: Instant) -> Result<State> {
        loop {
            let info = self.controller.get_dev_info(self.id())?;
            match info.state() {
                state @ (State::Quiesced | State::FailIo) => return Ok(state),
                State::Live if self.is_anothers(&info) => return Ok(State::Live),
                State::Dead => {
                    let message = format!("detach device {}: somebody else stopped it", self.id());
                    return Err(Error::new(ErrorKind::State, message));
                }
                state if Instant::now() >= deadline => {
                    let message =
                        format!("detach device {}: it is still {state}: the kernel takes its time", self.id());
                    return Err(Error::new(ErrorKind::TimedOut, message));
                }
                _ => std::thread::sleep(SLICE),
            }
        }
    }
}
