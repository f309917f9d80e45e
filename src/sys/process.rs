//! Calls about this process and its threads that nix does not wrap.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicI32, Ordering};

use nix::errno::Errno;
use nix::libc;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// `PR_SET_IO_FLUSHER` (`linux/prctl.h`).
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Tells the kernel that the calling thread serves I/O, so that memory reclaim on its behalf does not wait for the
/// very device it serves. Needs `CAP_SYS_RESOURCE`.
pub(crate) fn set_io_flusher() -> io::Result<()> {
    // SAFETY: takes four integers and touches no memory.
    Errno::result(unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1u64, 0u64, 0u64, 0u64) })?;
    Ok(())
}

/// The eventfd that the signal handler writes, or -1.
static SIGNALLED: AtomicI32 = AtomicI32::new(-1);
/// The last signal the handler saw, or 0.
static LAST: AtomicI32 = AtomicI32::new(0);

extern "C" fn on_signal(number: libc::c_int) {
    LAST.store(number, Ordering::SeqCst);
    let fd = SIGNALLED.load(Ordering::SeqCst);
    if fd >= 0 {
        let one = 1u64;
        // SAFETY: write(2) is async-signal-safe; the buffer is a local of 8 bytes. The descriptor is non-blocking, and open:
        // it is taken out of `SIGNALLED` before it is closed. errno is restored, for the code that was interrupted.
        unsafe {
            let errno = *libc::__errno_location();
            libc::write(fd, (&raw const one).cast(), size_of::<u64>());
            *libc::__errno_location() = errno;
        }
    }
}

/// Catches signals for as long as it lives, then puts the earlier handlers back.
#[derive(Debug)]
pub(crate) struct SignalTrap {
    event: EventFd,
    earlier: Vec<(Signal, SigAction)>,
}

impl SignalTrap {
    /// Catches `signals`. One trap at a time: a second one is refused with `EBUSY`.
    pub(crate) fn new(signals: &[Signal]) -> io::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        LAST.store(0, Ordering::SeqCst);
        if SIGNALLED.compare_exchange(-1, event.as_raw_fd(), Ordering::SeqCst, Ordering::SeqCst).is_err() {
            return Err(Errno::EBUSY.into());
        }
        let mut this = Self { event, earlier: Vec::new() };
        let action = SigAction::new(SigHandler::Handler(on_signal), SaFlags::SA_RESTART, SigSet::empty());
        for &signal in signals {
            // SAFETY: `on_signal` only does what a signal handler may do.
            let earlier = unsafe { sigaction(signal, &action)? };
            this.earlier.push((signal, earlier));
        }
        Ok(this)
    }

    /// Readable once a signal came.
    pub(crate) fn event(&self) -> &EventFd {
        &self.event
    }

    /// The last signal that came, if any.
    #[expect(clippy::unused_self, reason = "there is a last signal only while a trap is set")]
    pub(crate) fn last(&self) -> Option<Signal> {
        Signal::try_from(LAST.load(Ordering::SeqCst)).ok()
    }
}

impl Drop for SignalTrap {
    fn drop(&mut self) {
        for (signal, action) in self.earlier.drain(..) {
            // SAFETY: puts back what was there before; a handler of somebody else's is theirs to answer for.
            let _ = unsafe { sigaction(signal, &action) };
        }
        SIGNALLED.store(-1, Ordering::SeqCst);
    }
}
