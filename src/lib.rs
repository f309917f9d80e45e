//! Serve Linux block devices from user space through ublk.

pub mod backend;
mod error;

pub use backend::{Backend, DiscardLimits, Geometry, SECTOR_SIZE, WriteFlags, ZeroFlags, result_code};
pub use error::{Error, ErrorKind, Result};
