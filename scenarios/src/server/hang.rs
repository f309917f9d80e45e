//! Planted hangs: somebody stops for good, and the watchdog has to end the run and to say where.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use ublkit::{Backend, Geometry, WriteFlags, ZeroFlags};

/// Requests that are served before one is not.
const SERVED: u64 = 40;
/// How long a server that is about to hang in STOP waits before it stops the device, so that there is a request to be held.
const BEFORE_STOP: Duration = Duration::from_millis(700);

/// Where a hang is planted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(crate) enum Hang {
    /// A call of the backend never returns.
    Backend,
    /// The handler of a queue never returns, and so its thread.
    Queue,
    /// A queue never fetches its tags, so that START never completes.
    Start,
    /// The backend holds a read that an application waits for, once the random operations are over.
    Read,
    /// The backend holds a request while the device is stopped.
    Stop,
    /// A worker of this program never comes back from its own code.
    Worker,
    /// The server does not end when it is told to, its devices closed or not.
    End,
}

/// A hang that is planted in a server. Clones are the same.
#[derive(Clone, Default)]
pub(super) struct Plant(Option<Hang>, Arc<State>);

#[derive(Default)]
struct State {
    requests: AtomicU64,
    /// The random operations are over.
    drawn: AtomicBool,
    /// The device is about to be closed.
    closing: AtomicBool,
}

/// What a planted hang looks like in a backtrace.
#[inline(never)]
pub(crate) fn never_returns() -> ! {
    loop {
        std::thread::park();
    }
}

impl Plant {
    pub(super) fn new(hang: Option<Hang>) -> Self {
        Self(hang, Arc::default())
    }

    /// Whether the device has to be served by handlers for it.
    pub(super) fn is_in_handler(&self) -> bool {
        matches!(self.0, Some(Hang::Queue | Hang::Start))
    }

    /// A queue is opened.
    pub(super) fn opened(&self) {
        if self.0 == Some(Hang::Start) {
            never_returns();
        }
    }

    /// A request arrives at a handler.
    pub(super) fn handled(&self) {
        if self.0 == Some(Hang::Queue) && self.1.requests.fetch_add(1, Ordering::Relaxed) == SERVED {
            never_returns();
        }
    }

    /// A request arrives at the backend.
    fn called(&self, read: bool) {
        let hangs = match self.0 {
            Some(Hang::Backend) => self.1.requests.fetch_add(1, Ordering::Relaxed) >= SERVED,
            Some(Hang::Read) => read && self.1.drawn.load(Ordering::Relaxed),
            Some(Hang::Stop) => self.1.closing.load(Ordering::Relaxed),
            _ => false,
        };
        if hangs {
            never_returns();
        }
    }

    /// The random operations are over.
    pub(super) fn drawn(&self) {
        self.1.drawn.store(true, Ordering::Relaxed);
    }

    /// The device is about to be closed.
    pub(super) fn closing(&self) {
        if self.0 == Some(Hang::Stop) {
            self.1.closing.store(true, Ordering::Relaxed);
            std::thread::sleep(BEFORE_STOP);
        }
    }
}

/// A backend in which a hang may be planted.
pub(super) struct Hangs<B> {
    pub(super) inner: B,
    pub(super) plant: Plant,
}

impl<B: Backend> Backend for Hangs<B> {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.plant.called(true);
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        self.plant.called(false);
        self.inner.write_at(buf, offset, flags)
    }

    fn flush(&self) -> io::Result<()> {
        self.plant.called(false);
        self.inner.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.plant.called(false);
        self.inner.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.plant.called(false);
        self.inner.write_zeroes(offset, len, flags)
    }
}
