//! What a queue's thread shares with others: the buffers that it lends, the orders that it is given, and how it is woken.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicU64, Ordering};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::sys::map::Map;

/// An order to a queue: complete what it has, take nothing new, and park.
pub(super) const LEAVE: u8 = 1;
/// An order to a queue: end now, whatever it owns.
pub(super) const ABANDON: u8 = 2;
/// An order to a queue that has parked: serve what the driver had on its way, then end.
pub(super) const FINISH: u8 = 4;

/// What a queue shares with whoever holds its loans or wants to wake it.
#[derive(Debug)]
pub(crate) struct Shared {
    buffers: Map,
    pub(super) stride: usize,
    /// One bit per tag that was given back and waits to be committed.
    pub(super) returned: Box<[AtomicU64]>,
    pub(super) results: Box<[AtomicI32]>,
    /// The queue thread is about to sleep: a wake-up is needed.
    pub(super) asleep: AtomicBool,
    /// Whether and how the queue is to end: [`LEAVE`], [`FINISH`], [`ABANDON`].
    pub(super) orders: AtomicU8,
    /// The queue has nothing in its hands and takes nothing.
    pub(super) parked: AtomicBool,
    /// How often the queue's thread has noticed a wake-up.
    pub(super) woken: AtomicU64,
    pub(super) wake: EventFd,
}

impl Shared {
    /// Buffers and wake-up for a queue of `depth` tags of `stride` bytes each.
    pub(crate) fn new(depth: u16, stride: usize) -> io::Result<Self> {
        let stride = stride.next_multiple_of(crate::sys::map::page_size());
        let buffers = Map::anonymous(stride * usize::from(depth))?;
        // Most requests are much smaller than the largest, and a tag's buffer is used from its beginning.
        buffers.avoid_huge_pages();
        Ok(Self {
            buffers,
            stride,
            returned: (0..usize::from(depth).div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            results: (0..depth).map(|_| AtomicI32::new(0)).collect(),
            asleep: AtomicBool::new(false),
            orders: AtomicU8::new(0),
            parked: AtomicBool::new(false),
            woken: AtomicU64::new(0),
            wake: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
        })
    }

    /// Keeps the buffers in memory.
    pub(crate) fn lock_buffers(&self) -> io::Result<()> {
        self.buffers.lock()
    }

    /// Ends the queue's loop as soon as its thread is not inside a backend.
    pub(crate) fn abandon(&self) {
        self.orders.fetch_or(ABANDON, Ordering::SeqCst);
        self.wake();
    }

    /// Has the queue complete what it has, and park.
    pub(crate) fn leave(&self) {
        self.orders.fetch_or(LEAVE, Ordering::SeqCst);
        self.wake();
    }

    /// Whether it has.
    pub(crate) fn has_parked(&self) -> bool {
        self.parked.load(Ordering::SeqCst)
    }

    /// Has a queue that has parked serve what the driver had on its way, and end.
    pub(crate) fn finish(&self) {
        self.orders.fetch_or(FINISH, Ordering::SeqCst);
        self.wake();
    }

    /// Asks the queue's thread for a sign of life; [`has_answered`](Self::has_answered) knows whether it came.
    pub(crate) fn ask(&self) -> u64 {
        let before = self.woken.load(Ordering::SeqCst);
        self.wake();
        before
    }

    /// Whether the thread has come by since it was asked: it is not inside a backend for good.
    pub(crate) fn has_answered(&self, asked: u64) -> bool {
        self.woken.load(Ordering::SeqCst) != asked
    }

    fn wake(&self) {
        // The counter is non-blocking and near its limit only if the thread never read it, in which case it is
        // readable and the thread wakes all the same.
        let _ = self.wake.write(1);
    }

    pub(super) fn buffer_address(&self, tag: u16) -> *mut u8 {
        debug_assert!(self.stride * (usize::from(tag) + 1) <= self.buffers.len());
        self.buffers.start().as_ptr().wrapping_add(self.stride * usize::from(tag))
    }
}

/// Exclusive right to one tag's buffer, away from the queue's thread. Given back by [`Loan::settle`].
#[derive(Debug)]
pub(crate) struct Loan {
    shared: Arc<Shared>,
    tag: u16,
}

impl Loan {
    /// Of this tag's buffer.
    ///
    /// # Safety
    /// Nobody else has it, the driver included, until the loan is settled.
    pub(super) unsafe fn new(shared: &Arc<Shared>, tag: u16) -> Self {
        Self { shared: Arc::clone(shared), tag }
    }

    /// The first `len` bytes of the tag's buffer.
    pub(crate) fn buffer(&self, len: usize) -> &[u8] {
        assert!(len <= self.shared.stride, "longer than a tag's buffer");
        // SAFETY: in bounds by the assertion, mapped as long as `shared` lives, initialised (anonymous memory is
        // zeroed), and nobody else's until the loan is settled, by the promise to `new`.
        unsafe { std::slice::from_raw_parts(self.shared.buffer_address(self.tag), len) }
    }

    /// As [`buffer`](Self::buffer), to be written.
    pub(crate) fn buffer_mut(&mut self, len: usize) -> &mut [u8] {
        assert!(len <= self.shared.stride, "longer than a tag's buffer");
        // SAFETY: as above, and `&mut self` keeps two borrows apart.
        unsafe { std::slice::from_raw_parts_mut(self.shared.buffer_address(self.tag), len) }
    }

    /// Ends the loan: the queue's thread will commit `result`.
    pub(crate) fn settle(self, result: i32) {
        let Self { shared, tag } = self;
        shared.results[usize::from(tag)].store(result, Ordering::Relaxed);
        // Release: what was done to the buffer and the result come before the bit. SeqCst beside that, so that either
        // this thread sees the queue asleep or the queue sees the bit (see `Tags::wait`).
        shared.returned[usize::from(tag) / 64].fetch_or(1 << (tag % 64), Ordering::SeqCst);
        if shared.asleep.load(Ordering::SeqCst) && shared.asleep.swap(false, Ordering::SeqCst) {
            shared.wake();
        }
    }
}
