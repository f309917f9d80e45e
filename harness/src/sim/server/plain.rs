//! The right server: a queue loop with a blocking backend.

use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use ublkit::{Backend, Operation, WriteFlags, ZeroFlags, result_code};

use super::{Buffers, Commit, Server, Work};
use crate::seed::SeededRng;

/// How far from the front a request is taken at most, where completions stray.
const STRAY: u64 = 64;

const EOPNOTSUPP: i32 = 95;

/// A queue loop that does one blocking call a step, and commits what it returned.
pub struct PlainServer {
    backend: Arc<dyn Backend>,
    /// From 0 to 100: how often a request overtakes another.
    reorder: u8,
    pending: Vec<Work>,
    /// The requests up to this one are gone from `pending`.
    head: usize,
}

impl PlainServer {
    /// A server of `backend`. The higher `reorder`, from 0 to 100, the more often a request overtakes earlier ones.
    #[must_use]
    pub fn new(backend: Arc<dyn Backend>, reorder: u8) -> Self {
        Self { backend, reorder, pending: Vec::new(), head: 0 }
    }

    fn next(&mut self, rng: &mut SeededRng) -> Option<Work> {
        let waiting = self.pending.len() - self.head;
        let overtakes = waiting > 1 && rng.chance(u64::from(self.reorder), 100);
        let at = self.head + if overtakes { rng.below(STRAY.min(waiting as u64)) as usize } else { 0 };
        let work = *self.pending.get(at)?;
        // Those that were overtaken keep their order.
        self.pending.copy_within(self.head..at, self.head + 1);
        self.head += 1;
        if self.head == self.pending.len() {
            self.pending.clear();
            self.head = 0;
        }
        Some(work)
    }
}

impl Server for PlainServer {
    fn take(&mut self, work: Work, _buffers: &mut Buffers) {
        if self.head > 0 && self.pending.len() == self.pending.capacity() {
            self.pending.drain(..self.head);
            self.head = 0;
        }
        self.pending.push(work);
    }

    fn step(&mut self, buffers: &mut Buffers, rng: &mut SeededRng, commits: &mut Vec<Commit>) {
        if let Some(work) = self.next(rng) {
            commits.push(serve(&*self.backend, work, buffers));
        }
    }

    fn pending(&self) -> usize {
        self.pending.len() - self.head
    }
}

impl fmt::Debug for PlainServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PlainServer").field("pending", &&self.pending[self.head..]).finish_non_exhaustive()
    }
}

/// Does what a request asks, on its slot's buffer, and says how it ended. A panic of the backend is `EIO`.
pub fn serve(backend: &dyn Backend, work: Work, buffers: &mut Buffers) -> Commit {
    let Work { tag, operation, offset, len, fua, no_unmap } = work;
    let call = || match operation {
        Operation::Read => backend.read_at(&mut buffers.get_mut(tag)[..len as usize], offset),
        Operation::Write => {
            let flags = if fua { WriteFlags::FUA } else { WriteFlags::NONE };
            backend.write_at(&buffers.get_mut(tag)[..len as usize], offset, flags)
        }
        Operation::Flush => backend.flush(),
        Operation::Discard => backend.discard(offset, len),
        Operation::WriteZeroes => {
            let mut flags = if no_unmap { ZeroFlags::NO_UNMAP } else { ZeroFlags::NONE };
            flags.fua = fua;
            backend.write_zeroes(offset, len, flags)
        }
        _ => Err(io::Error::from_raw_os_error(EOPNOTSUPP)),
    };
    // What the buffer holds after a panic is never looked at: the request fails.
    let result = catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|_panic| Err(io::ErrorKind::Other.into()));
    let result = match result {
        Ok(()) => (len & i32::MAX as u64) as i32,
        Err(error) => result_code(&error),
    };
    Commit { tag, result }
}
