//! File calls that neither std nor nix has: `pwritev2(2)` with flags, and `statx(2)`.

use std::ffi::CString;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::libc;

/// Writes a part of `buf` at `offset` so that it is durable on return (`RWF_DSYNC`); how much is returned.
pub(crate) fn write_durable(fd: BorrowedFd<'_>, buf: &[u8], offset: u64) -> io::Result<usize> {
    let offset = libc::off_t::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
    let part = libc::iovec { iov_base: buf.as_ptr().cast_mut().cast(), iov_len: buf.len() };
    // SAFETY: one iovec is passed and says one; it covers `buf`, which is borrowed for the whole call, and a write
    // only reads from it, so that the cast to a mutable pointer is never used as one.
    let written = unsafe { libc::pwritev2(fd.as_raw_fd(), &raw const part, 1, offset, libc::RWF_DSYNC) };
    Ok(Errno::result(written)?.cast_unsigned())
}

/// What `statx(2)` tells, as far as anyone here asks.
pub(crate) struct Stat {
    pub(crate) mode: u32,
    /// Of the device that a device node stands for: major and minor.
    pub(crate) rdev: (u32, u32),
    pub(crate) device: (u32, u32),
    pub(crate) inode: u64,
    /// Alignment in bytes of memory and of offsets that direct I/O needs; (0, 0) says that it is not possible,
    /// `None` that the kernel does not tell.
    pub(crate) direct: Option<(u32, u32)>,
}

/// Of an open file.
pub(crate) fn stat_fd(fd: BorrowedFd<'_>) -> io::Result<Stat> {
    statx(fd.as_raw_fd(), c"", libc::AT_EMPTY_PATH)
}

/// Of what a path leads to, following links, without asking a remote server for fresh attributes: so that it does not hang
/// on a network file system that is gone.
pub(crate) fn stat_path(path: &Path) -> io::Result<Stat> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    statx(libc::AT_FDCWD, &path, libc::AT_STATX_DONT_SYNC | libc::AT_NO_AUTOMOUNT)
}

fn statx(fd: libc::c_int, path: &std::ffi::CStr, flags: libc::c_int) -> io::Result<Stat> {
    let mask = libc::STATX_BASIC_STATS | libc::STATX_DIOALIGN;
    let mut buf = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is a C string that outlives the call, and the kernel writes at most one `struct statx` of 256
    // bytes to the pointer, which is the size of libc's.
    let result = unsafe { libc::statx(fd, path.as_ptr(), flags, mask, buf.as_mut_ptr()) };
    Errno::result(result)?;
    // SAFETY: the struct is integers only, for which zeroed bytes are a value, and the call succeeded.
    let buf = unsafe { buf.assume_init() };
    Ok(Stat {
        mode: u32::from(buf.stx_mode),
        rdev: (buf.stx_rdev_major, buf.stx_rdev_minor),
        device: (buf.stx_dev_major, buf.stx_dev_minor),
        inode: buf.stx_ino,
        direct: (buf.stx_mask & libc::STATX_DIOALIGN != 0)
            .then_some((buf.stx_dio_mem_align, buf.stx_dio_offset_align)),
    })
}

const _: () = assert!(size_of::<libc::statx>() == 256);
