//! A device that is stored in a regular file or on another block device.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{PoisonError, RwLock};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc;

use super::check_range;
use crate::sys::file as sys;
use crate::{Backend, Geometry, SECTOR_SIZE, WriteFlags, ZeroFlags, blkdev};

/// The most zeroes that are written at once where a range cannot be zeroed in another way.
const ZEROES_BYTES: usize = 1 << 20;
/// The largest alignment that direct I/O may need: the largest logical block there is.
const ALIGN_MAX: u32 = 4096;

/// A device that is stored in a regular file or on another block device.
///
/// Byte `n` of the device is byte `n` of the file. What the device is told to do becomes:
///
/// | request | call |
/// | --- | --- |
/// | flush | `fdatasync(2)` |
/// | write with FUA | `pwritev2(2)` with `RWF_DSYNC`, or a write and `fdatasync(2)` where that is not known |
/// | discard | `fallocate(2)` that punches a hole; on a block device, `BLKDISCARD` |
/// | write zeroes | `fallocate(2)`: a hole, or a zeroed range if the space is to stay; zeroes are written where the file system can do neither |
///
/// What cannot discard does not declare it. In a regular file, what is discarded reads as zeroes.
///
/// **Caches.** Without [`direct`](FileOptions::direct), writes go to the page cache, which is lost with the power:
/// so the device declares a volatile cache, and FUA.
///
/// **Size.** The device is as large as the file, rounded down to a whole number of logical blocks (with direct I/O also of what
/// that needs). The file never grows or shrinks. If it is cut short by somebody else, reads beyond fail with `EIO`.
///
/// ```no_run
/// use ublkit::backends::File;
/// let disk = File::create("disk.img", 1 << 30)?;
/// let same = File::options().direct(true).open("disk.img")?;
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct File {
    storage: fs::File,
    geometry: Geometry,
    /// The logical block of the block device below, in bytes.
    device_block: Option<u64>,
    direct: Option<Direct>,
}

/// How a [`File`] is opened.
#[derive(Clone, Copy, Debug, Default)]
#[must_use]
pub struct FileOptions {
    read_only: bool,
    direct: bool,
    logical_block: Option<u32>,
}

/// What direct I/O needs, in bytes, and the lock that makes up for writes that do not give it.
#[derive(Debug)]
struct Direct {
    memory: u32,
    offset: u32,
    /// Held exclusively while a block is read, changed in part and written back, and shared by all other changes: else the
    /// parts that were not to be changed could be put back to what they were before a write that has completed.
    whole_blocks: RwLock<()>,
}

impl FileOptions {
    /// The device refuses writes, and the file is opened for reading only.
    pub fn read_only(mut self, yes: bool) -> Self {
        self.read_only = yes;
        self
    }

    /// Bypasses the page cache (`O_DIRECT`), where the file system can; [`File::is_direct`] tells whether it could.
    ///
    /// The device's logical block becomes what the file needs for it (512 bytes or more), unless one is
    /// [asked for](Self::logical_block). Requests whose offset or length do not fit the file's alignment,
    /// which takes a smaller logical block than the file's, and those whose memory does not, which the server
    /// never sends, go through an aligned copy, and not through the page cache: buffered and direct writes at the same time
    /// are not coherent on Linux (a direct write that cannot drop a page which another write dirtied meanwhile
    /// leaves it there, stale). Such writes are slow: they read the blocks that they change in part, and keep other
    /// writes waiting.
    pub fn direct(mut self, yes: bool) -> Self {
        self.direct = yes;
        self
    }

    /// Size in bytes of the device's logical block: a power of two from 512 to 4096. By default 512, or more where the file
    /// is a block device or [direct](Self::direct) and needs it.
    pub fn logical_block(mut self, bytes: u32) -> Self {
        self.logical_block = Some(bytes);
        self
    }

