//! Errors by name, and what the kernel makes of each on its way to the application.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An error number of Linux. Prints and reads as its name, `ENOSPC`, or as a number if it has no name here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Errno(i32);

/// Those that the block layer lets through to the application (`blk_errors[]` in `block/blk-core.c`), which are also
/// listed at [`ublkit::backend::result_code`].
const KEPT: [(&str, i32); 17] = [
    ("EIO", 5),
    ("EAGAIN", 11),
    ("ENOMEM", 12),
    ("EBUSY", 16),
    ("ENODEV", 19),
    ("EINVAL", 22),
    ("ENOSPC", 28),
    ("EBADE", 52),
    ("ENODATA", 61),
    ("ETIME", 62),
    ("ENOLINK", 67),
    ("EOVERFLOW", 75),
    ("EILSEQ", 84),
    ("EOPNOTSUPP", 95),
    ("ETOOMANYREFS", 109),
    ("ETIMEDOUT", 110),
    ("EREMOTEIO", 121),
];

/// Some of those that arrive as `EIO`.
const TURNED: [(&str, i32); 16] = [
    ("EPERM", 1),
    ("ENOENT", 2),
    ("EINTR", 4),
    ("ENXIO", 6),
    ("EACCES", 13),
    ("EFAULT", 14),
    ("EFBIG", 27),
    ("EROFS", 30),
    ("EPIPE", 32),
    ("ECONNRESET", 104),
    ("ENOTCONN", 107),
    ("ESHUTDOWN", 108),
    ("ECONNREFUSED", 111),
    ("ESTALE", 116),
    ("EDQUOT", 122),
    ("ECANCELED", 125),
];

/// The largest number that is an errno to the kernel.
const MAX: i32 = 4095;

impl Errno {
    /// What every error without a better name is.
    pub const EIO: Self = Self(5);
    /// Try again: memory, a slot or a lock is not to be had at once.
    pub const EAGAIN: Self = Self(11);
    /// No space.
    pub const ENOSPC: Self = Self(28);
    /// The device cannot do that.
    pub const EOPNOTSUPP: Self = Self(95);

    /// The errno with this number, if it is one: 1 to 4095.
    #[must_use]
    pub const fn new(number: i32) -> Option<Self> {
        if number >= 1 && number <= MAX { Some(Self(number)) } else { None }
    }

    /// Its number, above 0.
    #[must_use]
    pub const fn number(self) -> i32 {
        self.0
    }

    /// Every errno that reaches the application as it is.
    pub fn kept() -> impl Iterator<Item = Self> {
        KEPT.into_iter().map(|(_, number)| Self(number))
    }

    /// Every errno with a name here.
    pub fn named() -> impl Iterator<Item = Self> {
        KEPT.into_iter().chain(TURNED).map(|(_, number)| Self(number))
    }

    /// As what the application sees a request fail that was completed with this errno.
    #[must_use]
    pub fn seen(self) -> Self {
        if KEPT.iter().any(|(_, number)| *number == self.0) { self } else { Self::EIO }
    }

    /// Its name, where it has one here.
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        KEPT.iter().chain(&TURNED).find(|(_, number)| *number == self.0).map(|(name, _)| *name)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.pad(name),
            None => self.0.fmt(f),
        }
    }
}

/// A name that is no errno's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownErrno(String);

impl fmt::Display for UnknownErrno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is no errno: it takes a number from 1 to {MAX}, or one of", self.0)?;
        KEPT.iter().chain(&TURNED).try_for_each(|(name, _)| write!(f, " {name}"))
    }
}

impl std::error::Error for UnknownErrno {}

/// Upper and lower case are the same.
impl FromStr for Errno {
    type Err = UnknownErrno;

    fn from_str(text: &str) -> Result<Self, UnknownErrno> {
        KEPT.iter()
            .chain(&TURNED)
            .find(|(name, _)| name.eq_ignore_ascii_case(text))
            .map(|(_, number)| Self(*number))
            .or_else(|| text.parse().ok().and_then(Self::new))
            .ok_or_else(|| UnknownErrno(text.to_owned()))
    }
}

impl From<Errno> for String {
    fn from(errno: Errno) -> Self {
        errno.to_string()
    }
}

impl TryFrom<String> for Errno {
    type Error = UnknownErrno;

    fn try_from(text: String) -> Result<Self, UnknownErrno> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_round_trip() {
        for errno in Errno::named() {
            assert_eq!(errno.to_string().parse(), Ok(errno));
            assert_eq!(errno.to_string().to_lowercase().parse(), Ok(errno));
            // The names are right as far as the system that the tests run on can say.
            assert_ne!(std::io::Error::from_raw_os_error(errno.number()).to_string(), "");
            assert_eq!(Errno::new(errno.number()), Some(errno));
        }
        assert_eq!("4000".parse(), Ok(Errno(4000)));
        assert_eq!(Errno(4000).to_string(), "4000");
        for wrong in ["0", "-5", "4096", "EWRONG", ""] {
            assert!(wrong.parse::<Errno>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_the_block_layer_does_not_know_arrives_as_eio() {
        assert_eq!(Errno::kept().count(), 17);
        assert!(Errno::kept().all(|errno| errno.seen() == errno));
        assert!(TURNED.iter().all(|(_, number)| Errno(*number).seen() == Errno::EIO));
        assert_eq!(Errno(4000).seen(), Errno::EIO);
    }

    #[test]
    fn numbers_are_those_of_the_system() {
        use std::io::{Error, ErrorKind};
        for (name, kind) in [
            ("EPERM", ErrorKind::PermissionDenied),
            ("ENOENT", ErrorKind::NotFound),
            ("EAGAIN", ErrorKind::WouldBlock),
            ("ENOMEM", ErrorKind::OutOfMemory),
            ("EBUSY", ErrorKind::ResourceBusy),
            ("EINVAL", ErrorKind::InvalidInput),
            ("ENOSPC", ErrorKind::StorageFull),
            ("EROFS", ErrorKind::ReadOnlyFilesystem),
            ("EPIPE", ErrorKind::BrokenPipe),
            ("ETIMEDOUT", ErrorKind::TimedOut),
            ("EOPNOTSUPP", ErrorKind::Unsupported),
            ("ESTALE", ErrorKind::StaleNetworkFileHandle),
            ("EDQUOT", ErrorKind::QuotaExceeded),
            ("ECONNRESET", ErrorKind::ConnectionReset),
            ("ENOTCONN", ErrorKind::NotConnected),
        ] {
            let errno: Errno = name.parse().expect("a name");
            assert_eq!(Error::from_raw_os_error(errno.number()).kind(), kind, "{name}");
        }
    }
}
