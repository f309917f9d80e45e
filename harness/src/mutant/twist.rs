//! What the mutants are built from: when they err, and a layer that passes on whatever they leave alone.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ublkit::{Backend, Geometry, WriteFlags, ZeroFlags};

use super::{Mutant, Planted, Plot};
use crate::plan::OpKind;
use crate::seed::{Seed, SeededRng};

/// `EIO`: what a mutant that makes errors makes.
pub(super) const EIO: i32 = 5;

/// When a mutant errs: once in so many chances, which ones follows from the seed. For bugs that are planted outside of this
/// crate, too.
#[derive(Clone, Debug)]
pub struct Turn {
    planted: Planted,
    /// Which of the chances the first error falls on.
    phase: u64,
    seed: Seed,
    plot: Plot,
}

impl Turn {
    /// The turns of `planted` with this plot, which counts them.
    #[must_use]
    pub fn new(planted: Planted, plot: &Plot) -> Self {
        let seed = plot.seed.derive(planted.mutant.name(), 0);
        let every = planted.every.max(1);
        let planted = Planted { every, ..planted };
        Self { planted, phase: seed.rng().below(every), seed, plot: plot.clone() }
    }

    /// What takes these turns.
    #[must_use]
    pub fn planted(&self) -> Planted {
        self.planted
    }

    pub(super) fn mutant(&self) -> Mutant {
        self.planted.mutant
    }

    pub(super) fn every(&self) -> u64 {
        self.planted.every
    }

    /// What it may touch.
    #[must_use]
    pub fn plot(&self) -> &Plot {
        &self.plot
    }

    /// Whether this operation is to go wrong, and what to draw the error from. To be asked once for each operation that could.
    #[must_use]
    pub fn comes(&self) -> Option<SeededRng> {
        let number = self.plot.hits.chance();
        (number % self.planted.every == self.phase).then(|| self.seed.derive("error", number).rng())
    }

    /// Random numbers for what happens beside the errors.
    pub(super) fn rng(&self, name: &str) -> SeededRng {
        self.seed.derive(name, self.plot.hits.chances()).rng()
    }

    /// A number that goes with `index` for as long as the seed is the same.
    pub(super) fn fixed(&self, name: &str, index: u64) -> u64 {
        self.seed.derive(name, index).get()
    }

    /// It was wrong once more.
    pub fn hit(&self) {
        self.plot.hits.hit();
    }

    /// An error that the mutant makes by itself and admits to, in an operation on `len` bytes from `offset`.
    #[must_use]
    pub fn error(&self, kind: OpKind, offset: u64, len: u64) -> io::Error {
        self.plot.admit(kind, offset, len, EIO);
        io::Error::from_raw_os_error(EIO)
    }
}

/// How a backend is wrong: what it does not say passes through.
pub(super) trait Twist: Send + Sync + 'static {
    fn read(&self, disk: &Disk, buf: &mut [u8], offset: u64) -> io::Result<()> {
        disk.read_at(buf, offset)
    }

    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        disk.write_at(buf, offset, flags)
    }

    fn flush(&self, disk: &Disk) -> io::Result<()> {
        disk.flush()
    }

    fn discard(&self, disk: &Disk, offset: u64, len: u64) -> io::Result<()> {
        disk.discard(offset, len)
    }

    fn zeroes(&self, disk: &Disk, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        disk.write_zeroes(offset, len, flags)
    }
}

/// A backend that is wrong.
struct Twisted<T> {
    disk: Disk,
    declared: Geometry,
    twist: T,
}

/// `inner` with a twist.
pub(super) fn twisted(inner: Arc<dyn Backend>, twist: impl Twist) -> Arc<dyn Backend> {
    let geometry = inner.geometry();
    twisted_as(inner, geometry, twist)
}

/// `inner` with a twist, which declares something else.
pub(super) fn twisted_as(inner: Arc<dyn Backend>, declared: Geometry, twist: impl Twist) -> Arc<dyn Backend> {
    let geometry = inner.geometry();
    Arc::new(Twisted { disk: Disk { inner, geometry }, declared, twist })
}

impl<T: Twist> Backend for Twisted<T> {
    fn geometry(&self) -> Geometry {
        self.declared
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.twist.read(&self.disk, buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        self.twist.write(&self.disk, buf, offset, flags)
    }

    fn flush(&self) -> io::Result<()> {
        self.twist.flush(&self.disk)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.twist.discard(&self.disk, offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.twist.zeroes(&self.disk, offset, len, flags)
    }
}

/// The storage below a mutant.
pub(super) struct Disk {
    inner: Arc<dyn Backend>,
    geometry: Geometry,
}

impl std::ops::Deref for Disk {
    type Target = dyn Backend;

    fn deref(&self) -> &Self::Target {
        &*self.inner
    }
}

impl Disk {
    /// The size of a logical block, in bytes.
    pub(super) fn block(&self) -> u64 {
        u64::from(self.geometry.logical_block)
    }

    pub(super) fn size(&self) -> u64 {
        self.geometry.size
    }

    pub(super) fn load(&self, offset: u64, len: u64) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len as usize];
        self.inner.read_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    /// Stores zeroes, whether or not the storage can do so without being given them.
    pub(super) fn store_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.write_at(&vec![0; len as usize], offset, WriteFlags::NONE)
    }

    /// The number of each block of a range.
    pub(super) fn blocks(&self, offset: u64, len: u64) -> std::ops::Range<u64> {
        offset / self.block()..(offset + len).div_ceil(self.block())
    }

    /// Whether anything of a range is outside the device: what lands there is gone.
    pub(super) fn beyond(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_none_or(|end| end > self.size())
    }
}

/// Where block `block` is in a buffer that begins at `offset`.
pub(super) fn place(block: u64, block_bytes: u64, offset: u64) -> std::ops::Range<usize> {
    let begin = (block * block_bytes - offset) as usize;
    begin..begin + block_bytes as usize
}

/// Blocks that are remembered, the oldest forgotten first.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    data: BTreeMap<u64, Box<[u8]>>,
    order: VecDeque<u64>,
}

impl Blocks {
    pub(super) fn get(&self, block: u64) -> Option<&[u8]> {
        self.data.get(&block).map(|data| &**data)
    }

    pub(super) fn put(&mut self, block: u64, data: &[u8]) {
        if self.data.insert(block, data.into()).is_none() {
            self.order.push_back(block);
        }
    }

    pub(super) fn remove(&mut self, block: u64) -> Option<Box<[u8]>> {
        let data = self.data.remove(&block)?;
        self.order.retain(|other| *other != block);
        Some(data)
    }

    /// Takes out the one that was put in first, if there are more than `limit`.
    pub(super) fn overflow(&mut self, limit: usize) -> Option<(u64, Box<[u8]>)> {
        if self.data.len() <= limit {
            return None;
        }
        let block = self.order.pop_front()?;
        Some((block, self.data.remove(&block)?))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.data.iter().map(|(block, data)| (*block, &**data))
    }
}

/// A lock whose holder's panic is no reason to stop: what it guards is whole between statements.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
