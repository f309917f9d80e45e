//! One cell per block, in segments that exist once they are touched.
//!
//! The directory is zeroes until then, which an allocator gets from the system without a page behind them: a device of
//! many terabytes costs nothing before it is written.

use super::cell::Cell;

/// Blocks in a segment: 16 KiB of cells.
const SEGMENT: usize = 1 << 12;

/// The cells.
#[derive(Clone)]
pub(super) struct Table {
    blocks: u64,
    /// One more than the place of the segment in `segments`; 0 where nothing was touched.
    directory: Vec<u32>,
    segments: Vec<Box<[u32]>>,
}

impl Table {
    pub(super) fn new(blocks: u64) -> Self {
        Self { blocks, directory: vec![0; blocks.div_ceil(SEGMENT as u64) as usize], segments: Vec::new() }
    }

    pub(super) const fn blocks(&self) -> u64 {
        self.blocks
    }

    #[inline]
    pub(super) fn get(&self, block: u64) -> Cell {
        match self.directory[block as usize / SEGMENT] {
            0 => Cell::UNTOUCHED,
            segment => Cell::from_bits(self.segments[segment as usize - 1][block as usize % SEGMENT]),
        }
    }

    #[inline]
    pub(super) fn set(&mut self, block: u64, cell: Cell) {
        let segment = match self.directory[block as usize / SEGMENT] {
            0 => self.add_segment(block),
            segment => segment,
        };
        self.segments[segment as usize - 1][block as usize % SEGMENT] = cell.bits();
    }

    #[cold]
    fn add_segment(&mut self, block: u64) -> u32 {
        let number = block as usize / SEGMENT;
        let len = SEGMENT.min(self.blocks as usize - number * SEGMENT);
        self.segments.push(vec![Cell::UNTOUCHED.bits(); len].into_boxed_slice());
        self.directory[number] = self.segments.len() as u32;
        self.directory[number]
    }

    /// What it takes now; the directory counts in full, touched or not.
    pub(super) fn memory_bytes(&self) -> usize {
        let cells: usize = self.segments.iter().map(|segment| size_of_val(&segment[..])).sum();
        cells + self.segments.capacity() * size_of::<Box<[u32]>>() + size_of_val(&self.directory[..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::classify::Content;

    #[test]
    fn cells_stay_where_they_were_put() {
        let blocks = 3 * SEGMENT as u64 + 7;
        let mut table = Table::new(blocks);
        let touched = [0, SEGMENT as u64 - 1, SEGMENT as u64, blocks - 1];
        for (block, generation) in touched.into_iter().zip(1..) {
            assert_eq!(table.get(block), Cell::UNTOUCHED);
            table.set(block, Cell::new(Content::Written(generation)));
        }
        for block in 0..blocks {
            let generation =
                touched.into_iter().zip(1..).find(|(at, _)| *at == block).map(|(_, generation)| generation);
            assert_eq!(table.get(block).content(), generation.map(Content::Written));
        }
    }

    #[test]
    fn nothing_touched_is_nothing_held() {
        let table = Table::new(1 << 35);
        assert!(table.segments.is_empty());
    }
}
