//! Block devices as seen by whoever opens them: sizes, discard, zeroing. Offsets and lengths are in bytes.
//!
//! Each function takes an open descriptor of a block device. On anything else it fails with `ENOTTY` (or `EINVAL`,
//! for some character devices); [`is_block_device`] tells beforehand.
//!
//! ```no_run
//! let disk = std::fs::File::open("/dev/ublkb0")?;
//! println!("{} bytes in blocks of {}", ublkit::blkdev::size(&disk)?, ublkit::blkdev::logical_block(&disk)?);
//! # Ok::<(), std::io::Error>(())
//! ```

use std::io;
use std::os::fd::AsFd;

use nix::sys::stat::{SFlag, fstat};

use crate::sys::blkdev as sys;

/// Whether the descriptor is open on a block device.
///
/// # Errors
/// Those of `fstat(2)`.
pub fn is_block_device(device: impl AsFd) -> io::Result<bool> {
    let stat = fstat(device)?;
    Ok(SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFBLK)
}

/// Size of the device in bytes (`BLKGETSIZE64`).
///
/// # Errors
/// `ENOTTY` if this is no block device.
pub fn size(device: impl AsFd) -> io::Result<u64> {
    sys::size_bytes(device.as_fd())
}

/// Size in bytes of the smallest unit the device can be addressed in (`BLKSSZGET`).
///
/// # Errors
/// `ENOTTY` if this is no block device.
pub fn logical_block(device: impl AsFd) -> io::Result<u32> {
    // Block sizes are positive: the kernel keeps them in an unsigned int and hands out a signed one.
    Ok(sys::logical_block(device.as_fd())?.unsigned_abs())
}

/// Size in bytes of the smallest unit the device can write without a read-modify-write (`BLKPBSZGET`).
///
/// # Errors
/// `ENOTTY` if this is no block device.
pub fn physical_block(device: impl AsFd) -> io::Result<u32> {
    sys::physical_block(device.as_fd())
}

/// Whether the device refuses writes (`BLKROGET`).
///
/// # Errors
/// `ENOTTY` if this is no block device.
pub fn read_only(device: impl AsFd) -> io::Result<bool> {
    sys::read_only(device.as_fd())
}

/// Discards `len` bytes at `offset` (`BLKDISCARD`), and drops them from the page cache. What they read as
/// afterwards is up to the device.
///
/// # Errors
/// `EINVAL` if the range is not of whole logical blocks inside the device, `EOPNOTSUPP` if the device cannot
/// discard, `EBADF` if the descriptor is not open for writing, `EPERM` if the device is read-only.
pub fn discard(device: impl AsFd, offset: u64, len: u64) -> io::Result<()> {
    sys::discard(device.as_fd(), [offset, len])
}

/// Makes `len` bytes at `offset` read as zeroes (`BLKZEROOUT`), by whatever means the device has: the kernel writes
/// zeroes if it has none. The space behind them stays allocated.
///
/// # Errors
/// `EINVAL` if the range is not of whole sectors of 512 bytes inside the device, `EBADF` if the descriptor is not open
/// for writing, and what the device says.
pub fn zero_out(device: impl AsFd, offset: u64, len: u64) -> io::Result<()> {
    sys::zero_out(device.as_fd(), [offset, len])
}

/// Writes back the device's dirty pages and drops its page cache (`BLKFLSBUF`), so that the next read comes from
/// the device itself. Needs `CAP_SYS_ADMIN`.
///
/// # Errors
/// `EACCES` without the capability, `ENOTTY` if this is no block device.
pub fn flush_buffers(device: impl AsFd) -> io::Result<()> {
    sys::flush_buffers(device.as_fd())
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use nix::errno::Errno;

    use super::*;

    #[test]
    fn what_is_no_block_device_says_so() {
        let null = File::open("/dev/null").expect("/dev/null opens");
        assert!(!is_block_device(&null).expect("fstat"));
        for error in [size(&null).map(drop), logical_block(&null).map(drop), discard(&null, 0, 512)] {
            assert_eq!(error.expect_err("not a block device").raw_os_error(), Some(Errno::ENOTTY as i32));
        }
    }
}
