//! What reached the storage, and when: for whoever compares it with what applications were told.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use ublkit::{Backend, Geometry, WriteFlags, ZeroFlags};
use ublkit_harness::fault::Injection;
use ublkit_harness::{OpKind, SECTOR, SectorRange};

use crate::clock::nanoseconds;

/// A call of the storage that ended.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Witnessed {
    pub(crate) kind: OpKind,
    pub(crate) range: SectorRange,
    /// When it began and ended; see [`nanoseconds`].
    pub(crate) began: u64,
    pub(crate) ended: u64,
    pub(crate) ok: bool,
}

/// What happened at a storage since someone asked.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Testimony {
    pub(crate) calls: Vec<Witnessed>,
    pub(crate) injections: Vec<Injection>,
}

/// Calls that were seen. Clones are the same notes.
#[derive(Clone, Default)]
pub(super) struct Notes(Arc<Mutex<Vec<Witnessed>>>);

impl Notes {
    pub(super) fn take(&self) -> Vec<Witnessed> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A backend whose calls are noted: those that make something durable, or all that write.
pub(super) struct Witness<B> {
    inner: B,
    notes: Notes,
    all_writes: bool,
}

impl<B: Backend> Witness<B> {
    pub(super) const fn new(inner: B, notes: Notes, all_writes: bool) -> Self {
        Self { inner, notes, all_writes }
    }

    fn note(&self, kind: OpKind, offset: u64, len: u64, call: impl FnOnce(&B) -> io::Result<()>) -> io::Result<()> {
        let wanted = self.all_writes || matches!(kind, OpKind::Flush | OpKind::WriteFua);
        if !wanted {
            return call(&self.inner);
        }
        let began = nanoseconds();
        let result = call(&self.inner);
        let range = SectorRange::new(offset / SECTOR as u64, len / SECTOR as u64);
        let ended = nanoseconds();
        let seen = Witnessed { kind, range, began, ended, ok: result.is_ok() };
        self.notes.0.lock().unwrap_or_else(PoisonError::into_inner).push(seen);
        result
    }
}

impl<B: Backend> Backend for Witness<B> {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        let kind = if flags.fua { OpKind::WriteFua } else { OpKind::Write };
        self.note(kind, offset, buf.len() as u64, |inner| inner.write_at(buf, offset, flags))
    }

    fn flush(&self) -> io::Result<()> {
        self.note(OpKind::Flush, 0, 0, Backend::flush)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.note(OpKind::WriteZeroes, offset, len, |inner| inner.write_zeroes(offset, len, flags))
    }
}
