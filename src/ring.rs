//! One io_uring: set up with what the kernel offers, owned by one thread, published once per batch.
//!
//! Entries are written straight into their slots in the shared ring, completions are read straight out of theirs, and the
//! shared indices are touched once per enter, however many entries and completions lie between two of them. What the
//! kernel may do with memory is decided in the modules below, each of which owns the memory that its commands
//! name:
//!
//! * [`tags`]: the tags of one ublk queue, with their [`descriptors`], and their buffers, of which there are [`loans`];
//! * [`command`]: control commands and their payloads;
//! * [`client`]: reads and writes on a block device or file, from the other side;
//! * `raw`: any I/O command, malformed ones too.

pub(crate) mod client;
pub(crate) mod command;
pub(crate) mod descriptors;
pub(crate) mod loans;
#[cfg(feature = "raw")]
pub(crate) mod raw;
pub(crate) mod tags;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::ThreadId;
use std::time::Duration;

use nix::errno::Errno;

use crate::sys::map::Map;
use crate::sys::uring::{self, Cqe, Sqe};

/// Who submits to a ring, and what size its entries have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Only the thread that makes it: completions may be deferred to its own enter.
    ThisThread,
    /// Any thread that holds it, with entries of 128 bytes.
    Commands,
}

/// An io_uring.
#[derive(Debug)]
pub(crate) struct Ring {
    // The submission side. `tail` runs ahead of what the kernel is shown until the next enter.
    entries: NonNull<Sqe>,
    wide: bool,
    mask: u32,
    tail: u32,
    /// Where the kernel had read to when last looked at.
    head: u32,
    shared_head: NonNull<AtomicU32>,
    shared_tail: NonNull<AtomicU32>,
    // The completion side. `seen` runs ahead of what the kernel is shown until the next enter.
    completions: NonNull<Cqe>,
    completion_mask: u32,
    seen: u32,
    filled: u32,
    shared_seen: NonNull<AtomicU32>,
    shared_filled: NonNull<AtomicU32>,
    // What to enter it by.
    enter_fd: RawFd,
    enter_flags: u32,
    fd: OwnedFd,
    /// The index under which the kernel knows the ring on the thread that made it, and that thread.
    registered: Option<(u32, ThreadId)>,
    /// What the pointers above lead into.
    _mappings: [Map; 2],
}

