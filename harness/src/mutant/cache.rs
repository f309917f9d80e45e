//! Caches that promise to be durable and are not.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use ublkit::{Backend, WriteFlags, ZeroFlags};

use super::Mutant;
use super::twist::{Blocks, Disk, Turn, Twist, lock, place, twisted};
use crate::plan::OpKind;

/// How many blocks are kept back at most.
const KEPT: usize = 64;

/// How many blocks are rolled back at a power cut at most.
const ROLLED_BACK: usize = 8;

/// How many calls after its acknowledgement a flush is done.
const EARLY: u64 = 40;

/// How many flushes it takes until something is known to be dirty.
const COLD: u64 = 8;

/// How many blocks are remembered as written since the last flush.
const REMEMBERED: usize = 1 << 16;

pub(super) fn plant(
    mutant: Mutant,
    inner: Arc<dyn Backend>,
    turn: &Turn,
) -> Result<Arc<dyn Backend>, Arc<dyn Backend>> {
    let turn = turn.clone();
    Ok(match mutant {
        Mutant::TornBelowAtomic => twisted(inner, TornBelowAtomic(turn)),
        Mutant::FlushNoop => twisted(inner, FlushNoop(turn)),
        Mutant::ColdFlush => twisted(inner, ColdFlush { turn, flushes: AtomicU64::new(0) }),
        Mutant::FlushRange => twisted(inner, FlushRange { turn, last: Mutex::default() }),
        Mutant::FlushEarly => twisted(inner, FlushEarly { turn, calls: EARLY, due_in: AtomicU64::new(0) }),
        Mutant::FlushSubmitted => twisted(inner, FlushEarly { turn, calls: 1, due_in: AtomicU64::new(0) }),
        Mutant::FtlRollback => twisted(inner, FtlRollback { turn, map: Mutex::default() }),
        Mutant::FuaIgnored => twisted(inner, FuaIgnored(turn)),
        Mutant::MetadataNotFlushed
        | Mutant::ReorderAcrossFlush
        | Mutant::SameLbaLogRace
        | Mutant::DiscardResurrects => twisted(inner, KeptBack { turn, state: Mutex::default() }),
        Mutant::FlushGivesUp => twisted(inner, FlushGivesUp { turn, doubt: Mutex::default() }),
        _ => return Err(inner),
    })
}

/// The second half of a write's last block is written once more, as a change of its own: a power cut may leave it alone.
struct TornBelowAtomic(Turn);

impl Twist for TornBelowAtomic {
    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        disk.write_at(buf, offset, flags)?;
        if let Some(medium) = &self.0.plot().medium
            && !flags.fua
            && self.0.comes().is_some()
        {
            self.0.hit();
            let half = buf.len() - disk.block() as usize / 2;
            medium.write_at(&buf[half..], offset + half as u64)?;
        }
        Ok(())
    }
}

/// A flush that does nothing.
struct FlushNoop(Turn);

impl Twist for FlushNoop {
    fn flush(&self, disk: &Disk) -> io::Result<()> {
        if self.0.comes().is_some() {
            self.0.hit();
            return Ok(());
        }
        disk.flush()
    }
}

/// The first flushes of a server do nothing.
struct ColdFlush {
    turn: Turn,
    flushes: AtomicU64,
}

impl Twist for ColdFlush {
    fn flush(&self, disk: &Disk) -> io::Result<()> {
        if self.flushes.fetch_add(1, Ordering::Relaxed) < COLD && self.turn.comes().is_some() {
            self.turn.hit();
            return Ok(());
        }
        disk.flush()
    }
}

/// A flush persists what the last write wrote, for want of a range of its own.
struct FlushRange {
    turn: Turn,
    last: Mutex<(u64, u64)>,
}

impl Twist for FlushRange {
    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        *lock(&self.last) = (offset, buf.len() as u64);
        disk.write_at(buf, offset, flags)
    }

    fn flush(&self, disk: &Disk) -> io::Result<()> {
        if let Some(medium) = &self.turn.plot().medium
            && self.turn.comes().is_some()
        {
            self.turn.hit();
            let (offset, len) = *lock(&self.last);
            return medium.flush_range(offset, len);
        }
        disk.flush()
    }
}

/// A flush is done some calls after it was acknowledged.
struct FlushEarly {
    turn: Turn,
    /// How many calls later a flush is done.
    calls: u64,
    /// How many calls are left until it is done; 0 when none is owed.
    due_in: AtomicU64,
}

impl FlushEarly {
    fn settle(&self, disk: &Disk) -> io::Result<()> {
        let due = self.due_in.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |calls| calls.checked_sub(1));
        if due == Ok(1) { disk.flush() } else { Ok(()) }
    }
}

