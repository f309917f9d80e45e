//! Who works where: regions of one worker each, and one that several share.

use std::sync::Arc;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use ublkit_harness::{
    Ledger, LedgerOptions, Oracles, Pattern, PlanOptions, SECTOR, SectorRange, Seed, Shadow, ShadowOptions,
};

use super::book::Book;
use super::device::Opened;
use crate::target::NEIGHBOUR;

/// Whether workers share a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(crate) enum Sharing {
    /// Each worker has a region to itself, in which its operations do not overlap.
    Disjoint,
    /// All workers share one region, and their operations overlap freely.
    Overlapping,
    /// One half of the workers does this, the other that.
    Both,
}

/// The region that workers share, and those of single workers.
#[derive(Debug)]
pub(crate) struct Layout {
    workers: u32,
    /// The first so many workers share the first region.
    sharing: u32,
    regions: Vec<SectorRange>,
    compressible: u8,
}

impl Layout {
    /// Spreads regions of at most `most` bytes over the device.
    pub(crate) fn new(sharing: Sharing, workers: u32, most: u64, opened: &Opened) -> Self {
        let sharers = match sharing {
            Sharing::Disjoint => 0,
            Sharing::Overlapping => workers,
            Sharing::Both => workers / 2,
        };
        let block = opened.logical_block / SECTOR as u64;
        let wanted = workers - sharers + u32::from(sharers > 0);
        let mut regions = SectorRange::device(opened.bytes).split(wanted, block);
        let most = (most / SECTOR as u64 / block).max(1) * block;
        let last = regions.len() - 1;
        for (index, region) in regions.iter_mut().enumerate() {
            let sectors = region.sectors.min(most);
            // The last one keeps to the end of the device, where the edge is.
            let first = if index == last { region.end() - sectors } else { region.first };
            *region = SectorRange::new(first, sectors);
        }
        // A device of fewer blocks than regions has fewer workers.
        let workers = workers - (wanted - regions.len() as u32);
        Self { workers, sharing: sharers.min(workers), regions, compressible: 0 }
    }

    /// So many percent of what is written can be compressed away.
    pub(crate) fn compressible(self, percent: u8) -> Self {
        Self { compressible: percent, ..self }
    }

    /// Whether operations overlap, when each worker has so many in flight.
    pub(crate) const fn overlaps(&self, io_depth: u16) -> bool {
        self.sharing > 0 && (self.sharing > 1 || io_depth > 1)
    }

    /// All regions.
    pub(crate) fn regions(&self) -> &[SectorRange] {
        &self.regions
    }

    /// The first region, shared if one is, and the last, which is not unless it is the only one.
    pub(crate) fn first_and_last(&self) -> (SectorRange, SectorRange) {
        (self.regions[0], self.regions[self.regions.len() - 1])
    }

    fn region_of(&self, worker: u32) -> usize {
        if worker < self.sharing { 0 } else { (worker - self.sharing) as usize + usize::from(self.sharing > 0) }
    }

    /// What the plan has to know.
    pub(crate) fn apply(&self, options: &mut PlanOptions) {
        options.workers = self.workers;
        options.regions = (0..self.workers).map(|worker| self.regions[self.region_of(worker)]).collect();
    }

    /// Which part of its region a worker is to fill, and of how many.
    pub(crate) fn part(&self, worker: u32) -> (u32, u32) {
        if worker < self.sharing { (worker, self.sharing) } else { (0, 1) }
    }

    /// The book of each region. All are ledgers where there are `outages`, of which shadows know nothing.
    pub(crate) fn books(&self, opened: &Opened, seed: Seed, outages: bool) -> Books {
        let pattern = Arc::new(Pattern::with_compressibility(seed, opened.device_id, self.compressible));
        let foreign: Arc<[Pattern]> = Arc::new([Pattern::new(seed, NEIGHBOUR)]);
        let book = |(index, &region): (usize, &SectorRange)| {
            let shared = self.sharing > 0 && index == 0;
            Arc::new(if shared || outages {
                Book::shared(Ledger::new(LedgerOptions {
                    region,
                    block_sectors: (opened.logical_block / SECTOR as u64) as u32,
                    pattern: Arc::clone(&pattern),
                    foreign: Arc::clone(&foreign),
                    device_sectors: opened.bytes / SECTOR as u64,
                    initially_zero: opened.zeroed,
                    discard: opened.discard,
                    // What only a power cut shows is not kept where there is none.
                    volatile_cache: outages && opened.capabilities.flush,
                    torn_by_races: opened.torn_by_races,
                    oracles: Oracles::ALL,
                }))
            } else {
                let worker = index as u32 + self.sharing - u32::from(self.sharing > 0);
                let shadow = Shadow::new(ShadowOptions {
                    region,
                    worker,
                    pattern: Arc::clone(&pattern),
                    foreign: Arc::clone(&foreign),
                    device_sectors: opened.bytes / SECTOR as u64,
                    initially_zero: opened.zeroed,
                });
                Book::own(shadow, opened.discard)
            })
        };
        Books { of_regions: self.regions.iter().enumerate().map(book).collect() }
    }

    /// The book of a worker's region.
    pub(crate) fn book_of(&self, books: &Books, worker: u32) -> Arc<Book> {
        Arc::clone(&books.of_regions[self.region_of(worker)])
    }
}

/// The books of all regions.
#[derive(Debug)]
pub(crate) struct Books {
    of_regions: Vec<Arc<Book>>,
}

impl Books {
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Book> {
        self.of_regions.iter().map(AsRef::as_ref)
    }
}
