//! Plans: a seed and options become one deterministic stream of operations per worker.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::range::SectorRange;
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

/// How often each kind of operation is drawn, as weights. Reads and prints as `read=50,write=40,flush=1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mix {
    /// The weight of [`OpKind::Read`].
    pub read: u32,
    /// The weight of [`OpKind::Write`].
    pub write: u32,
    /// The weight of [`OpKind::WriteFua`].
    pub fua: u32,
    /// The weight of [`OpKind::Flush`].
    pub flush: u32,
    /// The weight of [`OpKind::Discard`].
    pub discard: u32,
    /// The weight of [`OpKind::WriteZeroes`].
    pub zeroes: u32,
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
    options: PlanOptions,
    seed: Seed,
}

/// The endless stream of one worker's operations.
#[derive(Clone, Debug)]
pub struct WorkerPlan {
    region: SectorRange,
}

impl PlanOptions {
    /// Options for a device of this shape: `workers` disjoint regions, depth 1, the default mix, any size, and every
    /// capability.
    #[must_use]
    pub fn new(device_bytes: u64, logical_block_bytes: u64, max_io_bytes: u64, workers: u32) -> Self {
        let _ = (device_bytes, logical_block_bytes, max_io_bytes, workers);
        todo!()
    }
}

impl Plan {
    /// The plan of `seed`.
    ///
    /// # Errors
    /// When the options contradict each other or the device is too small for them.
    pub fn new(options: PlanOptions, seed: Seed) -> Result<Self, PlanError> {
        Ok(Self { options, seed })
    }

    /// The options.
    #[must_use]
    pub const fn options(&self) -> &PlanOptions {
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
        let _ = worker;
        todo!()
    }
}

impl WorkerPlan {
    /// The region that every operation is in.
    #[must_use]
    pub const fn region(&self) -> SectorRange {
        self.region
    }
}

impl Iterator for WorkerPlan {
    type Item = Op;

    /// The next operation; there always is one.
    fn next(&mut self) -> Option<Op> {
        todo!()
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

impl Default for Mix {
    fn default() -> Self {
        Self { read: 50, write: 40, fua: 3, flush: 1, discard: 3, zeroes: 3 }
    }
}

impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let _ = f;
        todo!()
    }
}

impl From<Mix> for String {
    fn from(mix: Mix) -> Self {
        mix.to_string()
    }
}

impl TryFrom<String> for Mix {
    type Error = PlanError;

    fn try_from(text: String) -> Result<Self, PlanError> {
        text.parse()
    }
}

impl FromStr for Mix {
    type Err = PlanError;

    fn from_str(text: &str) -> Result<Self, PlanError> {
        Err(PlanError(text.to_owned()))
    }
}

impl fmt::Display for PlanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for PlanError {}
