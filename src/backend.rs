//! What a block device is made of: the [`Backend`] trait, its [`Geometry`], and how an error of a backend
//! becomes the errno that the application sees.

use std::io;
use std::sync::Arc;

use nix::errno::Errno;

/// Bytes per sector: the unit in which the kernel counts, whatever the logical block size.
pub const SECTOR_SIZE: u64 = 512;

/// How a write must be done, beside where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct WriteFlags {
    /// Force Unit Access: the data must be durable before the write is completed. Only ever set when the
    /// [`Geometry`] offers both a volatile cache and FUA; otherwise the kernel sends a flush after the write.
    pub fua: bool,
}

impl WriteFlags {
    /// An ordinary write.
    pub const NONE: Self = Self { fua: false };
    /// A write that must be durable when it completes.
    pub const FUA: Self = Self { fua: true };
}

/// How a range must be zeroed, beside where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct ZeroFlags {
    /// The space behind the range must stay allocated (`UBLK_IO_F_NOUNMAP`): zero it, do not punch a hole.
    pub no_unmap: bool,
    /// As [`WriteFlags::fua`].
    pub fua: bool,
}

impl ZeroFlags {
    /// Zero the range; the space behind it may be given back.
    pub const NONE: Self = Self { no_unmap: false, fua: false };
    /// Zero the range and keep the space behind it allocated.
    pub const NO_UNMAP: Self = Self { no_unmap: true, fua: false };
}

/// A block device's storage, with blocking calls: the simplest of the three ways to write a ublk server.
///
/// Offsets and lengths are in bytes. The library guarantees that every call lies inside the device, is not
/// empty, and is a whole number of logical blocks. Calls come from several threads at once when the device has
/// several queues or [workers](crate::DeviceBuilder::workers); overlapping calls may run concurrently and then
/// need no order, but each must be done when it returns.
///
/// What a backend can do beyond reading and writing is declared in its [`Geometry`]; what is not declared there
/// is not advertised to the kernel and never called.
///
/// # Errors
///
/// An error reaches the application as an errno: see [`result_code`] for how it is chosen and which the kernel lets
/// through. A panic becomes `EIO` for that request and an [`Event`](crate::Event); the device lives on.
pub trait Backend: Send + Sync + 'static {
    /// The device's size, block sizes and abilities. Asked once, before the device is created.
    fn geometry(&self) -> Geometry;

    /// Fills `buf` from `offset`. The whole buffer must be written: what is left in it goes to the application.
    ///
    /// # Errors
    /// Any; the application's read fails with it.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Stores all of `buf` at `offset`.
    ///
    /// # Errors
    /// Any; the application's write fails with it. What of the range was stored is then undefined.
    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()>;

    /// Makes every write that was completed before this call durable. Only called with
    /// [`Geometry::volatile_cache`].
    ///
    /// # Errors
    /// Any; the application's `fsync` fails with it.
    fn flush(&self) -> io::Result<()> {
        Err(unsupported())
    }

    /// Gives back the space of a range. What a later read of it finds is up to the backend. Only called with
    /// [`Geometry::discard`].
    ///
    /// # Errors
    /// Any; the application's discard fails with it.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let _ = (offset, len);
        Err(unsupported())
    }

    /// Makes a range read as zeroes. Only called with [`Geometry::write_zeroes`]; without it the kernel writes
    /// zeroes instead.
    ///
    /// # Errors
    /// Any; the application's call fails with it.
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        let _ = (offset, len, flags);
        Err(unsupported())
    }
}

fn unsupported() -> io::Error {
    io::Error::from_raw_os_error(Errno::EOPNOTSUPP as i32)
}

