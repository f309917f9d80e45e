//! Errors that the kernel drops by rights.

use crate::fault::Errno;
use crate::plan::OpKind;

/// An error of a call that the operation behind it need not fail with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowance {
    /// The call that fails.
    pub call: OpKind,
    /// With which errno, as the application would see it; any if there is none.
    pub errno: Option<Errno>,
    /// Where the error goes.
    pub why: &'static str,
}

const fn allow(call: OpKind, errno: Option<Errno>, why: &'static str) -> Allowance {
    Allowance { call, errno, why }
}

const AGAIN: &str =
    "io_uring submits again what failed with EAGAIN or, on newer kernels, EOPNOTSUPP, until it does not";

/// What Linux drops between the driver and an application.
pub const KERNEL: &[Allowance] = &[
    allow(
        OpKind::Flush,
        Some(Errno::EOPNOTSUPP),
        "blkdev_fsync() takes a device that cannot flush for one that need not",
    ),
    allow(OpKind::Discard, Some(Errno::EOPNOTSUPP), "a discard is a hint: blkdev_issue_discard() reports success"),
    allow(OpKind::WriteZeroes, None, "blkdev_issue_zeroout() writes zeroes instead; before 6.11 whatever the error"),
    allow(OpKind::Read, Some(Errno::EAGAIN), AGAIN),
    allow(OpKind::Write, Some(Errno::EAGAIN), AGAIN),
    allow(OpKind::WriteFua, Some(Errno::EAGAIN), AGAIN),
    allow(OpKind::Read, Some(Errno::EOPNOTSUPP), AGAIN),
    allow(OpKind::Write, Some(Errno::EOPNOTSUPP), AGAIN),
    allow(OpKind::WriteFua, Some(Errno::EOPNOTSUPP), AGAIN),
];

impl Allowance {
    /// Whether it is for calls of `kind` that fail with `errno`.
    #[must_use]
    pub fn allows(&self, kind: OpKind, errno: Errno) -> bool {
        self.call == kind && self.errno.is_none_or(|own| own == errno)
    }
}
