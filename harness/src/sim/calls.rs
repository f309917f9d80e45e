//! Which calls reach the storage, and when.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use ublkit::{Backend, Geometry, WriteFlags, ZeroFlags, result_code};

use crate::plan::OpKind;
use crate::range::SectorRange;
use crate::stamp::Stamp;

/// A call that ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// What was asked.
    pub kind: OpKind,
    /// Of which sectors.
    pub range: SectorRange,
    /// When it began.
    pub began: Stamp,
    /// When it ended.
    pub ended: Stamp,
    /// The errno that it failed with.
    pub errno: Option<i32>,
}

/// The calls since someone looked, and the clock that they are stamped by. Clones are the same log.
#[derive(Clone, Debug, Default)]
pub struct CallLog(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    now: Stamp,
    calls: Vec<Call>,
    off: bool,
}

impl CallLog {
    /// The next moment.
    #[must_use]
    pub fn tick(&self) -> Stamp {
        self.with(|inner| {
            inner.now += 1;
            inner.now
        })
    }

    /// Keeps no calls from now on: nobody looks at them.
    pub fn switch_off(&self) {
        self.with(|inner| inner.off = true);
    }

    /// Hands over the calls that ended since the last time.
    pub fn drain(&self, mut each: impl FnMut(Call)) {
        self.with(|inner| inner.calls.drain(..).for_each(&mut each));
    }

    fn with<T>(&self, work: impl FnOnce(&mut Inner) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A backend whose calls are logged.
#[derive(Debug)]
pub struct ObservedCalls<B> {
    inner: B,
    log: CallLog,
}

impl<B> ObservedCalls<B> {
    /// Watches `inner`.
    #[must_use]
    pub fn new(inner: B, log: CallLog) -> Self {
        Self { inner, log }
    }

    fn call(&self, kind: OpKind, offset: u64, len: u64, call: impl FnOnce(&B) -> io::Result<()>) -> io::Result<()> {
        let began = self.log.tick();
        let result = call(&self.inner);
        let errno = result.as_ref().err().map(|error| -result_code(error));
        self.log.with(|inner| {
            inner.now += 1;
            if !inner.off {
                let range = SectorRange::new(offset / 512, len / 512);
                inner.calls.push(Call { kind, range, began, ended: inner.now, errno });
            }
        });
        result
    }
}

impl<B: Backend> Backend for ObservedCalls<B> {
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
