//! A backend whose calls are noted while they last.

use std::io;

use ublkit::{Backend, Geometry, WriteFlags, ZeroFlags};
use ublkit_harness::{OpKind, SECTOR, SectorRange};

use crate::in_flight::{InFlight, Who};

/// A backend whose calls are in flight, in a table, while they last.
pub(super) struct InTable<B> {
    pub(super) inner: B,
    pub(super) table: InFlight,
}

impl<B: Backend> InTable<B> {
    fn call(&self, kind: OpKind, offset: u64, len: u64, call: impl FnOnce(&B) -> io::Result<()>) -> io::Result<()> {
        let range = SectorRange::new(offset / SECTOR as u64, len / SECTOR as u64);
        let _noted = self.table.begin(Who::this_thread(), kind, range);
        call(&self.inner)
    }
}

impl<B: Backend> Backend for InTable<B> {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.call(OpKind::Read, offset, buf.len() as u64, |inner| inner.read_at(buf, offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        let kind = if flags.fua { OpKind::WriteFua } else { OpKind::Write };
        self.call(kind, offset, buf.len() as u64, |inner| inner.write_at(buf, offset, flags))
    }

    fn flush(&self) -> io::Result<()> {
        self.call(OpKind::Flush, 0, 0, Backend::flush)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.call(OpKind::Discard, offset, len, |inner| inner.discard(offset, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.call(OpKind::WriteZeroes, offset, len, |inner| inner.write_zeroes(offset, len, flags))
    }
}
