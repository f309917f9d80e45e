//! Storage that can be stopped between two requests, and copied as it is at that moment.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ublkit::{Backend, Geometry, WriteFlags, ZeroFlags, backends};

use super::protocol::Moment;

/// How much is copied at a time.
const COPY_BYTES: usize = 1 << 20;

/// Storage with a gate before it.
pub(super) struct Freezer {
    inner: Arc<dyn Backend>,
    geometry: Geometry,
    gate: Mutex<Gate>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Gate {
    shut: bool,
    inside: usize,
    /// When it is to be shut.
    moment: Option<Moment>,
}

impl Gate {
    /// A request goes in. Shuts the gate behind it if it is the last one.
    fn enter(&mut self, durable: bool) {
        self.inside += 1;
        let left = match &mut self.moment {
            Some(Moment::Requests(left)) => left,
            Some(Moment::Durable(left)) if durable => left,
            _ => return,
        };
        *left = left.saturating_sub(1);
        if *left == 0 {
            self.shut = true;
        }
    }
}

impl Freezer {
    pub(super) fn new(inner: Arc<dyn Backend>) -> Self {
        Self { geometry: inner.geometry(), inner, gate: Mutex::default(), changed: Condvar::new() }
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when no request is inside and none gets in: once the moment has come, or when `patience` is over.
    pub(super) fn freeze(&self, moment: Moment, patience: Duration) {
        let deadline = Instant::now() + patience;
        let mut gate = self.gate();
        gate.moment = Some(moment);
        while !gate.shut && moment != Moment::Now {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { break };
            gate = self.changed.wait_timeout(gate, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        gate.shut = true;
        gate.moment = None;
        while gate.inside > 0 {
            gate = self.changed.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets requests through again.
    pub(super) fn thaw(&self) {
        self.gate().shut = false;
        self.changed.notify_all();
    }

    /// A copy in memory. To be taken while it is frozen.
    pub(super) fn copy(&self) -> io::Result<backends::Memory> {
        let copy = backends::Memory::with_geometry(self.geometry);
        let mut buf = vec![0; COPY_BYTES];
        let mut offset = 0;
        while offset < self.geometry.size {
            let len = (self.geometry.size - offset).min(COPY_BYTES as u64);
            let part = &mut buf[..len as usize];
            self.inner.read_at(part, offset)?;
            // Pages of zeroes take no memory.
            if part.iter().any(|byte| *byte != 0) {
                copy.write_at(part, offset, WriteFlags::NONE)?;
            }
            offset += len;
        }
        Ok(copy)
    }

    /// Reads past the gate.
    pub(super) fn peek(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.inner.read_at(buf, offset)
    }

    fn pass<T>(&self, durable: bool, request: impl FnOnce(&dyn Backend) -> io::Result<T>) -> io::Result<T> {
        /// Leaves however the request ends.
        struct Inside<'a>(&'a Freezer);
        impl Drop for Inside<'_> {
            fn drop(&mut self) {
                let mut gate = self.0.gate();
                gate.inside -= 1;
                if gate.shut {
                    self.0.changed.notify_all();
                }
            }
        }
        let mut gate = self.gate();
        while gate.shut {
            gate = self.changed.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        gate.enter(durable);
        drop(gate);
        let _inside = Inside(self);
        request(self.inner.as_ref())
    }
}

impl Backend for Freezer {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.pass(false, |inner| inner.read_at(buf, offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        self.pass(flags.fua, |inner| inner.write_at(buf, offset, flags))
    }

    fn flush(&self) -> io::Result<()> {
        self.pass(true, Backend::flush)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.pass(false, |inner| inner.discard(offset, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.pass(flags.fua, |inner| inner.write_zeroes(offset, len, flags))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_what_was_there_and_stays_so() {
        let freezer = Freezer::new(Arc::new(backends::Memory::new(3 << 20)));
        freezer.write_at(&[7; 512], (2 << 20) + 512, WriteFlags::NONE).expect("writes");
        freezer.freeze(Moment::Now, Duration::ZERO);
        let copy = freezer.copy().expect("copies");
        freezer.thaw();
        freezer.write_at(&[8; 512], (2 << 20) + 512, WriteFlags::NONE).expect("writes");
        let mut found = [0; 512];
        copy.read_at(&mut found, (2 << 20) + 512).expect("reads");
        assert_eq!(found, [7; 512]);
        assert_eq!(copy.geometry(), freezer.geometry());
    }

    #[test]
    fn no_request_passes_while_it_is_frozen() {
        let freezer = Arc::new(Freezer::new(Arc::new(backends::Memory::new(1 << 20))));
        freezer.freeze(Moment::Now, Duration::ZERO);
        let other = Arc::clone(&freezer);
        let writer = std::thread::spawn(move || other.write_at(&[1; 512], 0, WriteFlags::NONE));
        std::thread::sleep(Duration::from_millis(30));
        let mut found = [9; 512];
        freezer.peek(&mut found, 0).expect("peeks");
        assert_eq!(found, [0; 512]);
        freezer.thaw();
        writer.join().expect("joins").expect("writes");
        freezer.peek(&mut found, 0).expect("peeks");
        assert_eq!(found, [1; 512]);
    }

    /// The gate shuts behind the request that was asked for, and not for ever if that one never comes.
    #[test]
    fn it_is_frozen_behind_the_request_that_was_asked_for() {
        let freezer = Arc::new(Freezer::new(Arc::new(backends::Memory::new(1 << 20))));
        // Two writes, a flush, two writes, a flush, …
        for (moment, last) in [(Moment::Requests(3), 2), (Moment::Requests(4), 4), (Moment::Durable(2), 5)] {
            let other = Arc::clone(&freezer);
            let freezing = std::thread::spawn(move || other.freeze(moment, Duration::from_secs(20)));
            while freezer.gate().moment.is_none() {
                std::thread::yield_now();
            }
            let other = Arc::clone(&freezer);
            let writer = std::thread::spawn(move || {
                for number in 1..=8 {
                    let request = || match number % 3 {
                        0 => other.flush(),
                        _ => other.write_at(&[number; 512], 0, WriteFlags::NONE),
                    };
                    request().expect("passes");
                }
            });
            freezing.join().expect("freezes");
            let mut found = [0; 512];
            freezer.peek(&mut found, 0).expect("peeks");
            assert_eq!(found, [last; 512], "{moment:?}");
            freezer.thaw();
            writer.join().expect("joins");
        }
        let begun = Instant::now();
        freezer.freeze(Moment::Requests(1), Duration::from_millis(30));
        assert!(begun.elapsed() >= Duration::from_millis(30) && freezer.gate().shut);
        freezer.thaw();
    }
}
