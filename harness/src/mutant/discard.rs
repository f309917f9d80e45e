//! Discards and zeroes that take too much, too little, or too late.

use std::io;
use std::sync::{Arc, Mutex};

use ublkit::{Backend, WriteFlags, ZeroFlags};

use super::Mutant;
use super::twist::{Disk, Turn, Twist, lock, twisted};

/// The unit in which storage gives back space.
const UNIT: u64 = 4096;

/// How many discards wait to be punched at most, and how many writes a punch is late.
const WAITING: usize = 16;
const LATE: u32 = 3;

pub(super) fn plant(
    mutant: Mutant,
    inner: Arc<dyn Backend>,
    turn: &Turn,
) -> Result<Arc<dyn Backend>, Arc<dyn Backend>> {
    let turn = turn.clone();
    Ok(match mutant {
        Mutant::DiscardOffByOne => twisted(inner, DiscardOffByOne(turn)),
        Mutant::LatePunch => twisted(inner, LatePunch { turn, waiting: Mutex::default() }),
        Mutant::WriteZeroesIgnored => twisted(inner, WriteZeroesIgnored(turn)),
        Mutant::DiscardRoundsOut => twisted(inner, DiscardRoundsOut(turn)),
        Mutant::ZeroesEdgesKept => twisted(inner, ZeroesEdgesKept(turn)),
        _ => return Err(inner),
    })
}

/// A discard takes the block after it, or, at the end of the device, the one before it.
struct DiscardOffByOne(Turn);

impl Twist for DiscardOffByOne {
    fn discard(&self, disk: &Disk, offset: u64, len: u64) -> io::Result<()> {
        disk.discard(offset, len)?;
        let block = disk.block();
        let neighbour = if disk.beyond(offset + len, block) { offset.checked_sub(block) } else { Some(offset + len) };
        if let Some(neighbour) = neighbour
            && self.0.comes().is_some()
        {
            self.0.hit();
            disk.store_zeroes(neighbour, block)?;
        }
        Ok(())
    }
}

/// A hole is punched when what was discarded has been written again.
struct LatePunch {
    turn: Turn,
    waiting: Mutex<Vec<Punch>>,
}

struct Punch {
    offset: u64,
    len: u64,
    /// How many writes are left, once there was one to its place.
    due_in: Option<u32>,
}

impl Twist for LatePunch {
    fn discard(&self, disk: &Disk, offset: u64, len: u64) -> io::Result<()> {
        let mut waiting = lock(&self.waiting);
        if self.turn.comes().is_some() {
            waiting.truncate(WAITING - 1);
            waiting.insert(0, Punch { offset, len, due_in: None });
        }
        disk.discard(offset, len)
    }

    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        disk.write_at(buf, offset, flags)?;
        let mut waiting = lock(&self.waiting);
        let end = offset + buf.len() as u64;
        for punch in &mut *waiting {
            if let Some(due_in) = &mut punch.due_in {
                *due_in -= 1;
            } else if punch.offset < end && offset < punch.offset + punch.len {
                // Its blocks are in use again, and these of them the hole will hit.
                let begin = punch.offset.max(offset);
                let end = end.min(punch.offset + punch.len);
                *punch = Punch { offset: begin, len: end - begin, due_in: Some(LATE) };
            }
        }
        for punch in waiting.extract_if(.., |punch| punch.due_in == Some(0)) {
            self.turn.hit();
            disk.store_zeroes(punch.offset, punch.len)?;
        }
        Ok(())
    }
}

/// Zeroes that are not written.
struct WriteZeroesIgnored(Turn);

impl Twist for WriteZeroesIgnored {
    fn zeroes(&self, disk: &Disk, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        if self.0.comes().is_some() {
            self.0.hit();
            return Ok(());
        }
        disk.write_zeroes(offset, len, flags)
    }
}

/// The unit that a range is rounded to: more than a block, or there is nothing to round.
fn unit(disk: &Disk) -> u64 {
    UNIT.max(2 * disk.block())
}

/// A discard takes all of each unit that it touches.
struct DiscardRoundsOut(Turn);

impl Twist for DiscardRoundsOut {
    fn discard(&self, disk: &Disk, offset: u64, len: u64) -> io::Result<()> {
        disk.discard(offset, len)?;
        let end = offset + len;
        let begin_unit = offset / unit(disk) * unit(disk);
        let end_unit = end.next_multiple_of(unit(disk)).min(disk.size());
        if (begin_unit, end_unit) == (offset, end) || self.0.comes().is_none() {
            return Ok(());
        }
        self.0.hit();
        for (begin, end) in [(begin_unit, offset), (end, end_unit)] {
            if begin < end {
                disk.store_zeroes(begin, end - begin)?;
            }
        }
        Ok(())
    }
}

/// Zeroes are written to whole units alone.
struct ZeroesEdgesKept(Turn);

impl Twist for ZeroesEdgesKept {
    fn zeroes(&self, disk: &Disk, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        let begin = offset.next_multiple_of(unit(disk));
        let end = (offset + len) / unit(disk) * unit(disk);
        if (begin, end) == (offset, offset + len) || self.0.comes().is_none() {
            return disk.write_zeroes(offset, len, flags);
        }
        self.0.hit();
        if begin < end { disk.write_zeroes(begin, end - begin, flags) } else { Ok(()) }
    }
}
