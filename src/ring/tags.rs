//! The tags of one ublk queue: their buffers, who owns each, and the commands that pass them to and fro.
//!
//! A tag belongs to the driver from FETCH or COMMIT until its completion arrives, and to the server from then until the
//! next COMMIT. While it is the server's, exactly one token stands for it: a [`Request`](crate::Request), or the
//! [`Loan`] inside a detached one. That is what makes the buffers sound to hand out, and it is checked here.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};

use super::descriptors::Descriptors;
use super::loans::{ABANDON, FINISH, Loan, Shared};
use super::{Kind, Ring};
use crate::sys::ublk::{self, IoCmd, IoDesc};
use crate::sys::uring::{self, Sqe};

/// User data of the wake-up poll; above every tag.
const WAKE: u64 = 1 << 32;

/// How long a queue that leaves waits for loans or orders at a time.
const LEAVE_SLICE_MS: u8 = 50;

/// Tags that the driver still has are left when nothing came for so long, or when that was waited for so long.
const QUIET: Duration = Duration::from_millis(10);
const KEEP_PATIENCE: Duration = Duration::from_millis(200);

/// Who holds a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Owner {
    /// The driver: fetched, or not yet fetched.
    Driver,
    /// This thread, as a `Request`.
    Server,
    /// Somebody with a [`Loan`].
    Lent,
    /// Nobody: the driver ended the command for good.
    Gone,
}

/// How data moves between a request and the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Copying {
    /// The driver copies to and from the tag's buffer.
    Driver,
    /// The server reads and writes the character device; the tag's buffer is its scratch space.
    User,
}

/// What is done with requests that are on their way to the ring when it ends before the device does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AtEnd {
    /// They are left to the driver, which sends them to the next server or fails them.
    Leave,
    /// They are fetched, so that the driver fails or requeues them as the server's. Before 6.16 what is on its way to a ring that is
    /// closed is lost, and with it the device (docs/landmines.md).
    Keep,
}

/// What is kept per tag.
#[derive(Clone, Copy, Debug)]
struct Slot {
    /// The tag's COMMIT, complete but for the result.
    commit: Sqe,
    owner: Owner,
}

/// The tags of one queue, on a ring of their own.
#[derive(Debug)]
pub(crate) struct Tags {
    ring: Ring,
    queue: u16,
    copying: Copying,
    descriptors: Descriptors,
    slots: Box<[Slot]>,
    shared: Arc<Shared>,
    character_device: Arc<File>,
    /// Loans that are out.
    lent: u32,
    /// Completions with ABORT: the device is stopping.
    aborted: u32,
    /// The first completion that this code cannot serve past.
    failure: Option<(u64, i32)>,
    /// Whether the driver was given the tags.
    fetched: bool,
    at_end: AtEnd,
}

impl Drop for Tags {
    /// DEL waits for the character device, so it is let go of as early as can be: where the driver has ended every command.
    /// Where it has not, because the server leaves, or failed, or panics, what is completed is told.
    fn drop(&mut self) {
        if self.all_aborted() {
            self.ring.release_files();
        } else if self.fetched {
            // A ring that cannot be entered has nothing more to give or to take.
            let _ = match self.at_end {
                AtEnd::Leave => self.submit(),
                AtEnd::Keep => self.keep_what_comes(),
            };
        }
    }
}

impl Tags {
    /// The tags of queue `queue`, on a ring that belongs to the calling thread.
    pub(crate) fn new(
        queue: u16,
        depth: u16,
        copying: Copying,
        at_end: AtEnd,
        character_device: Arc<File>,
        descriptors: Descriptors,
        shared: Arc<Shared>,
    ) -> io::Result<Self> {
        assert!(descriptors.depth() == depth, "a descriptor for every tag");
        assert!(shared.results.len() == usize::from(depth), "a buffer for every tag");
        // One command per tag, the wake-up poll, and its removal.
        let ring = Ring::new(u32::from(depth) + 2, Kind::ThisThread)?;
        ring.register_files(&[character_device.as_fd()])?;
        let commit = |tag| {
            let addr = match copying {
                Copying::Driver => shared.buffer_address(tag) as u64,
                Copying::User => 0,
            };
            Sqe {
                opcode: uring::OP_URING_CMD,
                flags: uring::SQE_FIXED_FILE,
                fd: 0,
                off: u64::from(ublk::IO_COMMIT_AND_FETCH_REQ),
                user_data: u64::from(tag),
                cmd: IoCmd { q_id: queue, tag, result: 0, addr }.to_words(),
                ..Sqe::default()
            }
        };
        let slots = (0..depth).map(|tag| Slot { commit: commit(tag), owner: Owner::Driver }).collect();
        Ok(Self {
            ring,
            queue,
            copying,
            descriptors,
            slots,
            shared,
            character_device,
            lent: 0,
            aborted: 0,
            failure: None,
            fetched: false,
            at_end,
        })
    }

