//! The io_uring user interface as far as this library uses it, from `include/uapi/linux/io_uring.h`, and its three calls.

use std::io;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc;

/// A submission queue entry (`struct io_uring_sqe`), its unions reduced to the members in use.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Sqe {
    pub(crate) opcode: u8,
    pub(crate) flags: u8,
    pub(crate) ioprio: u16,
    pub(crate) fd: i32,
    /// Also `cmd_op`, in its low half.
    pub(crate) off: u64,
    pub(crate) addr: u64,
    pub(crate) len: u32,
    /// `rw_flags`, `fsync_flags`, `poll32_events`, and so on.
    pub(crate) op_flags: u32,
    pub(crate) user_data: u64,
    pub(crate) buf_index: u16,
    pub(crate) personality: u16,
    pub(crate) file_index: u32,
    /// `cmd`: 16 bytes of command, or the first 16 of 80.
    pub(crate) cmd: [u64; 2],
}

const _: () = {
    assert!(size_of::<Sqe>() == 64);
    assert!(offset_of!(Sqe, fd) == 4);
    assert!(offset_of!(Sqe, off) == 8);
    assert!(offset_of!(Sqe, addr) == 16);
    assert!(offset_of!(Sqe, len) == 24);
    assert!(offset_of!(Sqe, op_flags) == 28);
    assert!(offset_of!(Sqe, user_data) == 32);
    assert!(offset_of!(Sqe, buf_index) == 40);
    assert!(offset_of!(Sqe, cmd) == 48);
};

/// A completion queue entry (`struct io_uring_cqe`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Cqe {
    pub(crate) user_data: u64,
    pub(crate) result: i32,
    pub(crate) flags: u32,
}
const _: () = assert!(size_of::<Cqe>() == 16 && offset_of!(Cqe, result) == 8);

#[cfg(test)]
pub(crate) const OP_NOP: u8 = 0;
pub(crate) const OP_FSYNC: u8 = 3;
pub(crate) const OP_READ_FIXED: u8 = 4;
pub(crate) const OP_WRITE_FIXED: u8 = 5;
pub(crate) const OP_POLL_ADD: u8 = 6;
pub(crate) const OP_ASYNC_CANCEL: u8 = 14;
pub(crate) const OP_FALLOCATE: u8 = 17;
pub(crate) const OP_READ: u8 = 22;
pub(crate) const OP_WRITE: u8 = 23;
pub(crate) const OP_URING_CMD: u8 = 46;

/// `Sqe::flags`: `fd` is an index into the registered files.
pub(crate) const SQE_FIXED_FILE: u8 = 1 << 0;
/// `Sqe::op_flags` of a sync: data, not all metadata.
pub(crate) const FSYNC_DATASYNC: u32 = 1 << 0;

pub(crate) const SETUP_CQSIZE: u32 = 1 << 3;
pub(crate) const SETUP_SUBMIT_ALL: u32 = 1 << 7;
pub(crate) const SETUP_COOP_TASKRUN: u32 = 1 << 8;
pub(crate) const SETUP_SQE128: u32 = 1 << 10;
pub(crate) const SETUP_SINGLE_ISSUER: u32 = 1 << 12;
pub(crate) const SETUP_DEFER_TASKRUN: u32 = 1 << 13;
pub(crate) const SETUP_NO_SQARRAY: u32 = 1 << 16;

/// One mapping holds both rings. Since Linux 5.4.
pub(crate) const FEAT_SINGLE_MMAP: u32 = 1 << 0;
/// Completions that do not fit are kept, not dropped. Since Linux 5.5.
pub(crate) const FEAT_NODROP: u32 = 1 << 1;
/// An enter can have a timeout. Since Linux 5.11.
pub(crate) const FEAT_EXT_ARG: u32 = 1 << 8;

pub(crate) const ENTER_GETEVENTS: u32 = 1 << 0;
pub(crate) const ENTER_EXT_ARG: u32 = 1 << 3;
pub(crate) const ENTER_REGISTERED_RING: u32 = 1 << 4;

const REGISTER_BUFFERS: u32 = 0;
const REGISTER_FILES: u32 = 2;
const UNREGISTER_FILES: u32 = 3;
const REGISTER_RING_FDS: u32 = 20;
const UNREGISTER_RING_FDS: u32 = 21;

/// Where in the ring's descriptor the rings are mapped from.
pub(crate) const OFF_SQ_RING: usize = 0;
/// Where in the ring's descriptor the entries are mapped from.
pub(crate) const OFF_SQES: usize = 0x1000_0000;

/// `struct io_sqring_offsets`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct SqOffsets {
    pub(crate) head: u32,
    pub(crate) tail: u32,
    pub(crate) ring_mask: u32,
    pub(crate) ring_entries: u32,
    pub(crate) flags: u32,
    pub(crate) dropped: u32,
    pub(crate) array: u32,
    pub(crate) resv1: u32,
    pub(crate) user_addr: u64,
}

/// `struct io_cqring_offsets`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct CqOffsets {
    pub(crate) head: u32,
    pub(crate) tail: u32,
    pub(crate) ring_mask: u32,
    pub(crate) ring_entries: u32,
    pub(crate) overflow: u32,
    pub(crate) cqes: u32,
    pub(crate) flags: u32,
    pub(crate) resv1: u32,
    pub(crate) user_addr: u64,
}

