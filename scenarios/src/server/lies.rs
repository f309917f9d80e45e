//! Bugs that show only when somebody compares what a device says of itself with what it was to be, or looks far out.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use ublkit::{Backend, Geometry, WriteFlags, ZeroFlags};

use super::flattened::Flattened;

/// What is left of an offset that a signed 32-bit number has to hold.
const MASK: u64 = (1 << 31) - 1;
/// How long a server that stalls holds each request.
const STALL: Duration = Duration::from_millis(50);

/// A bug of a server, beneath what counts its calls. Those with a name are `probe`'s to plant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(crate) enum Lie {
    /// The device is one logical block smaller than its storage.
    #[value(name = "size-lie")]
    Size,
    /// The device claims larger physical blocks than its storage has.
    #[value(name = "block-lie")]
    Block,
    /// Byte offsets are cut to 31 bits.
    #[value(name = "offset-31")]
    Offset31,
    /// Every error is told as `EIO`.
    #[value(skip)]
    ErrnoLost,
    /// Writes are acknowledged and kept back; a flush is passed on before them.
    #[value(skip)]
    FlushBeforeWrites,
    /// Every request is held for a while before it is passed on.
    #[value(skip)]
    Stall,
    /// What touches the last block of the device lands one block before.
    #[value(skip)]
    OffByOne,
}

impl Lie {
    /// What is declared instead of `geometry`.
    pub(super) fn declared(self, mut geometry: Geometry) -> Geometry {
        match self {
            Self::Size => geometry.size -= u64::from(geometry.logical_block),
            Self::Block => geometry.physical_block *= 2,
            Self::Offset31 | Self::ErrnoLost | Self::FlushBeforeWrites | Self::Stall | Self::OffByOne => {}
        }
        geometry
    }

    /// What is served instead of `inner`.
    pub(super) fn plant(self, inner: Arc<dyn Backend>) -> Arc<dyn Backend> {
        match self {
            Self::Offset31 => Arc::new(Cut(inner)),
            Self::ErrnoLost => Arc::new(Flattened(inner)),
            Self::FlushBeforeWrites => Arc::new(WriteBehind { inner, kept: Mutex::default() }),
            Self::Stall => Arc::new(Stalling(inner)),
            Self::OffByOne => Arc::new(Shifted(inner)),
            Self::Size | Self::Block => inner,
        }
    }
}

/// A backend that is asked for offsets of 31 bits.
struct Cut(Arc<dyn Backend>);

impl Backend for Cut {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buf, offset & MASK)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        self.0.write_at(buf, offset & MASK, flags)
    }

    fn flush(&self) -> io::Result<()> {
        self.0.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.discard(offset & MASK, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.0.write_zeroes(offset & MASK, len, flags)
    }
}

/// A backend whose last block is the one before.
struct Shifted(Arc<dyn Backend>);

impl Shifted {
    fn place(&self, offset: u64, len: u64) -> u64 {
        let geometry = self.0.geometry();
        let touches_the_end = offset + len == geometry.size && offset > 0;
        if touches_the_end { offset - u64::from(geometry.logical_block) } else { offset }
    }
}

impl Backend for Shifted {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buf, self.place(offset, buf.len() as u64))
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        self.0.write_at(buf, self.place(offset, buf.len() as u64), flags)
    }

    fn flush(&self) -> io::Result<()> {
        self.0.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.discard(self.place(offset, len), len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.0.write_zeroes(self.place(offset, len), len, flags)
    }
}

/// A cache of writes that a flush goes past.
struct WriteBehind {
    inner: Arc<dyn Backend>,
    /// Writes that were acknowledged, with their offsets.
    kept: Mutex<Vec<(u64, Vec<u8>)>>,
}

impl WriteBehind {
    fn kept(&self) -> MutexGuard<'_, Vec<(u64, Vec<u8>)>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what was kept back.
    fn let_go(&self) -> io::Result<()> {
        let mut kept = self.kept();
        kept.drain(..).try_for_each(|(offset, bytes)| self.inner.write_at(&bytes, offset, WriteFlags::NONE))
    }
}

impl Backend for WriteBehind {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.let_go()?;
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        if !flags.fua {
            self.kept().push((offset, buf.to_vec()));
            return Ok(());
        }
        self.let_go()?;
        self.inner.write_at(buf, offset, flags)
    }

    fn flush(&self) -> io::Result<()> {
        self.inner.flush()?;
        self.let_go()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.let_go()?;
        self.inner.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.let_go()?;
        self.inner.write_zeroes(offset, len, flags)
    }
}

/// A backend that gets to each request late.
struct Stalling(Arc<dyn Backend>);

impl Stalling {
    fn late(&self) -> &dyn Backend {
        thread::sleep(STALL);
        &*self.0
    }
}

impl Backend for Stalling {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.late().read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        self.late().write_at(buf, offset, flags)
    }

    fn flush(&self) -> io::Result<()> {
        self.late().flush()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.late().discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.late().write_zeroes(offset, len, flags)
    }
}
