//! Reads that return what is not stored there.

use std::io;
use std::sync::{Arc, Mutex};

use ublkit::{Backend, WriteFlags, ZeroFlags};

use super::Mutant;
use super::twist::{Blocks, Disk, Turn, Twist, lock, place, twisted};
use super::writes::elsewhere;

/// The length of the bus that one wire is stuck in, in bytes.
const BUS: u64 = 4096;

/// How many blocks a mirror lags behind by at most.
const LAG: usize = 32;

pub(super) fn plant(
    mutant: Mutant,
    inner: Arc<dyn Backend>,
    turn: &Turn,
) -> Result<Arc<dyn Backend>, Arc<dyn Backend>> {
    let turn = turn.clone();
    Ok(match mutant {
        Mutant::MisdirectedRead => twisted(inner, MisdirectedRead(turn)),
        Mutant::BitflipRead => twisted(inner, BitflipRead(turn)),
        Mutant::StuckBit => twisted(inner, StuckBit(turn)),
        Mutant::StuckWire => twisted(inner, StuckWire(turn)),
        Mutant::HoleLeak => twisted(inner, HoleLeak { turn, memory: Mutex::default() }),
        Mutant::LaggingMirror => twisted(inner, LaggingMirror { turn, former: Mutex::default() }),
        Mutant::UnwrittenExtent => twisted(inner, UnwrittenExtent { turn, last: Mutex::default() }),
        _ => return Err(inner),
    })
}

/// A read returns what is a few blocks away.
struct MisdirectedRead(Turn);

impl Twist for MisdirectedRead {
    fn read(&self, disk: &Disk, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if let Some(mut rng) = self.0.comes()
            && let Some(elsewhere) = elsewhere(disk, &mut rng, offset, buf.len() as u64)
        {
            self.0.hit();
            return disk.read_at(buf, elsewhere);
        }
        disk.read_at(buf, offset)
    }
}

/// A read returns one flipped bit; what is stored stays right.
struct BitflipRead(Turn);

impl Twist for BitflipRead {
    fn read(&self, disk: &Disk, buf: &mut [u8], offset: u64) -> io::Result<()> {
        disk.read_at(buf, offset)?;
        if let Some(mut rng) = self.0.comes() {
            let bit = rng.below(buf.len() as u64 * 8);
            if let Some(byte) = buf.get_mut(bit as usize / 8) {
                *byte ^= 1 << (bit % 8);
                self.0.hit();
            }
        }
        Ok(())
    }
}

/// One block in so many has a bit that reads as set for ever.
struct StuckBit(Turn);

impl Twist for StuckBit {
    fn read(&self, disk: &Disk, buf: &mut [u8], offset: u64) -> io::Result<()> {
        disk.read_at(buf, offset)?;
        let block_bytes = disk.block();
        for (block, data) in disk.blocks(offset, buf.len() as u64).zip(buf.chunks_exact_mut(block_bytes as usize)) {
            let drawn = self.0.fixed("block", block);
            // What was never written is left alone: it is not known to be anything.
            if drawn.is_multiple_of(self.0.every()) && data.iter().any(|byte| *byte != 0) {
                let bit = (drawn >> 32) % (block_bytes * 8);
                set(&self.0, &mut data[bit as usize / 8], bit);
            }
        }
        Ok(())
    }
}

fn set(turn: &Turn, byte: &mut u8, bit: u64) {
    if *byte & 1 << (bit % 8) == 0 {
        *byte |= 1 << (bit % 8);
        turn.hit();
    }
}

/// One bit at one place of the buffer comes out as set, wherever it was read from.
struct StuckWire(Turn);

impl Twist for StuckWire {
    fn read(&self, disk: &Disk, buf: &mut [u8], offset: u64) -> io::Result<()> {
        disk.read_at(buf, offset)?;
        let bit = self.0.fixed("wire", 0) % (BUS * 8);
        if let Some(byte) = buf.get_mut(bit as usize / 8)
            && self.0.comes().is_some()
        {
            set(&self.0, byte, bit);
        }
        Ok(())
    }
}

/// A block of zeroes is returned as what was last written anywhere.
struct HoleLeak {
    turn: Turn,
    memory: Mutex<Vec<u8>>,
}

impl Twist for HoleLeak {
    fn read(&self, disk: &Disk, buf: &mut [u8], offset: u64) -> io::Result<()> {
        disk.read_at(buf, offset)?;
        let memory = lock(&self.memory);
        if memory.is_empty() {
            return Ok(());
        }
        let hole = buf.chunks_exact_mut(memory.len()).find(|block| block.iter().all(|byte| *byte == 0));
        if let Some(hole) = hole
            && self.turn.comes().is_some()
        {
            self.turn.hit();
            hole.copy_from_slice(&memory);
        }
        Ok(())
    }

    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        buf[..disk.block() as usize].clone_into(&mut lock(&self.memory));
        disk.write_at(buf, offset, flags)
    }
}

/// A read of a block that was overwritten a moment ago returns what it was before. What was zeroes is not lagged behind of.
struct LaggingMirror {
    turn: Turn,
    /// What the last blocks that were overwritten held before.
    former: Mutex<Blocks>,
}

impl LaggingMirror {
    fn forget(&self, disk: &Disk, offset: u64, len: u64) {
        let mut former = lock(&self.former);
        for block in disk.blocks(offset, len) {
            former.remove(block);
        }
    }
}

impl Twist for LaggingMirror {
    fn read(&self, disk: &Disk, buf: &mut [u8], offset: u64) -> io::Result<()> {
        disk.read_at(buf, offset)?;
        let former = lock(&self.former);
        let mut blocks = disk.blocks(offset, buf.len() as u64);
        if let Some((block, old)) = blocks.find_map(|block| Some((block, former.get(block)?)))
            && self.turn.comes().is_some()
        {
            self.turn.hit();
            buf[place(block, disk.block(), offset)].copy_from_slice(old);
        }
        Ok(())
    }

    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        self.forget(disk, offset, buf.len() as u64);
        let block = disk.block();
        let mut old = vec![0; block as usize];
        let known = match &self.turn.plot().medium {
            // Not through faults that are none of a read's.
            Some(medium) => medium.read_at(&mut old, offset).is_ok(),
            None => disk.read_at(&mut old, offset).is_ok(),
        };
        disk.write_at(buf, offset, flags)?;
        if known && old.iter().any(|byte| *byte != 0) {
            let mut former = lock(&self.former);
            former.put(offset / block, &old);
            former.overflow(LAG);
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

/// A read of the block that was written last returns zeroes.
struct UnwrittenExtent {
    turn: Turn,
    last: Mutex<Option<u64>>,
}

impl Twist for UnwrittenExtent {
    fn read(&self, disk: &Disk, buf: &mut [u8], offset: u64) -> io::Result<()> {
        disk.read_at(buf, offset)?;
        let last = *lock(&self.last);
        if let Some(block) = last.filter(|block| disk.blocks(offset, buf.len() as u64).contains(block))
            && self.turn.comes().is_some()
        {
            let data = &mut buf[place(block, disk.block(), offset)];
            if data.iter().any(|byte| *byte != 0) {
                self.turn.hit();
            }
            data.fill(0);
        }
        Ok(())
    }

    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        disk.write_at(buf, offset, flags)?;
        *lock(&self.last) = Some(offset / disk.block());
        Ok(())
    }
}
