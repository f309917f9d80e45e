//! Drawing one worker's operations.
//!
//! Uniform draws would hardly ever meet the places where devices go wrong. Lengths are biased towards one block, the
//! largest I/O and its neighbours, and powers of two; places towards both ends of the region, powers of two, and the
//! surroundings of what the worker did last, so that operations overlap, touch and repeat each other.

use std::sync::Arc;

use super::{IoSize, Mix, Op, OpKind, PlanOptions};
use crate::range::SectorRange;
use crate::sector::SECTOR;
use crate::seed::{Seed, SeededRng};

/// How many of the last ranges are returned to.
const RECENT: usize = 32;

/// How many times the largest I/O the longest operation is.
pub(super) const BEYOND: u64 = 4;

/// The endless stream of one worker's operations.
#[derive(Clone, Debug)]
pub struct WorkerPlan {
    options: Arc<PlanOptions>,
    mix: Mix,
    region: SectorRange,
    rng: SeededRng,
    index: u64,
    /// The last ranges, each a first unit of the region and a number of units.
    recent: [(u64, u64); RECENT],
    recent_count: usize,
}

impl WorkerPlan {
    pub(super) fn new(options: Arc<PlanOptions>, seed: Seed, worker: u32) -> Self {
        Self {
            mix: options.offered_mix(),
            region: options.regions[worker as usize % options.regions.len()],
            rng: seed.derive("worker", u64::from(worker)).rng(),
            index: 0,
            recent: [(0, 0); RECENT],
            recent_count: 0,
            options,
        }
    }

    /// The region that every operation is in.
    #[must_use]
    pub const fn region(&self) -> SectorRange {
        self.region
    }

    /// Sectors that offsets and lengths are multiples of.
    fn unit(&self) -> u64 {
        self.options.alignment_bytes / SECTOR as u64
    }

    fn fixed(&mut self, bytes: u64) -> SectorRange {
        let sectors = bytes / SECTOR as u64;
        let first = self.region.first.next_multiple_of(sectors);
        let places = (self.region.end() - first) / sectors;
        SectorRange::new(first + self.rng.below(places) * sectors, sectors)
    }

    fn any(&mut self, kind: OpKind) -> SectorRange {
        let units = self.region.sectors / self.unit();
        let again = kind == OpKind::Read && self.rng.chance(2, 5);
        let (first, length) = match self.recent_range() {
            // Seeing what was just done there is what most reads are for.
            Some(range) if again => range,
            _ => {
                let length = self.length().clamp(1, units);
                (self.place(length, units), length)
            }
        };
        self.recent[self.recent_count % RECENT] = (first, length);
        self.recent_count += 1;
        SectorRange::new(self.region.first + first * self.unit(), length * self.unit())
    }

    fn recent_range(&mut self) -> Option<(u64, u64)> {
        let known = self.recent_count.min(RECENT) as u64;
        let back = self.rng.below(known);
        self.recent[..known as usize].get(back as usize).copied()
    }

    /// A length, in units.
    fn length(&mut self) -> u64 {
        let max = self.options.max_io_bytes / self.options.alignment_bytes;
        match self.rng.below(100) {
            0..25 => 1,
            25..45 => self.rng.within(2..=16.min(max.max(2))),
            // As many short ones as long ones.
            45..70 => self.up_to_power(max),
            70..82 => 1 << self.rng.within(0..=u64::from(max.ilog2())),
            82..88 => max,
            88..91 => max + 1,
            91..94 => max.saturating_sub(1),
            94..97 => self.rng.within(max + 1..=max * BEYOND),
            _ => self.rng.within(1..=max),
        }
    }

    /// Up to a power of two that is itself drawn.
    fn up_to_power(&mut self, max: u64) -> u64 {
        let power = self.rng.within(0..=u64::from(max.ilog2()));
        self.rng.within(1..=max.min(1 << power))
    }

    /// A place for `length` of the region's `units` units.
    fn place(&mut self, length: u64, units: u64) -> u64 {
        let last = units - length;
        match self.rng.below(100) {
            0..6 => 0,
            6..12 => last,
            12..15 => self.rng.within(0..=last.min(8)),
            15..18 => self.rng.within(last.saturating_sub(8)..=last),
            18..35 => self.near_power(length, last),
            35..65 => self.near_recent(length).min(last),
            _ => self.rng.within(0..=last),
        }
    }

    /// At a multiple of a power of two, counted from the beginning of the device, or across one.
    fn near_power(&mut self, length: u64, last: u64) -> u64 {
        let before = self.region.first / self.unit();
        let power = 1 << self.rng.within(1..=16);
        let boundary = (before + self.rng.within(0..=last)).next_multiple_of(power).saturating_sub(before);
        let back = if self.rng.chance(1, 2) { 0 } else { self.rng.within(1..=length) };
        boundary.saturating_sub(back).min(last)
    }

    /// Touching or overlapping one of the last ranges.
    fn near_recent(&mut self, length: u64) -> u64 {
        let Some((first, recent)) = self.recent_range() else { return 0 };
        match self.rng.below(5) {
            0 => first,
            1 => first + recent,
            2 => first.saturating_sub(length),
            3 => (first + recent).saturating_sub(1),
            _ => (first + self.rng.within(0..=recent)).saturating_sub(self.rng.within(0..=length)),
        }
    }
}

impl Iterator for WorkerPlan {
    type Item = Op;

    /// The next operation; there always is one.
    fn next(&mut self) -> Option<Op> {
        let kind = self.mix.kind_at(self.rng.below(self.mix.total()));
        let range = match (kind, self.options.size) {
            (OpKind::Flush, _) => SectorRange::default(),
            (_, IoSize::Fixed(bytes)) => self.fixed(bytes),
            (_, IoSize::Any) => self.any(kind),
        };
        let index = self.index;
        self.index += 1;
        Some(Op { index, kind, range })
    }
}
