//! A sparse RAM disk.
//!
//! Pages of 4 KiB hang off chunks of 16, chunks off leaves of 64, and those off a tree of three more levels, whose nodes
//! come into being when something below them is first written and stay. A lookup is four array steps without
//! a lock; the lock that is taken is the chunk's own.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use nix::errno::Errno;

use super::check_range;
use crate::{Backend, Geometry, WriteFlags, ZeroFlags};

const PAGE: usize = 4096;
const CHUNK_PAGES: usize = 16;
const CHUNK: u64 = (CHUNK_PAGES * PAGE) as u64;
const LEAF_CHUNKS: u64 = 64;
const LEAF: u64 = CHUNK * LEAF_CHUNKS;
/// Children of a node of the two levels above the leaves. The root has as many as the size needs.
const FAN_OUT: u64 = 4096;
const BRANCH: u64 = LEAF * FAN_OUT;
const TRUNK: u64 = BRANCH * FAN_OUT;

static ZEROES: [u8; PAGE] = [0; PAGE];

type Page = Box<[u8; PAGE]>;
/// 64 KiB under one lock; a page that is absent reads as zeroes.
type Chunk = RwLock<[Option<Page>; CHUNK_PAGES]>;
type Leaf = Box<[Chunk]>;
/// A node whose children are made at most once, so that finding one takes no lock.
type Node<T> = Box<[OnceLock<T>]>;

/// A RAM disk that costs what is written to it: a device of 1 TiB is a few KiB until it is used.
///
/// Memory is taken in pages of 4 KiB, when anything but zeroes is first written to one, and is given back when
/// a whole page is discarded or zeroed. If there is none left, the write fails with `ENOMEM`.
///
/// **What is discarded reads as zeroes**, also where a discard covers only part of a page.
///
/// **Concurrency.** Any number of threads may call in at once. Each part of a call that lies within one aligned
/// 64 KiB is atomic towards every other call: a read finds all of a racing write there or nothing of it. So
/// logical blocks, which are never larger than 4 KiB, are never torn. Calls in different 64 KiB do not
/// wait for each other.
///
/// Nothing is cached, so no volatile cache is declared and [`flush`](Backend::flush) does nothing; with
/// [`with_geometry`](Self::with_geometry) one can be declared all the same, to have the kernel send flushes.
///
/// ```
/// use ublkit::backends::Memory;
/// use ublkit::{Backend, WriteFlags};
///
/// let disk = Memory::new(1 << 40);
/// disk.write_at(b"hello", 1 << 39, WriteFlags::NONE)?;
/// assert_eq!(disk.allocated_bytes(), 4096);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct Memory {
    geometry: Geometry,
    root: OnceLock<Node<Node<Node<Leaf>>>>,
    allocated_pages: AtomicU64,
}

impl Memory {
    /// A RAM disk of `size` bytes, with 512-byte logical blocks, that can discard and zero.
    #[must_use]
    pub const fn new(size: u64) -> Self {
        Self::with_geometry(Geometry::bytes(size).discard(PAGE as u32).write_zeroes())
    }

    /// A RAM disk with any geometry. What it declares, the disk can do.
    #[must_use]
    pub const fn with_geometry(geometry: Geometry) -> Self {
        Self { geometry, root: OnceLock::new(), allocated_pages: AtomicU64::new(0) }
    }

    /// Bytes of memory that hold data now, without the tree above them (at most 10 KiB for each 4 MiB that were ever
    /// written to, and 100 KiB for each 16 GiB).
    #[must_use]
    pub fn allocated_bytes(&self) -> u64 {
        self.allocated_pages.load(Ordering::Relaxed) * PAGE as u64
    }

    /// The chunk that covers `offset`; if nothing near it was ever written, the size of the empty, aligned range that it
    /// is in.
    #[inline]
    fn chunk(&self, offset: u64) -> Result<&Chunk, u64> {
        let root = self.root.get().ok_or(TRUNK)?;
        let trunk = root.get((offset / TRUNK) as usize).and_then(OnceLock::get).ok_or(TRUNK)?;
        let branch = trunk.get((offset % TRUNK / BRANCH) as usize).and_then(OnceLock::get).ok_or(BRANCH)?;
        let leaf = branch.get((offset % BRANCH / LEAF) as usize).and_then(OnceLock::get).ok_or(LEAF)?;
        leaf.get((offset % LEAF / CHUNK) as usize).ok_or(CHUNK)
    }

    /// The chunk that covers `offset`, made if need be.
    fn make_chunk(&self, offset: u64) -> io::Result<&Chunk> {
        let root = child(&self.root, self.geometry.size.div_ceil(TRUNK))?;
        let trunk = child(slot(root, offset / TRUNK)?, FAN_OUT.min(self.geometry.size.div_ceil(BRANCH)))?;
        let branch = child(slot(trunk, offset % TRUNK / BRANCH)?, FAN_OUT.min(self.geometry.size.div_ceil(LEAF)))?;
        let leaf = child(slot(branch, offset % BRANCH / LEAF)?, LEAF_CHUNKS)?;
        slot(leaf, offset % LEAF / CHUNK)
    }

