//! Requests: what the kernel asks of a queue, as tokens that are completed exactly once.

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Weak};

use nix::errno::Errno;

use crate::backend::{SECTOR_SIZE, WriteFlags, ZeroFlags, result_code};
use crate::ring::loans::Loan;
use crate::ring::tags::{Copying, Tags};
use crate::stats::QueueShared;
use crate::sys::ublk::{self, IoDesc};

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Operation {
    /// Fill the request's buffer.
    Read,
    /// Store the request's buffer.
    Write,
    /// Make completed writes durable. Has no range.
    Flush,
    /// Give back the space of a range.
    Discard,
    /// Zero a range.
    WriteZeroes,
    /// One that this library does not know, by its `UBLK_IO_OP_*` number.
    Other(u8),
}

impl Operation {
    /// A short lower-case name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes => "write-zeroes",
            Self::Other(_) => "other",
        }
    }
}

/// A request's descriptor, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Io {
    op_flags: u32,
    sectors: u32,
    start_sector: u64,
    queue: u16,
    tag: u16,
}

impl Io {
    /// What `descriptor` says, which the driver left for this tag of this queue. Nothing in it is taken on trust: whatever is
    /// in it means something.
    #[must_use]
    #[inline(always)]
    pub const fn new(queue: u16, tag: u16, descriptor: IoDesc) -> Self {
        let IoDesc { op_flags, nr_sectors, start_sector, .. } = descriptor;
        Self { op_flags, sectors: nr_sectors, start_sector, queue, tag }
    }

    /// What is asked.
    #[must_use]
    #[inline]
    pub const fn operation(&self) -> Operation {
        match self.op_flags & ublk::IO_OP_MASK {
            ublk::IO_OP_READ => Operation::Read,
            ublk::IO_OP_WRITE => Operation::Write,
            ublk::IO_OP_FLUSH => Operation::Flush,
            ublk::IO_OP_DISCARD => Operation::Discard,
            ublk::IO_OP_WRITE_ZEROES => Operation::WriteZeroes,
            other => Operation::Other(other as u8),
        }
    }

    /// Where the range starts, in bytes.
    #[must_use]
    #[inline]
    pub const fn offset(&self) -> u64 {
        // A descriptor with a start beyond 2^55 sectors cannot come from a device that this library made: the size is
        // checked in bytes. Wrapping keeps the arithmetic free of a branch.
        self.start_sector.wrapping_mul(SECTOR_SIZE)
    }

    /// How long the range is, in bytes; 0 for a flush. At most 2 TiB.
    #[must_use]
    #[inline]
    pub const fn len(&self) -> u64 {
        self.sectors as u64 * SECTOR_SIZE
    }

    /// Whether the request has no range.
    #[must_use]
    #[inline]
    pub const fn is_empty(&self) -> bool {
        self.sectors == 0
    }

    /// Force unit access: durable before it is completed.
    #[must_use]
    #[inline]
    pub const fn fua(&self) -> bool {
        // Compared at its absolute bit: the flags are not shifted down with the operation.
        self.op_flags & ublk::IO_F_FUA != 0
    }

    /// The space behind zeroes must stay allocated.
    #[must_use]
    #[inline]
    pub const fn no_unmap(&self) -> bool {
        self.op_flags & ublk::IO_F_NOUNMAP != 0
    }

    /// The operation and all flags as the kernel wrote them (`UBLK_IO_OP_*`, `UBLK_IO_F_*`).
    #[must_use]
    pub const fn raw_flags(&self) -> u32 {
        self.op_flags
    }

    /// Flags for [`Backend::write_at`](crate::Backend::write_at).
    #[must_use]
    #[inline]
    pub const fn write_flags(&self) -> WriteFlags {
        WriteFlags { fua: self.fua() }
    }

    /// Flags for [`Backend::write_zeroes`](crate::Backend::write_zeroes).
    #[must_use]
    #[inline]
    pub const fn zero_flags(&self) -> ZeroFlags {
        ZeroFlags { no_unmap: self.no_unmap(), fua: self.fua() }
    }

