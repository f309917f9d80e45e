//! Waiting for Ctrl-C.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

use crate::error::{Error, Result};
use crate::sys::process::SignalTrap;

/// Catches SIGINT, SIGTERM and SIGHUP for as long as it lives, whatever threads there are, and puts the earlier
/// handlers back when dropped: a program can then end by itself and leave no device behind.
#[derive(Debug)]
pub struct Signals(SignalTrap);

impl Signals {
    /// Starts catching.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`](crate::ErrorKind::Busy) when something in this process is catching them this way already.
    pub fn catch() -> Result<Self> {
        SignalTrap::new(&[Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP])
            .map(Self)
            .map_err(|error| Error::io(&error, "catch SIGINT, SIGTERM and SIGHUP"))
    }

    /// The name of the last signal that came, such as `SIGINT`, without waiting.
    #[must_use]
    pub fn pending(&self) -> Option<&'static str> {
        self.0.last().map(Signal::as_str)
    }

    /// Waits for a signal, at most `timeout`.
    #[must_use]
    pub fn wait(&self, timeout: Duration) -> Option<&'static str> {
        if self.pending().is_none() {
            let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
            // A signal may interrupt the poll itself; what counts is read below.
            let _ = poll(&mut [PollFd::new(self.0.event().as_fd(), PollFlags::POLLIN)], timeout);
        }
        self.pending()
    }
}
