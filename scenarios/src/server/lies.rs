//! Bugs that show only when somebody compares what a device says of itself with what it was to be, or looks far out.

use std::io;
use std::sync::Arc;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use ublkit::{Backend, Geometry, WriteFlags, ZeroFlags};

use super::flattened::Flattened;

/// What is left of an offset that a signed 32-bit number has to hold.
const MASK: u64 = (1 << 31) - 1;

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
    /// A flush is acknowledged and not passed on.
    #[value(skip)]
    FlushSwallowed,
    /// A write with FUA is passed on as one without.
    #[value(skip)]
    FuaDropped,
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
            Self::Offset31 | Self::ErrnoLost | Self::FlushSwallowed | Self::FuaDropped | Self::OffByOne => {}
        }
        geometry
    }

    /// What is served instead of `inner`.
    pub(super) fn plant(self, inner: Arc<dyn Backend>) -> Arc<dyn Backend> {
        match self {
            Self::Offset31 => Arc::new(Cut(inner)),
            Self::ErrnoLost => Arc::new(Flattened(inner)),
            Self::FlushSwallowed | Self::FuaDropped | Self::OffByOne => Arc::new(Careless { lie: self, inner }),
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

/// A backend that passes on what it is told, but for one thing.
struct Careless {
    lie: Lie,
    inner: Arc<dyn Backend>,
}

impl Careless {
    fn place(&self, offset: u64, len: u64) -> u64 {
        let geometry = self.inner.geometry();
        let touches_the_end = offset + len == geometry.size && offset > 0;
        if self.lie == Lie::OffByOne && touches_the_end { offset - u64::from(geometry.logical_block) } else { offset }
    }
}

impl Backend for Careless {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.inner.read_at(buf, self.place(offset, buf.len() as u64))
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        let flags = if self.lie == Lie::FuaDropped { WriteFlags::NONE } else { flags };
        self.inner.write_at(buf, self.place(offset, buf.len() as u64), flags)
    }

    fn flush(&self) -> io::Result<()> {
        if self.lie == Lie::FlushSwallowed { Ok(()) } else { self.inner.flush() }
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.discard(self.place(offset, len), len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.inner.write_zeroes(self.place(offset, len), len, flags)
    }
}
