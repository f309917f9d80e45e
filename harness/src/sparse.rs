//! A table with an entry for each block of a device, in segments that exist once they are touched.
//!
//! The directory of the segments is zeroes until then, which an allocator gets from the system without a page behind them:
//! a device of many terabytes costs nothing before it is written.

use std::ops::Range;

/// Entries in a segment: 16 KiB of those of four bytes.
const SEGMENT: usize = 1 << 12;

/// Entries that are all [`Default`] until they are changed.
#[derive(Clone, Debug)]
pub(crate) struct Sparse<T> {
    len: u64,
    /// One more than the place of the segment in `segments`; 0 where nothing was touched.
    directory: Vec<u32>,
    segments: Vec<Box<[T]>>,
}

impl<T: Copy + Default> Sparse<T> {
    /// A table of `len` entries.
    pub(crate) fn new(len: u64) -> Self {
        Self { len, directory: vec![0; len.div_ceil(SEGMENT as u64) as usize], segments: Vec::new() }
    }

    /// How many entries it has, touched or not.
    pub(crate) const fn len(&self) -> u64 {
        self.len
    }

    /// The entry at `at`.
    #[inline]
    pub(crate) fn get(&self, at: u64) -> T {
        match self.directory[at as usize / SEGMENT] {
            0 => T::default(),
            segment => self.segments[segment as usize - 1][at as usize % SEGMENT],
        }
    }

    /// Puts `entry` at `at`.
    #[inline]
    pub(crate) fn set(&mut self, at: u64, entry: T) {
        self.segment(at as usize / SEGMENT)[at as usize % SEGMENT] = entry;
    }

    /// Changes each entry of a range in order.
    pub(crate) fn update(&mut self, range: Range<u64>, mut change: impl FnMut(&mut T)) {
        let mut next = range.start as usize;
        let end = range.end as usize;
        while next < end {
            let segment = self.segment(next / SEGMENT);
            let within = next % SEGMENT;
            let count = (segment.len() - within).min(end - next);
            segment[within..within + count].iter_mut().for_each(&mut change);
            next += count;
        }
    }

    #[inline]
    fn segment(&mut self, number: usize) -> &mut [T] {
        let segment = match self.directory[number] {
            0 => self.make(number),
            segment => segment,
        };
        &mut self.segments[segment as usize - 1]
    }

    #[cold]
    fn make(&mut self, number: usize) -> u32 {
        let rest = self.len as usize - number * SEGMENT;
        self.segments.push(vec![T::default(); rest.min(SEGMENT)].into_boxed_slice());
        self.directory[number] = self.segments.len() as u32;
        self.directory[number]
    }

    /// What it takes now, in bytes; the directory counts in full, touched or not.
    pub(crate) fn memory_bytes(&self) -> usize {
        size_of_val(&self.directory[..])
            + self.segments.capacity() * size_of::<Box<[T]>>()
            + self.segments.iter().map(|segment| size_of_val(&segment[..])).sum::<usize>()
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
        assert!(table.memory_bytes() < 1000 && table.len() == len);
        let mut model = vec![0; len as usize];
        for (step, range) in
            [segment - 2..segment + 3, 0..1, len - 1..len, segment - 1..2 * segment + 1, 5..5].into_iter().enumerate()
        {
            table.update(range.clone(), |entry| *entry += step as u32 + 1);
            model[range.start as usize..range.end as usize].iter_mut().for_each(|entry| *entry += step as u32 + 1);
            assert!((0..len).all(|at| table.get(at) == model[at as usize]));
        }
        for at in [0, segment - 1, segment, 2 * segment - 1, len - 1] {
            table.set(at, 77 + at as u32);
            model[at as usize] = 77 + at as u32;
            assert!((0..len).all(|at| table.get(at) == model[at as usize]));
        }
    }

    #[test]
    fn only_what_is_touched_takes_memory() {
        let len = (16 << 40) / 512;
        let mut table = Sparse::<u32>::new(len);
        let before = table.memory_bytes();
        assert!(table.segments.is_empty() && before as u64 <= len / 1024);
        for at in [0, 1, len - 1, SEGMENT as u64, SEGMENT as u64 - 1] {
            table.set(at, at as u32 & 0xff);
        }
        assert_eq!((table.get(len - 1), table.get(2), table.get(len / 2)), (0xff, 0, 0));
        assert!(table.memory_bytes() < before + (1 << 16));
        table.update(len / 2..len / 2, |_| ());
        assert_eq!(table.segments.len(), 3, "nothing touched is nothing held");
        assert_eq!(Sparse::<u32>::new(3).memory_bytes(), 4);
    }
}
