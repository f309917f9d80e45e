//! A queue's data path without a driver, to count its instructions.
//!
//! `/dev/null` answers every io_uring command with 0, which is what the ublk driver answers when a request has come. With
//! it in place of the character device, and plain memory in place of the descriptors that the driver maps, a queue fetches,
//! dispatches and commits exactly as on a real device, on any kernel and without root. Nothing is said about the
//! kernel's share: commands complete while they are submitted, and no data moves.

use std::fs::OpenOptions;
use std::sync::Arc;

use crate::backend::{Backend, SECTOR_SIZE};
use crate::error::{Error, Result};
use crate::queue::{Handler, Queue};
use crate::ring::descriptors::Descriptors;
use crate::ring::loans::Shared;
use crate::ring::tags::{AtEnd, Copying, Tags};
use crate::stats::{QueueShared, QueueStats};
use crate::sys::ublk::{self, IoDesc};
use crate::workers::BackendHandler;

/// Serves at least `requests` reads (or writes) of `bytes` bytes at offset 0 at queue depth `depth`.
///
/// # Errors
/// `/dev/null`, the ring or the memory could not be had.
pub fn serve(depth: u16, write: bool, bytes: u32, requests: u64, handler: impl Handler) -> Result<QueueStats> {
    let null = OpenOptions::new().read(true).write(true).open("/dev/null");
    let null = Arc::new(null.map_err(|error| Error::io(&error, "open /dev/null"))?);
    let io = |error: std::io::Error| Error::io(&error, "set up a queue without a driver");
    let op_flags = if write { ublk::IO_OP_WRITE } else { ublk::IO_OP_READ };
    let nr_sectors = bytes / SECTOR_SIZE as u32;
    let descriptor = IoDesc { op_flags, nr_sectors, start_sector: 0, addr: 0 };
    let descriptors = Descriptors::pretended(depth, descriptor).map_err(io)?;
    let buffers = Arc::new(Shared::new(depth, bytes.max(1) as usize).map_err(io)?);
    let tags = Tags::new(0, depth, Copying::Driver, AtEnd::Leave, null, descriptors, buffers).map_err(io)?;
    let shared = Arc::new(QueueShared::new(0, Arc::new(|_| {})));
    let mut queue = Queue::new(tags, Arc::clone(&shared), handler);
    queue.fetch()?;
    while shared.snapshot().requests < requests && queue.turn()? {}
    Ok(shared.snapshot())
}

/// As [`serve`], with a [`Backend`] called inline.
///
/// # Errors
/// As [`serve`].
pub fn serve_backend<B: Backend>(
    depth: u16,
    write: bool,
    bytes: u32,
    requests: u64,
    backend: B,
) -> Result<QueueStats> {
    serve(depth, write, bytes, requests, BackendHandler::new(Arc::new(backend), None, depth))
}
