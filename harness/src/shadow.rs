//! The shadow: what each sector of one worker's region may hold now.
//!
//! The worker announces each operation before it is submitted and says how it ended; the shadow gives writes their
//! payload and judges what reads return. It holds four bytes per sector, under 1 % of the region, which the operating
//! system provides as they are touched.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::classify::Expected;
use crate::mismatch::Mismatch;
use crate::range::SectorRange;
use crate::sector::Pattern;

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It was acknowledged.
    Done,
    /// It failed, or was not heard of again: each of its sectors holds the old content or the new.
    Failed,
}

/// What a device promises of a discarded sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiscardPromise {
    /// It reads as zeroes.
    Zeroes,
    /// Nothing.
    Nothing,
}

/// What an operation needs of the sectors it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// That nothing changes them meanwhile.
    Read,
    /// That nothing else touches them meanwhile.
    Change,
}

/// What a shadow is for.
#[derive(Clone, Debug)]
pub struct ShadowOptions {
    /// The sectors it covers.
    pub region: SectorRange,
    /// The worker, for reports.
    pub worker: u32,
    /// What this run writes to this device.
    pub pattern: Arc<Pattern>,
    /// What other devices and runs hold, for naming bytes that come from there.
    pub foreign: Arc<[Pattern]>,
    /// The size of the device, in sectors.
    pub device_sectors: u64,
    /// Whether the sectors are known to be zeroes before the first write; otherwise anything may be there.
    pub initially_zero: bool,
}

/// An operation in flight; give it back to [`Shadow::finish`] or [`Shadow::finish_read`].
#[derive(Debug)]
#[must_use = "an operation that never finishes keeps its sectors in flight"]
pub struct Ticket {
    id: u64,
}

/// A check that found nothing wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Bytes that were compared.
    pub bytes: u64,
    /// Bytes that may hold anything and were not.
    pub unknown_bytes: u64,
    /// Sectors of unknown fate that now have a known content.
    pub settled_sectors: u64,
}

/// What each sector of one region may hold.
#[derive(Debug)]
pub struct Shadow {
    options: ShadowOptions,
}

impl Shadow {
    /// The shadow of a region that nothing was written to yet.
    #[must_use]
    pub fn new(options: ShadowOptions) -> Self {
        Self { options }
    }

    /// What the shadow is for.
    #[must_use]
    pub const fn options(&self) -> &ShadowOptions {
        &self.options
    }

    /// Begins a write, number `op` of the worker's plan: fills `buf`, as long as `range`, with its payload.
    ///
    /// # Panics
    /// When `range` is not in the region, `buf` is not as long, or something in flight is in the way.
    pub fn begin_write(&mut self, op: u64, range: SectorRange, buf: &mut [u8]) -> Ticket {
        let _ = (op, range, buf);
        todo!()
    }

    /// Begins a write of zeroes.
    ///
    /// # Panics
    /// As [`begin_write`](Self::begin_write).
    pub fn begin_write_zeroes(&mut self, op: u64, range: SectorRange) -> Ticket {
        let _ = (op, range);
        todo!()
    }

    /// Begins a discard.
    ///
    /// # Panics
    /// As [`begin_write`](Self::begin_write).
    pub fn begin_discard(&mut self, op: u64, range: SectorRange, promise: DiscardPromise) -> Ticket {
        let _ = (op, range, promise);
        todo!()
    }

    /// Ends a write, a write of zeroes or a discard; also a read that failed.
    pub fn finish(&mut self, ticket: Ticket, outcome: Outcome) {
        let _ = (ticket, outcome);
        todo!()
    }

    /// Begins a read.
    ///
    /// # Panics
    /// As [`begin_write`](Self::begin_write); reads do not get in each other's way.
    pub fn begin_read(&mut self, op: u64, range: SectorRange) -> Ticket {
        let _ = (op, range);
        todo!()
    }

    /// Ends a read that returned `buf`.
    ///
    /// # Errors
    /// When a sector holds what it may not hold.
    ///
    /// # Panics
    /// When `buf` is not as long as the read.
    pub fn finish_read(&mut self, ticket: Ticket, buf: &[u8]) -> Result<Verified, Box<Mismatch>> {
        let _ = (ticket, buf);
        todo!()
    }

    /// Checks what `range` holds, read at a moment when nothing in flight could change it.
    ///
    /// # Errors
    /// When a sector holds what it may not hold.
    ///
    /// # Panics
    /// When `range` is not in the region, `buf` is not as long, or something in flight changes it.
    pub fn verify(&mut self, range: SectorRange, buf: &[u8]) -> Result<Verified, Box<Mismatch>> {
        let _ = (range, buf);
        todo!()
    }

    /// Whether something in flight forbids an operation that needs this access to `range`.
    #[must_use]
    pub fn overlaps_in_flight(&self, range: SectorRange, access: Access) -> bool {
        let _ = (range, access);
        todo!()
    }

    /// What `sector`, which is in the region, may hold now.
    ///
    /// # Panics
    /// When it is not in the region.
    #[must_use]
    pub fn expected(&self, sector: u64) -> Expected {
        let _ = sector;
        todo!()
    }

    /// The memory the shadow takes when every sector was touched, in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        todo!()
    }
}

impl Ticket {
    /// A number that no other ticket of the same shadow has.
    #[must_use]
    pub const fn id(&self) -> u64 {
        self.id
    }
}