    fn write_chunk(&self, chunk: &Chunk, mut buf: &[u8], offset: u64) -> io::Result<()> {
        let mut pages = write(chunk);
        let mut at = (offset % CHUNK) as usize;
        while !buf.is_empty() {
            let start = at % PAGE;
            let (part, rest) = buf.split_at(buf.len().min(PAGE - start));
            match &mut pages[at / PAGE] {
                Some(page) => page[start..start + part.len()].copy_from_slice(part),
                None if *part == ZEROES[..part.len()] => {}
                absent @ None => {
                    *absent = Some(new_page(part, start)?);
                    self.allocated_pages.fetch_add(1, Ordering::Relaxed);
                }
            }
            buf = rest;
            at += part.len();
        }
        Ok(())
    }

    /// Zeroes a range, and frees the whole pages in it unless they are to be kept.
    fn zero(&self, offset: u64, len: u64, keep: bool) -> io::Result<()> {
        check_range(offset, len, self.geometry.size)?;
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let mut pages = match self.chunk(at) {
                Ok(chunk) => write(chunk),
                Err(empty) => {
                    at = (at - at % empty).saturating_add(empty);
                    continue;
                }
            };
            let stop = end.min((at - at % CHUNK).saturating_add(CHUNK));
            while at < stop {
                let start = (at % PAGE as u64) as usize;
                let part = (PAGE - start).min((stop - at) as usize);
                let page = &mut pages[(at % CHUNK) as usize / PAGE];
                if part < PAGE || keep {
                    if let Some(page) = page {
                        page[start..start + part].fill(0);
                    }
                } else if page.take().is_some() {
                    self.allocated_pages.fetch_sub(1, Ordering::Relaxed);
                }
                at += part as u64;
            }
        }
        Ok(())
    }
}

impl Backend for Memory {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        check_range(offset, buf.len() as u64, self.geometry.size)?;
        let (mut buf, mut offset) = (buf, offset);
        while !buf.is_empty() {
            let (part, rest) = buf.split_at_mut(in_chunk(offset, buf.len()));
            match self.chunk(offset) {
                Ok(chunk) => read_chunk(chunk, part, offset),
                Err(_) => part.fill(0),
            }
            offset += part.len() as u64;
            buf = rest;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64, _flags: WriteFlags) -> io::Result<()> {
        check_range(offset, buf.len() as u64, self.geometry.size)?;
        let (mut buf, mut offset) = (buf, offset);
        while !buf.is_empty() {
            let (part, rest) = buf.split_at(in_chunk(offset, buf.len()));
            let chunk = match self.chunk(offset) {
                Ok(chunk) => chunk,
                Err(_) => self.make_chunk(offset)?,
            };
            self.write_chunk(chunk, part, offset)?;
            offset += part.len() as u64;
            buf = rest;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zero(offset, len, false)
    }

    /// With [`no_unmap`](ZeroFlags::no_unmap) the pages that are there stay.
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.zero(offset, len, flags.no_unmap)
    }
}

/// How many of `len` bytes at `offset` lie in the chunk that `offset` is in.
#[inline]
fn in_chunk(offset: u64, len: usize) -> usize {
    len.min((CHUNK - offset % CHUNK) as usize)
}

fn read_chunk(chunk: &Chunk, mut buf: &mut [u8], offset: u64) {
    let pages = read(chunk);
    let mut at = (offset % CHUNK) as usize;
    while !buf.is_empty() {
        let start = at % PAGE;
        let len = buf.len().min(PAGE - start);
        let (part, rest) = buf.split_at_mut(len);
        match &pages[at / PAGE] {
            Some(page) => part.copy_from_slice(&page[start..start + len]),
            None => part.fill(0),
        }
        buf = rest;
        at += len;
    }
}

/// A page that holds `part` at `start`, and zeroes around it.
fn new_page(part: &[u8], start: usize) -> io::Result<Page> {
    let mut page = reserve(PAGE)?;
    page.extend_from_slice(&ZEROES[..start]);
    page.extend_from_slice(part);
    page.extend_from_slice(&ZEROES[start + part.len()..]);
    page.into_boxed_slice().try_into().map_err(|_| Errno::ENOMEM.into())
}

/// The `index`th of a node's children.
fn slot<T>(node: &[T], index: u64) -> io::Result<&T> {
    node.get(index as usize).ok_or_else(|| Errno::EINVAL.into())
}

