//! One queue: fetch, dispatch, commit. The hot loop.
//!
//! A batch is what one `io_uring_enter` brings. Within it there is no allocation, no lock, no clock and no system
//! call (in copy mode): a completion is read, its descriptor decoded, the handler called, and the COMMIT written into
//! its submission slot. A panic is caught around the batch, not around each request; the request that was being
//! served fails in its `Drop` while the stack unwinds, and the batch goes on behind it.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind};
use crate::request::{Io, Request};
use crate::ring::tags::Tags;
use crate::stats::QueueShared;

/// How long a queue waits, while the driver takes its tags back, for all of them. STOP gives them back within microseconds
/// of each other; a driver that keeps some is one that somebody quiesces meanwhile.
const ABORT_PATIENCE: Duration = Duration::from_millis(500);

/// A queue's request handler: the raw level of the three ways to write a ublk server.
///
/// One value serves one queue, on that queue's thread. Each request must be completed once, now or later, in any
/// order; see [`Request`]. A handler that blocks stops its queue: [detach](Request::detach) the request and let
/// another thread do the waiting.
///
/// A device of handlers is built by [`Device::builder_with_handlers`](crate::Device::builder_with_handlers).
pub trait Handler: 'static {
    /// Serves one request.
    fn handle(&mut self, request: Request<'_>);

    /// Called once per batch of requests, before the queue's completions are handed to the kernel.
    fn batch_end(&mut self) {}
}

impl<F: FnMut(Request<'_>) + 'static> Handler for F {
    #[inline]
    fn handle(&mut self, request: Request<'_>) {
        self(request);
    }
}

/// A queue and what serves it.
#[derive(Debug)]
pub(crate) struct Queue<H> {
    tags: Tags,
    shared: Arc<QueueShared>,
    handler: H,
}

impl<H: Handler> Queue<H> {
    pub(crate) fn new(tags: Tags, shared: Arc<QueueShared>, handler: H) -> Self {
        Self { tags, shared, handler }
    }

    /// Hands every tag to the driver. After this, START can succeed.
    pub(crate) fn fetch(&mut self) -> Result<(), Error> {
        self.tags.fetch_all();
        self.enter(false)?;
        // A FETCH that the driver refuses is complete by now; in a recovery, a request that waited may be too.
        self.batch();
        self.check()
    }

    /// Serves until the driver takes the tags back, or the queue is told to end, or it fails.
    pub(crate) fn serve(&mut self) -> Result<(), Error> {
        if self.tags.ordered() {
            // Before there was a ring to wake: `fetch` has taken the wake-up for one of its own.
            return self.leave();
        }
        while self.turn()? {}
        if self.tags.ordered() && !self.tags.stopping() {
            return self.leave();
        }
        self.finish()
    }

    /// Waits for a batch and serves it. Returns whether there may be another.
    #[inline]
    pub(crate) fn turn(&mut self) -> Result<bool, Error> {
        self.enter(true)?;
        self.batch();
        if self.tags.failure().is_some() || self.tags.ordered() || self.tags.stopping() {
            self.check()?;
            // One that is told to end takes nothing new; what it has is for `leave`.
            return Ok(!self.tags.ordered() && self.tags.owns_requests());
        }
        Ok(true)
    }

    /// Commits what the last batch left, and whatever the driver had on its way when it began to hold requests back: nothing
    /// after STOP, but a few requests after QUIESCE. After STOP every tag is taken back, one after the other, and the ring is not
    /// left before: the driver would end a command that the ring's own end is ending too, which 7.2 warns of.
    fn finish(&mut self) -> Result<(), Error> {
        let until = Instant::now() + ABORT_PATIENCE;
        while !self.tags.abandoned() {
            let (taken, owned) = (self.tags.taken(), self.tags.owns_requests());
            self.enter(owned)?;
            self.batch();
            self.check()?;
            if owned || self.tags.taken() != taken {
                continue;
            }
            let left = until.saturating_duration_since(Instant::now());
            if self.tags.ordered() || self.tags.all_aborted() || left.is_zero() {
                return Ok(());
            }
            self.tags.wait_at_most(left).map_err(|error| self.failed(&error))?;
        }
        self.submit()
    }

    /// Completes what is here or on loan, without a look at what comes in, and parks. What came in is served if the queue is to
    /// finish. If not, it is left to the end of the tags.
    fn leave(&mut self) -> Result<(), Error> {
        while !self.tags.abandoned() && self.tags.settle().map_err(|error| self.failed(&error))? {}
        self.tags.park();
        if self.tags.abandoned() { self.submit() } else { self.finish() }
    }

    fn enter(&mut self, block: bool) -> Result<(), Error> {
        self.tags.wait(block).map_err(|error| self.failed(&error))
    }

    /// Commits without taking what is on its way: that is for the next server.
    fn submit(&mut self) -> Result<(), Error> {
        self.tags.submit().map_err(|error| self.failed(&error))
    }

    #[cold]
    fn failed(&self, error: &io::Error) -> Error {
        Error::io(error, format_args!("enter the ring of queue {}", self.tags.queue())).with_kind(ErrorKind::Queue)
    }

    /// Serves what the last enter brought.
    #[inline]
    fn batch(&mut self) {
        let mut requests = 0;
        while let Err(payload) = catch_unwind(AssertUnwindSafe(|| {
            while let Some((tag, descriptor)) = self.tags.next() {
                requests += 1;
                let io = Io::new(self.tags.queue(), tag, descriptor);
                self.handler.handle(Request::new(&mut self.tags, &self.shared, io));
            }
        })) {
            self.shared.panicked(&*payload);
        }
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| self.handler.batch_end())) {
            self.shared.panicked(&*payload);
        }
        self.shared.count_batch(requests);
    }

    fn check(&self) -> Result<(), Error> {
        match self.tags.failure() {
            None => Ok(()),
            Some((index, errno)) => {
                let what = format!("serve tag {index} of queue {}", self.tags.queue());
                Err(Error::kernel(errno, what).with_kind(ErrorKind::Queue))
            }
        }
    }
}

