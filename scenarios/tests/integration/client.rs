//! The other end: what an application does with a block device.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::libc;
use ublkit::{Deletion, Device, DeviceBuilder, ServeBackend};

use super::disk::Disk;

pub(crate) const KIB: u64 = 1 << 10;
pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const GIB: u64 = 1 << 30;

pub(crate) type Builder = DeviceBuilder<ServeBackend<Arc<Disk>>>;

/// A builder with what suits a trial: small, and patient with udev, which opens every new device for a moment.
pub(crate) fn builder(disk: &Arc<Disk>) -> Builder {
    Device::builder(Arc::clone(disk)).depth(16).max_io_bytes(64 << 10).delete_deadline(Duration::from_secs(10))
}

pub(crate) fn start(disk: &Arc<Disk>) -> Device {
    start_with(disk, |builder| builder)
}

pub(crate) fn start_with(disk: &Arc<Disk>, choose: impl FnOnce(Builder) -> Builder) -> Device {
    choose(builder(disk)).start().expect("start")
}

/// Closes a device that nobody holds.
pub(crate) fn close(device: &Device) {
    let closed = device.close().expect("close");
    assert_eq!(closed.deletion, Deletion::Complete, "{closed}");
}

/// Opens the device past the page cache.
pub(crate) fn direct(device: &Device) -> File {
    open(device, libc::O_DIRECT)
}

/// Opens a block device by its path, past the page cache.
pub(crate) fn direct_at(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path).expect("open the device")
}

/// Opens it for reading and writing.
pub(crate) fn open(device: &Device, flags: i32) -> File {
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(device.path()).expect("open the device")
}

/// A buffer that may be used for direct I/O.
pub(crate) struct Aligned {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    pub(crate) fn zeroed(len: usize) -> Self {
        let memory = vec![0; len + 4096];
        let start = memory.as_ptr().align_offset(4096);
        Self { memory, start, len }
    }

    /// Bytes of which each eight name their place and the writer.
    pub(crate) fn pattern(writer: u64, offset: u64, len: usize) -> Self {
        let mut buffer = Self::zeroed(len);
        buffer.copy_from_slice(&pattern(writer, offset, len));
        buffer
    }
}

impl Deref for Aligned {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

/// What [`Aligned::pattern`] holds.
pub(crate) fn pattern(writer: u64, offset: u64, len: usize) -> Vec<u8> {
    assert!(len.is_multiple_of(8), "whole words");
    let writer = writer.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut bytes = vec![0; len];
    for (word, place) in (offset / 8..).zip(bytes.chunks_exact_mut(8)) {
        let word = word ^ writer;
        place.copy_from_slice(&(word ^ (word << 25)).wrapping_mul(0xd6e8_feb8_6659_fd93).to_le_bytes());
    }
    bytes
}

/// Where two buffers differ first, for a message that can be read.
pub(crate) fn assert_same(got: &[u8], want: &[u8], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    if got == want {
        return;
    }
    if let Some(at) = got.iter().zip(want).position(|(got, want)| got != want) {
        let end = (at + 16).min(got.len());
        panic!("{what}: byte {at} of {}: got {:x?}, want {:x?}", got.len(), &got[at..end], &want[at..end]);
    }
}

pub(crate) fn read(file: &File, offset: u64, len: usize) -> io::Result<Aligned> {
    let mut buffer = Aligned::zeroed(len);
    file.read_exact_at(&mut buffer, offset)?;
    Ok(buffer)
}

/// Writes a pattern and returns it.
pub(crate) fn write(file: &File, writer: u64, offset: u64, len: usize) -> io::Result<Aligned> {
    let buffer = Aligned::pattern(writer, offset, len);
    file.write_all_at(&buffer, offset)?;
    Ok(buffer)
}

/// The errno of a result that must be an error.
pub(crate) fn errno<T>(result: io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

/// A file of `/sys/block/ublkbN`.
pub(crate) fn sysfs(device: &Device, name: &str) -> String {
    let path = format!("/sys/block/ublkb{}/{name}", device.id());
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}")).trim().to_owned()
}

pub(crate) fn sysfs_number(device: &Device, name: &str) -> u64 {
    sysfs(device, name).parse().unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Waits until something holds, within a bound.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Something that must be done soon.
pub(crate) fn bounded<T>(what: &str, bound: Duration, act: impl FnOnce() -> T) -> T {
    let begun = Instant::now();
    let result = act();
    let took = begun.elapsed();
    assert!(took <= bound, "{what} took {took:?}, more than {bound:?}");
    result
}
