//! Faults of time: requests that are late. On a device it is the thread that serves the request which waits.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use ublkit::{Backend, Geometry, WriteFlags, ZeroFlags};
use ublkit_harness::fault::{Faults, Timing};
use ublkit_harness::{OpKind, SECTOR, SectorRange};

/// A backend before which requests wait as a plan says.
pub(super) struct Timed {
    inner: Arc<dyn Backend>,
    faults: Faults,
    /// How long a request is held if nobody releases it: the queue that it holds up has to go on.
    held_most: Duration,
}

impl Timed {
    pub(super) const fn new(inner: Arc<dyn Backend>, faults: Faults, held_most: Duration) -> Self {
        Self { inner, faults, held_most }
    }

    fn wait(&self, kind: OpKind, offset: u64, len: u64) {
        let range = SectorRange::new(offset / SECTOR as u64, len / SECTOR as u64);
        match self.faults.timing(kind, range) {
            Some(Timing::Delay(milliseconds)) => std::thread::sleep(Duration::from_millis(milliseconds)),
            Some(Timing::Hold(hold)) => {
                // Released or not, it goes on.
                let _ = self.faults.wait_released(hold, self.held_most);
            }
            // A backend serves whole requests; such plans are refused.
            Some(Timing::Short { .. }) | None => {}
        }
    }
}

impl Backend for Timed {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.wait(OpKind::Read, offset, buf.len() as u64);
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        self.wait(if flags.fua { OpKind::WriteFua } else { OpKind::Write }, offset, buf.len() as u64);
        self.inner.write_at(buf, offset, flags)
    }

    fn flush(&self) -> io::Result<()> {
        self.wait(OpKind::Flush, 0, 0);
        self.inner.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.wait(OpKind::Discard, offset, len);
        self.inner.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.wait(OpKind::WriteZeroes, offset, len);
        self.inner.write_zeroes(offset, len, flags)
    }
}
