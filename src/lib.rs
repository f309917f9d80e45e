//! Serve Linux block devices from user space through ublk.

pub mod backend;
pub mod backends;
pub mod blkdev;
mod error;
pub mod holders;
mod sys;

pub use backend::{Backend, DiscardLimits, Geometry, SECTOR_SIZE, WriteFlags, ZeroFlags, result_code};
pub use error::{Error, ErrorKind, Result};