    /// Queues a FETCH for every tag, and the wake-up poll.
    pub(crate) fn fetch_all(&mut self) {
        for tag in 0..self.slots.len() {
            let fetch = Sqe { off: u64::from(ublk::IO_FETCH_REQ), ..self.slots[tag].commit };
            // SAFETY: as in `commit_from`.
            unsafe { self.ring.push(&fetch) };
        }
        self.arm_wake();
        self.fetched = true;
    }

    /// Commits what is completed, and takes nothing.
    pub(crate) fn submit(&mut self) -> io::Result<()> {
        self.ring.submit()
    }

    /// Takes what is on its way, and keeps it, until nothing more comes: whoever sent it waits for it.
    fn keep_what_comes(&mut self) -> io::Result<()> {
        let until = Instant::now() + KEEP_PATIENCE;
        self.ring.enter(0)?;
        loop {
            while self.next().is_some() {}
            let taken = self.taken();
            self.wait_at_most(QUIET)?;
            let quiet = self.next().is_none() && self.taken() == taken;
            if quiet || Instant::now() >= until {
                return Ok(());
            }
        }
    }

    /// Gives a tag that is `owner`'s back to the driver with a result.
    #[inline(always)]
    fn commit_from(&mut self, owner: Owner, tag: u16, result: i32) {
        let tag = &mut self.slots[usize::from(tag)];
        assert!(tag.owner == owner, "only what is the server's can be committed");
        tag.owner = Owner::Driver;
        // SAFETY: the buffer named is the tag's own. The driver writes it only while it owns the tag, in which time this module
        // hands out no reference to it; the mapping outlives the ring, which `self` drops first, and the driver fills
        // buffers only in the context of the thread that owns the ring.
        unsafe { self.ring.push_with_result(&tag.commit, result) };
    }

    fn arm_wake(&mut self) {
        let poll = Sqe {
            opcode: uring::OP_POLL_ADD,
            fd: self.shared.wake.as_fd().as_raw_fd(),
            // 32 bits of events, whose halves the kernel expects swapped on big-endian machines.
            op_flags: (PollFlags::POLLIN.bits() as u32).rotate_left(if cfg!(target_endian = "big") { 16 } else { 0 }),
            user_data: WAKE,
            ..Sqe::default()
        };
        // SAFETY: a poll names no memory.
        unsafe { self.ring.push(&poll) };
    }

    /// Submits what is queued and, if `block`, waits for at least one completion or a settled loan.
    #[inline]
    pub(crate) fn wait(&mut self, block: bool) -> io::Result<()> {
        if self.lent == 0 {
            return self.ring.enter(u32::from(block));
        }
        self.wait_with_loans(block)
    }

    fn wait_with_loans(&mut self, block: bool) -> io::Result<()> {
        // Announce the sleep, then look once more: a loan settled before the announcement is found here, one settled
        // after it wakes us through the eventfd.
        self.shared.asleep.store(true, Ordering::SeqCst);
        let found = self.collect();
        let result = self.ring.enter(u32::from(block && !found));
        self.shared.asleep.store(false, Ordering::SeqCst);
        self.collect();
        result
    }

    /// Commits loans that were settled. Returns whether there were any.
    fn collect(&mut self) -> bool {
        let mut found = false;
        for word in 0..self.shared.returned.len() {
            if self.shared.returned[word].load(Ordering::SeqCst) == 0 {
                continue;
            }
            let mut bits = self.shared.returned[word].swap(0, Ordering::SeqCst);
            while bits != 0 {
                let tag = (word * 64 + bits.trailing_zeros() as usize) as u16;
                bits &= bits - 1;
                let result = self.shared.results[usize::from(tag)].load(Ordering::Relaxed);
                self.lent -= 1;
                self.commit_from(Owner::Lent, tag, result);
                found = true;
            }
        }
        found
    }

