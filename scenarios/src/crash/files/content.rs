//! What files hold: every sixteen bytes name the file, the write and the place that they belong to.

use std::fmt;

/// The unit in which files are written and judged, in bytes. No larger than what a power cut leaves whole.
pub(super) const CELL: usize = 512;

/// How many bytes name themselves.
const RECORD: usize = 16;

/// The generation of what was never written, or was cut off and is back: zeroes.
pub(super) const ZERO: u32 = 0;

/// The content of one run's files.
#[derive(Clone, Copy, Debug)]
pub(super) struct Content {
    /// What tells this run's bytes from another's.
    key: u64,
}

/// Where sixteen bytes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Origin {
    pub(super) file: u32,
    pub(super) generation: u32,
    pub(super) offset: u64,
}

/// What a cell holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// What one write of this file left there, or [`ZERO`].
    Generation(u32),
    /// Anything else: runs of bytes that have one origin, or none, each with where it begins in the cell.
    Foreign(Vec<(usize, Piece)>),
}

/// A piece of a cell that has no business there, or not beside the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    Zeroes,
    Of(Origin),
    Unknown([u8; 8]),
}

impl Content {
    pub(super) const fn new(key: u64) -> Self {
        Self { key }
    }

    fn record(self, Origin { file, generation, offset }: Origin) -> [u8; RECORD] {
        let mut record = [0; RECORD];
        record[..8].copy_from_slice(&(u64::from(file) << 32 | u64::from(generation)).to_le_bytes());
        record[8..].copy_from_slice(&(offset ^ self.key).to_le_bytes());
        record
    }

    /// Fills what a write puts at `offset` of a file, in bytes.
    pub(super) fn fill(self, file: u32, generation: u32, offset: u64, buf: &mut [u8]) {
        for (record, offset) in buf.as_chunks_mut::<RECORD>().0.iter_mut().zip((offset..).step_by(RECORD)) {
            *record = self.record(Origin { file, generation, offset });
        }
    }

    /// What a cell, or as much of one as there is, holds at `offset` of a file.
    pub(super) fn look(self, file: u32, offset: u64, cell: &[u8]) -> Seen {
        if cell.iter().all(|byte| *byte == 0) {
            return Seen::Generation(ZERO);
        }
        let first = cell.first_chunk::<RECORD>().and_then(|record| self.origin(record));
        if let Some(origin) = first
            && origin.file == file
        {
            let mut right = [0; CELL];
            self.fill(file, origin.generation, offset, &mut right);
            if cell == &right[..cell.len()] {
                return Seen::Generation(origin.generation);
            }
        }
        Seen::Foreign(self.pieces(cell))
    }

    fn origin(self, record: &[u8; RECORD]) -> Option<Origin> {
        let word = |at: usize| record[at..at + 8].iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        let (who, offset) = (word(0), word(8) ^ self.key);
        let known = offset < 1 << 40 && offset.is_multiple_of(RECORD as u64);
        known.then_some(Origin { file: (who >> 32) as u32, generation: who as u32, offset })
    }

    fn pieces(self, cell: &[u8]) -> Vec<(usize, Piece)> {
        let mut pieces: Vec<(usize, Piece)> = Vec::new();
        for (at, record) in (0..).step_by(RECORD).zip(cell.chunks(RECORD)) {
            let origin = record.first_chunk::<RECORD>().and_then(|record| self.origin(record));
            let piece = match origin {
                _ if record.iter().all(|byte| *byte == 0) => Piece::Zeroes,
                Some(origin) => Piece::Of(origin),
                None => Piece::Unknown(*record.first_chunk().unwrap_or(&[0; 8])),
            };
            let goes_on = match (pieces.last(), piece) {
                (Some((begin, Piece::Of(first))), Piece::Of(next)) => {
                    let Origin { file, generation, offset } = *first;
                    next == Origin { file, generation, offset: offset + (at - begin) as u64 }
                }
                (Some((_, Piece::Zeroes)), Piece::Zeroes) | (Some((_, Piece::Unknown(_))), Piece::Unknown(_)) => true,
                _ => false,
            };
            if !goes_on {
                pieces.push((at, piece));
            }
        }
        pieces
    }
}

impl fmt::Display for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zeroes => f.write_str("zeroes"),
            Self::Of(Origin { file, generation, offset }) => {
                write!(f, "what write {generation} put at {offset} of file {file:#x}")
            }
            Self::Unknown(bytes) => write!(f, "bytes of nobody's, {bytes:02x?}…"),
        }
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Generation(ZERO) => f.write_str("zeroes"),
            Self::Generation(generation) => write!(f, "what write {generation} put there"),
            Self::Foreign(pieces) => {
                for (index, (at, piece)) in pieces.iter().take(4).enumerate() {
                    let comma = if index == 0 { "" } else { ", " };
                    write!(f, "{comma}from its byte {at} on {piece}")?;
                }
                if pieces.len() > 4 { write!(f, ", and {} more pieces", pieces.len() - 4) } else { Ok(()) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(content: Content, file: u32, generation: u32, offset: u64) -> Vec<u8> {
        let mut cell = vec![0; CELL];
        content.fill(file, generation, offset, &mut cell);
        cell
    }

    #[test]
    fn every_cell_names_itself() {
        let content = Content::new(0x1234_5678_9abc_def0);
        let right = cell(content, 7, 3, 4096);
        assert_eq!(content.look(7, 4096, &right), Seen::Generation(3));
        assert_eq!(content.look(7, 4096, &right[..100]), Seen::Generation(3));
        assert_eq!(content.look(7, 4096, &[0; CELL]), Seen::Generation(ZERO));
    }

    #[test]
    fn what_does_not_belong_there_is_named() {
        let content = Content::new(0x1234_5678_9abc_def0);
        // Another file's, another place's, another run's, torn, and a flipped bit.
        let shown = |bytes: &[u8]| content.look(7, 4096, bytes).to_string();
        assert_eq!(shown(&cell(content, 8, 3, 4096)), "from its byte 0 on what write 3 put at 4096 of file 0x8");
        assert_eq!(shown(&cell(content, 7, 3, 512)), "from its byte 0 on what write 3 put at 512 of file 0x7");
        assert!(shown(&cell(Content::new(5), 7, 3, 4096)).contains("nobody's"));
        let mut torn = cell(content, 7, 3, 4096);
        torn[256..].copy_from_slice(&cell(content, 7, 2, 4096)[256..]);
        assert!(
            shown(&torn).ends_with("from its byte 256 on what write 2 put at 4352 of file 0x7"),
            "{}",
            shown(&torn)
        );
        let mut flipped = cell(content, 7, 3, 4096);
        flipped[40] ^= 1;
        assert!(matches!(content.look(7, 4096, &flipped), Seen::Foreign(pieces) if pieces.len() == 3));
    }
}
