//! How the block layer cuts an operation into requests, by the limits that the device declared.

use ublkit::{Geometry, Operation};

/// The limits that splits go by, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    max_io: u64,
    geometry: Geometry,
}

impl Limits {
    pub(super) fn new(max_io_bytes: u32, geometry: Geometry) -> Self {
        let block = u64::from(geometry.logical_block.max(1));
        Self { max_io: (u64::from(max_io_bytes) / block * block).max(block), geometry }
    }

    pub(super) fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// How long the first request is of an operation on `left` bytes from `offset`.
    pub(super) fn first_piece(&self, operation: Operation, offset: u64, left: u64) -> u64 {
        let longest = match operation {
            Operation::Discard => self.discard_piece(offset, left),
            Operation::WriteZeroes => self.geometry.write_zeroes.unwrap_or(self.max_io),
            _ => self.max_io,
        };
        left.min(longest.max(1))
    }

    /// What comes before the first unit that can be given back goes alone, and no other piece but the last ends within
    /// a unit: `bio_discard_limit()` and `bio_split_discard()`.
    fn discard_piece(&self, offset: u64, left: u64) -> u64 {
        let Some(limits) = self.geometry.discard else { return left };
        let unit = u64::from(limits.granularity.max(1));
        let head = offset.next_multiple_of(unit) - offset;
        if head > 0 {
            return head.min(limits.max_bytes);
        }
        let max = limits.max_bytes / unit * unit;
        if max == 0 || left <= max {
            return left.min(limits.max_bytes.max(1));
        }
        // The driver may count its units from elsewhere.
        let over = (offset + max).saturating_sub(u64::from(limits.alignment)) % unit;
        if max > over { max - over } else { max }
    }
}

#[cfg(test)]
mod tests {
    use ublkit::DiscardLimits;

    use super::*;

    fn pieces(limits: &Limits, operation: Operation, mut offset: u64, mut left: u64) -> Vec<u64> {
        let mut pieces = Vec::new();
        while left > 0 {
            let piece = limits.first_piece(operation, offset, left);
            pieces.push(piece);
            offset += piece;
            left -= piece;
        }
        pieces
    }

    #[test]
    fn reads_and_writes_are_cut_at_the_largest_request() {
        let limits = Limits::new(5000, Geometry::bytes(1 << 20).logical_block(4096));
        assert_eq!(pieces(&limits, Operation::Write, 4096, 12288), [4096, 4096, 4096]);
        let limits = Limits::new(8192, Geometry::bytes(1 << 20));
        assert_eq!(pieces(&limits, Operation::Read, 512, 9216), [8192, 1024]);
    }

    #[test]
    fn zeroes_are_cut_at_the_limit_of_their_own() {
        let limits = Limits::new(8192, Geometry::bytes(1 << 20).write_zeroes_max(16384));
        assert_eq!(pieces(&limits, Operation::WriteZeroes, 0, 20480), [16384, 4096]);
    }

    #[test]
    fn discards_are_cut_at_whole_units() {
        let discard = DiscardLimits { granularity: 4096, alignment: 0, max_bytes: 10_240 };
        let limits = Limits::new(8192, Geometry::bytes(1 << 20).discard_limits(discard));
        assert_eq!(pieces(&limits, Operation::Discard, 512, 20480), [3584, 8192, 8192, 512]);
        assert_eq!(pieces(&limits, Operation::Discard, 4096, 8192), [8192]);
        let tiny = DiscardLimits { granularity: 4096, alignment: 0, max_bytes: 1024 };
        let limits = Limits::new(8192, Geometry::bytes(1 << 20).discard_limits(tiny));
        assert_eq!(pieces(&limits, Operation::Discard, 0, 2560), [1024, 1024, 512]);
    }
}
