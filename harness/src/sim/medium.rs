//! A disk with a volatile write cache, and what a power cut leaves of it.
//!
//! Two images: what reads return, and what is durable. Between them lies a log of the changes that are not durable yet, in
//! the order in which they were made. A flush applies the log to the durable image. A power cut applies those of its
//! changes that survive, in order, and what they leave is what reads return from then on.
//!
//! A change that is made durable on its own stays in the log, marked: older changes of the same place come before it, so
//! that whichever of them survive do not cover it.

pub(crate) mod failing;
mod image;
mod log;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use ublkit::{Backend, Geometry, WriteFlags, ZeroFlags};

use self::failing::Failing;
use self::image::Image;
use self::log::{Change, Log};
pub use self::log::{Cut, CutMode, Loss};
use crate::plan::OpKind;
use crate::seed::SeededRng;

/// What a medium is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MediumOptions {
    /// Its size, in bytes.
    pub bytes: u64,
    /// Changes may be lost until a flush. Without, each is durable when it is made.
    pub volatile_cache: bool,
    /// What a power cut leaves whole, in bytes: each aligned unit of a change survives or does not.
    pub atomic_bytes: u32,
}

/// What a power cut did, in full.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CutReport {
    /// How it was drawn, and how many changes it took.
    pub cut: Cut,
    /// How many changes were not durable when it came, give or take those that were made durable on their own.
    pub unflushed: u64,
    /// Sectors that do not hold any more what reads returned before.
    pub lost_sectors: u64,
    /// The changes that were lost, or a part of them; the oldest first.
    pub losses: Vec<Loss>,
}

/// A disk with a volatile write cache. Clones are the same disk; [`fork`](Self::fork) makes another.
///
/// It takes the memory that its content takes: pieces that are zeroes take none, and forks share what they have in common.
#[derive(Clone)]
pub struct Medium {
    options: MediumOptions,
    images: Arc<Mutex<Images>>,
    /// Whether this handle still leads to the disk.
    connected: Arc<AtomicBool>,
    /// Calls of this handle that fail.
    failing: Option<Failing>,
}

#[derive(Clone)]
struct Images {
    current: Image,
    /// Empty without a volatile cache: then it is the current one.
    durable: Image,
    log: Log,
}

impl Medium {
    /// A medium full of zeroes.
    #[must_use]
    pub fn new(options: MediumOptions) -> Self {
        let bytes = options.bytes as usize;
        let durable = Image::new(if options.volatile_cache { bytes } else { 0 });
        let images = Images { current: Image::new(bytes), durable, log: Log::default() };
        Self {
            options,
            images: Arc::new(Mutex::new(images)),
            connected: Arc::new(AtomicBool::new(true)),
            failing: None,
        }
    }

    /// What it is made of.
    #[must_use]
    pub fn options(&self) -> MediumOptions {
        self.options
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// Beyond the end.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let range = self.range(offset, buf.len() as u64)?;
        self.make(OpKind::Read, offset, buf.len() as u64, |len| {
            self.images().current.read(&mut buf[..len as usize], range.start);
        })
    }