impl Twist for FlushEarly {
    fn read(&self, disk: &Disk, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.settle(disk)?;
        disk.read_at(buf, offset)
    }

    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        self.settle(disk)?;
        disk.write_at(buf, offset, flags)
    }

    fn flush(&self, disk: &Disk) -> io::Result<()> {
        if self.turn.comes().is_some() {
            self.turn.hit();
            // One that is owed already is owed no later: flushes never stop, so it would never be done.
            let owed = |calls| if calls == 0 { Some(self.calls) } else { None };
            let _owed_already = self.due_in.fetch_update(Ordering::Relaxed, Ordering::Relaxed, owed);
            return Ok(());
        }
        disk.flush()
    }
}

/// After a flush, some blocks are what they were before in the map that a power cut leaves, until they change again.
struct FtlRollback {
    turn: Turn,
    map: Mutex<Map>,
}

#[derive(Default)]
struct Map {
    /// The block that was written last, and what was there before.
    last: Option<(u64, Vec<u8>)>,
    /// What a power cut leaves of blocks that were flushed since.
    old: Blocks,
}

impl FtlRollback {
    fn forget(&self, disk: &Disk, offset: u64, len: u64) {
        let mut map = lock(&self.map);
        for block in disk.blocks(offset, len) {
            map.old.remove(block);
            map.last.take_if(|(last, _)| *last == block);
        }
    }
}

impl Twist for FtlRollback {
    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        self.forget(disk, offset, buf.len() as u64);
        if let Some(medium) = &self.turn.plot().medium {
            let mut former = vec![0; disk.block() as usize];
            medium.read_at(&mut former, offset)?;
            lock(&self.map).last = Some((offset / disk.block(), former));
        }
        disk.write_at(buf, offset, flags)
    }

    fn flush(&self, disk: &Disk) -> io::Result<()> {
        disk.flush()?;
        let Some(medium) = &self.turn.plot().medium else { return Ok(()) };
        let Map { last, old } = &mut *lock(&self.map);
        if let Some((block, former)) = last.take()
            && self.turn.comes().is_some()
        {
            self.turn.hit();
            old.put(block, &former);
            old.overflow(ROLLED_BACK);
        }
        let mut newer = vec![0; disk.block() as usize];
        for (block, former) in old.iter() {
            let offset = block * disk.block();
            medium.read_at(&mut newer, offset)?;
            medium.write_through(former, offset)?;
            medium.write_at(&newer, offset)?;
        }
        Ok(())
    }

    fn discard(&self, disk: &Disk, offset: u64, len: u64) -> io::Result<()> {
        self.forget(disk, offset, len);
        disk.discard(offset, len)
    }

    fn zeroes(&self, disk: &Disk, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.forget(disk, offset, len);
        disk.write_zeroes(offset, len, flags)
    }
}

/// A write that is to be durable is done like any other.
struct FuaIgnored(Turn);

impl FuaIgnored {
    fn ignored(&self, fua: bool) -> bool {
        let ignored = fua && self.0.comes().is_some();
        if ignored {
            self.0.hit();
        }
        ignored
    }
}

impl Twist for FuaIgnored {
    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, mut flags: WriteFlags) -> io::Result<()> {
        flags.fua &= !self.ignored(flags.fua);
        disk.write_at(buf, offset, flags)
    }

    fn zeroes(&self, disk: &Disk, offset: u64, len: u64, mut flags: ZeroFlags) -> io::Result<()> {
        flags.fua &= !self.ignored(flags.fua);
        disk.write_zeroes(offset, len, flags)
    }
}

/// Blocks that reads find and the storage does not have, flush or not, until there are too many of them. Which, is what
/// the mutants that share this differ in: new blocks, any write, a block's second write since a flush, or discards.
struct KeptBack {
    turn: Turn,
    state: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    blocks: Blocks,
    /// What was written since the last flush.
    written: BTreeSet<u64>,
}

impl KeptBack {
    fn keeps(&self, disk: &Disk, kept: &Kept, block: u64, fua: bool) -> io::Result<bool> {
        Ok(match self.turn.mutant() {
            // In the map: what is kept already, and what holds anything.
            Mutant::MetadataNotFlushed => {
                kept.blocks.get(block).is_some()
                    || disk.load(block * disk.block(), disk.block())?.iter().all(|byte| *byte == 0)
            }
            Mutant::SameLbaLogRace => !fua && kept.written.contains(&block),
            Mutant::ReorderAcrossFlush => !fua,
            _ => false,
        })
    }

