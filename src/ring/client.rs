//! The other side of a block device: a client with many reads and writes in flight.

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;

use super::{Kind, Ring};
use crate::backend::WriteFlags;
use crate::sys::map::{Map, page_size};
use crate::sys::uring::{self, Sqe};

/// How long dropping a client waits for what is in flight, before it leaks the buffers rather than free them under the
/// kernel's hands.
const DROP_PATIENCE: Duration = Duration::from_secs(1);

/// Which space an async `fallocate` is to leave behind zeroes; see [`BlockClient::write_zeroes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroSpace {
    /// It may be given back (`FALLOC_FL_PUNCH_HOLE`).
    MayUnmap,
    /// It stays allocated (`FALLOC_FL_ZERO_RANGE`).
    Keep,
}

/// Reads and writes on one file or block device, many in flight, on an io_uring of the thread that made it.
///
/// Each operation goes through a *slot*, which owns a page-aligned buffer: between the start of an operation and its
/// completion the slot's buffer is the kernel's and cannot be borrowed. That is all a caller needs to know to be safe.
/// File and buffers are registered with the ring where the kernel allows it.
///
/// ```
/// # fn main() -> std::io::Result<()> {
/// use ublkit::{BlockClient, WriteFlags};
/// let file = std::fs::File::options().read(true).write(true).open("/dev/zero")?;
/// let mut client = BlockClient::new(file, 4, 4096)?;
/// client.buffer_mut(0).fill(7);
/// client.write(0, 0, 512, WriteFlags::NONE);
/// client.read(1, 0, 4096);
/// let mut done = 0;
/// while done < 2 {
///     client.submit_and_wait(1, std::time::Duration::from_secs(1))?;
///     while let Some((_slot, result)) = client.next_completion() {
///         result?;
///         done += 1;
///     }
/// }
/// assert_eq!(client.buffer(1)[0], 0);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct BlockClient {
    ring: ManuallyDrop<Ring>,
    buffers: ManuallyDrop<Map>,
    stride: usize,
    busy: Box<[bool]>,
    in_flight: u32,
    registered_buffers: bool,
    file: File,
}

impl BlockClient {
    /// A client of `file` with `slots` slots of `slot_bytes` bytes each.
    ///
    /// # Errors
    /// The ring or the buffers could not be had.
    ///
    /// # Panics
    /// If `slots` or `slot_bytes` is 0.
    pub fn new(file: File, slots: u16, slot_bytes: usize) -> io::Result<Self> {
        assert!(slots > 0 && slot_bytes > 0, "a client has slots, and they have bytes");
        let stride = slot_bytes.next_multiple_of(page_size());
        let buffers = Map::anonymous(stride * usize::from(slots))?;
        let ring = Ring::new(u32::from(slots), Kind::ThisThread)?;
        ring.register_files(&[file.as_fd()])?;
        let vectors: Vec<_> = (0..usize::from(slots))
            .map(|slot| libc::iovec {
                iov_base: buffers.start().as_ptr().wrapping_add(slot * stride).cast(),
                iov_len: stride,
            })
            .collect();
        // SAFETY: the buffers are unmapped only after the ring is gone (see `drop`).
        let registered_buffers = unsafe { uring::register_buffers(&ring.fd, &vectors) }.is_ok();
        Ok(Self {
            ring: ManuallyDrop::new(ring),
            buffers: ManuallyDrop::new(buffers),
            stride,
            busy: vec![false; usize::from(slots)].into(),
            in_flight: 0,
            registered_buffers,
            file,
        })
    }

    /// The file.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Number of slots.
    #[must_use]
    pub fn slots(&self) -> u16 {
        self.busy.len() as u16
    }

    /// Operations that have not completed yet.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Whether a slot has no operation in flight.
    #[must_use]
    pub fn is_idle(&self, slot: u16) -> bool {
        !self.busy[usize::from(slot)]
    }

    fn address(&self, slot: u16) -> *mut u8 {
        assert!(!self.busy[usize::from(slot)], "slot {slot} has an operation in flight");
        self.buffers.start().as_ptr().wrapping_add(usize::from(slot) * self.stride)
    }

