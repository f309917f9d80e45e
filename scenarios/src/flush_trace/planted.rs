//! Bugs that `flush-trace` has to catch: servers that lie about time and order, and a recorder that forgets.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use ublkit::{Backend, Geometry, WriteFlags, ZeroFlags};

use crate::scenario::Plant;

/// How long a stalling server holds each request.
const STALL: Duration = Duration::from_millis(50);
/// One record in so many is lost.
pub(crate) const LOSE: u64 = 7;

/// A bug of the server's, or of the recorder's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(crate) enum Bug {
    /// A flush is acknowledged and goes nowhere; a FUA write becomes an ordinary one.
    FlushSwallowed,
    /// Writes are acknowledged and kept back; a flush goes to the backend before them.
    FlushBeforeWrites,
    /// A flush is acknowledged first and passed on with the next request.
    FlushLate,
    /// Each request is held for 50 ms before the backend gets it.
    ServerStall,
    /// One call in seven is not recorded, and not counted.
    RecordsLost,
}

/// The bugs, for the registry.
pub(crate) const PLANTS: &[Plant] = &[
    Plant {
        name: "flush-swallowed",
        about: "a server whose flush is a success that does nothing: fsync returns, and the backend was never asked",
        arguments: &["--plant", "flush-swallowed"],
    },
    Plant {
        name: "flush-before-writes",
        about: "a server with a write-behind cache that flush goes past",
        arguments: &["--plant", "flush-before-writes"],
    },
    Plant {
        name: "flush-late",
        about: "a server that acknowledges a flush when it has queued it",
        arguments: &["--plant", "flush-late"],
    },
    Plant {
        name: "server-stall",
        about: "a server that lets requests lie before it looks at them: a poll interval, a lock, a lost wake-up",
        arguments: &["--plant", "server-stall"],
    },
    Plant {
        name: "records-lost",
        about: "a trace with holes that do not show: a ring that wraps, a race for a slot",
        arguments: &["--plant", "records-lost"],
    },
];

/// A backend behind a server with a bug.
pub(crate) struct Buggy<B> {
    inner: B,
    bug: Bug,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Writes that were acknowledged, with their offsets.
    kept: Vec<(u64, Vec<u8>)>,
    flush_owed: bool,
}

impl<B: Backend> Buggy<B> {
    pub(crate) fn new(inner: B, bug: Bug) -> Self {
        Self { inner, bug, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Before every request but what is kept back.
    fn enter(&self) -> io::Result<()> {
        match self.bug {
            Bug::ServerStall => std::thread::sleep(STALL),
            Bug::FlushLate if std::mem::take(&mut self.state().flush_owed) => return self.inner.flush(),
            Bug::FlushBeforeWrites => return self.let_go(),
            _ => {}
        }
        Ok(())
    }

    /// Does what was kept back.
    fn let_go(&self) -> io::Result<()> {
        let mut state = self.state();
        state.kept.drain(..).try_for_each(|(offset, bytes)| self.inner.write_at(&bytes, offset, WriteFlags::NONE))
    }
}

impl<B: Backend> Backend for Buggy<B> {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.enter()?;
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        match self.bug {
            Bug::FlushBeforeWrites if !flags.fua => {
                self.state().kept.push((offset, buf.to_vec()));
                return Ok(());
            }
            Bug::FlushSwallowed => return self.inner.write_at(buf, offset, WriteFlags::NONE),
            _ => {}
        }
        self.enter()?;
        self.inner.write_at(buf, offset, flags)
    }

    fn flush(&self) -> io::Result<()> {
        match self.bug {
            Bug::FlushSwallowed => Ok(()),
            Bug::FlushLate => {
                self.state().flush_owed = true;
                Ok(())
            }
            Bug::FlushBeforeWrites => {
                self.inner.flush()?;
                self.let_go()
            }
            Bug::ServerStall | Bug::RecordsLost => {
                self.enter()?;
                self.inner.flush()
            }
        }
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.enter()?;
        self.inner.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.enter()?;
        self.inner.write_zeroes(offset, len, flags)
    }
}
