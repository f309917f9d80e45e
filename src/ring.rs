//! One io_uring: set up with what the kernel offers, owned by one thread, published once per batch.
//!
//! [`Ring`] keeps the submission and completion handles of the `io-uring` crate alive beside the ring itself, so that
//! entries go straight into their slots and the shared indices are written once per batch, and so that the
//! registered ring descriptor is used by every enter. What the kernel may do with memory is decided in the three
//! modules below, each of which owns the memory that its commands name:
//!
//! * [`tags`]: the tags of one ublk queue and their buffers;
//! * [`command`]: control commands and their payloads;
//! * [`client`]: reads and writes on a block device or file, from the other side.

pub(crate) mod client;
pub(crate) mod command;
pub(crate) mod tags;

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::time::Duration;

use io_uring::cqueue::{self, CompletionQueue};
use io_uring::squeue::{self, EntryMarker, SubmissionQueue};
use io_uring::{EnterFlags, IoUring, Submitter, types};
use nix::errno::Errno;

/// An io_uring and its handles.
///
/// The ring is boxed and the handles borrow from the box for as long as this value lives: that is what the
/// `'static` stands for.
pub(crate) struct Ring<E: EntryMarker + 'static = squeue::Entry> {
    submitter: ManuallyDrop<Submitter<'static>>,
    submission: ManuallyDrop<SubmissionQueue<'static, E>>,
    completion: ManuallyDrop<CompletionQueue<'static, cqueue::Entry>>,
    owned: NonNull<IoUring<E, cqueue::Entry>>,
}

impl<E: EntryMarker + 'static> std::fmt::Debug for Ring<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").finish_non_exhaustive()
    }
}

/// Who submits to a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Issuer {
    /// Only the thread that makes it: completions may be deferred to its own enter.
    ThisThread,
    /// Any thread that holds it.
    AnyThread,
}

impl<E: EntryMarker + 'static> Ring<E> {
    /// A ring of at least `entries` submission entries and twice as many completions.
    ///
    /// The fastest set-up the kernel accepts is used: flags it does not know are dropped from the newest on.
    pub(crate) fn new(entries: u32, issuer: Issuer) -> io::Result<Self> {
        let mut last = io::Error::from(Errno::EINVAL);
        // Each step drops what the newest kernel of the step before brought: NO_SQARRAY 6.6, DEFER_TASKRUN 6.1,
        // SINGLE_ISSUER 6.0, COOP_TASKRUN 5.19, SUBMIT_ALL 5.18.
        for step in 0..=4 {
            let mut builder = IoUring::<E, cqueue::Entry>::builder();
            builder.dontfork();
            if step <= 3 {
                builder.setup_submit_all();
            }
            if issuer == Issuer::ThisThread {
                if step <= 2 {
                    builder.setup_coop_taskrun();
                    builder.setup_single_issuer();
                }
                if step <= 1 {
                    builder.setup_defer_taskrun();
                }
            }
            if step == 0 {
                builder.setup_no_sqarray();
            }
            match builder.build(entries) {
                Ok(ring) => return Ok(Self::adopt(ring, issuer)),
                Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) => last = error,
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }

    fn adopt(ring: IoUring<E, cqueue::Entry>, issuer: Issuer) -> Self {
        let owned = NonNull::from(Box::leak(Box::new(ring)));
        // SAFETY: the box is freed only in `drop`, after the handles; nobody else has a reference to it.
        let (mut submitter, submission, completion) = unsafe { &mut *owned.as_ptr() }.split();
        if issuer == Issuer::ThisThread {
            // Saves the kernel a file look-up per enter. A registration belongs to a thread, so a ring that moves has
            // none; a kernel that refuses leaves us with the plain descriptor, which always works.
            let _ = submitter.register_ring_fd();
        }
        Self {
            submitter: ManuallyDrop::new(submitter),
            submission: ManuallyDrop::new(submission),
            completion: ManuallyDrop::new(completion),
            owned,
        }
    }

    /// Makes `files` the ring's fixed files, from index 0.
    pub(crate) fn register_files(&self, files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let files: Vec<_> = files.iter().map(AsRawFd::as_raw_fd).collect();
        self.submitter.register_files(&files)
    }

    /// Writes an entry into its slot. The kernel sees it at the next [`enter`](Self::enter).
    ///
    /// # Safety
    /// Memory that the entry names must stay valid, and must not be touched in a way that conflicts with the
    /// kernel's use of it, until the entry has completed or the ring is gone.
    #[inline]
    unsafe fn push(&mut self, entry: &E) -> bool {
        // SAFETY: the caller's promise.
        unsafe { self.submission.push(entry) }.is_ok()
    }

    /// Publishes the entries of this batch and what was consumed of the last one, and waits for `want` completions.
    ///
    /// Returns early, with fewer, on a signal or when the completion queue overflowed; never reports those.
    #[inline]
    pub(crate) fn enter(&mut self, want: u32) -> io::Result<()> {
        self.publish();
        let entries = self.submission.len() as u32;
        // SAFETY: no argument structure is passed. GETEVENTS always, so that deferred task work runs.
        let result = unsafe { self.submitter.enter::<()>(entries, want, EnterFlags::GETEVENTS.bits(), None) };
        self.refresh();
        match result {
            Ok(_) => Ok(()),
            Err(error) => Self::forgive(error),
        }
    }

    /// As [`enter`](Self::enter), giving up after `timeout`.
    pub(crate) fn enter_timeout(&mut self, want: u32, timeout: Duration) -> io::Result<()> {
        self.publish();
        let timespec = types::Timespec::from(timeout);
        let args = types::SubmitArgs::new().timespec(&timespec);
        let result = self.submitter.submit_with_args(want as usize, &args);
        self.refresh();
        match result {
            Ok(_) => Ok(()),
            Err(error) if error.raw_os_error() == Some(Errno::ETIME as i32) => Ok(()),
            Err(error) => Self::forgive(error),
        }
    }

    /// Shows the kernel this batch's entries, and which completions of the last one are consumed: the kernel counts the
    /// ones it waits for from there.
    #[inline]
    fn publish(&mut self) {
        self.submission.sync();
        self.completion.sync();
    }

    /// Looks at how far the kernel has come.
    #[inline]
    fn refresh(&mut self) {
        self.submission.sync();
        self.completion.sync();
    }

    /// Errors of an enter that mean "reap, then try again": a signal, or a completion queue that is full.
    #[cold]
    fn forgive(error: io::Error) -> io::Result<()> {
        match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EINTR | Errno::EAGAIN | Errno::EBUSY) => Ok(()),
            _ => Err(error),
        }
    }

    /// The next completion of the current batch.
    #[inline]
    fn next(&mut self) -> Option<cqueue::Entry> {
        self.completion.next()
    }
}

