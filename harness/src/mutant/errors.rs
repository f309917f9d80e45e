//! Errors that are not told, and errors that stay.

use std::io;
use std::sync::{Arc, Mutex};

use ublkit::{Backend, WriteFlags, ZeroFlags};

use super::Mutant;
use super::twist::{Disk, EIO, Turn, Twist, lock, twisted};
use crate::plan::OpKind;

/// How many accesses to a place fail after its fault is gone.
const STICKS: u32 = 20;

pub(super) fn plant(
    mutant: Mutant,
    inner: Arc<dyn Backend>,
    turn: &Turn,
) -> Result<Arc<dyn Backend>, Arc<dyn Backend>> {
    let turn = turn.clone();
    Ok(match mutant {
        Mutant::ErrorSwallowed => twisted(inner, ErrorSwallowed(turn)),
        Mutant::ErrorSticky => twisted(inner, ErrorSticky { turn, bad: Mutex::default() }),
        _ => return Err(inner),
    })
}

pub(super) fn write_kind(flags: WriteFlags) -> OpKind {
    if flags.fua { OpKind::WriteFua } else { OpKind::Write }
}

/// An error of the storage becomes a success. It makes some that it admits to, for storage that has none.
struct ErrorSwallowed(Turn);

impl ErrorSwallowed {
    fn swallow(&self, kind: OpKind, offset: u64, len: u64, call: impl FnOnce() -> io::Result<()>) {
        let result = match self.0.comes() {
            Some(_) => Err(self.0.error(kind, offset, len)),
            None => call(),
        };
        if result.is_err() {
            self.0.hit();
        }
    }
}

impl Twist for ErrorSwallowed {
    fn read(&self, disk: &Disk, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.swallow(OpKind::Read, offset, buf.len() as u64, || disk.read_at(buf, offset));
        Ok(())
    }

    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        self.swallow(write_kind(flags), offset, buf.len() as u64, || disk.write_at(buf, offset, flags));
        Ok(())
    }

    fn flush(&self, disk: &Disk) -> io::Result<()> {
        self.swallow(OpKind::Flush, 0, 0, || disk.flush());
        Ok(())
    }

    fn discard(&self, disk: &Disk, offset: u64, len: u64) -> io::Result<()> {
        self.swallow(OpKind::Discard, offset, len, || disk.discard(offset, len));
        Ok(())
    }

    fn zeroes(&self, disk: &Disk, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.swallow(OpKind::WriteZeroes, offset, len, || disk.write_zeroes(offset, len, flags));
        Ok(())
    }
}

/// Where there was an error, there are more. It admits to the first, which it makes for storage that has none.
struct ErrorSticky {
    turn: Turn,
    bad: Mutex<Option<Bad>>,
}

struct Bad {
    offset: u64,
    len: u64,
    left: u32,
}

impl ErrorSticky {
    fn check(&self, kind: OpKind, offset: u64, len: u64, call: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut bad = lock(&self.bad);
        match &mut *bad {
            Some(place) if place.offset < offset + len && offset < place.offset + place.len => {
                place.left -= 1;
                if place.left == 0 {
                    *bad = None;
                }
                self.turn.hit();
                return Err(io::Error::from_raw_os_error(EIO));
            }
            _ => {}
        }
        let result = match self.turn.comes() {
            Some(_) => Err(self.turn.error(kind, offset, len)),
            None => call(),
        };
        if result.is_err() {
            *bad = Some(Bad { offset, len, left: STICKS });
        }
        result
    }
}

impl Twist for ErrorSticky {
    fn read(&self, disk: &Disk, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.check(OpKind::Read, offset, buf.len() as u64, || disk.read_at(buf, offset))
    }

    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        self.check(write_kind(flags), offset, buf.len() as u64, || disk.write_at(buf, offset, flags))
    }

    fn discard(&self, disk: &Disk, offset: u64, len: u64) -> io::Result<()> {
        self.check(OpKind::Discard, offset, len, || disk.discard(offset, len))
    }

    fn zeroes(&self, disk: &Disk, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.check(OpKind::WriteZeroes, offset, len, || disk.write_zeroes(offset, len, flags))
    }
}
