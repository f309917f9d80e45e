//! The states of a region's sectors, in segments that exist once they are touched.
//!
//! A sparse device of many terabytes can thus be shadowed on a small machine, whatever its operating system thinks of
//! promising memory that it does not have.

use super::state::State;

/// Sectors in a segment: 16 MiB of the device, 128 KiB of states.
const SEGMENT: usize = 1 << 15;

/// What every segment looks like that does not exist.
static UNTOUCHED: [u32; SEGMENT] = [State::UNTOUCHED.bits(); SEGMENT];

/// The states, as bits, by distance from the first sector of the region.
#[derive(Debug)]
pub(super) struct Table {
    sectors: u64,
    /// Empty where nothing was touched.
    segments: Vec<Vec<u32>>,
}

impl Table {
    pub(super) fn new(sectors: u64) -> Self {
        Self { sectors, segments: vec![Vec::new(); sectors.div_ceil(SEGMENT as u64) as usize] }
    }

    #[inline]
    pub(super) fn get(&self, at: u64) -> State {
        let bits = self.segments[at as usize / SEGMENT].get(at as usize % SEGMENT);
        State::from_bits(bits.copied().unwrap_or(State::UNTOUCHED.bits()))
    }

    /// The states from `at` to the end of its segment. They may go on past the end of the region.
    #[inline]
    pub(super) fn run(&self, at: u64) -> &[u32] {
        let segment = &self.segments[at as usize / SEGMENT];
        let states = if segment.is_empty() { &UNTOUCHED[..] } else { segment };
        &states[at as usize % SEGMENT..]
    }

    pub(super) fn change(&mut self, at: u64, sectors: u64, to: impl Fn(State) -> State) {
        let end = at + sectors;
        let mut next = at;
        while next < end {
            let number = next as usize / SEGMENT;
            let first = number * SEGMENT;
            let segment = &mut self.segments[number];
            if segment.is_empty() {
                segment.resize(SEGMENT.min(self.sectors as usize - first), State::UNTOUCHED.bits());
            }
            let last = segment.len().min(end as usize - first);
            for bits in &mut segment[next as usize - first..last] {
                *bits = to(State::from_bits(*bits)).bits();
            }
            next = (first + last) as u64;
        }
    }

    /// What it takes when every sector was touched.
    pub(super) fn memory_bytes(&self) -> usize {
        self.sectors as usize * size_of::<u32>() + size_of_val(&self.segments[..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_stay_in_their_range_across_segments() {
        let segment = SEGMENT as u64;
        let sectors = 3 * segment + 100;
        let mut table = Table::new(sectors);
        let written = |state: State| state.written(true);
        for (at, count) in [(segment - 2, 5), (0, 1), (sectors - 1, 1), (segment - 1, segment + 2)] {
            let before: Vec<_> = (0..sectors).map(|at| table.get(at)).collect();
            table.change(at, count, written);
            for (sector, before) in (0..).zip(before) {
                let changed = (at..at + count).contains(&sector);
                assert_eq!(table.get(sector), if changed { written(before) } else { before }, "{sector}");
                assert_eq!(table.run(sector)[0], table.get(sector).bits());
            }
        }
        assert_eq!(table.run(segment - 1).len(), 1);
    }
}
