//! Plans: a seed and options become one deterministic stream of operations per worker.
//!
//! A stream says what is done and where; the payload of a write follows from the seed, the sector and its generation. The
//! operations of a run can thus be had again from its seed and options alone, byte for byte.

mod draw;
mod mix;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use ublkit::Geometry;

pub use self::draw::WorkerPlan;
pub use self::mix::Mix;
use crate::range::SectorRange;
use crate::sector::{LBA_LIMIT, SECTOR};
use crate::seed::Seed;

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OpKind {
    /// Read and check.
    Read,
    /// Write.
    Write,
    /// Write, durable when acknowledged.
    WriteFua,
    /// Make everything acknowledged so far durable.
    Flush,
    /// Say that the content is of no more use.
    Discard,
    /// Write zeroes without sending them.
    WriteZeroes,
}

/// One operation of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Op {
    /// Its place in the worker's stream, from 0.
    pub index: u64,
    /// What it does.
    pub kind: OpKind,
    /// The sectors it is for; empty for a flush.
    pub range: SectorRange,
}

/// How long operations are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IoSize {
    /// From one logical block to beyond the largest I/O, biased towards edges.
    Any,
    /// This many bytes, at multiples of it: for measuring.
    Fixed(u64),
}

/// Which operations the device offers besides reading and writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(clippy::struct_excessive_bools, reason = "each is offered or not on its own")]
pub struct Capabilities {
    /// Flush.
    pub flush: bool,
    /// Writes that are durable when acknowledged.
    pub fua: bool,
    /// Discard.
    pub discard: bool,
    /// Write zeroes.
    pub write_zeroes: bool,
}

/// What a plan is drawn from besides its seed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanOptions {
    /// The size of the device, in bytes.
    pub device_bytes: u64,
    /// The size of a logical block, in bytes.
    pub logical_block_bytes: u64,
    /// The largest request the device takes in one piece, in bytes; plans go beyond it.
    pub max_io_bytes: u64,
    /// What offsets and lengths are multiples of, in bytes; at least a logical block.
    pub alignment_bytes: u64,
    /// The workers' regions; where there are fewer regions than workers, workers share.
    pub regions: Vec<SectorRange>,
    /// How many workers there are.
    pub workers: u32,
    /// How many operations each worker keeps in flight.
    pub depth: u32,
    /// How often each kind of operation is drawn.
    pub mix: Mix,
    /// How long operations are.
    pub size: IoSize,
    /// Which operations the device offers; others are left out of the mix.
    pub capabilities: Capabilities,
}

/// Options that no plan can be drawn from. The message names the option and says what it must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanError(String);

/// A seed with options.
#[derive(Clone, Debug)]
pub struct Plan {
    options: Arc<PlanOptions>,
    seed: Seed,
}

impl Capabilities {
    /// Everything.
    pub const ALL: Self = Self { flush: true, fua: true, discard: true, write_zeroes: true };

    /// What a device of this geometry offers.
    #[must_use]
    pub const fn of(geometry: &Geometry) -> Self {
        Self {
            flush: geometry.volatile_cache,
            fua: geometry.fua,
            discard: geometry.discard.is_some(),
            write_zeroes: geometry.write_zeroes.is_some(),
        }
    }

    /// Whether `kind` can be asked for; reads and writes always can.
    #[must_use]
    pub const fn offers(&self, kind: OpKind) -> bool {
        match kind {
            OpKind::Read | OpKind::Write => true,
            OpKind::WriteFua => self.fua,
            OpKind::Flush => self.flush,
            OpKind::Discard => self.discard,
            OpKind::WriteZeroes => self.write_zeroes,
        }
    }
}

impl PlanOptions {
    /// Options for a device of this shape: disjoint regions, one for each of `workers` workers (fewer where the device
    /// has fewer blocks), depth 1, the default mix, any size, and every capability.
    #[must_use]
    pub fn new(device_bytes: u64, logical_block_bytes: u64, max_io_bytes: u64, workers: u32) -> Self {
        let regions = SectorRange::device(device_bytes).split(workers, logical_block_bytes / SECTOR as u64);
        Self {
            device_bytes,
            logical_block_bytes,
            max_io_bytes: max_io_bytes.max(logical_block_bytes),
            alignment_bytes: logical_block_bytes,
            workers: regions.len() as u32,
            regions,
            depth: 1,
            mix: Mix::default(),
            size: IoSize::Any,
            capabilities: Capabilities::ALL,
        }
    }

    /// How long an operation can be at most, in bytes: with any size, four times the largest I/O, so that it is split.
    #[must_use]
    pub fn longest_bytes(&self) -> u64 {
        match self.size {
            IoSize::Any => self.max_io_bytes.saturating_mul(draw::BEYOND),
            IoSize::Fixed(bytes) => bytes,
        }
    }

