//! Closing: a device and its server end together.

use std::fmt;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use crate::ctrl::State;
use crate::device::{Closure, Deadlines, Device, JOIN_DEADLINE, Serving, still_inside};
use crate::error::{Error, ErrorKind, Result};
use crate::holders::{self, Holder};
use crate::orphan;
use crate::recovery::Recovery;
use crate::stats::{Event, Phase};
use crate::writeback;

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

impl Device {
    /// Closes the device: the kernel writes dirty pages back through the server, which is still there, waits for I/O in
    /// flight, and removes the block device; then the threads end and the id is given back.
    ///
    /// It may be called several times and from several threads; each call returns how the one closing went. It is bounded
    /// by the deadlines of the [builder](crate::DeviceBuilder::stop_deadline). When somebody else holds the block device open, the
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
                serving.join_queues(&self.health, Instant::now() + deadlines.grace())?;
                self.controller.stop(self.id(), JOIN_DEADLINE)?;
            }
        }
        let joined = serving.join(&self.health, Instant::now() + deadlines.grace());
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
        let joined = serving.join(&self.health, until.max(Instant::now() + self.deadlines.grace()));
        // A worker that is stuck holds nothing of the device's.
        if serving.queues_ended() { Ok(Some(info.state())) } else { joined.and(Err(still_inside("a queue"))) }
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
