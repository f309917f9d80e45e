//! Older content that comes back, and writes that come late.

use std::io;
use std::sync::{Arc, Mutex};

use ublkit::{Backend, WriteFlags, ZeroFlags};

use super::Mutant;
use super::twist::{Blocks, Disk, Turn, Twist, lock, place, twisted};

/// How many blocks are remembered at most, and of how many of a write's.
const REMEMBERED: usize = 1024;
const OF_ONE_WRITE: usize = 16;

/// How many blocks a stale cache has at most.
const CACHED: usize = 32;

/// The unit in which storage reads, modifies and writes.
const UNIT: u64 = 4096;

/// What is copied at a time, and how many writes that takes.
const CHUNK: u64 = 64 << 10;
const COPYING: u32 = 8;

/// How many calls later a late write comes, at most.
const LATE: u64 = 64;

pub(super) fn plant(
    mutant: Mutant,
    inner: Arc<dyn Backend>,
    turn: &Turn,
) -> Result<Arc<dyn Backend>, Arc<dyn Backend>> {
    let turn = turn.clone();
    Ok(match mutant {
        Mutant::StaleCache => twisted(inner, StaleCache { turn, cache: Mutex::default() }),
        Mutant::RefetchOverwrites => twisted(inner, RefetchOverwrites { turn, base: Mutex::default() }),
        Mutant::MixedFetchRead => twisted(inner, MixedFetchRead { turn, base: Mutex::default() }),
        Mutant::RmwNeighbour => twisted(inner, RmwNeighbour { turn, former: Mutex::default() }),
        Mutant::RebuildLosesWrite => twisted(inner, RebuildLosesWrite { turn, copy: Mutex::default() }),
        Mutant::EarlyCommit => twisted(inner, EarlyCommit { turn, held: Mutex::default() }),
        Mutant::LateRetry => twisted(inner, LateRetry { turn, retry: Mutex::default() }),
        _ => return Err(inner),
    })
}

/// Remembers what the first blocks of a range hold, before it is written.
fn remember(disk: &Disk, blocks: &mut Blocks, offset: u64, len: u64, again: bool) -> io::Result<()> {
    for block in disk.blocks(offset, len).take(OF_ONE_WRITE) {
        if again {
            blocks.remove(block);
        }
        if blocks.get(block).is_none() {
            blocks.put(block, &disk.load(block * disk.block(), disk.block())?);
        }
    }
    while blocks.overflow(REMEMBERED).is_some() {}
    Ok(())
}

/// Puts remembered blocks over what was read; how many of them differ.
fn lay_over(disk: &Disk, blocks: &Blocks, buf: &mut [u8], offset: u64) -> usize {
    let mut differ = 0;
    for block in disk.blocks(offset, buf.len() as u64) {
        if let Some(old) = blocks.get(block) {
            let data = &mut buf[place(block, disk.block(), offset)];
            differ += usize::from(*data != *old);
            data.copy_from_slice(old);
        }
    }
    differ
}

/// A block that was cached before a write is read from the cache until it is written again.
struct StaleCache {
    turn: Turn,
    cache: Mutex<Blocks>,
}

impl StaleCache {
    fn invalidate(&self, disk: &Disk, offset: u64, len: u64) -> io::Result<()> {
        let cache = &mut *lock(&self.cache);
        for block in disk.blocks(offset, len) {
            cache.remove(block);
        }
        if self.turn.comes().is_some() {
            let block = offset / disk.block();
            cache.put(block, &disk.load(block * disk.block(), disk.block())?);
            cache.overflow(CACHED);
        }
        Ok(())
    }
}

impl Twist for StaleCache {
    fn read(&self, disk: &Disk, buf: &mut [u8], offset: u64) -> io::Result<()> {
        disk.read_at(buf, offset)?;
        if lay_over(disk, &lock(&self.cache), buf, offset) > 0 {
            self.turn.hit();
        }
        Ok(())
    }

    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        self.invalidate(disk, offset, buf.len() as u64)?;
        disk.write_at(buf, offset, flags)
    }

    fn discard(&self, disk: &Disk, offset: u64, len: u64) -> io::Result<()> {
        self.invalidate(disk, offset, len)?;
        disk.discard(offset, len)
    }

    fn zeroes(&self, disk: &Disk, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.invalidate(disk, offset, len)?;
        disk.write_zeroes(offset, len, flags)
    }
}

/// A read fetches a block from the base image although it was written since.
struct RefetchOverwrites {
    turn: Turn,
    base: Mutex<Blocks>,
}

impl Twist for RefetchOverwrites {
    fn read(&self, disk: &Disk, buf: &mut [u8], offset: u64) -> io::Result<()> {
        {
            let base = lock(&self.base);
            let mut blocks = disk.blocks(offset, buf.len() as u64);
            if let Some((block, old)) = blocks.find_map(|block| Some((block, base.get(block)?)))
                && self.turn.comes().is_some()
            {
                self.turn.hit();
                disk.write_at(old, block * disk.block(), WriteFlags::NONE)?;
            }
        }
        disk.read_at(buf, offset)
    }

    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        remember(disk, &mut lock(&self.base), offset, buf.len() as u64, false)?;
        disk.write_at(buf, offset, flags)
    }
}

/// A read of blocks of which some were written and some were not returns the base image's.
struct MixedFetchRead {
    turn: Turn,
    base: Mutex<Blocks>,
}