    /// The next request of this batch: its tag, which is the server's from now on, and its descriptor.
    #[inline(always)]
    pub(crate) fn next(&mut self) -> Option<(u16, IoDesc)> {
        while let Some(cqe) = self.ring.next() {
            if let Some(tag) = self.slots.get_mut(cqe.user_data as usize)
                && cqe.result == ublk::IO_RES_OK
            {
                tag.owner = Owner::Server;
                let tag = cqe.user_data as u16;
                // SAFETY: it has a slot, and there are as many descriptors (asserted in `new`). The driver writes a tag's only
                // while it owns the tag.
                return Some((tag, unsafe { self.descriptors.request(tag) }));
            }
            self.other(cqe.user_data, cqe.result);
        }
        None
    }

    /// Every completion that is not a request.
    #[cold]
    fn other(&mut self, index: u64, result: i32) {
        if index == WAKE && result >= 0 {
            let _ = self.shared.wake.read();
            self.shared.woken.fetch_add(1, Ordering::SeqCst);
            self.arm_wake();
            return;
        }
        if let Some(tag) = self.slots.get_mut(index as usize) {
            tag.owner = Owner::Gone;
        }
        if result == ublk::IO_RES_ABORT {
            self.aborted += 1;
        } else {
            self.failure.get_or_insert((index, result));
        }
    }

    /// The buffer of a tag that is the server's.
    #[inline(always)]
    pub(crate) fn buffer_mut(&mut self, tag: u16, len: usize) -> &mut [u8] {
        assert!(
            self.slots[usize::from(tag)].owner == Owner::Server && len <= self.shared.stride,
            "the server's own buffer"
        );
        // SAFETY: in bounds by the assertion, mapped while `shared` lives, initialised (anonymous memory is zeroed), and
        // the server's: the driver does not touch it and no loan of it exists. `&mut self` keeps borrows apart.
        unsafe { std::slice::from_raw_parts_mut(self.shared.buffer_address(tag), len) }
    }

    /// Completes a tag's request and hands the tag back to the driver, at the next [`wait`](Self::wait).
    #[inline(always)]
    pub(crate) fn commit(&mut self, tag: u16, result: i32) {
        self.commit_from(Owner::Server, tag, result);
    }

    /// Lets a tag's buffer leave this thread.
    pub(crate) fn lend(&mut self, tag: u16) -> Loan {
        let owner = &mut self.slots[usize::from(tag)].owner;
        assert!(*owner == Owner::Server, "only what is the server's can be lent");
        *owner = Owner::Lent;
        self.lent += 1;
        // SAFETY: it was the server's, of which there is one, and is not before the loan is settled.
        unsafe { Loan::new(&self.shared, tag) }
    }

    /// This queue's number.
    #[inline]
    pub(crate) fn queue(&self) -> u16 {
        self.queue
    }

    /// How data moves.
    #[inline]
    pub(crate) fn copying(&self) -> Copying {
        self.copying
    }

    /// The character device, for user copy.
    pub(crate) fn character_device(&self) -> &Arc<File> {
        &self.character_device
    }

    /// Whether the driver has begun to take its tags back.
    #[inline]
    pub(crate) fn stopping(&self) -> bool {
        self.aborted > 0
    }

    /// Whether it has taken all of them back.
    pub(crate) fn all_aborted(&self) -> bool {
        self.aborted as usize == self.slots.len()
    }

    /// Waits for a completion, at most `timeout`.
    pub(crate) fn wait_at_most(&mut self, timeout: Duration) -> io::Result<()> {
        self.ring.enter_timeout(1, timeout)
    }

    /// Whether some request is still the server's.
    pub(crate) fn owns_requests(&self) -> bool {
        self.slots.iter().any(|tag| matches!(tag.owner, Owner::Server | Owner::Lent))
    }

    /// Whether the queue was told to end whatever it owns.
    #[inline]
    pub(crate) fn abandoned(&self) -> bool {
        self.shared.orders.load(Ordering::Relaxed) & ABANDON != 0
    }

    /// Whether the queue was told to end in either way.
    #[inline]
    pub(crate) fn ordered(&self) -> bool {
        self.shared.orders.load(Ordering::Relaxed) != 0
    }

