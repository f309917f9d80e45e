//! The place where what serves a device is plugged in, and from which it can be torn while requests are under way.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use nix::libc;
use ublkit::{Backend, Geometry, WriteFlags, ZeroFlags};

/// A backend that can be exchanged.
pub(super) struct Socket {
    geometry: Geometry,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// None for a moment only, while it is dead.
    plugged: Option<Arc<dyn Backend>>,
    dead: bool,
    inside: usize,
}

impl Socket {
    pub(super) fn new(plugged: Arc<dyn Backend>) -> Self {
        let geometry = plugged.geometry();
        Self {
            geometry,
            state: Mutex::new(State { plugged: Some(plugged), dead: false, inside: 0 }),
            changed: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails every request from now on, and when none is inside any more, plugs in what `next` makes. It is used once the
    /// socket is alive again.
    pub(super) fn kill(&self, next: impl FnOnce() -> Arc<dyn Backend>) {
        let mut state = self.state();
        state.dead = true;
        while state.inside > 0 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        // First the old one ends, then the new one begins.
        state.plugged = None;
        state.plugged = Some(next());
    }

    /// Serves requests again.
    pub(super) fn revive(&self) {
        self.state().dead = false;
    }

    fn pass(&self, request: impl FnOnce(&dyn Backend) -> io::Result<()>) -> io::Result<()> {
        /// Leaves however the request ends.
        struct Inside<'a>(&'a Socket);
        impl Drop for Inside<'_> {
            fn drop(&mut self) {
                let mut state = self.0.state();
                state.inside -= 1;
                if state.dead {
                    self.0.changed.notify_all();
                }
            }
        }
        let mut state = self.state();
        let plugged = match &state.plugged {
            Some(plugged) if !state.dead => Arc::clone(plugged),
            _ => return Err(io::Error::from_raw_os_error(libc::EIO)),
        };
        state.inside += 1;
        drop(state);
        // In this order: who has left holds nothing any more.
        let _inside = Inside(self);
        let plugged = plugged;
        request(plugged.as_ref())
    }
}

impl Backend for Socket {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.pass(|plugged| plugged.read_at(buf, offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        self.pass(|plugged| plugged.write_at(buf, offset, flags))
    }

    fn flush(&self) -> io::Result<()> {
        self.pass(Backend::flush)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.pass(|plugged| plugged.discard(offset, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.pass(|plugged| plugged.write_zeroes(offset, len, flags))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ublkit::backends::Memory;

    #[test]
    fn what_was_plugged_in_is_gone_with_what_it_kept() {
        let first = Arc::new(Memory::new(1 << 20));
        let socket = Socket::new(Arc::clone(&first) as _);
        socket.write_at(&[1; 512], 0, WriteFlags::NONE).expect("writes");
        socket.kill(|| Arc::new(Memory::new(1 << 20)));
        let mut found = [9; 512];
        let error = socket.read_at(&mut found, 0).expect_err("dead");
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        socket.revive();
        socket.read_at(&mut found, 0).expect("reads");
        assert_eq!(found, [0; 512]);
        assert_eq!(Arc::strong_count(&first), 1);
    }
}
