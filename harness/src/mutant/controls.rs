//! What is odd and right: it must not be taken for a bug.

use std::io;
use std::sync::Arc;

use ublkit::{Backend, WriteFlags, ZeroFlags};

use super::Mutant;
use super::errors::write_kind;
use super::twist::{Disk, Turn, Twist, place, twisted};
use crate::plan::OpKind;
use crate::seed::SeededRng;

pub(super) fn plant(
    mutant: Mutant,
    inner: Arc<dyn Backend>,
    turn: &Turn,
) -> Result<Arc<dyn Backend>, Arc<dyn Backend>> {
    let turn = turn.clone();
    Ok(match mutant {
        Mutant::ErroredWrite => twisted(inner, ErroredWrite(turn)),
        Mutant::UnflushedLost => twisted(inner, UnflushedLost(turn)),
        Mutant::AnySubset => twisted(inner, AnySubset(turn)),
        Mutant::DiscardGarbage => twisted(inner, DiscardGarbage(turn)),
        Mutant::WrittenTwice => twisted(inner, WrittenTwice(turn)),
        Mutant::PartialThenError => twisted(inner, PartialThenError(turn)),
        Mutant::FlushFails => twisted(inner, FlushFails(turn)),
        _ => return Err(inner),
    })
}

/// The numbers below `count`, in an order that is drawn.
pub(super) fn shuffled(rng: &mut SeededRng, count: usize) -> Vec<usize> {
    let mut order: Vec<_> = (0..count).collect();
    rng.shuffle(&mut order);
    order
}

/// Stores one block of a write.
fn store_block(disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags, index: usize) -> io::Result<()> {
    let block = offset / disk.block() + index as u64;
    disk.write_at(&buf[place(block, disk.block(), offset)], block * disk.block(), flags)
}

/// A write fails, and all of it was done, some blocks, or nothing.
struct ErroredWrite(Turn);

impl Twist for ErroredWrite {
    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        let Some(mut rng) = self.0.comes() else { return disk.write_at(buf, offset, flags) };
        self.0.hit();
        let blocks = buf.len() / disk.block() as usize;
        let done = match rng.below(3) {
            0 => 0,
            1 => blocks,
            _ => rng.within(0..=blocks as u64) as usize,
        };
        for index in shuffled(&mut rng, blocks).into_iter().take(done) {
            store_block(disk, buf, offset, flags, index)?;
        }
        Err(self.0.error(write_kind(flags), offset, buf.len() as u64))
    }
}

/// Counts the writes that a power cut may lose; the disk does the rest.
struct UnflushedLost(Turn);

impl Twist for UnflushedLost {
    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        if !flags.fua {
            self.0.hit();
        }
        disk.write_at(buf, offset, flags)
    }
}

/// After a write, some range is written back.
struct AnySubset(Turn);

impl Twist for AnySubset {
    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        disk.write_at(buf, offset, flags)?;
        if let Some(medium) = &self.0.plot().medium
            && let Some(mut rng) = self.0.comes()
        {
            self.0.hit();
            let blocks = disk.size() / disk.block();
            let first = rng.below(blocks);
            let count = rng.within(1..=(blocks - first).min(64));
            medium.flush_range(first * disk.block(), count * disk.block())?;
        }
        Ok(())
    }
}

/// A discard leaves each of its blocks as it was, zeroed, erased, or as noise.
struct DiscardGarbage(Turn);

impl Twist for DiscardGarbage {
    fn discard(&self, disk: &Disk, offset: u64, len: u64) -> io::Result<()> {
        let Some(mut rng) = self.0.comes() else { return disk.discard(offset, len) };
        self.0.hit();
        // Below whatever faults there are: those of reads and writes are not a discard's.
        let medium = self.0.plot().medium.as_ref();
        let mut data = vec![0; len as usize];
        match medium {
            Some(medium) => medium.read_at(&mut data, offset)?,
            None => disk.read_at(&mut data, offset)?,
        }
        for block in data.chunks_exact_mut(disk.block() as usize) {
            match rng.below(4) {
                0 => {}
                1 => block.fill(0),
                2 => block.fill(0xff),
                _ => rng.fill(block),
            }
        }
        match medium {
            Some(medium) => medium.write_at(&data, offset),
            None => disk.write_at(&data, offset, WriteFlags::NONE),
        }
    }
}

/// A write is done block by block, and then all of it once more.
struct WrittenTwice(Turn);

impl Twist for WrittenTwice {
    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        if let Some(mut rng) = self.0.comes() {
            self.0.hit();
            for index in shuffled(&mut rng, buf.len() / disk.block() as usize) {
                store_block(disk, buf, offset, flags, index)?;
            }
        }
        disk.write_at(buf, offset, flags)
    }
}

/// The front of an operation is done, and then it fails.
struct PartialThenError(Turn);

impl PartialThenError {
    /// How many bytes are done, of an operation that fails.
    fn done(&self, disk: &Disk, len: u64) -> Option<u64> {
        let mut rng = self.0.comes()?;
        self.0.hit();
        Some(rng.below(len / disk.block()) * disk.block())
    }
}

impl Twist for PartialThenError {
    fn read(&self, disk: &Disk, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let len = buf.len() as u64;
        let Some(done) = self.done(disk, len) else { return disk.read_at(buf, offset) };
        if done > 0 {
            disk.read_at(&mut buf[..done as usize], offset)?;
        }
        Err(self.0.error(OpKind::Read, offset, len))
    }

    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        let len = buf.len() as u64;
        let Some(done) = self.done(disk, len) else { return disk.write_at(buf, offset, flags) };
        if done > 0 {
            disk.write_at(&buf[..done as usize], offset, flags)?;
        }
        Err(self.0.error(write_kind(flags), offset, len))
    }

    fn discard(&self, disk: &Disk, offset: u64, len: u64) -> io::Result<()> {
        let Some(done) = self.done(disk, len) else { return disk.discard(offset, len) };
        if done > 0 {
            disk.discard(offset, done)?;
        }
        Err(self.0.error(OpKind::Discard, offset, len))
    }

    fn zeroes(&self, disk: &Disk, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        let Some(done) = self.done(disk, len) else { return disk.write_zeroes(offset, len, flags) };
        if done > 0 {
            disk.write_zeroes(offset, done, flags)?;
        }
        Err(self.0.error(OpKind::WriteZeroes, offset, len))
    }
}

/// A flush fails, having done nothing or everything. What is dirty stays so.
struct FlushFails(Turn);

impl Twist for FlushFails {
    fn flush(&self, disk: &Disk) -> io::Result<()> {
        let Some(mut rng) = self.0.comes() else { return disk.flush() };
        self.0.hit();
        if rng.chance(1, 2) {
            disk.flush()?;
        }
        Err(self.0.error(OpKind::Flush, 0, 0))
    }
}