    /// How many completions were taken so far, modulo 2^32.
    pub(crate) fn taken(&self) -> u32 {
        self.ring.taken()
    }

    /// How many entries the kernel has not been shown.
    #[cfg(test)]
    pub(crate) fn unsubmitted(&self) -> u32 {
        self.ring.tail.wrapping_sub(self.ring.head)
    }

    /// Commits what was given back, waiting for more if some is out, and takes nothing new. Returns whether some is still
    /// out.
    pub(crate) fn settle(&mut self) -> io::Result<bool> {
        // As in `wait_with_loans`.
        self.shared.asleep.store(true, Ordering::SeqCst);
        if !self.collect() && self.lent > 0 {
            self.await_wake();
        }
        self.shared.asleep.store(false, Ordering::SeqCst);
        self.collect();
        self.ring.submit()?;
        Ok(self.lent > 0)
    }

    /// Waits for the order to finish or to end, without a look at the ring.
    pub(crate) fn park(&self) {
        self.shared.parked.store(true, Ordering::SeqCst);
        while self.shared.orders.load(Ordering::SeqCst) & (FINISH | ABANDON) == 0 {
            self.await_wake();
        }
    }

    /// Waits a moment for a wake-up, past the ring. Whoever asks for a sign of life meanwhile gets one.
    fn await_wake(&self) {
        let _ = poll(&mut [PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN)], LEAVE_SLICE_MS);
        if self.shared.wake.read().is_ok() {
            self.shared.woken.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// The first completion that cannot be served past: a tag's or the wake-up's, and its errno.
    #[inline]
    pub(crate) fn failure(&self) -> Option<(u64, Errno)> {
        self.failure.map(|(index, result)| (index, Errno::from_raw(-result)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;

    /// `/dev/null` completes every command with 0, which is `UBLK_IO_RES_OK`: with it as the character device and plain
    /// memory as descriptors, a queue runs on any kernel.
    fn tags_on_dev_null(depth: u16) -> Option<Tags> {
        let null = OpenOptions::new().read(true).write(true).open("/dev/null").expect("open /dev/null");
        let shared = Arc::new(Shared::new(depth, 4096).expect("buffers"));
        let descriptors = Descriptors::pretended(depth, IoDesc::default()).expect("descriptors");
        Tags::new(0, depth, Copying::Driver, AtEnd::Leave, Arc::new(null), descriptors, shared).ok()
    }

    #[test]
    fn every_tag_comes_round_and_a_settled_loan_wakes_the_queue() {
        let mut tags = tags_on_dev_null(8).expect("ring");
        tags.fetch_all();
        let mut seen = [0u32; 8];
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        // As long as it takes the other threads to have their turns.
        while seen.iter().any(|&count| count <= 2) {
            assert!(std::time::Instant::now() < deadline, "{seen:?}");
            tags.wait(true).expect("enter");
            while let Some((tag, descriptor)) = tags.next() {
                assert_eq!(descriptor.nr_sectors, 0);
                seen[usize::from(tag)] += 1;
                if seen[usize::from(tag)] % 2 == 0 {
                    tags.commit(tag, 0);
                } else {
                    let mut loan = tags.lend(tag);
                    std::thread::spawn(move || {
                        loan.buffer_mut(4096).fill(tag as u8);
                        loan.settle(0);
                    });
                }
            }
            assert_eq!(tags.failure(), None);
        }
        while tags.lent > 0 {
            tags.wait(true).expect("enter");
            while let Some((tag, _)) = tags.next() {
                tags.commit(tag, 0);
            }
        }
    }

    #[test]
    fn an_abandoned_queue_wakes() {
        let mut tags = tags_on_dev_null(2).expect("ring");
        tags.arm_wake();
        let shared = Arc::clone(&tags.shared);
        let other = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            shared.abandon();
        });
        tags.wait(true).expect("enter");
        assert!(tags.next().is_none());
        assert!(tags.abandoned());
        other.join().expect("join");
    }

    #[test]
    #[should_panic(expected = "only what is the server's")]
    fn a_tag_cannot_be_committed_twice() {
        let mut tags = tags_on_dev_null(1).expect("ring");
        tags.fetch_all();
        tags.wait(true).expect("enter");
        let (tag, _) = tags.next().expect("a request");
        tags.commit(tag, 0);
        tags.commit(tag, 0);
    }
}
