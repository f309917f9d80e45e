//! The block-device ioctls of `include/uapi/linux/fs.h`.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::libc::{c_int, c_uint};

/// The calls as nix declares them: named after the kernel's macros, typed by hand.
mod raw {
    use nix::libc::{c_int, c_uint};

    nix::ioctl_read_bad!(blkgetsize64, nix::request_code_read!(0x12, 114, size_of::<usize>()), u64);
    nix::ioctl_read_bad!(blkroget, nix::request_code_none!(0x12, 94), c_int);
    nix::ioctl_none!(blkflsbuf, 0x12, 97);
    nix::ioctl_read_bad!(blksszget, nix::request_code_none!(0x12, 104), c_int);
    nix::ioctl_write_ptr_bad!(blkdiscard, nix::request_code_none!(0x12, 119), [u64; 2]);
    nix::ioctl_read_bad!(blkpbszget, nix::request_code_none!(0x12, 123), c_uint);
    nix::ioctl_write_ptr_bad!(blkzeroout, nix::request_code_none!(0x12, 127), [u64; 2]);
}

pub(crate) fn size_bytes(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut size = 0_u64;
    // SAFETY: BLKGETSIZE64 writes one u64 to the pointer (`put_u64()` in block/ioctl.c), whatever the width of the
    // size_t in its number; `size` is one and outlives the call. A descriptor of another kind gets ENOTTY.
    unsafe { raw::blkgetsize64(fd.as_raw_fd(), &raw mut size) }?;
    Ok(size)
}

pub(crate) fn logical_block(fd: BorrowedFd<'_>) -> io::Result<c_int> {
    let mut bytes: c_int = 0;
    // SAFETY: BLKSSZGET writes one int to the pointer; `bytes` is one and outlives the call.
    unsafe { raw::blksszget(fd.as_raw_fd(), &raw mut bytes) }?;
    Ok(bytes)
}

pub(crate) fn physical_block(fd: BorrowedFd<'_>) -> io::Result<c_uint> {
    let mut bytes: c_uint = 0;
    // SAFETY: BLKPBSZGET writes one unsigned int to the pointer; `bytes` is one and outlives the call.
    unsafe { raw::blkpbszget(fd.as_raw_fd(), &raw mut bytes) }?;
    Ok(bytes)
}

pub(crate) fn read_only(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut flag: c_int = 0;
    // SAFETY: BLKROGET writes one int to the pointer; `flag` is one and outlives the call.
    unsafe { raw::blkroget(fd.as_raw_fd(), &raw mut flag) }?;
    Ok(flag != 0)
}

pub(crate) fn discard(fd: BorrowedFd<'_>, range: [u64; 2]) -> io::Result<()> {
    // SAFETY: BLKDISCARD reads two u64 (start, length) from the pointer; `range` is that and outlives the call. It
    // touches no memory of this process beyond them.
    unsafe { raw::blkdiscard(fd.as_raw_fd(), &raw const range) }?;
    Ok(())
}

pub(crate) fn zero_out(fd: BorrowedFd<'_>, range: [u64; 2]) -> io::Result<()> {
    // SAFETY: BLKZEROOUT reads two u64 (start, length) from the pointer; `range` is that and outlives the call. It
    // touches no memory of this process beyond them.
    unsafe { raw::blkzeroout(fd.as_raw_fd(), &raw const range) }?;
    Ok(())
}

pub(crate) fn flush_buffers(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: BLKFLSBUF takes no argument and touches no memory of this process.
    unsafe { raw::blkflsbuf(fd.as_raw_fd()) }?;
    Ok(())
}
