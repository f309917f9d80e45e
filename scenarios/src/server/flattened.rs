//! A bug to be found: a server that says `EIO`, whatever its storage said.

use std::io;
use std::sync::Arc;

use nix::errno::Errno;
use ublkit::{Backend, Geometry, WriteFlags, ZeroFlags};

/// A backend whose errors have all become `EIO`.
pub(super) struct Flattened(pub(super) Arc<dyn Backend>);

fn flattened(result: io::Result<()>) -> io::Result<()> {
    result.map_err(|_| Errno::EIO.into())
}

impl Backend for Flattened {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        flattened(self.0.read_at(buf, offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        flattened(self.0.write_at(buf, offset, flags))
    }

    fn flush(&self) -> io::Result<()> {
        flattened(self.0.flush())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        flattened(self.0.discard(offset, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        flattened(self.0.write_zeroes(offset, len, flags))
    }
}
