//! Passes over everything, outside the workers.

use ublkit_harness::{Mismatch, Outcome, SectorRange};

use super::book::Book;
use crate::aligned::AlignedBuf;
use crate::scenario::Failure;

const CHUNK_BYTES: u64 = 1 << 20;
/// How many wrong places a survey names.
const SURVEY_MOST: usize = 8;

fn chunks(area: SectorRange) -> impl Iterator<Item = SectorRange> {
    area.chunks(CHUNK_BYTES / ublkit_harness::SECTOR as u64)
}

/// Looks at every region for chunks that hold what they should not. What cannot be read is passed over.
pub(crate) fn survey<'a>(
    books: impl IntoIterator<Item = &'a Book>,
    mut read: impl FnMut(&mut [u8], u64) -> Result<(), Failure>,
) -> Vec<Mismatch> {
    let mut buf = AlignedBuf::zeroed(CHUNK_BYTES as usize);
    let mut found = Vec::new();
    for book in books {
        for chunk in chunks(book.region()) {
            let buf = &mut buf[..chunk.len_bytes() as usize];
            if found.len() >= SURVEY_MOST {
                return found;
            }
            let entry = book.begin_pass(0, chunk);
            if read(buf, chunk.offset_bytes()).is_err() {
                book.end(entry, Outcome::Failed);
            } else if let Err(mismatch) = book.end_read(entry, buf) {
                found.push(*mismatch);
            }
        }
    }
    found
}

/// Compares each region, as `read` has it, with its book. Returns how many bytes were compared.
pub(crate) fn all<'a>(
    books: impl IntoIterator<Item = &'a Book>,
    mut read: impl FnMut(&mut [u8], u64) -> Result<(), Failure>,
) -> Result<u64, Failure> {
    let mut bytes = 0;
    for book in books {
        bytes += areas(book, &[book.region()], &mut read)?;
    }
    Ok(bytes)
}

/// As [`all`], with parts of a region alone.
pub(crate) fn areas(
    book: &Book,
    areas: &[SectorRange],
    mut read: impl FnMut(&mut [u8], u64) -> Result<(), Failure>,
) -> Result<u64, Failure> {
    let mut buf = AlignedBuf::zeroed(CHUNK_BYTES as usize);
    let mut bytes = 0;
    for chunk in areas.iter().flat_map(|area| chunks(*area)) {
        let buf = &mut buf[..chunk.len_bytes() as usize];
        let entry = book.begin_pass(0, chunk);
        read(buf, chunk.offset_bytes())?;
        bytes += book.end_read(entry, buf)?.bytes;
    }
    Ok(bytes)
}
