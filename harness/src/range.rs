//! A contiguous run of 512-byte sectors.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::sector::SECTOR;

/// Sectors `first..first + sectors` of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SectorRange {
    /// The first sector.
    pub first: u64,
    /// How many sectors; a flush has none.
    pub sectors: u64,
}

impl SectorRange {
    /// Sectors `first..first + sectors`.
    #[must_use]
    pub const fn new(first: u64, sectors: u64) -> Self {
        Self { first, sectors }
    }

    /// The whole device of `bytes` bytes; a last part of a sector is left out.
    #[must_use]
    pub const fn device(bytes: u64) -> Self {
        Self::new(0, bytes / SECTOR as u64)
    }

    /// The sector after the last. Of a range that no device has, such as one from a file, the end of all numbers; so with
    /// bytes.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.first.saturating_add(self.sectors)
    }

    /// Where the range begins, in bytes.
    #[must_use]
    pub const fn offset_bytes(self) -> u64 {
        self.first.saturating_mul(SECTOR as u64)
    }

    /// How long the range is, in bytes.
    #[must_use]
    pub const fn len_bytes(self) -> u64 {
        self.sectors.saturating_mul(SECTOR as u64)
    }

    /// Whether the range has no sectors.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.sectors == 0
    }

    /// Whether `sector` is in the range.
    #[must_use]
    pub const fn contains(self, sector: u64) -> bool {
        sector >= self.first && sector - self.first < self.sectors
    }

    /// Whether every sector of `other` is in this range.
    #[must_use]
    pub const fn covers(self, other: Self) -> bool {
        other.first >= self.first && other.end() <= self.end()
    }

    /// Whether the two have a sector in common.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.first < other.end() && other.first < self.end() && !self.is_empty() && !other.is_empty()
    }

    /// Splits the range into `parts` disjoint ones that begin on multiples of `block_sectors` and together cover it.
    ///
    /// The parts differ by at most one block, but for the last, which takes what does not fill a block. There are fewer
    /// parts when there are not enough blocks, and none when the range is empty.
    #[must_use]
    pub fn split(self, parts: u32, block_sectors: u64) -> Vec<Self> {
        let block = block_sectors.max(1);
        let blocks = self.sectors / block;
        let parts = u64::from(parts).min(blocks.max(1)).max(1);
        if self.is_empty() {
            return Vec::new();
        }
        let edge = |part: u64| {
            if part == parts {
                self.sectors
            } else {
                (u128::from(blocks) * u128::from(part) / u128::from(parts)) as u64 * block
            }
        };
        (0..parts).map(|part| Self::new(self.first + edge(part), edge(part + 1) - edge(part))).collect()
    }

    /// The pieces of at most `sectors` sectors that the range falls into, in order.
    pub fn chunks(self, sectors: u64) -> impl Iterator<Item = Self> {
        let step = sectors.max(1);
        (0..self.sectors.div_ceil(step)).map(move |chunk| {
            let skip = chunk * step;
            Self::new(self.first + skip, step.min(self.sectors - skip))
        })
    }
}

impl fmt::Display for SectorRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.first, self.sectors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_cover_and_do_not_overlap() {
        for (sectors, parts, block) in [(100, 3, 8), (7, 4, 1), (8, 16, 8), (1 << 20, 5, 8), (9, 2, 4), (3, 2, 8)] {
            let whole = SectorRange::new(16, sectors);
            let split = whole.split(parts, block);
            let mut next = 16;
            for part in &split {
                assert_eq!(part.first, next, "{sectors} {parts} {block}");
                assert_eq!((part.first - 16) % block, 0);
                assert!(!part.is_empty());
                next = part.end();
            }
            assert_eq!(next, whole.end());
            assert!(split.len() <= parts as usize);
        }
        assert!(SectorRange::new(5, 0).split(3, 1).is_empty());
    }

    #[test]
    fn overlap_is_a_common_sector() {
        let range = SectorRange::new(10, 5);
        assert!(range.overlaps(SectorRange::new(14, 1)));
        assert!(!range.overlaps(SectorRange::new(15, 1)));
        assert!(!range.overlaps(SectorRange::new(12, 0)));
        assert!(range.covers(SectorRange::new(10, 5)));
        assert!(!range.covers(SectorRange::new(10, 6)));
        let chunks: Vec<_> = range.chunks(2).map(|chunk| chunk.sectors).collect();
        assert_eq!(chunks, [2, 2, 1]);
    }
}