impl<E: EntryMarker + 'static> Drop for Ring<E> {
    fn drop(&mut self) {
        // SAFETY: the handles borrow from the box, so they go first; none of the three is used again.
        unsafe {
            ManuallyDrop::drop(&mut self.completion);
            ManuallyDrop::drop(&mut self.submission);
            ManuallyDrop::drop(&mut self.submitter);
            drop(Box::from_raw(self.owned.as_ptr()));
        }
    }
}

// SAFETY: the pointers lead to memory that this value owns and that follows it from thread to thread. Rings of
// `Issuer::ThisThread` are made and used inside one thread by their owners; were one moved, the kernel would refuse
// its enters with EEXIST, which is an error and not undefined behaviour.
unsafe impl<E: EntryMarker + Send + 'static> Send for Ring<E> {}

#[cfg(test)]
mod tests {
    use super::*;
    use io_uring::opcode;

    #[test]
    fn a_batch_of_nops_comes_back_whole_across_many_wraps() {
        let mut ring = Ring::<squeue::Entry>::new(8, Issuer::ThisThread).expect("ring");
        let mut sent = 0u64;
        let mut sum = 0u64;
        for round in 0..1000u64 {
            let batch = round % 8 + 1;
            for _ in 0..batch {
                // SAFETY: a NOP names no memory.
                assert!(unsafe { ring.push(&opcode::Nop::new().build().user_data(sent)) });
                sent += 1;
            }
            ring.enter(batch as u32).expect("enter");
            while let Some(cqe) = ring.next() {
                assert_eq!(cqe.result(), 0);
                sum += cqe.user_data();
            }
        }
        assert_eq!(sum, (0..sent).sum());
    }

    #[test]
    fn a_full_submission_queue_says_so_and_loses_nothing() {
        let mut ring = Ring::<squeue::Entry>::new(4, Issuer::AnyThread).expect("ring");
        let mut pushed = 0;
        // SAFETY: a NOP names no memory.
        while unsafe { ring.push(&opcode::Nop::new().build()) } {
            pushed += 1;
        }
        assert_eq!(pushed, 4);
        ring.enter(4).expect("enter");
        assert_eq!(std::iter::from_fn(|| ring.next()).count(), 4);
        // SAFETY: a NOP names no memory.
        assert!(unsafe { ring.push(&opcode::Nop::new().build()) });
    }

    #[test]
    fn waiting_ends_at_the_timeout() {
        let mut ring = Ring::<squeue::Entry>::new(4, Issuer::AnyThread).expect("ring");
        let start = std::time::Instant::now();
        ring.enter_timeout(1, Duration::from_millis(20)).expect("enter");
        assert!(start.elapsed() >= Duration::from_millis(19));
        assert!(ring.next().is_none());
    }
}