    fn keep(disk: &Disk, kept: &mut Kept, block: u64, data: &[u8]) -> io::Result<()> {
        kept.blocks.put(block, data);
        match kept.blocks.overflow(KEPT) {
            Some((block, data)) => disk.write_at(&data, block * disk.block(), WriteFlags::NONE),
            None => Ok(()),
        }
    }
}

impl Twist for KeptBack {
    fn read(&self, disk: &Disk, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let kept = lock(&self.state);
        disk.read_at(buf, offset)?;
        for block in disk.blocks(offset, buf.len() as u64) {
            if let Some(data) = kept.blocks.get(block) {
                buf[place(block, disk.block(), offset)].copy_from_slice(data);
            }
        }
        Ok(())
    }

    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        let kept = &mut *lock(&self.state);
        let blocks = disk.blocks(offset, buf.len() as u64);
        let mut keeps = blocks.end - blocks.start <= KEPT as u64 / 4;
        for block in blocks.clone() {
            keeps = keeps && self.keeps(disk, kept, block, flags.fua)?;
        }
        let keeps = keeps && self.turn.comes().is_some();
        if keeps {
            self.turn.hit();
        }
        if kept.written.len() < REMEMBERED {
            kept.written.extend(blocks.clone());
        }
        for block in blocks {
            kept.blocks.remove(block);
            if keeps {
                Self::keep(disk, kept, block, &buf[place(block, disk.block(), offset)])?;
            }
        }
        if keeps { Ok(()) } else { disk.write_at(buf, offset, flags) }
    }

    fn flush(&self, disk: &Disk) -> io::Result<()> {
        lock(&self.state).written.clear();
        disk.flush()
    }

    fn discard(&self, disk: &Disk, offset: u64, len: u64) -> io::Result<()> {
        let kept = &mut *lock(&self.state);
        let blocks = disk.blocks(offset, len);
        let keeps = self.turn.mutant() == Mutant::DiscardResurrects
            && blocks.end - blocks.start <= KEPT as u64
            && self.turn.comes().is_some();
        if keeps {
            self.turn.hit();
        }
        for block in blocks {
            kept.blocks.remove(block);
            if keeps {
                Self::keep(disk, kept, block, &vec![0; disk.block() as usize])?;
            }
        }
        if keeps { Ok(()) } else { disk.discard(offset, len) }
    }

    fn zeroes(&self, disk: &Disk, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        let kept = &mut *lock(&self.state);
        for block in disk.blocks(offset, len) {
            kept.blocks.remove(block);
        }
        disk.write_zeroes(offset, len, flags)
    }
}

/// A flush fails, which it admits to, and takes what was dirty for clean: no later flush persists that.
struct FlushGivesUp {
    turn: Turn,
    doubt: Mutex<Doubt>,
}

#[derive(Default)]
struct Doubt {
    /// Blocks that were changed since the last good flush.
    dirty: BTreeSet<u64>,
    /// Blocks that were given up and not changed since.
    given_up: BTreeSet<u64>,
}

impl FlushGivesUp {
    fn changed(&self, disk: &Disk, offset: u64, len: u64) {
        let Doubt { dirty, given_up } = &mut *lock(&self.doubt);
        for block in disk.blocks(offset, len) {
            dirty.insert(block);
            given_up.remove(&block);
        }
    }

    /// Persists all but what was given up.
    fn persist(&self, disk: &Disk, doubt: &Doubt) -> io::Result<()> {
        let medium = match &self.turn.plot().medium {
            Some(medium) if !doubt.given_up.is_empty() => medium,
            _ => return disk.flush(),
        };
        let mut begin = 0;
        for end in doubt.given_up.iter().copied().chain([disk.size() / disk.block()]) {
            if begin < end {
                medium.flush_range(begin * disk.block(), (end - begin) * disk.block())?;
            }
            begin = end + 1;
        }
        Ok(())
    }
}

impl Twist for FlushGivesUp {
    fn flush(&self, disk: &Disk) -> io::Result<()> {
        let doubt = &mut *lock(&self.doubt);
        if self.turn.comes().is_none() {
            self.persist(disk, doubt)?;
            doubt.dirty.clear();
            return Ok(());
        }
        self.turn.hit();
        doubt.given_up.extend(doubt.dirty.iter());
        Err(self.turn.error(OpKind::Flush, 0, 0))
    }

    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        self.changed(disk, offset, buf.len() as u64);
        disk.write_at(buf, offset, flags)
    }

    fn discard(&self, disk: &Disk, offset: u64, len: u64) -> io::Result<()> {
        self.changed(disk, offset, len);
        disk.discard(offset, len)
    }

    fn zeroes(&self, disk: &Disk, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.changed(disk, offset, len);
        disk.write_zeroes(offset, len, flags)
    }
}
