//! Things that lie on sectors and come due, such as calls: those on given sectors are found without looking at all.

use std::collections::{BTreeMap, BTreeSet};

use crate::range::SectorRange;
use crate::stamp::Stamp;

/// Items by the sectors they are on, and by when they come due.
#[derive(Clone, Debug)]
pub(crate) struct Near<T> {
    items: BTreeMap<(u64, u64), (SectorRange, T)>,
    due: BTreeSet<(Stamp, u64, u64)>,
    /// No item is longer.
    longest: u64,
    next: u64,
}

impl<T> Default for Near<T> {
    fn default() -> Self {
        Self { items: BTreeMap::new(), due: BTreeSet::new(), longest: 0, next: 0 }
    }
}

impl<T> Near<T> {
    pub(crate) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.items.len()
    }

    /// Adds an item on `range`, which has sectors, that comes due at `due`.
    pub(crate) fn insert(&mut self, range: SectorRange, due: Stamp, item: T) {
        self.longest = self.longest.max(range.sectors);
        self.next += 1;
        self.items.insert((range.first, self.next), (range, item));
        self.due.insert((due, range.first, self.next));
    }

    /// The items that have a sector in common with `range`.
    pub(crate) fn on(&mut self, range: SectorRange) -> impl Iterator<Item = (SectorRange, &mut T)> {
        let from = range.first.saturating_sub(self.longest);
        self.items
            .range_mut((from, 0)..(range.end(), 0))
            .filter(move |(_, (own, _))| own.overlaps(range))
            .map(|(_, (own, item))| (*own, item))
    }

    /// All items.
    pub(crate) fn all(&mut self) -> impl Iterator<Item = &mut T> {
        self.items.values_mut().map(|(_, item)| item)
    }

    /// Takes the item that comes due first, if that is before `now`; at the end of time, whatever there is.
    pub(crate) fn pop_due(&mut self, now: Stamp) -> Option<T> {
        let &(due, first, id) = self.due.first()?;
        if due >= now && now != Stamp::MAX {
            return None;
        }
        self.due.pop_first();
        let (_, item) = self.items.remove(&(first, id))?;
        if self.items.is_empty() {
            self.longest = 0;
        }
        Some(item)
    }
}

/// Takes `cut` out of disjoint ranges.
pub(crate) fn subtract(ranges: &mut Vec<SectorRange>, cut: SectorRange) {
    if !ranges.iter().any(|range| range.overlaps(cut)) {
        return;
    }
    let left = |range: &SectorRange| {
        let before = SectorRange::new(range.first, range.end().min(cut.first).saturating_sub(range.first));
        let from = range.first.max(cut.end());
        [before, SectorRange::new(from, range.end().saturating_sub(from))]
    };
    *ranges = ranges.iter().flat_map(left).filter(|range| !range.is_empty()).collect();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::Seed;

    #[test]
    fn what_overlaps_is_found_and_what_is_due_is_taken() {
        let mut rng = Seed::new(1).rng();
        for _ in 0..200 {
            let (mut near, mut naive) = (Near::default(), Vec::new());
            for number in 0..rng.below(60) {
                let range = SectorRange::new(rng.below(100), rng.within(1..=1 << rng.clone().below(6)));
                let due = rng.below(50);
                near.insert(range, due, number);
                naive.push((range, due, number));
                let query = SectorRange::new(rng.below(100), rng.below(20));
                let mut found: Vec<_> = near.on(query).map(|(_, item)| *item).collect();
                found.sort_unstable();
                let overlaps = naive.iter().filter(|(range, ..)| range.overlaps(query));
                assert_eq!(found, overlaps.map(|(.., number)| *number).collect::<Vec<_>>());
                let now = rng.below(60);
                if rng.chance(1, 10) {
                    let mut taken: Vec<_> = std::iter::from_fn(|| near.pop_due(now)).collect();
                    taken.sort_unstable();
                    let due: Vec<_> = naive.extract_if(.., |(_, due, _)| *due < now).map(|(.., n)| n).collect();
                    assert_eq!(taken, due);
                }
                assert_eq!((near.len(), near.all().count()), (naive.len(), naive.len()));
            }
        }
    }

    #[test]
    fn what_is_subtracted_is_gone() {
        let mut rng = Seed::new(2).rng();
        for _ in 0..500 {
            let mut ranges = vec![SectorRange::new(5, 20)];
            let mut sectors: Vec<u64> = (5..25).collect();
            for _ in 0..rng.below(6) {
                let cut = SectorRange::new(rng.below(30), rng.below(8));
                subtract(&mut ranges, cut);
                sectors.retain(|sector| !cut.contains(*sector));
                let left: Vec<_> = ranges.iter().flat_map(|range| range.first..range.end()).collect();
                assert_eq!(left, sectors);
            }
        }
    }
}
