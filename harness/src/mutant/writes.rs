//! Writes that are not stored, or not as they are, or not where they belong.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex};

use ublkit::{Backend, WriteFlags};

use super::Mutant;
use super::twist::{Disk, Turn, Twist, lock, twisted};
use crate::sector::{Pattern, SECTOR};
use crate::seed::SeededRng;

/// How many logical blocks a misdirected write is off, at most.
const BLOCKS_OFF: u64 = 8;

/// How many blocks are remembered as written since the last flush.
const REMEMBERED: usize = 1 << 16;

/// What is given back of a buffer at a time.
const PAGE: usize = 4096;

pub(super) fn plant(
    mutant: Mutant,
    inner: Arc<dyn Backend>,
    turn: &Turn,
) -> Result<Arc<dyn Backend>, Arc<dyn Backend>> {
    let turn = turn.clone();
    Ok(match mutant {
        Mutant::LostWrite => twisted(inner, LostWrite(turn)),
        Mutant::LostOverwrite => twisted(inner, LostOverwrite { turn, written: Mutex::default() }),
        Mutant::MisdirectedWrite => twisted(inner, MisdirectedWrite(turn)),
        Mutant::AddressAlias => twisted(inner, AddressAlias(turn)),
        Mutant::ShornWrite => twisted(inner, ShornWrite(turn)),
        Mutant::ZeroedBuffer => twisted(inner, ZeroedBuffer(turn)),
        Mutant::ShortIoAsFull => twisted(inner, ShortIoAsFull(turn)),
        Mutant::CrossDeviceBleed => {
            let foreign = turn.plot().foreign.clone();
            let foreign = foreign.unwrap_or_else(|| Arc::new(Pattern::new(turn.plot().seed, 1)));
            twisted(inner, CrossDeviceBleed { turn, foreign })
        }
        Mutant::EndOfDevice => twisted(inner, EndOfDevice(turn)),
        Mutant::ShiftedWrite => twisted(inner, ShiftedWrite(turn)),
        Mutant::SwappedBlocks => twisted(inner, SwappedBlocks(turn)),
        _ => return Err(inner),
    })
}

/// A write that is acknowledged and never stored.
struct LostWrite(Turn);

impl Twist for LostWrite {
    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        if self.0.comes().is_some() {
            self.0.hit();
            return Ok(());
        }
        disk.write_at(buf, offset, flags)
    }
}

/// A write to blocks that were all written since the last flush is dropped.
struct LostOverwrite {
    turn: Turn,
    written: Mutex<BTreeSet<u64>>,
}

impl Twist for LostOverwrite {
    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        let mut written = lock(&self.written);
        let blocks = disk.blocks(offset, buf.len() as u64);
        if blocks.clone().all(|block| written.contains(&block)) && self.turn.comes().is_some() {
            self.turn.hit();
            return Ok(());
        }
        if written.len() < REMEMBERED {
            written.extend(blocks);
        }
        disk.write_at(buf, offset, flags)
    }

    fn flush(&self, disk: &Disk) -> io::Result<()> {
        lock(&self.written).clear();
        disk.flush()
    }
}

/// A write lands a few logical blocks away.
struct MisdirectedWrite(Turn);

impl Twist for MisdirectedWrite {
    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        if let Some(mut rng) = self.0.comes()
            && let Some(elsewhere) = elsewhere(disk, &mut rng, offset, buf.len() as u64)
        {
            self.0.hit();
            return disk.write_at(buf, elsewhere, flags);
        }
        disk.write_at(buf, offset, flags)
    }
}

/// Where what belongs at `offset` is looked for or lands by mistake, if there is another place for it.
pub(super) fn elsewhere(disk: &Disk, rng: &mut SeededRng, offset: u64, len: u64) -> Option<u64> {
    let block = disk.block();
    let ahead = offset / block;
    let behind = disk.size().checked_sub(offset + len)? / block;
    // Towards the front where there is room: then the blocks that were overwritten come before those that were missed.
    if ahead > 0 {
        Some(offset - rng.within(1..=ahead.min(BLOCKS_OFF)) * block)
    } else if behind > 0 {
        Some(offset + rng.within(1..=behind.min(BLOCKS_OFF)) * block)
    } else {
        None
    }
}

/// An access to the upper half of the device goes to the lower half.
struct AddressAlias(Turn);

impl AddressAlias {
    fn address(&self, disk: &Disk, offset: u64) -> u64 {
        let half = disk.size() / disk.block() / 2 * disk.block();
        if offset >= half && half > 0 && self.0.comes().is_some() {
            self.0.hit();
            // Without the top bit: what is left is in the lower half, or, of an odd block too many, its first.
            return (offset - half) % half;
        }
        offset
    }
}

impl Twist for AddressAlias {
    fn read(&self, disk: &Disk, buf: &mut [u8], offset: u64) -> io::Result<()> {
        disk.read_at(buf, self.address(disk, offset))
    }

    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        disk.write_at(buf, self.address(disk, offset), flags)
    }
}

