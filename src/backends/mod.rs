//! Backends that come with the library, each small enough to be read as a model for your own.

mod file;
mod memory;
mod null;
#[cfg(test)]
mod testing;

pub use file::{File, FileOptions};
pub use memory::Memory;
pub use null::Null;

use std::io;

use nix::errno::Errno;

/// Checks that a range lies in a device. The queue guarantees it; a caller that uses a backend directly may not.
fn check_range(offset: u64, len: u64, size: u64) -> io::Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(Errno::EINVAL.into()),
    }
}
