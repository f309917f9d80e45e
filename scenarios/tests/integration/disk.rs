//! The backend of the trials: a sparse disk whose calls are noted, and can be held, failed or made to panic.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ublkit::{Backend, Geometry, WriteFlags, ZeroFlags};

const PAGE: u64 = 4096;

/// What a call was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Op {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

/// One call of the backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) op: Op,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) fua: bool,
    pub(crate) no_unmap: bool,
    /// Name of the thread that made it.
    pub(crate) thread: String,
}

type Hook = Arc<dyn Fn(&Call) -> io::Result<()> + Send + Sync>;

/// A disk in memory. Not the library's own, so that a mistake there is not repeated here.
pub(crate) struct Disk {
    geometry: Geometry,
    pages: Mutex<HashMap<u64, Box<[u8; PAGE as usize]>>>,
    calls: Mutex<Vec<Call>>,
    hook: Mutex<Option<Hook>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Disk {
    pub(crate) fn new(geometry: Geometry) -> Arc<Self> {
        Arc::new(Self { geometry, pages: Mutex::default(), calls: Mutex::default(), hook: Mutex::default() })
    }

    /// Runs before each call is applied and outside any lock: it may block, fail or panic.
    pub(crate) fn hook(&self, hook: impl Fn(&Call) -> io::Result<()> + Send + Sync + 'static) {
        *lock(&self.hook) = Some(Arc::new(hook));
    }

    pub(crate) fn unhook(&self) {
        *lock(&self.hook) = None;
    }

    /// Every call since the start or the last [`forget`](Self::forget), in the order in which they came in.
    pub(crate) fn calls(&self) -> Vec<Call> {
        lock(&self.calls).clone()
    }

    /// Those of one kind. Reads are not only the trial's own: udev looks at every new disk.
    pub(crate) fn calls_of(&self, op: Op) -> Vec<Call> {
        self.calls().into_iter().filter(|call| call.op == op).collect()
    }

    /// All but the reads.
    pub(crate) fn changes(&self) -> Vec<Call> {
        self.calls().into_iter().filter(|call| call.op != Op::Read).collect()
    }

    pub(crate) fn forget(&self) {
        lock(&self.calls).clear();
    }

    /// What is stored.
    pub(crate) fn stored(&self, offset: u64, len: usize) -> Vec<u8> {
        let pages = lock(&self.pages);
        let mut data = vec![0; len];
        for_pages(offset, len, |page, at, range| {
            if let Some(page) = pages.get(&page) {
                let part = range.len();
                data[range].copy_from_slice(&page[at..at + part]);
            }
        });
        data
    }

    /// Changes what is stored, behind the device's back.
    pub(crate) fn store(&self, offset: u64, data: &[u8]) {
        let mut pages = lock(&self.pages);
        for_pages(offset, data.len(), |page, at, range| {
            let page = pages.entry(page).or_insert_with(|| Box::new([0; PAGE as usize]));
            page[at..at + range.len()].copy_from_slice(&data[range]);
        });
    }

    fn zero(&self, offset: u64, len: u64) {
        let mut pages = lock(&self.pages);
        let touched: Vec<u64> =
            pages.keys().copied().filter(|page| page * PAGE < offset + len && (page + 1) * PAGE > offset).collect();
        for page in touched {
            let start = offset.saturating_sub(page * PAGE).min(PAGE) as usize;
            let end = (offset + len - page * PAGE).min(PAGE) as usize;
            if let Some(page) = pages.get_mut(&page) {
                page[start..end].fill(0);
            }
        }
    }

    fn called(&self, op: Op, offset: u64, len: u64, fua: bool, no_unmap: bool) -> io::Result<()> {
        let thread = std::thread::current().name().unwrap_or_default().to_owned();
        let call = Call { op, offset, len, fua, no_unmap, thread };
        lock(&self.calls).push(call.clone());
        let size = self.geometry.size;
        assert!(offset.checked_add(len).is_some_and(|end| end <= size), "{call:?} is beyond {size}");
        let hook = lock(&self.hook).clone();
        hook.map_or(Ok(()), |hook| hook(&call))
    }
}

/// Cuts a range at page borders: page number, offset within it, and the part of the caller's buffer.
fn for_pages(offset: u64, len: usize, mut each: impl FnMut(u64, usize, std::ops::Range<usize>)) {
    let mut done = 0;
    while done < len {
        let at = offset + done as u64;
        let within = (at % PAGE) as usize;
        let part = (PAGE as usize - within).min(len - done);
        each(at / PAGE, within, done..done + part);
        done += part;
    }
}

impl Backend for Disk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.called(Op::Read, offset, buf.len() as u64, false, false)?;
        buf.copy_from_slice(&self.stored(offset, buf.len()));
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        self.called(Op::Write, offset, buf.len() as u64, flags.fua, false)?;
        self.store(offset, buf);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.called(Op::Flush, 0, 0, false, false)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.called(Op::Discard, offset, len, false, false)?;
        self.zero(offset, len);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.called(Op::WriteZeroes, offset, len, flags.fua, flags.no_unmap)?;
        self.zero(offset, len);
        Ok(())
    }
}
