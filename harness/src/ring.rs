//! The last of many, in a ring of fixed size.

/// The last so many entries, the oldest overwritten first. They are numbered from 0 in the order in which they came.
#[derive(Clone, Debug)]
pub(crate) struct Ring<T> {
    entries: Vec<T>,
    capacity: usize,
    count: u64,
}

impl<T> Ring<T> {
    /// Room for `capacity` entries, which is not 0.
    pub(crate) fn new(capacity: usize) -> Self {
        Self { entries: Vec::with_capacity(capacity), capacity, count: 0 }
    }

    /// How many there ever were, which is the number of the next one.
    pub(crate) const fn count(&self) -> u64 {
        self.count
    }

    /// How many are kept at most.
    pub(crate) const fn capacity(&self) -> usize {
        self.capacity
    }

    /// Adds an entry, and returns its number.
    #[inline]
    pub(crate) fn push(&mut self, entry: T) -> u64 {
        let number = self.count;
        self.count += 1;
        if self.entries.len() < self.capacity {
            self.entries.push(entry);
        } else {
            let slot = self.slot(number);
            self.entries[slot] = entry;
        }
        number
    }

    /// The entry of that number, unless it is overwritten.
    #[inline]
    pub(crate) fn get_mut(&mut self, number: u64) -> Option<&mut T> {
        let slot = self.slot(number);
        if self.count - number <= self.capacity as u64 { self.entries.get_mut(slot) } else { None }
    }

    /// Those that are kept.
    pub(crate) fn newest_first(&self) -> impl Iterator<Item = &T> {
        let oldest = self.count - self.entries.len() as u64;
        (oldest..self.count).rev().map(|number| &self.entries[self.slot(number)])
    }

    /// The memory it takes now or later, in bytes.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.capacity * size_of::<T>()
    }

    #[inline]
    fn slot(&self, number: u64) -> usize {
        (number % self.capacity as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_are_kept_by_their_numbers() {
        let mut ring = Ring::new(5);
        for number in 0..23 {
            assert_eq!((ring.count(), ring.push(number)), (number, number));
            let kept: Vec<u64> = ring.newest_first().copied().collect();
            let last: Vec<u64> = (0..=number).rev().take(5).collect();
            assert_eq!(kept, last);
            for old in 0..=number {
                assert_eq!(ring.get_mut(old).copied(), last.contains(&old).then_some(old));
            }
        }
        assert_eq!((ring.capacity(), ring.memory_bytes()), (5, 40));
    }
}
