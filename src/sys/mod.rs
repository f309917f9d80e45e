//! The kernel's words: structures, commands, flags, and the calls that need `unsafe`. No logic.

pub(crate) mod blkdev;
pub(crate) mod file;
pub(crate) mod map;
pub(crate) mod process;
pub mod ublk;
pub(crate) mod uring;