    /// The queue it came through.
    #[must_use]
    #[inline]
    pub const fn queue(&self) -> u16 {
        self.queue
    }

    /// Its tag, unique among the queue's requests in flight.
    #[must_use]
    #[inline]
    pub const fn tag(&self) -> u16 {
        self.tag
    }

    /// Bytes of data that move with the request; 0 unless it is a read or a write.
    #[inline(always)]
    fn data_len(&self) -> usize {
        match self.operation() {
            Operation::Read | Operation::Write => self.len() as usize,
            _ => 0,
        }
    }

    /// The result code of a success.
    ///
    /// A read or write says how many bytes it moved, which is at most 32 MiB; of everything else the driver only wants to
    /// know that it is not negative, so there is no need to ask which it is.
    #[inline(always)]
    fn success(&self) -> i32 {
        (self.len() & i32::MAX as u64) as i32
    }

    fn user_copy_offset(&self, offset: usize) -> u64 {
        ublk::user_copy_offset(self.queue, self.tag, offset as u32)
    }
}

/// Fetches a write's data in user-copy mode.
fn user_copy_in(device: &File, io: &Io, buffer: &mut [u8], offset: usize) -> io::Result<()> {
    device.read_exact_at(buffer, io.user_copy_offset(offset))
}

/// Delivers a read's data in user-copy mode.
fn user_copy_out(device: &File, io: &Io, buffer: &[u8], offset: usize) -> io::Result<()> {
    device.write_all_at(buffer, io.user_copy_offset(offset))
}

/// Fetches a write's data in user-copy mode, into the tag's buffer.
#[inline(never)]
fn fetch(tags: &mut Tags, io: Io) -> io::Result<()> {
    let device = Arc::clone(tags.character_device());
    user_copy_in(&device, &io, tags.buffer_mut(io.tag, io.data_len()), 0)
}

/// Delivers a read's data in user-copy mode, from the tag's buffer, and returns the request's result.
#[inline(never)]
fn deliver(tags: &mut Tags, shared: &QueueShared, io: Io) -> i32 {
    let device = Arc::clone(tags.character_device());
    let buffer = tags.buffer_mut(io.tag, io.data_len());
    match user_copy_out(&device, &io, buffer, 0) {
        Ok(()) => io.success(),
        Err(error) => {
            shared.count_failed();
            result_code(&error)
        }
    }
}

/// The queue ended before the request did.
fn gone() -> io::Error {
    io::Error::from_raw_os_error(Errno::ENODEV as i32)
}

macro_rules! describe {
    () => {
        /// The whole descriptor.
        #[must_use]
        #[inline]
        pub const fn io(&self) -> Io {
            self.io
        }

        /// What is asked.
        #[must_use]
        #[inline]
        pub const fn operation(&self) -> Operation {
            self.io.operation()
        }

        /// Where the range starts, in bytes.
        #[must_use]
        #[inline]
        pub const fn offset(&self) -> u64 {
            self.io.offset()
        }

        /// How long the range is, in bytes; 0 for a flush.
        #[must_use]
        #[inline]
        pub const fn len(&self) -> u64 {
            self.io.len()
        }

        /// Whether the request has no range.
        #[must_use]
        #[inline]
        pub const fn is_empty(&self) -> bool {
            self.io.is_empty()
        }
    };
}

/// A request on its queue's thread.
///
/// It must be completed exactly once, by [`complete`](Self::complete) or [`fail`](Self::fail), now or, after
/// [`detach`](Self::detach), later, in any order and from any thread. One that is dropped instead is completed with
/// `EIO`, counted in [`QueueStats::dropped`](crate::QueueStats::dropped), and told as an [`Event`](crate::Event).
#[must_use = "a request that is dropped fails with EIO"]
#[derive(Debug)]
pub struct Request<'q> {
    tags: &'q mut Tags,
    shared: &'q Arc<QueueShared>,
    io: Io,
    /// In user-copy mode: a write's data has been fetched.
    fetched: bool,
}