impl Ring {
    /// A ring of at least `entries` submission entries and twice as many completions.
    ///
    /// The fastest set-up the kernel accepts is used: flags it does not know are dropped from the newest on.
    pub(crate) fn new(entries: u32, kind: Kind) -> io::Result<Self> {
        let own = match kind {
            Kind::ThisThread => 0,
            Kind::Commands => uring::SETUP_SQE128,
        };
        let fast = match kind {
            Kind::ThisThread => uring::SETUP_COOP_TASKRUN | uring::SETUP_SINGLE_ISSUER | uring::SETUP_DEFER_TASKRUN,
            Kind::Commands => 0,
        };
        // Newest first: NO_SQARRAY came with 6.6, DEFER_TASKRUN with 6.1, SINGLE_ISSUER with 6.0, COOP_TASKRUN with 5.19,
        // SUBMIT_ALL with 5.18. DEFER_TASKRUN does not work without SINGLE_ISSUER.
        let optional = [
            fast | uring::SETUP_SUBMIT_ALL | uring::SETUP_NO_SQARRAY,
            fast | uring::SETUP_SUBMIT_ALL,
            fast & !uring::SETUP_DEFER_TASKRUN | uring::SETUP_SUBMIT_ALL,
            fast & uring::SETUP_COOP_TASKRUN | uring::SETUP_SUBMIT_ALL,
            0,
        ];
        for flags in optional {
            let mut params = uring::Params {
                flags: own | flags | uring::SETUP_CQSIZE,
                cq_entries: entries.next_power_of_two() * 2,
                ..uring::Params::default()
            };
            match uring::setup(entries, &mut params) {
                Ok(fd) => return Self::map(fd, &params, kind),
                Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) => {}
                Err(error) => return Err(error),
            }
        }
        Err(Errno::EINVAL.into())
    }

    fn map(fd: OwnedFd, params: &uring::Params, kind: Kind) -> io::Result<Self> {
        let needed = uring::FEAT_SINGLE_MMAP | uring::FEAT_NODROP | uring::FEAT_EXT_ARG;
        if params.features & needed != needed {
            // Linux before 5.11, which has no ublk either.
            return Err(Errno::ENOSYS.into());
        }
        let wide = params.flags & uring::SETUP_SQE128 != 0;
        let (sq, cq) = (&params.sq_off, &params.cq_off);
        let has_array = params.flags & uring::SETUP_NO_SQARRAY == 0;
        let array_end = if has_array { sq.array as usize + params.sq_entries as usize * 4 } else { 0 };
        let rings_len = array_end.max(cq.cqes as usize + params.cq_entries as usize * size_of::<Cqe>());
        let entries_len = (params.sq_entries as usize * size_of::<Sqe>()) << u32::from(wide);
        let rings = Map::shared(&fd, uring::OFF_SQ_RING, rings_len)?;
        let entries = Map::shared(&fd, uring::OFF_SQES, entries_len)?;
        // SAFETY: the kernel's offsets lie inside the mapping it made for them, are aligned for what stands there, and are
        // shared with the kernel, for which atomics are the right type.
        let at = |offset: u32| unsafe { rings.start().add(offset as usize) };
        if has_array {
            for index in 0..params.sq_entries {
                // SAFETY: the array has `sq_entries` elements. The identity, once and for all: slot n is entry n.
                unsafe { at(sq.array).cast::<u32>().add(index as usize).write(index) };
            }
        }
        // Saves the kernel a file look-up per enter. A registration belongs to a thread, so only a ring that stays on one has
        // it; a kernel that refuses leaves us with the plain descriptor, which always works.
        let registered = (kind == Kind::ThisThread).then(|| uring::register_ring(&fd).ok()).flatten();
        let (enter_fd, enter_flags) = match registered {
            Some(index) => (index as RawFd, uring::ENTER_GETEVENTS | uring::ENTER_REGISTERED_RING),
            None => (fd.as_raw_fd(), uring::ENTER_GETEVENTS),
        };
        Ok(Self {
            entries: entries.start().cast(),
            wide,
            mask: params.sq_entries - 1,
            tail: 0,
            head: 0,
            shared_head: at(sq.head).cast(),
            shared_tail: at(sq.tail).cast(),
            completions: at(cq.cqes).cast(),
            completion_mask: params.cq_entries - 1,
            seen: 0,
            filled: 0,
            shared_seen: at(cq.head).cast(),
            shared_filled: at(cq.tail).cast(),
            enter_fd,
            enter_flags,
            fd,
            registered: registered.map(|index| (index, std::thread::current().id())),
            _mappings: [rings, entries],
        })
    }

    /// Makes `files` the ring's fixed files, from index 0.
    pub(crate) fn register_files(&self, files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let files: Vec<_> = files.iter().map(AsRawFd::as_raw_fd).collect();
        uring::register_files(&self.fd, &files)
    }

    /// Lets go of the fixed files at once. A ring that is closed does so too, but only after a grace period of the kernel's, in
    /// which whoever waits for the last descriptor of a device waits. Nothing that uses them may be under way.
    pub(crate) fn release_files(&self) {
        // Without it they go with the ring.
        let _ = uring::unregister_files(&self.fd);
    }

    /// The index of the next free slot, which is the caller's to fill before it calls [`enter`](Self::enter).
    #[inline(always)]
    fn next_slot(&mut self) -> usize {
        // Not checked in release builds: an owner that broke its promise would lose an entry of its own, not memory.
        debug_assert!(self.tail.wrapping_sub(self.head) <= self.mask, "more entries than the ring was made for");
        let index = self.tail & self.mask;
        self.tail = self.tail.wrapping_add(1);
        index as usize
    }

    /// Writes an entry into a ring of 64-byte entries. The kernel sees it at the next [`enter`](Self::enter).
    ///
    /// The owner must know that there is a free slot: each of them has a bound on its entries under way and makes the ring
    /// that large.
    ///
    /// # Safety
    /// Memory that the entry names must stay valid, and must not be touched in a way that conflicts with the kernel's use of
    /// it, until the entry has completed or the ring is gone. The ring is of [`Kind::ThisThread`].
    #[inline(always)]
    unsafe fn push(&mut self, entry: &Sqe) {
        debug_assert!(!self.wide, "a ring of 64-byte entries");
        let slot = self.next_slot();
        // SAFETY: the slot is inside the mapping and the kernel does not look at it before the tail has passed it.
        unsafe { self.entries.as_ptr().add(slot).write(*entry) };
    }

    /// As [`push`](Self::push), of a ublk I/O command that is complete but for its result.
    ///
    /// # Safety
    /// As [`push`](Self::push).
    #[inline(always)]
    unsafe fn push_with_result(&mut self, entry: &Sqe, result: i32) {
        debug_assert!(!self.wide, "a ring of 64-byte entries");
        let slot = self.next_slot();
        // SAFETY: as in `push`. The result is the second half of the command's first word (`sys::ublk::IoCmd`).
        unsafe {
            let slot = self.entries.as_ptr().add(slot);
            slot.write(*entry);
            (&raw mut (*slot).cmd).cast::<i32>().add(1).write(result);
        }
    }

    /// As [`push`](Self::push), into a ring of 128-byte entries.
    ///
    /// # Safety
    /// As [`push`](Self::push), but the ring is of [`Kind::Commands`].
    unsafe fn push_wide(&mut self, entry: &Sqe, rest: [u64; 8]) {
        debug_assert!(self.wide, "a ring of 128-byte entries");
        let slot = self.next_slot();
        // SAFETY: as in `push`; a slot of this ring is two halves of 64 bytes.
        unsafe {
            let first = self.entries.as_ptr().add(slot * 2);
            first.write(*entry);
            first.add(1).cast::<[u64; 8]>().write(rest);
        }
    }

    /// Shows the kernel this batch's entries, and which completions of the last one are consumed: it counts the ones it waits
    /// for from there. Returns how many entries it has not read yet.
    #[inline]
    fn publish(&mut self) -> u32 {
        // SAFETY: both point into the mapping, which lives as long as `self`.
        unsafe {
            self.shared_tail.as_ref().store(self.tail, Ordering::Release);
            self.shared_seen.as_ref().store(self.seen, Ordering::Release);
        }
        self.tail.wrapping_sub(self.head)
    }

    /// Looks at how far the kernel has come.
    #[inline]
    fn refresh(&mut self) {
        // SAFETY: both point into the mapping, which lives as long as `self`.
        unsafe {
            self.head = self.shared_head.as_ref().load(Ordering::Acquire);
            self.filled = self.shared_filled.as_ref().load(Ordering::Acquire);
        }
    }

    /// Publishes the batch and waits for `want` completions.
    ///
    /// Returns early, with fewer, on a signal or when the completion queue overflowed; never reports those.
    #[inline]
    pub(crate) fn enter(&mut self, want: u32) -> io::Result<()> {
        let submit = self.publish();
        // SAFETY: what is submitted was promised to `push`.
        let result = unsafe { uring::enter(self.enter_fd, submit, want, self.enter_flags) };
        self.refresh();
        result.or_else(forgive)
    }

    /// Publishes the batch and takes no completion: on a ring whose completions are deferred to its thread's enter, none is
    /// made either.
    pub(crate) fn submit(&mut self) -> io::Result<()> {
        let submit = self.publish();
        // SAFETY: what is submitted was promised to `push`.
        let result = unsafe { uring::enter(self.enter_fd, submit, 0, self.enter_flags & !uring::ENTER_GETEVENTS) };
        self.refresh();
        result.or_else(forgive)
    }

    /// How many completions were taken so far, modulo 2^32.
    pub(crate) fn taken(&self) -> u32 {
        self.seen
    }

    /// As [`enter`](Self::enter), giving up after `timeout`.
    pub(crate) fn enter_timeout(&mut self, want: u32, timeout: Duration) -> io::Result<()> {
        let submit = self.publish();
        // SAFETY: what is submitted was promised to `push`.
        let result = unsafe { uring::enter_timeout(self.enter_fd, submit, want, self.enter_flags, timeout) };
        self.refresh();
        result.or_else(forgive)
    }

    /// The next completion of the current batch.
    #[inline(always)]
    fn next(&mut self) -> Option<Cqe> {
        if self.seen == self.filled {
            return None;
        }
        let index = self.seen & self.completion_mask;
        self.seen = self.seen.wrapping_add(1);
        // SAFETY: the slot is inside the mapping, and the kernel filled it before it moved the tail past it (the acquire in
        // `refresh`) and leaves it alone until it is shown that it was seen.
        Some(unsafe {
            let cqe = self.completions.as_ptr().add(index as usize);
            // Field by field: copied whole, it would go through memory once more.
            Cqe { user_data: (*cqe).user_data, result: (*cqe).result, flags: (*cqe).flags }
        })
    }
}

