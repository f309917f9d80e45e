//! Passes over everything, outside the workers.

use std::io;

use super::worker::Worker;
use crate::aligned::AlignedBuf;
use crate::scenario::Failure;

/// Compares each worker's region, as `read` has it, with the worker's shadow. Returns how many bytes were compared.
pub(super) fn all(
    workers: &mut [Worker],
    what: &str,
    mut read: impl FnMut(&mut [u8], u64) -> io::Result<()>,
) -> Result<u64, Failure> {
    const CHUNK_BYTES: u64 = 1 << 20;
    let mut buf = AlignedBuf::zeroed(CHUNK_BYTES as usize);
    let mut bytes = 0;
    for worker in workers {
        let chunks: Vec<_> =
            worker.shadow().options().region.chunks(CHUNK_BYTES / ublkit_harness::SECTOR as u64).collect();
        for chunk in chunks {
            let buf = &mut buf[..chunk.len_bytes() as usize];
            read(buf, chunk.offset_bytes())
                .map_err(|error| Failure::io(format_args!("{what} at {}", chunk.offset_bytes()), &error))?;
            bytes += worker.shadow().verify(chunk, buf)?.bytes;
        }
    }
    Ok(bytes)
}