impl<'q> Request<'q> {
    #[inline(always)]
    pub(crate) fn new(tags: &'q mut Tags, shared: &'q Arc<QueueShared>, io: Io) -> Self {
        Self { tags, shared, io, fetched: false }
    }

    describe!();

    /// The data of a write; empty for every other operation.
    ///
    /// # Errors
    /// In user-copy mode, fetching the data failed: the request can then only be failed.
    #[inline(always)]
    pub fn data(&mut self) -> io::Result<&[u8]> {
        if self.operation() != Operation::Write {
            return Ok(&[]);
        }
        if self.tags.copying() == Copying::User && !self.fetched {
            fetch(self.tags, self.io)?;
            self.fetched = true;
        }
        Ok(self.tags.buffer_mut(self.io.tag, self.io.len() as usize))
    }

    /// The buffer that a read is to fill; empty for every other operation. It holds what an earlier request left there.
    #[inline(always)]
    pub fn buffer(&mut self) -> &mut [u8] {
        if self.operation() != Operation::Read {
            return &mut [];
        }
        self.tags.buffer_mut(self.io.tag, self.io.len() as usize)
    }

    /// Completes the request with success: all of its range was served.
    #[inline(always)]
    pub fn complete(self) {
        let mut this = ManuallyDrop::new(self);
        let Self { tags, shared, io, .. } = &mut *this;
        let mut result = io.success();
        if tags.copying() == Copying::User && io.operation() == Operation::Read {
            result = deliver(tags, shared, *io);
        }
        tags.commit(io.tag, result);
    }

    /// Completes the request with an error: see [`result_code`] for the errno that arrives.
    #[inline(always)]
    pub fn fail(self, error: &io::Error) {
        let mut this = ManuallyDrop::new(self);
        let Self { tags, shared, io, .. } = &mut *this;
        fail_request(tags, shared, *io, error);
    }

    /// Completes the request with what a backend returned.
    #[inline(always)]
    pub fn finish(self, result: io::Result<()>) {
        match result {
            Ok(()) => self.complete(),
            Err(error) => self.fail(&error),
        }
    }

    /// Frees the request from its queue's thread, to be completed later or elsewhere.
    #[inline(always)]
    pub fn detach(self) -> DetachedRequest {
        let mut this = ManuallyDrop::new(self);
        let Self { tags, shared, io, fetched } = &mut *this;
        detach_request(tags, shared, *io, *fetched)
    }
}

#[inline(never)]
fn detach_request(tags: &mut Tags, shared: &Arc<QueueShared>, io: Io, fetched: bool) -> DetachedRequest {
    let device = (tags.copying() == Copying::User).then(|| Arc::downgrade(tags.character_device()));
    DetachedRequest { loan: Some(tags.lend(io.tag)), shared: Arc::clone(shared), device, io, fetched }
}

impl Drop for Request<'_> {
    // Inlined down to a call by value: a request whose address is taken lives in memory on the hot path too.
    #[inline(always)]
    fn drop(&mut self) {
        drop_request(self.tags, self.shared, self.io);
    }
}

#[cold]
#[inline(never)]
fn drop_request(tags: &mut Tags, shared: &QueueShared, io: Io) {
    shared.dropped(io);
    tags.commit(io.tag, -(Errno::EIO as i32));
}

#[cold]
#[inline(never)]
fn fail_request(tags: &mut Tags, shared: &QueueShared, io: Io, error: &io::Error) {
    shared.count_failed();
    tags.commit(io.tag, result_code(error));
}

/// A request away from its queue's thread. The rules are those of [`Request`].
#[must_use = "a request that is dropped fails with EIO"]
#[derive(Debug)]
pub struct DetachedRequest {
    /// `None` once it is completed.
    loan: Option<Loan>,
    shared: Arc<QueueShared>,
    /// The character device, in user-copy mode. Weak, so that a request which is stuck in a backend does not keep the device
    /// from ending.
    device: Option<Weak<File>>,
    io: Io,
    fetched: bool,
}