    /// A slot's buffer.
    ///
    /// # Panics
    /// If the slot has an operation in flight, or there is no such slot.
    #[must_use]
    pub fn buffer(&self, slot: u16) -> &[u8] {
        // SAFETY: in bounds (one stride per slot), initialised (anonymous memory is zeroed), and not the kernel's, which
        // `address` checked. Starting an operation takes `&mut self`, so it cannot happen during this borrow.
        unsafe { std::slice::from_raw_parts(self.address(slot), self.stride) }
    }

    /// A slot's buffer, to be written.
    ///
    /// # Panics
    /// If the slot has an operation in flight, or there is no such slot.
    #[must_use]
    pub fn buffer_mut(&mut self, slot: u16) -> &mut [u8] {
        // SAFETY: as in `buffer`, and `&mut self` keeps borrows apart.
        unsafe { std::slice::from_raw_parts_mut(self.address(slot), self.stride) }
    }

    /// Starts reading `len` bytes at `offset` bytes into a slot's buffer.
    ///
    /// # Panics
    /// If the slot is busy or too small.
    pub fn read(&mut self, slot: u16, offset: u64, len: usize) {
        let address = self.address(slot);
        assert!(len <= self.stride, "a read longer than its slot");
        let opcode = if self.registered_buffers { uring::OP_READ_FIXED } else { uring::OP_READ };
        let entry = Sqe {
            opcode,
            off: offset,
            addr: address as u64,
            len: len as u32,
            buf_index: self.buffer_index(slot),
            ..Sqe::default()
        };
        self.start(slot, entry);
    }

    /// Starts writing the first `len` bytes of a slot's buffer at `offset` bytes. With [`WriteFlags::fua`] the data is durable
    /// when it completes (`RWF_DSYNC`).
    ///
    /// # Panics
    /// If the slot is busy or too small.
    pub fn write(&mut self, slot: u16, offset: u64, len: usize, flags: WriteFlags) {
        let address = self.address(slot);
        assert!(len <= self.stride, "a write longer than its slot");
        let opcode = if self.registered_buffers { uring::OP_WRITE_FIXED } else { uring::OP_WRITE };
        let op_flags = if flags.fua { libc::RWF_DSYNC as u32 } else { 0 };
        let entry = Sqe {
            opcode,
            off: offset,
            addr: address as u64,
            len: len as u32,
            op_flags,
            buf_index: self.buffer_index(slot),
            ..Sqe::default()
        };
        self.start(slot, entry);
    }

    /// Starts an `fdatasync`.
    ///
    /// # Panics
    /// If the slot is busy.
    pub fn sync_data(&mut self, slot: u16) {
        let entry = Sqe { opcode: uring::OP_FSYNC, op_flags: uring::FSYNC_DATASYNC, ..Sqe::default() };
        self.start(slot, entry);
    }

    /// Starts zeroing a range, in bytes.
    ///
    /// # Panics
    /// If the slot is busy.
    pub fn write_zeroes(&mut self, slot: u16, offset: u64, len: u64, space: ZeroSpace) {
        let mode = match space {
            ZeroSpace::MayUnmap => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            ZeroSpace::Keep => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
        };
        // The kernel takes the mode in `len` and the length in `addr`.
        let entry = Sqe { opcode: uring::OP_FALLOCATE, off: offset, addr: len, len: mode as u32, ..Sqe::default() };
        self.start(slot, entry);
    }

    /// The slot's buffer as a registered one. Other operations than fixed reads and writes want 0 there.
    fn buffer_index(&self, slot: u16) -> u16 {
        if self.registered_buffers { slot } else { 0 }
    }

    fn start(&mut self, slot: u16, entry: Sqe) {
        assert!(self.is_idle(slot), "slot {slot} has an operation in flight");
        let entry = Sqe { fd: 0, flags: uring::SQE_FIXED_FILE, user_data: u64::from(slot), ..entry };
        // SAFETY: the only memory an entry of ours names is its slot's buffer, which is not handed out while the slot is busy and
        // not unmapped while the ring may use it.
        unsafe { self.ring.push(&entry) };
        self.busy[usize::from(slot)] = true;
        self.in_flight += 1;
    }

