//! Reads that return what is not stored there.

use std::io;
use std::sync::{Arc, Mutex};

use ublkit::{Backend, WriteFlags};

use super::Mutant;
use super::twist::{Disk, Turn, Twist, lock, twisted};
use super::writes::elsewhere;

/// The length of the bus that one wire is stuck in, in bytes.
const BUS: u64 = 4096;

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
