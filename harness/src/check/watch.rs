//! Looking over a backend's shoulder: what it says when it fails.

use std::any::Any;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ublkit::{Backend, Geometry, WriteFlags, ZeroFlags};

use crate::range::SectorRange;

/// How many remarks of anyone's are kept.
const KEPT: usize = 3;

/// What was said during a run. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(super) struct Remarks(Arc<Mutex<Said>>);

/// The last that anyone had to say.
#[derive(Clone, Debug, Default)]
pub(super) struct Said {
    /// A backend, or whoever opened it.
    pub(super) backend: Vec<String>,
    /// The medium: calls that it had fail.
    pub(super) medium: Vec<String>,
}

impl Remarks {
    pub(super) fn add(&self, remark: String) {
        keep(&mut self.said().backend, remark);
    }

    pub(super) fn add_of_medium(&self, remark: String) {
        keep(&mut self.said().medium, remark);
    }

    pub(super) fn take(&self) -> Said {
        std::mem::take(&mut *self.said())
    }

    fn said(&self) -> MutexGuard<'_, Said> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn keep(remarks: &mut Vec<String>, remark: String) {
    if remarks.len() == KEPT {
        remarks.remove(0);
    }
    remarks.push(remark);
}

/// What a panic said.
pub(super) fn panic_words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    text.unwrap_or("without words").to_owned()
}

/// A backend whose errors and panics are written down.
pub(super) struct Watched {
    inner: Arc<dyn Backend>,
    remarks: Remarks,
}

impl Watched {
    pub(super) fn new(inner: Arc<dyn Backend>, remarks: Remarks) -> Self {
        Self { inner, remarks }
    }

    fn call(&self, what: &str, offset: u64, len: u64, call: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let (error, words) = match catch_unwind(AssertUnwindSafe(call)) {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => {
                let words = format!("failed: {error}");
                (error, words)
            }
            Err(panic) => (io::ErrorKind::Other.into(), format!("panicked: {}", panic_words(&*panic))),
        };
        let sectors = SectorRange::new(offset / 512, len / 512);
        let place = if what == "flush" { String::new() } else { format!(" of sectors {sectors}") };
        self.remarks.add(format!("{what}{place} {words}"));
        Err(error)
    }
}

impl Backend for Watched {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.call("read_at", offset, buf.len() as u64, || self.inner.read_at(buf, offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        self.call("write_at", offset, buf.len() as u64, || self.inner.write_at(buf, offset, flags))
    }

    fn flush(&self) -> io::Result<()> {
        self.call("flush", 0, 0, || self.inner.flush())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.call("discard", offset, len, || self.inner.discard(offset, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.call("write_zeroes", offset, len, || self.inner.write_zeroes(offset, len, flags))
    }
}

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched").field("remarks", &self.remarks).finish_non_exhaustive()
    }
}