    /// Submits what was started and waits for `want` completions, at most `timeout`.
    ///
    /// # Errors
    /// The ring failed.
    pub fn submit_and_wait(&mut self, want: u32, timeout: Duration) -> io::Result<()> {
        let want = want.min(self.in_flight);
        if want == 0 {
            return self.ring.enter(0);
        }
        self.ring.enter_timeout(want, timeout)
    }

    /// The next completed operation: its slot, and how many bytes it moved or how it failed.
    pub fn next_completion(&mut self) -> Option<(u16, io::Result<usize>)> {
        let cqe = self.ring.next()?;
        let slot = cqe.user_data as u16;
        self.busy[usize::from(slot)] = false;
        self.in_flight -= 1;
        let result = match cqe.result {
            count @ 0.. => Ok(count as usize),
            error => Err(Errno::from_raw(-error).into()),
        };
        Some((slot, result))
    }
}

impl Drop for BlockClient {
    fn drop(&mut self) {
        let deadline = Instant::now() + DROP_PATIENCE;
        while self.in_flight > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left == Duration::ZERO || self.submit_and_wait(self.in_flight, left).is_err() {
                break;
            }
            while self.next_completion().is_some() {}
        }
        if self.in_flight == 0 {
            self.ring.release_files();
        }
        // SAFETY: neither is used again. The ring goes first; the buffers follow only if the kernel has let go of all of
        // them, and are leaked otherwise.
        unsafe {
            ManuallyDrop::drop(&mut self.ring);
            if self.in_flight == 0 {
                ManuallyDrop::drop(&mut self.buffers);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn file() -> File {
        let dir = std::env::temp_dir();
        let path = dir.join(format!("ublkit-client-{}-{:?}", std::process::id(), std::thread::current().id()));
        let mut file = File::options().read(true).write(true).create(true).truncate(true).open(&path).expect("open");
        std::fs::remove_file(&path).expect("unlink");
        file.write_all(&vec![0; 64 << 10]).expect("fill");
        file
    }

    fn drain(client: &mut BlockClient) -> Vec<(u16, io::Result<usize>)> {
        let mut done = Vec::new();
        while client.in_flight() > 0 {
            client.submit_and_wait(1, Duration::from_secs(5)).expect("enter");
            done.extend(std::iter::from_fn(|| client.next_completion()));
        }
        done
    }

    #[test]
    fn what_one_slot_writes_another_reads() {
        let mut client = BlockClient::new(file(), 8, 8192).expect("client");
        for slot in 0..8 {
            client.buffer_mut(slot).fill(slot as u8 + 1);
            client.write(slot, u64::from(slot) * 8192, 8192, WriteFlags { fua: slot % 2 == 0 });
        }
        assert!(drain(&mut client).into_iter().all(|(_, result)| result.expect("write") == 8192));
        for slot in 0..8u16 {
            client.read(slot, u64::from(7 - slot) * 8192, 8192);
        }
        drain(&mut client);
        for slot in 0..8u16 {
            assert!(client.buffer(slot).iter().all(|byte| *byte == 8 - slot as u8), "slot {slot}");
        }
        client.write_zeroes(3, 0, 4096, ZeroSpace::MayUnmap);
        client.sync_data(1);
        for (slot, result) in drain(&mut client) {
            assert_eq!(result.expect("zero and sync"), 0, "slot {slot}");
        }
        client.read(0, 0, 8192);
        drain(&mut client);
        assert_eq!(client.buffer(0)[4095], 0);
        assert_eq!(client.buffer(0)[4096], 1);
    }

    #[test]
    fn an_error_keeps_its_errno() {
        let read_only = File::open("/dev/null").expect("open");
        let mut client = BlockClient::new(read_only, 1, 512).expect("client");
        client.write(0, 0, 512, WriteFlags::NONE);
        let error = drain(&mut client).remove(0).1.expect_err("refused");
        assert_eq!(error.raw_os_error(), Some(Errno::EBADF as i32));
    }

    #[test]
    #[should_panic(expected = "in flight")]
    fn a_busy_slots_buffer_cannot_be_borrowed() {
        let mut client = BlockClient::new(file(), 1, 512).expect("client");
        client.read(0, 0, 512);
        let _ = client.buffer(0);
    }
}