    /// Opens a regular file or a block device. A block device that is written to is claimed (`O_EXCL`), so that
    /// none that is mounted or otherwise in use can be served by mistake.
    ///
    /// # Errors
    /// `InvalidInput` if the path is neither a regular file nor a block device, if it is smaller than one logical
    /// block, or if the logical block is none; `EBUSY` for a block device in use; and those of `open(2)`.
    pub fn open(self, path: impl AsRef<Path>) -> io::Result<File> {
        let path = path.as_ref();
        // Looked at before it is opened, because opening can block (a pipe) or do things (a tape).
        let kind = fs::metadata(path)?.file_type();
        let block_device = std::os::unix::fs::FileTypeExt::is_block_device(&kind);
        if !block_device && !kind.is_file() {
            return invalid(format!("{} is neither a regular file nor a block device", path.display()));
        }
        let open = |flags| {
            let claim = if block_device && !self.read_only { libc::O_EXCL } else { 0 };
            fs::OpenOptions::new().read(true).write(!self.read_only).custom_flags(flags | claim).open(path)
        };
        if self.direct
            && let Some((file, direct)) = open_direct(open)?
        {
            return self.serve(file, Some(direct), path);
        }
        self.serve(open(0)?, None, path)
    }

    /// Creates a sparse file of `size` bytes and opens it. An existing file is left alone.
    ///
    /// # Errors
    /// `InvalidInput` if the size is 0 or no multiple of 512, `AlreadyExists`, and those of `open(2)` and `ftruncate(2)`.
    pub fn create(self, path: impl AsRef<Path>, size: u64) -> io::Result<File> {
        let path = path.as_ref();
        if size == 0 || !size.is_multiple_of(SECTOR_SIZE) {
            return invalid(format!("a size of {size} bytes is not a multiple of {SECTOR_SIZE}, or is 0"));
        }
        let file = fs::OpenOptions::new().write(true).create_new(true).open(path)?;
        let opened = file.set_len(size).and_then(|()| self.open(path));
        if opened.is_err() {
            // It is this call's own: `create_new` succeeded.
            let _ = fs::remove_file(path);
        }
        opened
    }

    fn serve(self, file: fs::File, direct: Option<Direct>, path: &Path) -> io::Result<File> {
        let block_device = blkdev::is_block_device(&file)?;
        let (bytes, needed) = if block_device {
            (blkdev::size(&file)?, blkdev::logical_block(&file)?)
        } else {
            (file.metadata()?.len(), SECTOR_SIZE as u32)
        };
        let device_block = block_device.then_some(u64::from(needed));
        let needed = direct.as_ref().map_or(needed, |direct| needed.max(direct.offset));
        let block = self.logical_block.unwrap_or(needed);
        if !block.is_power_of_two() || !(SECTOR_SIZE as u32..=4096).contains(&block) {
            return invalid(format!("a logical block of {block} bytes is not a power of two from 512 to 4096"));
        }
        let unit = u64::from(block.max(direct.as_ref().map_or(0, |direct| direct.offset)));
        let size = bytes - bytes % unit;
        if size == 0 {
            return invalid(format!("{} has {bytes} bytes, less than one block of {unit}", path.display()));
        }
        let mut geometry = Geometry::bytes(size).logical_block(block);
        if block_device {
            geometry = geometry.physical_block(blkdev::physical_block(&file)?.max(block));
        }
        if self.read_only || (block_device && blkdev::read_only(&file)?) {
            geometry = geometry.read_only();
        } else {
            geometry = geometry.fua().write_zeroes();
            if can_discard(&file, block_device, bytes) {
                geometry = geometry.discard(unit.max(4096) as u32);
            }
        }
        Ok(File { storage: file, geometry, device_block, direct })
    }
}

