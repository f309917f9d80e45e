//! A device that stores nothing.

use std::io;

use super::check_range;
use crate::{Backend, Geometry, WriteFlags, ZeroFlags};

/// Discards what is written and reads as zeroes: the fastest device there is, to measure everything around it.
///
/// ```
/// use ublkit::Backend;
/// use ublkit::backends::Null;
/// assert_eq!(Null::new(1 << 30).geometry().size, 1 << 30);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Null {
    geometry: Geometry,
}

impl Null {
    /// A device of `size` bytes that can discard and zero, which cost it nothing either.
    #[must_use]
    pub const fn new(size: u64) -> Self {
        Self::with_geometry(Geometry::bytes(size).discard(512).write_zeroes())
    }

    /// A device with any geometry.
    #[must_use]
    pub const fn with_geometry(geometry: Geometry) -> Self {
        Self { geometry }
    }
}

impl Backend for Null {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        check_range(offset, buf.len() as u64, self.geometry.size)?;
        buf.fill(0);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64, _flags: WriteFlags) -> io::Result<()> {
        check_range(offset, buf.len() as u64, self.geometry.size)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        check_range(offset, len, self.geometry.size)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _flags: ZeroFlags) -> io::Result<()> {
        check_range(offset, len, self.geometry.size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_zeroes_whatever_was_written() {
        let null = Null::new(8192);
        null.write_at(&[7; 4096], 4096, WriteFlags::NONE).expect("write");
        let mut buf = [1; 4096];
        null.read_at(&mut buf, 4096).expect("read");
        assert_eq!(buf, [0; 4096]);
    }

    #[test]
    fn a_range_outside_the_device_is_refused() {
        let null = Null::new(8192);
        assert!(null.read_at(&mut [0; 512], 8192).is_err());
        assert!(null.write_at(&[0; 1024], 7680, WriteFlags::NONE).is_err());
        assert!(null.discard(u64::MAX, 512).is_err());
        assert!(null.write_zeroes(0, 8704, ZeroFlags::NONE).is_err());
    }
}