/// A backend that is shared, so that its owner can look into it while the device serves it.
impl<B: Backend + ?Sized> Backend for Arc<B> {
    fn geometry(&self) -> Geometry {
        (**self).geometry()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        (**self).write_at(buf, offset, flags)
    }
    fn flush(&self) -> io::Result<()> {
        (**self).flush()
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        (**self).discard(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        (**self).write_zeroes(offset, len, flags)
    }
}

/// Limits of discard, as the kernel is told them. All in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiscardLimits {
    /// Smallest unit that can be given back; a multiple of the logical block. `queue/discard_granularity`.
    pub granularity: u32,
    /// Offset of the first such unit from the start of the device.
    pub alignment: u32,
    /// Largest single discard; the kernel splits longer ones. A multiple of the logical block.
    pub max_bytes: u64,
}

/// A device's size, block sizes and abilities, all in bytes.
///
/// ```
/// use ublkit::Geometry;
/// let disk = Geometry::bytes(1 << 30).logical_block(4096).volatile_cache().discard(4096).write_zeroes();
/// assert_eq!(disk.size, 1 << 30);
/// ```
///
/// Whether the driver accepts a geometry is checked when the device is built, with the kernel's own rules
/// (`ublk_validate_params()` in `drivers/block/ublk_drv.c`), so that a mistake is a message and not an `EINVAL`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is an attribute bit of the driver, independent of the others"
)]
pub struct Geometry {
    /// Size of the device: a multiple of the logical block, not 0.
    pub size: u64,
    /// Smallest unit the device can be addressed in: a power of two from 512 to the page size.
    pub logical_block: u32,
    /// Smallest unit it can write without a read-modify-write: a power of two, at least the logical block.
    pub physical_block: u32,
    /// Preferred smallest I/O, or 0 for the physical block: a power of two.
    pub io_min: u32,
    /// Preferred I/O size for streaming, or 0 for none: a power of two.
    pub io_opt: u32,
    /// The device refuses writes.
    pub read_only: bool,
    /// The device is a spinning disk, or wants to be scheduled like one.
    pub rotational: bool,
    /// Completed writes may be lost until a flush: the kernel sends FLUSH.
    pub volatile_cache: bool,
    /// The backend honours [`WriteFlags::fua`]; means something only with `volatile_cache`.
    pub fua: bool,
    /// What discard can do, if it can.
    pub discard: Option<DiscardLimits>,
    /// Largest single write-zeroes in bytes, if the backend can do it; the kernel splits longer ones.
    pub write_zeroes: Option<u64>,
}

impl Geometry {
    /// The largest discard or write-zeroes by default: 1 GiB, so that one request stays bounded in time.
    pub const DEFAULT_MAX_DISCARD: u64 = 1 << 30;

    /// A device of `size` bytes with 512-byte logical and 4096-byte physical blocks and no abilities beyond reading
    /// and writing.
    #[must_use]
    pub const fn bytes(size: u64) -> Self {
        Self {
            size,
            logical_block: 512,
            physical_block: 4096,
            io_min: 0,
            io_opt: 0,
            read_only: false,
            rotational: false,
            volatile_cache: false,
            fua: false,
            discard: None,
            write_zeroes: None,
        }
    }

    /// Sets the logical block size in bytes; the physical one grows with it.
    #[must_use]
    pub const fn logical_block(mut self, bytes: u32) -> Self {
        self.logical_block = bytes;
        if self.physical_block < bytes {
            self.physical_block = bytes;
        }
        self
    }

    /// Sets the physical block size in bytes.
    #[must_use]
    pub const fn physical_block(mut self, bytes: u32) -> Self {
        self.physical_block = bytes;
        self
    }

    /// Sets the preferred smallest and streaming I/O sizes in bytes; 0 leaves one to the kernel.
    #[must_use]
    pub const fn io_hints(mut self, min: u32, opt: u32) -> Self {
        self.io_min = min;
        self.io_opt = opt;
        self
    }

    /// The device refuses writes.
    #[must_use]
    pub const fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// The device is to be scheduled like a spinning disk.
    #[must_use]
    pub const fn rotational(mut self) -> Self {
        self.rotational = true;
        self
    }