impl File {
    /// Opens a regular file or a block device for reading and writing, through the page cache.
    ///
    /// # Errors
    /// As [`FileOptions::open`].
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        FileOptions::default().open(path)
    }

    /// Creates a sparse file of `size` bytes, which must not exist.
    ///
    /// # Errors
    /// As [`FileOptions::create`].
    pub fn create(path: impl AsRef<Path>, size: u64) -> io::Result<Self> {
        FileOptions::default().create(path, size)
    }

    /// Other ways of opening.
    pub fn options() -> FileOptions {
        FileOptions::default()
    }

    /// Whether reads and writes bypass the page cache.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    /// The direct I/O whose needs this request does not meet, if there are any.
    fn misfit(&self, memory: *const u8, offset: u64, len: usize) -> Option<&Direct> {
        let direct = self.direct.as_ref()?;
        let in_file = (offset | len as u64) & u64::from(direct.offset - 1);
        let in_memory = memory.addr() & (direct.memory - 1) as usize;
        (in_file != 0 || in_memory != 0).then_some(direct)
    }

    /// Does `change` so that no block is being changed in part meanwhile.
    fn with_whole_blocks<T>(&self, change: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let guard =
            self.direct.as_ref().map(|direct| direct.whole_blocks.read().unwrap_or_else(PoisonError::into_inner));
        let result = change();
        drop(guard);
        result
    }

    fn read_aligned(&self, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buf.is_empty() {
            match self.storage.read_at(buf, offset) {
                Ok(0) => return Err(Errno::EIO.into()),
                Ok(n) => {
                    buf = &mut buf[n..];
                    offset += n as u64;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn write_aligned(&self, mut buf: &[u8], mut offset: u64, fua: bool) -> io::Result<()> {
        let mut durable = fua;
        while !buf.is_empty() {
            let written = if durable {
                sys::write_durable(self.storage.as_fd(), buf, offset)
            } else {
                self.storage.write_at(buf, offset)
            };
            match written {
                Ok(0) => return Err(Errno::EIO.into()),
                Ok(n) => {
                    buf = &buf[n..];
                    offset += n as u64;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if durable && is_unsupported(&error) => durable = false,
                Err(error) => return Err(error),
            }
        }
        if fua && !durable { self.storage.sync_data() } else { Ok(()) }
    }

    /// Writes a range that is not aligned: reads the blocks it lies in, changes them, writes them back.
    fn write_through_copy(&self, direct: &Direct, buf: &[u8], offset: u64, fua: bool) -> io::Result<()> {
        let guard = direct.whole_blocks.write().unwrap_or_else(PoisonError::into_inner);
        let mut copy = Copy::of(direct, offset, buf.len())?;
        let (start, inner) = (copy.start, copy.inner.clone());
        if inner.start != 0 || inner.end != copy.bytes().len() {
            self.read_aligned(copy.bytes(), start)?;
        }
        copy.bytes()[inner].copy_from_slice(buf);
        let result = self.write_aligned(copy.bytes(), start, fua);
        drop(guard);
        result
    }

    fn punch(&self, mode: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        let offset = libc::off_t::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        let len = libc::off_t::try_from(len).map_err(|_| Errno::EOVERFLOW)?;
        let mode = mode | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        loop {
            match self.with_whole_blocks(|| Ok(fallocate(&self.storage, mode, offset, len)?)) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }

    fn write_zeroes_out(&self, offset: u64, len: u64) -> io::Result<()> {
        let align = self.direct.as_ref().map_or(1, |direct| direct.memory as usize);
        let mut zeroes = Aligned::new(ZEROES_BYTES.min(usize::try_from(len).unwrap_or(ZEROES_BYTES)), align)?;
        let zeroes = &*zeroes.bytes();
        let (mut offset, mut len) = (offset, len);
        while len > 0 {
            let part = &zeroes[..zeroes.len().min(usize::try_from(len).unwrap_or(zeroes.len()))];
            self.write_at(part, offset, WriteFlags::NONE)?;
            offset += part.len() as u64;
            len -= part.len() as u64;
        }
        Ok(())
    }
}

impl Backend for File {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        check_range(offset, buf.len() as u64, self.geometry.size)?;
        let Some(direct) = self.misfit(buf.as_ptr(), offset, buf.len()) else {
            return self.read_aligned(buf, offset);
        };
        let mut copy = Copy::of(direct, offset, buf.len())?;
        let (start, inner) = (copy.start, copy.inner.clone());
        self.read_aligned(copy.bytes(), start)?;
        buf.copy_from_slice(&copy.bytes()[inner]);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        check_range(offset, buf.len() as u64, self.geometry.size)?;
        match self.misfit(buf.as_ptr(), offset, buf.len()) {
            Some(direct) => self.write_through_copy(direct, buf, offset, flags.fua),
            None => self.with_whole_blocks(|| self.write_aligned(buf, offset, flags.fua)),
        }
    }

    fn flush(&self) -> io::Result<()> {
        self.storage.sync_data()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        check_range(offset, len, self.geometry.size)?;
        let Some(block) = self.device_block else {
            return self.punch(FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, len);
        };
        // The device takes whole blocks of its own; giving back less than was offered is always right.
        let (start, end) = (offset.next_multiple_of(block), (offset + len) / block * block);
        if start >= end {
            return Ok(());
        }
        self.with_whole_blocks(|| blkdev::discard(&self.storage, start, end - start))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        check_range(offset, len, self.geometry.size)?;
        let (hole, zeroed) = (FallocateFlags::FALLOC_FL_PUNCH_HOLE, FallocateFlags::FALLOC_FL_ZERO_RANGE);
        let ways: &[FallocateFlags] = match self.device_block {
            Some(block) if !(offset | len).is_multiple_of(block) => &[],
            _ if flags.no_unmap => &[zeroed],
            _ => &[hole, zeroed],
        };
        let mut done = false;
        for &way in ways {
            match self.punch(way, offset, len) {
                Ok(()) => done = true,
                Err(error) if is_unsupported(&error) => continue,
                Err(error) => return Err(error),
            }
            break;
        }
        if !done {
            self.write_zeroes_out(offset, len)?;
        }
        if flags.fua { self.flush() } else { Ok(()) }
    }
}

fn invalid<T>(message: String) -> io::Result<T> {
    Err(io::Error::new(ErrorKind::InvalidInput, message))
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS))
}

/// Whether discard is possible, found out without one: on a block device from whether a range that is none is refused as
/// such, in a file by punching a hole behind its end.
fn can_discard(file: &fs::File, block_device: bool, bytes: u64) -> bool {
    let tried = if block_device {
        blkdev::discard(file, 1, 0)
    } else {
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let behind = bytes.checked_next_multiple_of(4096).and_then(|end| end.try_into().ok());
        behind.map_or(Ok(()), |end| fallocate(file, mode, end, 4096).map_err(io::Error::from))
    };
    !tried.is_err_and(|error| is_unsupported(&error))
}

/// Opens with `O_DIRECT` and finds out what that needs; `None` if this file cannot do it.
fn open_direct(open: impl Fn(i32) -> io::Result<fs::File>) -> io::Result<Option<(fs::File, Direct)>> {
    let file = match open(libc::O_DIRECT) {
        Ok(file) => file,
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(None),
        Err(error) => return Err(error),
    };
    // Kernels from 6.1 tell for most file systems; where they do not, reading shows it without changing anything.
    let (memory, offset) = if let Some((memory, offset)) = sys::stat_fd(file.as_fd())?.direct {
        (memory.max(1), offset)
    } else {
        let align = [512, 1024, 2048].into_iter().find(|&align| can_read(&file, align)).unwrap_or(ALIGN_MAX);
        (align, align)
    };
    // Block sizes above 4 KiB exist, but no logical block of a device served here can be one.
    let usable = |align: u32| align.is_power_of_two() && align <= ALIGN_MAX;
    if !usable(memory) || !usable(offset) {
        return Ok(None);
    }
    let offset = offset.max(SECTOR_SIZE as u32);
    Ok(Some((file, Direct { memory, offset, whole_blocks: RwLock::new(()) })))
}

/// Whether a direct read works that is aligned to `align` bytes in memory and in the file, and to no more.
fn can_read(file: &fs::File, align: u32) -> bool {
    let align = align as usize;
    Aligned::new(3 * align, 2 * align)
        .is_ok_and(|mut memory| file.read_at(&mut memory.bytes()[align..2 * align], align as u64).is_ok())
}

/// Zeroed memory at an aligned address.
struct Aligned {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    fn new(len: usize, align: usize) -> io::Result<Self> {
        let mut memory = Vec::new();
        memory.try_reserve_exact(len.checked_add(align).ok_or(Errno::ENOMEM)?).map_err(|_| Errno::ENOMEM)?;
        memory.resize(len + align, 0);
        // Never reallocated from here on, so that the address stays.
        let start = memory.as_ptr().addr().wrapping_neg() & (align - 1);
        Ok(Self { memory, start, len })
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

/// Aligned memory for the whole blocks around a range.
struct Copy {
    aligned: Aligned,
    /// Offset in the file of the first block.
    start: u64,
    /// Where the range lies in the memory.
    inner: std::ops::Range<usize>,
}

impl Copy {
    fn of(direct: &Direct, offset: u64, len: usize) -> io::Result<Self> {
        let unit = direct.offset as usize;
        let before = (offset % unit as u64) as usize;
        let bytes = before.checked_add(len).and_then(|bytes| bytes.checked_next_multiple_of(unit));
        let aligned = Aligned::new(bytes.ok_or(Errno::ENOMEM)?, direct.memory as usize)?;
        Ok(Self { aligned, start: offset - before as u64, inner: before..before + len })
    }

    fn bytes(&mut self) -> &mut [u8] {
        self.aligned.bytes()
    }
}

#[cfg(test)]
mod tests;
