//! The kernel's words: commands, flags, structs and calls. No logic.

pub(crate) mod blkdev;
pub(crate) mod file;