/// `struct io_uring_params`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Params {
    pub(crate) sq_entries: u32,
    pub(crate) cq_entries: u32,
    pub(crate) flags: u32,
    pub(crate) sq_thread_cpu: u32,
    pub(crate) sq_thread_idle: u32,
    pub(crate) features: u32,
    pub(crate) wq_fd: u32,
    pub(crate) resv: [u32; 3],
    pub(crate) sq_off: SqOffsets,
    pub(crate) cq_off: CqOffsets,
}
const _: () =
    assert!(size_of::<Params>() == 120 && offset_of!(Params, sq_off) == 40 && offset_of!(Params, cq_off) == 80);

#[repr(C)]
struct Timespec {
    seconds: i64,
    nanoseconds: i64,
}

#[repr(C)]
struct GeteventsArg {
    sigmask: u64,
    sigmask_size: u32,
    min_wait_usec: u32,
    timespec: u64,
}

#[repr(C)]
struct RsrcUpdate {
    offset: u32,
    resv: u32,
    data: u64,
}

/// `io_uring_setup(2)`.
pub(crate) fn setup(entries: u32, params: &mut Params) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads and writes one `Params`, and returns a descriptor that is ours alone.
    unsafe {
        let fd = Errno::result(libc::syscall(libc::SYS_io_uring_setup, entries, &raw mut *params))?;
        Ok(OwnedFd::from_raw_fd(fd as RawFd))
    }
}

/// `io_uring_enter(2)` without a timeout.
///
/// # Safety
/// The entries that the ring's tail shows to the kernel are sound to carry out.
#[inline]
pub(crate) unsafe fn enter(fd: RawFd, submit: u32, want: u32, flags: u32) -> io::Result<()> {
    let none = std::ptr::null::<libc::c_void>();
    // SAFETY: no argument structure; the caller's promise for the rest.
    Errno::result(unsafe { libc::syscall(libc::SYS_io_uring_enter, fd, submit, want, flags, none, 0usize) })?;
    Ok(())
}

/// `io_uring_enter(2)` with a timeout, which ends with `ETIME`.
///
/// # Safety
/// As [`enter`].
pub(crate) unsafe fn enter_timeout(
    fd: RawFd,
    submit: u32,
    want: u32,
    flags: u32,
    timeout: std::time::Duration,
) -> io::Result<()> {
    let timespec = Timespec {
        seconds: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        nanoseconds: i64::from(timeout.subsec_nanos()),
    };
    let arg = GeteventsArg { sigmask: 0, sigmask_size: 8, min_wait_usec: 0, timespec: (&raw const timespec) as u64 };
    let flags = flags | ENTER_EXT_ARG;
    let size = size_of::<GeteventsArg>();
    // SAFETY: both structures live until the call returns; the caller's promise for the rest.
    Errno::result(unsafe { libc::syscall(libc::SYS_io_uring_enter, fd, submit, want, flags, &raw const arg, size) })?;
    Ok(())
}

/// Registers files, from index 0.
pub(crate) fn register_files(ring: impl AsFd, files: &[RawFd]) -> io::Result<()> {
    // SAFETY: the kernel reads `files.len()` descriptors and takes references of its own.
    unsafe { register(ring, REGISTER_FILES, files.as_ptr().cast(), files.len()) }.map(drop)
}

/// Undoes [`register_files`]. Waits until nothing that is under way uses the files.
pub(crate) fn unregister_files(ring: impl AsFd) -> io::Result<()> {
    // SAFETY: names no memory.
    unsafe { register(ring, UNREGISTER_FILES, std::ptr::null(), 0) }.map(drop)
}

/// Registers buffers, from index 0.
///
/// # Safety
/// The buffers stay mapped until the ring is gone.
pub(crate) unsafe fn register_buffers(ring: impl AsFd, buffers: &[libc::iovec]) -> io::Result<()> {
    // SAFETY: the kernel reads `buffers.len()` vectors; the caller's promise for what they name.
    unsafe { register(ring, REGISTER_BUFFERS, buffers.as_ptr().cast(), buffers.len()) }.map(drop)
}

/// Registers the ring's own descriptor with the calling thread, and returns the index to enter it by.
pub(crate) fn register_ring(ring: impl AsFd) -> io::Result<u32> {
    let mut update = RsrcUpdate { offset: u32::MAX, resv: 0, data: ring.as_fd().as_raw_fd() as u64 };
    // SAFETY: the kernel reads and writes one `RsrcUpdate`.
    unsafe { register(ring, REGISTER_RING_FDS, (&raw mut update).cast(), 1)? };
    Ok(update.offset)
}

/// Undoes [`register_ring`]. Must be called on the thread that called that: the index is one of that thread's.
pub(crate) fn unregister_ring(ring: impl AsFd, index: u32) -> io::Result<()> {
    let mut update = RsrcUpdate { offset: index, resv: 0, data: 0 };
    // SAFETY: the kernel reads one `RsrcUpdate`.
    unsafe { register(ring, UNREGISTER_RING_FDS, (&raw mut update).cast(), 1) }.map(drop)
}

unsafe fn register(ring: impl AsFd, operation: u32, arg: *const libc::c_void, count: usize) -> io::Result<i64> {
    let fd = ring.as_fd().as_raw_fd();
    // SAFETY: the caller's promise.
    Ok(Errno::result(unsafe { libc::syscall(libc::SYS_io_uring_register, fd, operation, arg, count as u32) })?)
}
