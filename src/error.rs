//! The library's one error type.
//!
//! An [`Error`] has a [`kind`](Error::kind) to match on, the kernel's errno where one was involved, and a
//! message: a lowercase fragment that reads well after "failed to …" and says what to do where the reader can
//! do something.

use std::borrow::Cow;
use std::fmt;
use std::io;

use nix::errno::Errno;

/// What went wrong, coarsely enough to match on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A value given by the caller is outside what the driver accepts; nothing was done.
    InvalidInput,
    /// `/dev/ublk-control` does not exist: `ublk_drv` is not loaded, or this kernel has no ublk.
    DriverMissing,
    /// The caller lacks a privilege (ublk needs `CAP_SYS_ADMIN`, that is: root).
    PermissionDenied,
    /// The kernel knows ublk but not this command or feature.
    Unsupported,
    /// No device has this id.
    NotFound,
    /// The id is taken, or the device is held by somebody else.
    Busy,
    /// A deadline passed. What was waited for may still happen.
    TimedOut,
    /// The device, or one of its queues, is in a state in which this cannot be done.
    State,
    /// A queue thread ended early: it failed to start, hit an error it cannot serve past, or panicked.
    Queue,
    /// A kernel call failed in a way that no other kind describes; see [`Error::errno`].
    Kernel,
}

/// An error of the library. Cheap to clone, so that a device can hand out its first one again and again.
#[derive(Clone, Debug)]
pub struct Error {
    kind: ErrorKind,
    errno: Option<Errno>,
    message: Cow<'static, str>,
}

/// What the library's functions return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<Cow<'static, str>>) -> Self {
        Self { kind, errno: None, message: message.into() }
    }

    pub(crate) fn invalid(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::InvalidInput, message)
    }

    /// An error that carries the kernel's errno; the kind follows from it.
    pub(crate) fn kernel(errno: Errno, message: impl fmt::Display) -> Self {
        let kind = match errno {
            Errno::EPERM | Errno::EACCES => ErrorKind::PermissionDenied,
            Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::ENOTTY => ErrorKind::Unsupported,
            Errno::ENODEV | Errno::ENOENT | Errno::ENXIO => ErrorKind::NotFound,
            Errno::EBUSY | Errno::EEXIST => ErrorKind::Busy,
            Errno::ETIMEDOUT | Errno::ETIME => ErrorKind::TimedOut,
            _ => ErrorKind::Kernel,
        };
        Self { kind, errno: Some(errno), message: format!("{message}: {} ({errno:?})", errno.desc()).into() }
    }

    pub(crate) fn io(error: &io::Error, message: impl fmt::Display) -> Self {
        match error.raw_os_error() {
            Some(raw) => Self::kernel(Errno::from_raw(raw), message),
            None => Self::new(ErrorKind::Kernel, format!("{message}: {error}")),
        }
    }

    /// The same error with other words, for a caller that knows more about what to do.
    pub(crate) fn with_message(mut self, message: impl Into<Cow<'static, str>>) -> Self {
        self.message = message.into();
        self
    }

    pub(crate) fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// What went wrong, to match on.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The kernel's own errno (positive, as in `errno(3)`), where a kernel call was involved.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        self.errno.map(|errno| errno as i32)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match error.kind {
            ErrorKind::InvalidInput => io::ErrorKind::InvalidInput,
            ErrorKind::DriverMissing | ErrorKind::NotFound => io::ErrorKind::NotFound,
            ErrorKind::PermissionDenied => io::ErrorKind::PermissionDenied,
            ErrorKind::Unsupported => io::ErrorKind::Unsupported,
            ErrorKind::Busy => io::ErrorKind::ResourceBusy,
            ErrorKind::TimedOut => io::ErrorKind::TimedOut,
            _ => io::ErrorKind::Other,
        };
        io::Error::new(kind, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_errno_is_kept_and_gives_the_kind() {
        let error = Error::kernel(Errno::EBUSY, "delete device 3");
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert_eq!(error.errno(), Some(Errno::EBUSY as i32));
        assert_eq!(error.to_string(), "delete device 3: Device or resource busy (EBUSY)");
    }

    #[test]
    fn an_error_survives_the_trip_into_io_error() {
        let io = io::Error::from(Error::invalid("size is 0"));
        assert_eq!(io.kind(), io::ErrorKind::InvalidInput);
        assert_eq!(io.to_string(), "size is 0");
    }
}