    /// The mix without what the device does not offer. A write that is to be durable becomes a plain one.
    #[must_use]
    pub fn offered_mix(&self) -> Mix {
        let keep = |weight: u32, kind: OpKind| if self.capabilities.offers(kind) { weight } else { 0 };
        let fua = keep(self.mix.fua, OpKind::WriteFua);
        Mix {
            read: self.mix.read,
            write: self.mix.write.saturating_add(self.mix.fua - fua),
            fua,
            flush: keep(self.mix.flush, OpKind::Flush),
            discard: keep(self.mix.discard, OpKind::Discard),
            zeroes: keep(self.mix.zeroes, OpKind::WriteZeroes),
        }
    }

    fn validate(&self) -> Result<(), PlanError> {
        let check =
            |right: bool, message: &dyn Fn() -> String| if right { Ok(()) } else { Err(PlanError(message())) };
        let Self { device_bytes, logical_block_bytes: block, alignment_bytes: alignment, .. } = *self;
        check(block.is_power_of_two() && block >= SECTOR as u64, &|| {
            format!("a logical block of {block} bytes is not a power of two of at least {SECTOR}")
        })?;
        check(device_bytes >= block && device_bytes.is_multiple_of(block), &|| {
            format!("a device of {device_bytes} bytes does not consist of logical blocks of {block} bytes")
        })?;
        check(device_bytes / SECTOR as u64 <= LBA_LIMIT, &|| {
            format!("a device of {device_bytes} bytes is larger than 512 TiB, beyond which sectors look alike")
        })?;
        check(alignment >= block && alignment.is_multiple_of(block), &|| {
            format!("an alignment of {alignment} bytes is not a multiple of the logical block of {block} bytes")
        })?;
        check(self.max_io_bytes >= alignment, &|| {
            format!("a largest I/O of {} bytes is less than the alignment of {alignment} bytes", self.max_io_bytes)
        })?;
        check(self.workers > 0, &|| "a plan needs at least one worker".to_owned())?;
        check(self.depth > 0, &|| "a depth of 0 keeps nothing in flight".to_owned())?;
        check(self.offered_mix().total() > 0, &|| {
            format!("the mix {} has nothing that the device offers", self.mix)
        })?;
        check(!self.regions.is_empty(), &|| "a plan needs at least one region".to_owned())?;
        let device = SectorRange::device(device_bytes);
        for region in &self.regions {
            check(device.covers(*region), &|| format!("the region {region} is not in the device {device}"))?;
            check(region.offset_bytes().is_multiple_of(alignment) && region.len_bytes() >= alignment, &|| {
                format!("the region {region} does not begin at, or is less than, the alignment of {alignment} bytes")
            })?;
            if let IoSize::Fixed(bytes) = self.size {
                check(bytes > 0 && bytes.is_multiple_of(alignment), &|| {
                    format!("an I/O of {bytes} bytes is not a multiple of the alignment of {alignment} bytes")
                })?;
                let first = region.offset_bytes().checked_next_multiple_of(bytes);
                let end = first.and_then(|first| first.checked_add(bytes));
                check(end.is_some_and(|end| end <= region.end() * SECTOR as u64), &|| {
                    format!("the region {region} has no room for an I/O of {bytes} bytes at a multiple of it")
                })?;
            }
        }
        Ok(())
    }
}

impl Plan {
    /// The plan of `seed`.
    ///
    /// # Errors
    /// When the options contradict each other or the device is too small for them.
    pub fn new(options: PlanOptions, seed: Seed) -> Result<Self, PlanError> {
        options.validate()?;
        Ok(Self { options: Arc::new(options), seed })
    }

    /// The options.
    #[must_use]
    pub fn options(&self) -> &PlanOptions {
        &self.options
    }

    /// The seed.
    #[must_use]
    pub const fn seed(&self) -> Seed {
        self.seed
    }

    /// The operations of `worker`, from the first.
    #[must_use]
    pub fn worker(&self, worker: u32) -> WorkerPlan {
        WorkerPlan::new(Arc::clone(&self.options), self.seed, worker)
    }
}

impl OpKind {
    /// Every kind.
    pub const ALL: [Self; 6] =
        [Self::Read, Self::Write, Self::WriteFua, Self::Flush, Self::Discard, Self::WriteZeroes];

    /// Whether it changes what its sectors hold.
    #[must_use]
    pub const fn changes(self) -> bool {
        matches!(self, Self::Write | Self::WriteFua | Self::Discard | Self::WriteZeroes)
    }
}

impl fmt::Display for OpKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::WriteFua => "fua",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes => "zeroes",
        })
    }
}

impl fmt::Display for PlanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for PlanError {}