/// What is in a slot, filled with a node of `len` empty children if nothing was.
fn child<T: Default>(slot: &OnceLock<Box<[T]>>, len: u64) -> io::Result<&[T]> {
    if slot.get().is_none() {
        let mut node = reserve(usize::try_from(len).map_err(|_| Errno::ENOMEM)?)?;
        node.resize_with(len as usize, T::default);
        // Another thread may have been faster: then this node is dropped and its is taken.
        let _ = slot.set(node.into_boxed_slice());
    }
    slot.get().map(|node| &**node).ok_or_else(|| Errno::ENOMEM.into())
}

fn reserve<T>(len: usize) -> io::Result<Vec<T>> {
    let mut vec = Vec::new();
    vec.try_reserve_exact(len).map_err(|_| Errno::ENOMEM)?;
    Ok(vec)
}

// Nothing under these locks panics half way through a change, so that a poisoned one is as good as any.
#[inline]
fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

#[inline]
fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::backends::testing::{Rng, against_model};

    fn read_back(disk: &Memory, offset: u64, len: usize) -> Vec<u8> {
        let mut buf = vec![0xee; len];
        disk.read_at(&mut buf, offset).expect("read");
        buf
    }

    #[test]
    fn behaves_like_a_vector_of_bytes() {
        for seed in 1..=8 {
            // Sizes that end in the middle of a page, a chunk and a leaf, and every alignment, down to one byte.
            let size = [512, 4096 + 512, CHUNK, 3 * CHUNK + 1536, LEAF + CHUNK + 512][seed as usize % 5];
            against_model(&Memory::new(size), size, seed, 500, 1);
            against_model(&Memory::new(size), size, seed, 300, 512);
        }
    }

    #[test]
    fn the_ends_of_every_level_of_the_tree_are_told_apart() {
        let size = 3 * TRUNK + BRANCH + LEAF + CHUNK + 512;
        let disk = Memory::new(size);
        let mut borders = Vec::new();
        for unit in [PAGE as u64, CHUNK, LEAF, BRANCH, TRUNK] {
            for factor in [1, 2, 3] {
                borders.push((unit * factor).min(size - 512));
            }
        }
        borders.sort_unstable();
        borders.dedup();
        for (index, &at) in borders.iter().enumerate() {
            disk.write_at(&[index as u8 + 1; 16], at - 8, WriteFlags::NONE).expect("write");
        }
        for (index, &at) in borders.iter().enumerate() {
            assert_eq!(read_back(&disk, at - 8, 16), [index as u8 + 1; 16], "at {at}");
        }
        let started = Instant::now();
        disk.discard(0, size).expect("discard");
        assert_eq!(disk.allocated_bytes(), 0);
        assert!(started.elapsed() < Duration::from_secs(20), "a sparse discard steps over what is not there");
    }

    #[test]
    fn costs_what_is_written_and_gives_it_back() {
        let disk = Memory::new(1 << 40);
        disk.write_at(&vec![0; 1 << 16], 1 << 30, WriteFlags::NONE).expect("zeroes");
        assert_eq!(disk.allocated_bytes(), 0, "zeroes cost nothing");
        disk.write_at(&[1; 3 * PAGE], (1 << 39) + 512, WriteFlags::NONE).expect("write");
        assert_eq!(disk.allocated_bytes(), 4 * 4096);

        disk.discard(1 << 39, 2 * 4096 + 512).expect("discard");
        assert_eq!(disk.allocated_bytes(), 2 * 4096, "whole pages go, part of a page stays");
        assert_eq!(read_back(&disk, 1 << 39, 3 * PAGE)[2 * PAGE..][..1024], [[0; 512], [1; 512]].concat());

        disk.write_zeroes(1 << 39, 4 * 4096, ZeroFlags::NO_UNMAP).expect("zero");
        assert_eq!(disk.allocated_bytes(), 2 * 4096, "kept");
        assert_eq!(read_back(&disk, 1 << 39, 4 * PAGE), [0; 4 * PAGE]);
        disk.write_zeroes(0, 1 << 40, ZeroFlags::NONE).expect("zero");
        assert_eq!(disk.allocated_bytes(), 0);
    }

    /// A discard that begins in the middle of an empty range must not step over the beginning of what comes after it.
    #[test]
    fn a_gap_is_stepped_over_to_its_end_and_no_further() {
        for unit in [LEAF, BRANCH, TRUNK] {
            let disk = Memory::new(3 * unit);
            disk.write_at(&[1; 512], 2 * unit, WriteFlags::NONE).expect("write");
            disk.discard(unit + unit / 2, 2 * unit - unit / 2).expect("discard");
            assert_eq!((read_back(&disk, 2 * unit, 512), disk.allocated_bytes()), (vec![0; 512], 0), "after {unit}");
        }
    }

    #[test]
    fn the_largest_device_works_or_says_enomem_and_nothing_wraps() {
        let disk = Memory::new(!511);
        let last = disk.geometry().size - 512;
        disk.write_at(&[9; 512], last, WriteFlags::NONE).expect("write");
        assert_eq!(read_back(&disk, last, 512), [9; 512]);
        disk.discard(last, 512).expect("discard");
        assert_eq!(read_back(&disk, last, 512), [0; 512]);
        assert!(disk.read_at(&mut [0; 1024], last).is_err());
        assert!(disk.write_at(&[0; 512], u64::MAX - 100, WriteFlags::NONE).is_err());
    }

    /// Two writers and two readers on the same blocks: no read may find a mixture inside one 4 KiB block.
    #[test]
    fn blocks_are_never_torn() {
        const BLOCKS: u64 = 40;
        let disk = Memory::new(BLOCKS * 4096);
        let done = AtomicBool::new(false);
        let reads = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for seed in 1..=2 {
                let (disk, done) = (&disk, &done);
                scope.spawn(move || {
                    let mut rng = Rng::new(seed);
                    while !done.load(Ordering::Relaxed) {
                        let block = rng.below(BLOCKS);
                        let blocks = 1 + rng.below((BLOCKS - block).min(20));
                        let (offset, len) = (block * 4096, blocks * 4096);
                        match rng.below(8) {
                            0 => disk.discard(offset, len).expect("discard"),
                            1 => disk.write_zeroes(offset, len, ZeroFlags::NO_UNMAP).expect("zero"),
                            _ => {
                                let data = vec![rng.below(256) as u8; len as usize];
                                disk.write_at(&data, offset, WriteFlags::NONE).expect("write");
                            }
                        }
                    }
                });
            }
            for seed in 3..=4 {
                let (disk, done, reads) = (&disk, &done, &reads);
                scope.spawn(move || {
                    let mut rng = Rng::new(seed);
                    let mut torn = 0;
                    while !done.load(Ordering::Relaxed) {
                        let block = rng.below(BLOCKS);
                        let blocks = 1 + rng.below((BLOCKS - block).min(20));
                        let data = read_back(disk, block * 4096, (blocks * 4096) as usize);
                        torn += data.chunks(4096).filter(|page| page.iter().any(|&b| b != page[0])).count();
                        reads.fetch_add(1, Ordering::Relaxed);
                    }
                    assert_eq!(torn, 0, "blocks with parts of two writes");
                });
            }
            std::thread::sleep(Duration::from_millis(400));
            done.store(true, Ordering::Relaxed);
        });
        assert!(reads.into_inner() > 100, "too few reads to mean anything");
    }

    #[test]
    fn a_chunk_is_written_and_read_as_one() {
        let disk = Memory::new(3 * CHUNK);
        let done = AtomicBool::new(false);
        let torn = std::thread::scope(|scope| {
            scope.spawn(|| {
                for value in (0..=255_u8).cycle() {
                    disk.write_at(&vec![value; CHUNK as usize], CHUNK, WriteFlags::NONE).expect("write");
                    if done.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
            let started = Instant::now();
            let mut torn = 0;
            while started.elapsed() < Duration::from_millis(300) {
                let data = read_back(&disk, CHUNK, CHUNK as usize);
                torn += u32::from(data.iter().any(|&byte| byte != data[0]));
            }
            done.store(true, Ordering::Relaxed);
            torn
        });
        assert_eq!(torn, 0, "reads with parts of two writes");
    }

    /// Four threads, each in its own blocks of shared chunks: none may disturb another.
    #[test]
    fn neighbours_do_not_disturb_each_other() {
        const SECTORS: u64 = 4096;
        let disk = Memory::new(SECTORS * 512);
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let disk = &disk;
                scope.spawn(move || {
                    let mut rng = Rng::new(thread + 1);
                    let mut model = vec![0_u8; SECTORS as usize];
                    for step in 0..20_000 {
                        let sector = rng.below(SECTORS / 4) * 4 + thread;
                        let value = &mut model[sector as usize];
                        match rng.below(4) {
                            0 => assert_eq!(read_back(disk, sector * 512, 512), [*value; 512], "step {step}"),
                            1 => {
                                *value = 0;
                                disk.discard(sector * 512, 512).expect("discard");
                            }
                            _ => {
                                *value = rng.below(256) as u8;
                                disk.write_at(&[*value; 512], sector * 512, WriteFlags::NONE).expect("write");
                            }
                        }
                    }
                    for sector in (thread..SECTORS).step_by(4) {
                        assert_eq!(read_back(disk, sector * 512, 512), [model[sector as usize]; 512]);
                    }
                });
            }
        });
        disk.discard(0, SECTORS * 512).expect("discard");
        assert_eq!(disk.allocated_bytes(), 0, "the count of pages is exact under races");
    }
}