    /// Writes; lost by a power cut, perhaps, until it is flushed.
    ///
    /// # Errors
    /// Beyond the end.
    pub fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write(buf, offset, false)
    }

    /// Writes durably, and flushes nothing else.
    ///
    /// # Errors
    /// Beyond the end.
    pub fn write_through(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write(buf, offset, true)
    }

    /// Zeroes; a change like a write.
    ///
    /// # Errors
    /// Beyond the end.
    pub fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.change_to_zero(offset, len, false)
    }

    /// Zeroes durably, and flushes nothing else.
    ///
    /// # Errors
    /// Beyond the end.
    pub fn zero_through(&self, offset: u64, len: u64) -> io::Result<()> {
        self.change_to_zero(offset, len, true)
    }

    /// Makes every change durable.
    ///
    /// # Errors
    /// When the handle is [cut off](Self::disconnect).
    pub fn flush(&self) -> io::Result<()> {
        self.range(0, 0)?;
        self.make(OpKind::Flush, 0, 0, |_| {
            let Images { durable, log, .. } = &mut *self.images();
            log.apply(durable);
        })
    }

    /// Makes the changes in a range durable, and of changes that are partly in it that part.
    ///
    /// # Errors
    /// Beyond the end.
    pub fn flush_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.range(offset, len)?;
        self.make(OpKind::Flush, offset, len, |len| self.images().log.pin(&(offset..offset + len)))
    }

    /// Cuts the power. Which of the changes that are not durable survive is drawn: none, all, some of them, some units of
    /// them, or all up to a moment. What is there afterwards is durable.
    #[must_use]
    pub fn power_cut(&self, rng: &mut SeededRng) -> Cut {
        self.cut(rng, |_| {})
    }

    /// [Cuts the power](Self::power_cut), and tells what that took.
    #[must_use]
    pub fn power_cut_told(&self, rng: &mut SeededRng) -> CutReport {
        let (before, unflushed) = {
            let images = self.images();
            (images.current.clone(), images.log.len() as u64)
        };
        let mut losses = Vec::new();
        let cut = self.cut(rng, |loss| losses.push(loss));
        let lost_sectors = self.images().current.differing_sectors(&before);
        CutReport { cut, unflushed, lost_sectors, losses }
    }

    /// What a power cut at this moment could leave: a disk of its own, with an empty cache. This one goes on as it is, so
    /// that one moment can be had with many different losses.
    #[must_use]
    pub fn crash_image(&self, rng: &mut SeededRng) -> (Self, CutReport) {
        let image = self.fork();
        let report = image.power_cut_told(rng);
        (image, report)
    }

    fn cut(&self, rng: &mut SeededRng, lost: impl FnMut(Loss)) -> Cut {
        let Images { current, durable, log } = &mut *self.images();
        if !self.options.volatile_cache {
            return Cut::default();
        }
        // The images differ in nothing but what is in the log.
        log.each_range(|range| current.copy_from(durable, range));
        let land = |change: &Change, range: Range<u64>, data: &[u8]| {
            change.put(durable, &range, data);
            change.put(current, &range, data);
        };
        log.survive(u64::from(self.options.atomic_bytes.max(1)), rng, land, lost)
    }

    /// A disk of its own with the same content, cache included.
    #[must_use]
    pub fn fork(&self) -> Self {
        let images = self.images().clone();
        Self {
            options: self.options,
            images: Arc::new(Mutex::new(images)),
            connected: Arc::new(AtomicBool::new(true)),
            failing: None,
        }
    }

    /// Another handle of the same disk. It and its clones can be [cut off](Self::disconnect) without the others.
    #[must_use]
    pub fn connect(&self) -> Self {
        Self { connected: Arc::new(AtomicBool::new(true)), ..self.clone() }
    }

    /// This handle, and its clones, with calls that fail. The disk itself, and other handles of it, are as they were.
    pub(crate) fn failing(self, failing: Failing) -> Self {
        Self { failing: Some(failing), ..self }
    }

    /// From now on all that is asked of this handle and its clones fails: whoever has them died.
    pub fn disconnect(&self) {
        self.connected.store(false, Ordering::Relaxed);
    }

    /// How many changes are not durable, give or take those that were made durable on their own.
    #[must_use]
    pub fn unflushed(&self) -> usize {
        self.images().log.len()
    }

    fn write(&self, buf: &[u8], offset: u64, through: bool) -> io::Result<()> {
        let range = self.range(offset, buf.len() as u64)?;
        let kind = if through { OpKind::WriteFua } else { OpKind::Write };
        self.make(kind, offset, buf.len() as u64, |len| {
            let buf = &buf[..len as usize];
            let Images { current, durable, log } = &mut *self.images();
            current.write(buf, range.start);
            if self.options.volatile_cache {
                log.make_room(durable);
                log.push(offset, len, Some(buf), through);
            }
        })
    }

    fn change_to_zero(&self, offset: u64, len: u64, through: bool) -> io::Result<()> {
        let range = self.range(offset, len)?;
        self.make(OpKind::WriteZeroes, offset, len, |len| {
            let Images { current, durable, log } = &mut *self.images();
            current.zero(range.start..range.start + len as usize);
            if self.options.volatile_cache {
                log.make_room(durable);
                log.push(offset, len, None, through);
            }
        })
    }

    /// Makes a call of so many bytes; or less of it, if it is to fail. `call` is told how much.
    #[inline]
    fn make(&self, kind: OpKind, offset: u64, len: u64, call: impl FnOnce(u64)) -> io::Result<()> {
        let unit = u64::from(self.options.atomic_bytes.max(1));
        let failed = self.failing.as_ref().and_then(|failing| failing.next(kind, offset, len, unit));
        let Some(failed) = failed else {
            call(len);
            return Ok(());
        };
        if let Some(done) = failed.done {
            call(done);
        }
        Err(failed.error)
    }

    fn range(&self, offset: u64, len: u64) -> io::Result<Range<usize>> {
        if !self.connected.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::NotConnected.into());
        }
        match offset.checked_add(len) {
            Some(end) if end <= self.options.bytes => Ok(offset as usize..end as usize),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn images(&self) -> MutexGuard<'_, Images> {
        // Whoever panicked did not do so in here, but for want of memory: the images are whole.
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Medium {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Medium").field("options", &self.options).finish_non_exhaustive()
    }
}

/// The right backend of a medium. What is discarded reads as zeroes.
#[derive(Clone, Debug)]
pub struct MediumDisk {
    medium: Medium,
    geometry: Geometry,
}

impl MediumDisk {
    /// A disk that declares `geometry`, on `medium`.
    #[must_use]
    pub fn new(medium: Medium, geometry: Geometry) -> Self {
        Self { medium, geometry }
    }
}

impl Backend for MediumDisk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.medium.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        self.medium.write(buf, offset, flags.fua)
    }

    fn flush(&self) -> io::Result<()> {
        self.medium.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.medium.zero(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.medium.change_to_zero(offset, len, flags.fua)
    }
}
