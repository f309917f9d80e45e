//! A backend that is watched: how many operations and bytes of each kind reached it.
//!
//! A scenario that verified a gigabyte proves nothing about a backend that was never asked; these counts are the evidence
//! that it was.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use ublkit::{Backend, Geometry, WriteFlags, ZeroFlags};

use crate::vacuity::Evidence;

/// A backend whose operations are counted.
#[derive(Debug)]
pub struct Observed<B> {
    inner: B,
    counters: Arc<Counters>,
}

/// The running counts of an [`Observed`] backend. Operations that failed count, and among the errors too.
#[derive(Debug, Default)]
pub struct Counters {
    reads: AtomicU64,
    read_bytes: AtomicU64,
    writes: AtomicU64,
    write_bytes: AtomicU64,
    fua_writes: AtomicU64,
    flushes: AtomicU64,
    discards: AtomicU64,
    discard_bytes: AtomicU64,
    zeroes: AtomicU64,
    zero_bytes: AtomicU64,
    errors: AtomicU64,
}

/// The counts at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Reads.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes, those that have to be durable included.
    pub writes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Writes that have to be durable when they complete.
    pub fua_writes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Discards.
    pub discards: u64,
    /// Bytes discarded.
    pub discard_bytes: u64,
    /// Writes of zeroes.
    pub zeroes: u64,
    /// Bytes zeroed.
    pub zero_bytes: u64,
    /// Operations of any kind that failed.
    pub errors: u64,
}

impl<B> Observed<B> {
    /// Watches `inner`; the counts can be read while it serves.
    pub fn new(inner: B) -> (Self, Arc<Counters>) {
        let counters = Arc::new(Counters::default());
        (Self { inner, counters: Arc::clone(&counters) }, counters)
    }

    /// The backend that is watched.
    pub const fn inner(&self) -> &B {
        &self.inner
    }

    fn note<T>(&self, result: io::Result<T>, counts: &[(&AtomicU64, u64)]) -> io::Result<T> {
        for (counter, count) in counts {
            counter.fetch_add(*count, Ordering::Relaxed);
        }
        if result.is_err() {
            self.counters.errors.fetch_add(1, Ordering::Relaxed);
        }
        result
    }
}

impl Counters {
    /// The counts now. Operations under way may be in one and not yet in another.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            reads: get(&self.reads),
            read_bytes: get(&self.read_bytes),
            writes: get(&self.writes),
            write_bytes: get(&self.write_bytes),
            fua_writes: get(&self.fua_writes),
            flushes: get(&self.flushes),
            discards: get(&self.discards),
            discard_bytes: get(&self.discard_bytes),
            zeroes: get(&self.zeroes),
            zero_bytes: get(&self.zero_bytes),
            errors: get(&self.errors),
        }
    }
}

impl Counts {
    /// Adds each count to `evidence`, as `backend_reads` and so on.
    pub fn add_to(&self, evidence: &mut Evidence) {
        for (name, count) in [
            ("backend_reads", self.reads),
            ("backend_read_bytes", self.read_bytes),
            ("backend_writes", self.writes),
            ("backend_write_bytes", self.write_bytes),
            ("backend_fua_writes", self.fua_writes),
            ("backend_flushes", self.flushes),
            ("backend_discards", self.discards),
            ("backend_discard_bytes", self.discard_bytes),
            ("backend_zeroes", self.zeroes),
            ("backend_zero_bytes", self.zero_bytes),
            ("backend_errors", self.errors),
        ] {
            evidence.add(name, count);
        }
    }
}

impl<B: Backend> Backend for Observed<B> {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = buf.len() as u64;
        let result = self.inner.read_at(buf, offset);
        self.note(result, &[(&self.counters.reads, 1), (&self.counters.read_bytes, bytes)])
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        let Counters { writes, write_bytes, fua_writes, .. } = &*self.counters;
        let result = self.inner.write_at(buf, offset, flags);
        self.note(result, &[(writes, 1), (write_bytes, buf.len() as u64), (fua_writes, flags.fua.into())])
    }

    fn flush(&self) -> io::Result<()> {
        self.note(self.inner.flush(), &[(&self.counters.flushes, 1)])
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let result = self.inner.discard(offset, len);
        self.note(result, &[(&self.counters.discards, 1), (&self.counters.discard_bytes, len)])
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        let result = self.inner.write_zeroes(offset, len, flags);
        self.note(result, &[(&self.counters.zeroes, 1), (&self.counters.zero_bytes, len)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutant::tests::Memory;

    #[test]
    fn every_operation_is_counted() {
        let (backend, counters) = Observed::new(Memory::new(1 << 20));
        let mut buf = [1; 1024];
        assert!(backend.write_at(&buf, 0, WriteFlags::NONE).is_ok());
        assert!(backend.write_at(&buf[..512], 0, WriteFlags::FUA).is_ok());
        assert!(backend.read_at(&mut buf, 512).is_ok());
        assert!(backend.flush().is_ok());
        assert!(backend.discard(0, 4096).is_ok());
        assert!(backend.write_zeroes(0, 8192, ZeroFlags::NONE).is_ok());
        assert!(backend.read_at(&mut buf, 1 << 20).is_err());
        let expected = Counts {
            reads: 2,
            read_bytes: 2048,
            writes: 2,
            write_bytes: 1536,
            fua_writes: 1,
            flushes: 1,
            discards: 1,
            discard_bytes: 4096,
            zeroes: 1,
            zero_bytes: 8192,
            errors: 1,
        };
        assert_eq!(counters.counts(), expected);
        let mut evidence = Evidence::new();
        counters.counts().add_to(&mut evidence);
        assert_eq!((evidence.count("backend_writes"), evidence.count("backend_discard_bytes")), (2, 4096));
        assert_eq!(backend.geometry(), backend.inner().geometry());
    }
}
