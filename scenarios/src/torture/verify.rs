//! Passes over everything, outside the workers.

use ublkit_harness::{Mismatch, SectorRange};

use super::worker::Worker;
use crate::aligned::AlignedBuf;
use crate::scenario::Failure;

const CHUNK_BYTES: u64 = 1 << 20;
/// How many wrong places a survey names.
const SURVEY_MOST: usize = 8;

fn chunks(worker: &mut Worker) -> Vec<SectorRange> {
    worker.shadow().options().region.chunks(CHUNK_BYTES / ublkit_harness::SECTOR as u64).collect()
}

/// Looks at every region for chunks that hold what they should not. What cannot be read is passed over.
pub(super) fn survey(
    workers: &mut [Worker],
    mut read: impl FnMut(&mut [u8], u64) -> Result<(), Failure>,
) -> Vec<Mismatch> {
    let mut buf = AlignedBuf::zeroed(CHUNK_BYTES as usize);
    let mut found = Vec::new();
    for worker in workers {
        for chunk in chunks(worker) {
            let buf = &mut buf[..chunk.len_bytes() as usize];
            if found.len() < SURVEY_MOST
                && read(buf, chunk.offset_bytes()).is_ok()
                && let Err(mismatch) = worker.shadow().verify(chunk, buf)
            {
                found.push(*mismatch);
            }
        }
    }
    found
}

/// Compares each worker's region, as `read` has it, with the worker's shadow. Returns how many bytes were compared.
pub(super) fn all(
    workers: &mut [Worker],
    mut read: impl FnMut(&mut [u8], u64) -> Result<(), Failure>,
) -> Result<u64, Failure> {
    let mut buf = AlignedBuf::zeroed(CHUNK_BYTES as usize);
    let mut bytes = 0;
    for worker in workers {
        for chunk in chunks(worker) {
            let buf = &mut buf[..chunk.len_bytes() as usize];
            read(buf, chunk.offset_bytes())?;
            bytes += worker.shadow().verify(chunk, buf)?.bytes;
        }
    }
    Ok(bytes)
}