    /// Completed writes may be lost until a flush, so the kernel must send flushes.
    #[must_use]
    pub const fn volatile_cache(mut self) -> Self {
        self.volatile_cache = true;
        self
    }

    /// A volatile cache whose backend honours [`WriteFlags::fua`].
    #[must_use]
    pub const fn fua(mut self) -> Self {
        self.volatile_cache = true;
        self.fua = true;
        self
    }

    /// Discard in units of `granularity` bytes.
    #[must_use]
    pub const fn discard(mut self, granularity: u32) -> Self {
        self.discard = Some(DiscardLimits { granularity, alignment: 0, max_bytes: Self::DEFAULT_MAX_DISCARD });
        self
    }

    /// Discard with every limit given.
    #[must_use]
    pub const fn discard_limits(mut self, limits: DiscardLimits) -> Self {
        self.discard = Some(limits);
        self
    }

    /// The backend can zero a range.
    #[must_use]
    pub const fn write_zeroes(mut self) -> Self {
        self.write_zeroes = Some(Self::DEFAULT_MAX_DISCARD);
        self
    }

    /// The backend can zero a range of at most `max` bytes at a time.
    #[must_use]
    pub const fn write_zeroes_max(mut self, max: u64) -> Self {
        self.write_zeroes = Some(max);
        self
    }

    /// Size of the device in 512-byte sectors.
    #[must_use]
    pub const fn sectors(&self) -> u64 {
        self.size / SECTOR_SIZE
    }
}

/// The (negative) result code with which a request is completed for `error`.
///
/// An error made from an errno ([`io::Error::from_raw_os_error`]) keeps it; otherwise the nearest errno to its
/// [`io::ErrorKind`] is taken, and `EIO` where none is near. Of these the kernel lets through to the application
/// (`blk_errors[]` in `block/blk-core.c`): `EOPNOTSUPP`, `ETIMEDOUT`, `ENOSPC`, `ENOLINK`, `EREMOTEIO`, `EBADE`,
/// `ENODATA`, `EILSEQ`, `ENOMEM`, `EBUSY`, `EAGAIN`, `ENODEV`, `ETOOMANYREFS`, `EOVERFLOW`, `ETIME` and `EINVAL`;
/// every other one arrives as `EIO`.
#[must_use]
pub fn result_code(error: &io::Error) -> i32 {
    let errno = match error.raw_os_error() {
        // Only what is an errno may go to the kernel: 0 and below would read as success.
        Some(raw @ 1..=4095) => return -raw,
        Some(_) => Errno::EIO,
        None => match error.kind() {
            io::ErrorKind::Unsupported => Errno::EOPNOTSUPP,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Errno::ENOSPC,
            io::ErrorKind::TimedOut => Errno::ETIMEDOUT,
            io::ErrorKind::OutOfMemory => Errno::ENOMEM,
            io::ErrorKind::InvalidInput => Errno::EINVAL,
            io::ErrorKind::ResourceBusy => Errno::EBUSY,
            io::ErrorKind::WouldBlock => Errno::EAGAIN,
            _ => Errno::EIO,
        },
    };
    -(errno as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_errno_is_kept_and_nonsense_becomes_eio() {
        assert_eq!(result_code(&io::Error::from_raw_os_error(Errno::ENOSPC as i32)), -(Errno::ENOSPC as i32));
        for nonsense in [0, -5, 4096, i32::MIN, i32::MAX] {
            assert_eq!(result_code(&io::Error::from_raw_os_error(nonsense)), -(Errno::EIO as i32), "{nonsense}");
        }
        assert_eq!(result_code(&io::Error::other("x")), -(Errno::EIO as i32));
        assert_eq!(result_code(&io::ErrorKind::StorageFull.into()), -(Errno::ENOSPC as i32));
    }

    #[test]
    fn a_larger_logical_block_takes_the_physical_one_along() {
        assert_eq!(Geometry::bytes(1 << 20).physical_block(512).logical_block(4096).physical_block, 4096);
    }
}
