//! What a queue tells about itself: counters, events, and the first error.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Error;
use crate::request::Io;

/// How far a device has come in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// The driver has given it an id: ADD is done, or a recovery has begun.
    Added,
    /// Its parameters are set and its character device is open; no queue's thread runs yet.
    Configured,
    /// Every tag of every queue was handed to the driver; START, or the end of the recovery, comes next.
    Fetched,
    /// START is done, or the recovery has ended: requests are served.
    Started,
    /// Its block node is there: [`start`](crate::DeviceBuilder::start) is about to return.
    Visible,
    /// It is to be closed or detached, and every queue's thread has given a sign of life; STOP or QUIESCE comes next.
    Stopping,
    /// STOP is done: dirty pages are written back, and there is no block device any more.
    Stopped,
    /// Every queue's thread has ended, and every worker that is not stuck in the backend; DEL comes next, if it is to be
    /// closed.
    Joined,
    /// DEL is done, or left to the kernel.
    Deleted,
    /// The kernel has taken it back: another server can recover it.
    Detached,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Added => "added",
            Self::Configured => "configured",
            Self::Fetched => "fetched",
            Self::Started => "started",
            Self::Visible => "visible",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Joined => "joined",
            Self::Deleted => "deleted",
            Self::Detached => "detached",
        })
    }
}

/// Something that happened inside a server and that no return value can tell.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event {
    /// The device has come to a phase of its life. Told on the thread that starts or closes it, which goes on when the
    /// sink returns: what the sink does between two of these is part of the start's or the close's time.
    Phase(Phase),
    /// A backend or handler panicked. The request it served, if it had taken one, failed with `EIO`.
    Panicked {
        /// The queue whose request it was.
        queue: u16,
        /// The panic's message.
        message: String,
    },
    /// A request was dropped without being completed, and failed with `EIO`.
    RequestDropped {
        /// The request.
        io: Io,
    },
    /// A queue cannot be served any longer, and with it the device: further I/O fails, or, as the device's
    /// [recovery mode](crate::Recovery) says, waits.
    QueueFailed {
        /// The queue.
        queue: u16,
        /// Why.
        error: Error,
    },
    /// Something optional could not be had; the device works without it.
    Degraded {
        /// What, and why.
        what: String,
    },
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Phase(phase) => write!(f, "the device is {phase}"),
            Self::Panicked { queue, message } => write!(f, "queue {queue}: the backend panicked: {message}"),
            Self::RequestDropped { io } => write!(
                f,
                "queue {}: a {} of {} bytes at {} was dropped and failed with EIO",
                io.queue(),
                io.operation().name(),
                io.len(),
                io.offset()
            ),
            Self::QueueFailed { queue, error } => write!(f, "queue {queue} failed to {error}"),
            Self::Degraded { what } => f.write_str(what),
        }
    }
}

/// Where events go. Called on the thread where the event happened; must not block for long.
pub(crate) type EventSink = Arc<dyn Fn(&Event) + Send + Sync>;

/// Counters of one queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct QueueStats {
    /// Requests taken from the driver.
    pub requests: u64,
    /// Times the queue's thread returned from the kernel.
    pub batches: u64,
    /// Requests completed with an error by the backend, handler or library.
    pub failed: u64,
    /// Requests that were dropped without being completed.
    pub dropped: u64,
    /// Panics of the backend or handler.
    pub panicked: u64,
}

/// What a queue shares with its device and with its detached requests.
pub(crate) struct QueueShared {
    queue: u16,
    events: EventSink,
    requests: AtomicU64,
    batches: AtomicU64,
    failed: AtomicU64,
    dropped: AtomicU64,
    panicked: AtomicU64,
}

impl fmt::Debug for QueueShared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueueShared").field("queue", &self.queue).finish_non_exhaustive()
    }
}

impl QueueShared {
    pub(crate) fn new(queue: u16, events: EventSink) -> Self {
        Self {
            queue,
            events,
            requests: AtomicU64::new(0),
            batches: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            panicked: AtomicU64::new(0),
        }
    }

    /// Adds a batch. Only the queue's thread calls this, so that a plain add is enough.
    #[inline]
    pub(crate) fn count_batch(&self, requests: u64) {
        self.requests.store(self.requests.load(Ordering::Relaxed) + requests, Ordering::Relaxed);
        self.batches.store(self.batches.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    #[cold]
    pub(crate) fn count_failed(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }

    /// A request was dropped; by a panic that is unwinding, or by mistake.
    #[cold]
    pub(crate) fn dropped(&self, io: Io) {
        self.count_failed();
        if std::thread::panicking() {
            // Told as a panic by whoever catches it.
            return;
        }
        self.dropped.fetch_add(1, Ordering::Relaxed);
        self.tell(&Event::RequestDropped { io });
    }

    #[cold]
    pub(crate) fn panicked(&self, payload: &(dyn std::any::Any + Send)) {
        self.panicked.fetch_add(1, Ordering::Relaxed);
        let message = payload
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
            .or_else(|| payload.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "a panic without a message".to_owned());
        self.tell(&Event::Panicked { queue: self.queue, message });
    }

    pub(crate) fn tell(&self, event: &Event) {
        (self.events)(event);
    }

    pub(crate) fn snapshot(&self) -> QueueStats {
        QueueStats {
            requests: self.requests.load(Ordering::Relaxed),
            batches: self.batches.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
            dropped: self.dropped.load(Ordering::Relaxed),
            panicked: self.panicked.load(Ordering::Relaxed),
        }
    }
}