/// An [`io::Error`] of setting a queue up, told as the library's.
pub(crate) fn setup_error(queue: u16, what: &str, error: &io::Error) -> Error {
    Error::io(error, format_args!("{what} for queue {queue}")).with_kind(ErrorKind::Queue)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::descriptors::Descriptors;
    use crate::ring::loans::Shared;
    use crate::ring::tags::{AtEnd, Copying};
    use crate::sys::ublk::IoDesc;

    /// What was completed before the order to end is not kept back: its applications would see errors for what is done.
    #[test]
    fn an_abandoned_queue_commits_what_it_has_completed() {
        const DEPTH: u16 = 4;
        let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null").expect("open /dev/null");
        let descriptors = Descriptors::pretended(DEPTH, IoDesc::default()).expect("descriptors");
        let orders = Arc::new(Shared::new(DEPTH, 4096).expect("buffers"));
        let tags =
            Tags::new(0, DEPTH, Copying::Driver, AtEnd::Leave, Arc::new(null), descriptors, Arc::clone(&orders));
        let shared = Arc::new(QueueShared::new(0, Arc::new(|_| {})));
        let abandon = Arc::clone(&orders);
        let handler = move |request: Request<'_>| {
            request.complete();
            abandon.abandon();
        };
        let mut queue = Queue::new(tags.expect("ring"), Arc::clone(&shared), handler);
        // `/dev/null` answers every FETCH at once: all of them are completed, and none is committed yet.
        queue.fetch().expect("fetch");
        assert_eq!((shared.snapshot().requests, queue.tags.unsubmitted()), (u64::from(DEPTH), u32::from(DEPTH)));
        queue.serve().expect("serve");
        assert_eq!(queue.tags.unsubmitted(), 0);
    }
}