impl Twist for MixedFetchRead {
    fn read(&self, disk: &Disk, buf: &mut [u8], offset: u64) -> io::Result<()> {
        disk.read_at(buf, offset)?;
        let base = lock(&self.base);
        let blocks = disk.blocks(offset, buf.len() as u64);
        let (all, written) =
            (blocks.end - blocks.start, blocks.filter(|block| base.get(*block).is_some()).count() as u64);
        if written > 0 && written < all && self.turn.comes().is_some() && lay_over(disk, &base, buf, offset) > 0 {
            self.turn.hit();
        }
        Ok(())
    }

    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        remember(disk, &mut lock(&self.base), offset, buf.len() as u64, false)?;
        disk.write_at(buf, offset, flags)
    }
}

/// A write takes the next block of its unit along, as it was once or as zeroes.
struct RmwNeighbour {
    turn: Turn,
    former: Mutex<Blocks>,
}

impl Twist for RmwNeighbour {
    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        let block = disk.block();
        let unit = UNIT.max(2 * block);
        let end = offset + buf.len() as u64;
        let neighbour = if end.is_multiple_of(unit) || disk.beyond(end, block) {
            (!offset.is_multiple_of(unit)).then(|| offset - block)
        } else {
            Some(end)
        };
        if let Some(neighbour) = neighbour
            && self.turn.comes().is_some()
        {
            let former = lock(&self.former).get(neighbour / block).map(<[u8]>::to_vec);
            let former = former.unwrap_or_else(|| vec![0; block as usize]);
            if former != disk.load(neighbour, block)? {
                self.turn.hit();
                disk.write_at(&former, neighbour, WriteFlags::NONE)?;
            }
        }
        remember(disk, &mut lock(&self.former), offset, buf.len() as u64, true)?;
        disk.write_at(buf, offset, flags)
    }
}

/// What is written to a chunk while it is copied is overwritten by the copy.
struct RebuildLosesWrite {
    turn: Turn,
    copy: Mutex<Option<Copy>>,
}

struct Copy {
    offset: u64,
    data: Vec<u8>,
    writes_left: u32,
}

impl Twist for RebuildLosesWrite {
    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        let mut copying = lock(&self.copy);
        if copying.is_none() && self.turn.comes().is_some() {
            let begin = offset / CHUNK * CHUNK;
            let data = disk.load(begin, CHUNK.min(disk.size() - begin))?;
            *copying = Some(Copy { offset: begin, data, writes_left: COPYING });
        }
        disk.write_at(buf, offset, flags)?;
        if let Some(copy) = &mut *copying {
            copy.writes_left -= 1;
            if copy.writes_left == 0 {
                self.turn.hit();
                disk.write_at(&copy.data, copy.offset, WriteFlags::NONE)?;
                *copying = None;
            }
        }
        Ok(())
    }
}

/// A write that is kept for later.
struct Later {
    offset: u64,
    data: Vec<u8>,
    flags: WriteFlags,
    calls_left: u64,
}

impl Later {
    fn overlaps(&self, offset: u64, len: u64) -> bool {
        self.offset < offset + len && offset < self.offset + self.data.len() as u64
    }
}

/// A write is acknowledged some calls before it is done.
struct EarlyCommit {
    turn: Turn,
    held: Mutex<Vec<Later>>,
}

impl EarlyCommit {
    /// Does what is due, and what would change the same place.
    fn settle(&self, disk: &Disk, changed: Option<(u64, u64)>) -> io::Result<()> {
        let mut held = lock(&self.held);
        for later in &mut *held {
            later.calls_left = later.calls_left.saturating_sub(1);
        }
        let due = |later: &mut Later| {
            later.calls_left == 0 || changed.is_some_and(|(offset, len)| later.overlaps(offset, len))
        };
        let due: Vec<_> = held.extract_if(.., due).collect();
        due.into_iter().try_for_each(|later| disk.write_at(&later.data, later.offset, later.flags))
    }
}

impl Twist for EarlyCommit {
    fn read(&self, disk: &Disk, buf: &mut [u8], offset: u64) -> io::Result<()> {
        disk.read_at(buf, offset)?;
        self.settle(disk, None)
    }

    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        self.settle(disk, Some((offset, buf.len() as u64)))?;
        let Some(mut rng) = self.turn.comes() else { return disk.write_at(buf, offset, flags) };
        self.turn.hit();
        let calls_left = rng.within(2..=LATE);
        lock(&self.held).push(Later { offset, data: buf.to_vec(), flags, calls_left });
        Ok(())
    }

    fn flush(&self, disk: &Disk) -> io::Result<()> {
        self.settle(disk, None)?;
        disk.flush()
    }

    fn discard(&self, disk: &Disk, offset: u64, len: u64) -> io::Result<()> {
        self.settle(disk, Some((offset, len)))?;
        disk.discard(offset, len)
    }

    fn zeroes(&self, disk: &Disk, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.settle(disk, Some((offset, len)))?;
        disk.write_zeroes(offset, len, flags)
    }
}

/// A write is done a second time, after a newer one to the same place.
struct LateRetry {
    turn: Turn,
    retry: Mutex<Option<Later>>,
}

impl Twist for LateRetry {
    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        disk.write_at(buf, offset, flags)?;
        let mut retry = lock(&self.retry);
        if let Some(later) = retry.take_if(|later| later.overlaps(offset, buf.len() as u64)) {
            self.turn.hit();
            disk.write_at(&later.data, later.offset, later.flags)?;
        }
        if retry.is_none() && self.turn.comes().is_some() {
            *retry = Some(Later { offset, data: buf.to_vec(), flags, calls_left: 0 });
        }
        Ok(())
    }
}
