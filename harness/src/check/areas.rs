//! Where on a device a run works: all of a small one, and of a large one a few places that are far apart.
//!
//! What is done is drawn for a small device, and each part of that lies somewhere on the large one: at its beginning, at
//! its end, across a power of two, where offsets overflow, and anywhere.

use std::sync::Arc;

use crate::range::SectorRange;
use crate::script::{Act, Action};
use crate::sector::SECTOR;
use crate::seed::SeededRng;

/// How many places there are at most.
const AREAS: u64 = 4;

/// No area begins or ends at anything smaller than this, in bytes.
const UNIT: u64 = 4096;

/// Areas of one size, in order, that do not touch.
#[derive(Clone, Debug)]
pub(super) struct Areas {
    areas: Arc<[SectorRange]>,
    sectors: u64,
}

impl Areas {
    /// Areas of about `bytes` bytes together, on a device of `device_bytes`. `alignment` is a power of two.
    pub(super) fn draw(rng: &mut SeededRng, device_bytes: u64, bytes: u64, alignment: u64) -> Self {
        let unit = alignment.max(UNIT);
        let each = bytes / AREAS / unit * unit;
        if device_bytes <= bytes || each == 0 || device_bytes < 2 * AREAS * each {
            let whole = SectorRange::device(device_bytes);
            return Self { areas: Arc::new([whole]), sectors: whole.sectors };
        }
        let last = device_bytes - each;
        let power = 1 << rng.within(u64::from((2 * each).ilog2())..=u64::from(device_bytes.ilog2()));
        let across = (power - each / 2) / unit * unit;
        let anywhere = rng.within(0..=last) / unit * unit;
        let mut places: Vec<u64> = Vec::new();
        for place in [0, last, across, anywhere] {
            if place <= last && places.iter().all(|other| place.abs_diff(*other) > each) {
                places.push(place);
            }
        }
        places.sort_unstable();
        let (sector, sectors) = (SECTOR as u64, each / SECTOR as u64);
        Self { areas: places.iter().map(|place| SectorRange::new(place / sector, sectors)).collect(), sectors }
    }

    /// How large a device is on which the areas are all there is, in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.areas.len() as u64 * self.sectors * SECTOR as u64
    }

    /// The areas.
    pub(super) fn ranges(&self) -> Arc<[SectorRange]> {
        Arc::clone(&self.areas)
    }

    /// Where an action on that device is on the real one. What goes on beyond an area ends with it.
    pub(super) fn place(&self, mut action: Action) -> Action {
        if let Act::Op { range, .. } = &mut action.act
            && !range.is_empty()
        {
            let area = self.areas[(range.first / self.sectors) as usize];
            let first = area.first + range.first % self.sectors;
            *range = SectorRange::new(first, range.sectors.min(area.end() - first));
        }
        action
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::OpKind;
    use crate::seed::Seed;

    #[test]
    fn areas_lie_on_the_device_and_apart() {
        let mut many = 0;
        for seed in 0..2000 {
            let mut rng = Seed::new(seed).rng();
            let block = 512 << rng.within(0..=3);
            let most = 1 << rng.within(1..=40);
            let device = block * rng.within(1..=most);
            let bytes = (64 << 10) << rng.below(8);
            let areas = Areas::draw(&mut rng, device, bytes, block);
            let ranges = areas.ranges();
            assert_eq!(areas.bytes(), ranges.iter().map(|range| range.len_bytes()).sum::<u64>());
            assert!(ranges.iter().all(|range| SectorRange::device(device).covers(*range)));
            assert!(ranges.iter().all(|range| range.offset_bytes() % block == 0 && range.len_bytes() % block == 0));
            assert!(ranges.windows(2).all(|pair| pair[0].end() < pair[1].first));
            assert_eq!((ranges[0].first, ranges[ranges.len() - 1].end()), (0, device / 512));
            many += usize::from(ranges.len() == 4);
            let blocks = areas.bytes() / block;
            let first = rng.below(blocks);
            let unit = block / 512;
            let range = SectorRange::new(first * unit, rng.within(1..=blocks - first) * unit);
            let action = Action { worker: 0, act: Act::Op { kind: OpKind::Read, range } };
            let Act::Op { range, .. } = areas.place(action).act else { panic!("an operation") };
            assert!(!range.is_empty() && ranges.iter().any(|area| area.covers(range)));
        }
        assert!(many > 500, "{many}");
    }
}