impl Drop for Ring {
    /// The registration of a ring with its thread is a reference to it, which closing the descriptor leaves alone: without this the
    /// ring, and with it every file that is registered with the ring, would stay open until the thread ends.
    fn drop(&mut self) {
        if let Some((index, thread)) = self.registered
            && thread == std::thread::current().id()
        {
            // It is there, or the thread's other rings would be wrong too.
            let _ = uring::unregister_ring(&self.fd, index);
        }
    }
}

/// Errors of an enter that mean "reap, then try again": a signal, a timeout, or a completion queue that is full.
#[cold]
fn forgive(error: io::Error) -> io::Result<()> {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EINTR | Errno::EAGAIN | Errno::EBUSY | Errno::ETIME) => Ok(()),
        _ => Err(error),
    }
}

// SAFETY: the pointers lead into mappings that this value owns and that follow it from thread to thread. A ring of
// `Kind::ThisThread` is made and used inside one thread by its owners; were one moved, the kernel would refuse its enters
// (EEXIST, or EINVAL for the registered descriptor), which is an error and not undefined behaviour.
unsafe impl Send for Ring {}

#[cfg(test)]
mod tests {
    use super::*;

    fn nop(user_data: u64) -> Sqe {
        Sqe { opcode: uring::OP_NOP, user_data, ..Sqe::default() }
    }

