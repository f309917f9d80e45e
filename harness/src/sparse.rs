//! A table with an entry for each block of a device, in segments that exist once they are touched.
//!
//! A sparse device of many terabytes can thus be covered on a small machine, whatever its operating system thinks of
//! promising memory that it does not have.

use std::ops::Range;

/// Entries in a segment.
const SEGMENT: usize = 1 << 13;

/// Entries that are all [`Default`] until they are changed.
#[derive(Clone, Debug)]
pub(crate) struct Sparse<T> {
    len: u64,
    /// Empty where nothing was changed.
    segments: Vec<Vec<T>>,
}

impl<T: Copy + Default> Sparse<T> {
    /// A table of `len` entries.
    pub(crate) fn new(len: u64) -> Self {
        Self { len, segments: vec![Vec::new(); len.div_ceil(SEGMENT as u64) as usize] }
    }

    /// The entry at `at`.
    #[inline]
    pub(crate) fn get(&self, at: u64) -> T {
        self.segments[at as usize / SEGMENT].get(at as usize % SEGMENT).copied().unwrap_or_default()
    }

    /// Changes each entry of a range in order.
    pub(crate) fn update(&mut self, range: Range<u64>, mut change: impl FnMut(&mut T)) {
        let mut next = range.start;
        while next < range.end {
            let number = next as usize / SEGMENT;
            let first = number * SEGMENT;
            let segment = &mut self.segments[number];
            if segment.is_empty() {
                segment.resize(SEGMENT.min(self.len as usize - first), T::default());
            }
            let last = segment.len().min(range.end as usize - first);
            segment[next as usize - first..last].iter_mut().for_each(&mut change);
            next = (first + last) as u64;
        }
    }

    /// The memory it takes now, in bytes.
    pub(crate) fn memory_bytes(&self) -> usize {
        let entries: usize = self.segments.iter().map(Vec::capacity).sum();
        entries * size_of::<T>() + size_of_val(&self.segments[..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_stay_in_their_range_across_segments() {
        let segment = SEGMENT as u64;
        let len = 3 * segment + 100;
        let mut table = Sparse::<u32>::new(len);
        assert!(table.memory_bytes() < 1000);
        let mut model = vec![0; len as usize];
        for (step, range) in
            [segment - 2..segment + 3, 0..1, len - 1..len, segment - 1..2 * segment + 1, 5..5].into_iter().enumerate()
        {
            table.update(range.clone(), |entry| *entry += step as u32 + 1);
            model[range.start as usize..range.end as usize].iter_mut().for_each(|entry| *entry += step as u32 + 1);
            assert!((0..len).all(|at| table.get(at) == model[at as usize]));
        }
    }
}