/// Only the first sectors of a write are stored.
struct ShornWrite(Turn);

/// Stores the first `sectors` sectors of a write and leaves the rest of its blocks as it was.
fn store_front(disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags, sectors: u64) -> io::Result<()> {
    let front = sectors as usize * SECTOR;
    let whole = front.next_multiple_of(disk.block() as usize);
    if front == 0 {
        return Ok(());
    }
    let mut stored = disk.load(offset, whole as u64)?;
    stored[..front].copy_from_slice(&buf[..front]);
    disk.write_at(&stored, offset, flags)
}

impl Twist for ShornWrite {
    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        let sectors = (buf.len() / SECTOR) as u64;
        if sectors > 1
            && let Some(mut rng) = self.0.comes()
        {
            self.0.hit();
            return store_front(disk, buf, offset, flags, rng.within(1..=sectors - 1));
        }
        disk.write_at(buf, offset, flags)
    }
}

/// A page of a write's buffer is zeroed before it is stored.
struct ZeroedBuffer(Turn);

impl Twist for ZeroedBuffer {
    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        let Some(mut rng) = self.0.comes() else { return disk.write_at(buf, offset, flags) };
        self.0.hit();
        let mut buf = buf.to_vec();
        let page = rng.below(buf.len().div_ceil(PAGE) as u64) as usize * PAGE;
        let end = buf.len().min(page + PAGE);
        buf[page..end].fill(0);
        disk.write_at(&buf, offset, flags)
    }
}

/// A read fills, or a write stores, the front of the buffer, and reports all of it.
struct ShortIoAsFull(Turn);

impl Twist for ShortIoAsFull {
    fn read(&self, disk: &Disk, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let Some(mut rng) = self.0.comes() else { return disk.read_at(buf, offset) };
        self.0.hit();
        let data = disk.load(offset, buf.len() as u64)?;
        let front = rng.below((buf.len() / SECTOR) as u64) as usize * SECTOR;
        // The rest keeps what an earlier request left in the buffer.
        buf[..front].copy_from_slice(&data[..front]);
        Ok(())
    }

    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        let Some(mut rng) = self.0.comes() else { return disk.write_at(buf, offset, flags) };
        self.0.hit();
        store_front(disk, buf, offset, flags, rng.below((buf.len() / SECTOR) as u64))
    }
}

/// A block of a write is stored as another device has it.
struct CrossDeviceBleed {
    turn: Turn,
    foreign: Arc<Pattern>,
}

impl Twist for CrossDeviceBleed {
    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        let Some(mut rng) = self.turn.comes() else { return disk.write_at(buf, offset, flags) };
        self.turn.hit();
        let mut buf = buf.to_vec();
        let block = disk.block() as usize;
        let begin = rng.below((buf.len() / block) as u64) as usize * block;
        self.foreign.fill(&mut buf[begin..begin + block], (offset + begin as u64) / SECTOR as u64, |_| 1);
        disk.write_at(&buf, offset, flags)
    }
}

/// The last block of the device is neither read nor stored.
struct EndOfDevice(Turn);

impl EndOfDevice {
    /// How much of a buffer is moved.
    fn moved(&self, disk: &Disk, offset: u64, len: usize) -> usize {
        if offset + len as u64 == disk.size() && self.0.comes().is_some() {
            self.0.hit();
            return len - disk.block() as usize;
        }
        len
    }
}

impl Twist for EndOfDevice {
    fn read(&self, disk: &Disk, buf: &mut [u8], offset: u64) -> io::Result<()> {
        match self.moved(disk, offset, buf.len()) {
            0 => Ok(()),
            moved => disk.read_at(&mut buf[..moved], offset),
        }
    }

    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        match self.moved(disk, offset, buf.len()) {
            0 => Ok(()),
            moved => disk.write_at(&buf[..moved], offset, flags),
        }
    }
}

/// A block's bytes are stored some places further on.
struct ShiftedWrite(Turn);

impl Twist for ShiftedWrite {
    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        let Some(mut rng) = self.0.comes() else { return disk.write_at(buf, offset, flags) };
        self.0.hit();
        let mut buf = buf.to_vec();
        buf.rotate_right(rng.within(1..=64) as usize);
        disk.write_at(&buf, offset, flags)
    }
}

/// Two blocks of a write are stored in each other's place.
struct SwappedBlocks(Turn);

impl Twist for SwappedBlocks {
    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        let block = disk.block() as usize;
        let blocks = buf.len() / block;
        if blocks < 2 {
            return disk.write_at(buf, offset, flags);
        }
        let Some(mut rng) = self.0.comes() else { return disk.write_at(buf, offset, flags) };
        self.0.hit();
        let mut buf = buf.to_vec();
        let first = rng.below(blocks as u64 - 1) as usize * block;
        let (front, back) = buf.split_at_mut(first + block);
        front[first..].swap_with_slice(&mut back[..block]);
        disk.write_at(&buf, offset, flags)
    }
}