    #[test]
    fn a_batch_of_nops_comes_back_whole_across_many_wraps() {
        for kind in [Kind::ThisThread, Kind::Commands] {
            let mut ring = Ring::new(8, kind).expect("ring");
            let mut sent = 0u64;
            let mut sum = 0u64;
            for round in 0..1000u64 {
                let batch = round % 8 + 1;
                for _ in 0..batch {
                    match kind {
                        // SAFETY: a NOP names no memory.
                        Kind::ThisThread => unsafe { ring.push(&nop(sent)) },
                        // SAFETY: as above.
                        Kind::Commands => unsafe { ring.push_wide(&nop(sent), [0; 8]) },
                    }
                    sent += 1;
                }
                ring.enter(batch as u32).expect("enter");
                while let Some(cqe) = ring.next() {
                    assert_eq!(cqe.result, 0);
                    sum += cqe.user_data;
                }
            }
            assert_eq!(sum, (0..sent).sum());
        }
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "more entries than the ring was made for")]
    fn a_full_ring_says_so() {
        let mut ring = Ring::new(4, Kind::ThisThread).expect("ring");
        for index in 0..5 {
            // SAFETY: a NOP names no memory.
            unsafe { ring.push(&nop(index)) };
        }
    }

    /// A ring that was dropped kept its files open, and so a device its id, until the thread ended: the thread had it registered.
    #[test]
    fn a_dropped_ring_lets_go_of_its_files() {
        use std::io::{ErrorKind, Read};
        use std::os::fd::AsFd;
        // More than a thread can have registered.
        for _ in 0..20 {
            let (mut reader, writer) = std::io::pipe().expect("pipe");
            let ring = Ring::new(4, Kind::ThisThread).expect("ring");
            ring.register_files(&[writer.as_fd()]).expect("register");
            drop((ring, writer));
            let (done, ended) = std::sync::mpsc::channel();
            std::thread::spawn(move || {
                let mut byte = [0];
                let read = loop {
                    match reader.read(&mut byte) {
                        Err(error) if error.kind() == ErrorKind::Interrupted => {}
                        read => break read,
                    }
                };
                let _ = done.send(read.expect("read"));
            });
            // The end of the pipe is there once nobody has the other side open.
            assert_eq!(ended.recv_timeout(Duration::from_secs(20)), Ok(0));
        }
    }

    #[test]
    fn waiting_ends_at_the_timeout() {
        let mut ring = Ring::new(4, Kind::ThisThread).expect("ring");
        let start = std::time::Instant::now();
        ring.enter_timeout(1, Duration::from_millis(20)).expect("enter");
        assert!(start.elapsed() >= Duration::from_millis(19));
        assert!(ring.next().is_none());
    }
}