impl DetachedRequest {
    describe!();

    /// The data of a write; empty for every other operation.
    ///
    /// # Errors
    /// In user-copy mode, fetching the data failed: the request can then only be failed.
    pub fn data(&mut self) -> io::Result<&[u8]> {
        let Some(loan) = self.loan.as_mut().filter(|_| self.io.operation() == Operation::Write) else {
            return Ok(&[]);
        };
        if let Some(device) = self.device.as_ref().filter(|_| !self.fetched) {
            let device = device.upgrade().ok_or_else(gone)?;
            user_copy_in(&device, &self.io, loan.buffer_mut(self.io.data_len()), 0)?;
            self.fetched = true;
        }
        Ok(loan.buffer(self.io.data_len()))
    }

    /// The buffer that a read is to fill; empty for every other operation. It holds what an earlier request left there.
    pub fn buffer(&mut self) -> &mut [u8] {
        match &mut self.loan {
            Some(loan) if self.io.operation() == Operation::Read => loan.buffer_mut(self.io.data_len()),
            _ => &mut [],
        }
    }

    /// Completes the request with success: all of its range was served.
    pub fn complete(mut self) {
        let mut result = self.io.success();
        if let (Some(device), Some(loan), Operation::Read) = (&self.device, &self.loan, self.io.operation())
            && let Err(error) = device
                .upgrade()
                .ok_or_else(gone)
                .and_then(|device| user_copy_out(&device, &self.io, loan.buffer(self.io.data_len()), 0))
        {
            self.shared.count_failed();
            result = result_code(&error);
        }
        self.settle(result);
    }

    /// Completes the request with an error: see [`result_code`] for the errno that arrives.
    pub fn fail(mut self, error: &io::Error) {
        self.shared.count_failed();
        self.settle(result_code(error));
    }

    /// Completes the request with what a backend returned.
    pub fn finish(self, result: io::Result<()>) {
        match result {
            Ok(()) => self.complete(),
            Err(error) => self.fail(&error),
        }
    }

    /// What this queue shares with its device.
    pub(crate) fn shared(&self) -> &Arc<QueueShared> {
        &self.shared
    }

    fn settle(&mut self, result: i32) {
        if let Some(loan) = self.loan.take() {
            loan.settle(result);
        }
    }
}

impl Drop for DetachedRequest {
    fn drop(&mut self) {
        if self.loan.is_some() {
            self.shared.dropped(self.io);
            self.settle(-(Errno::EIO as i32));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn io(op_flags: u32) -> Io {
        Io::new(1, 2, IoDesc { op_flags, nr_sectors: 9, start_sector: 1 << 40, addr: 0 })
    }

    #[test]
    fn flags_are_read_at_their_absolute_bits() {
        let write = io(ublk::IO_OP_WRITE | ublk::IO_F_FUA);
        assert_eq!(write.operation(), Operation::Write);
        assert!(write.fua() && !write.no_unmap());
        let zero = io(ublk::IO_OP_WRITE_ZEROES | ublk::IO_F_NOUNMAP);
        assert_eq!(zero.operation(), Operation::WriteZeroes);
        assert!(zero.no_unmap() && !zero.fua());
    }

    #[test]
    fn ranges_are_in_bytes_and_do_not_wrap_at_32_bits() {
        let read = io(ublk::IO_OP_READ);
        assert_eq!(read.offset(), 1 << 49);
        assert_eq!(read.len(), 9 * 512);
        assert_eq!(Io::new(0, 0, IoDesc { nr_sectors: u32::MAX, ..IoDesc::default() }).len(), (1 << 41) - 512);
    }

    #[test]
    fn an_operation_that_is_not_known_keeps_its_number() {
        assert_eq!(io(18).operation(), Operation::Other(18));
    }
}
