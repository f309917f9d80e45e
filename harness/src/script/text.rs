//! Scripts in words.

use std::fmt;

use super::{Act, Action, Recovery, Setup};
use crate::plan::OpKind;

impl Recovery {
    /// Its name, as in JSON and on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Wait => "wait",
            Self::Reissue => "reissue",
            Self::FailIo => "fail_io",
        }
    }
}

impl fmt::Display for Recovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Every option as `name=value`, in one line.
impl fmt::Display for Setup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Taken apart, so that an option that is added is not forgotten here.
        let Self {
            bytes,
            logical_block,
            max_io_bytes,
            queues,
            queue_depth,
            workers,
            io_depth,
            volatile_cache,
            fua,
            discard,
            discard_zeroes,
            write_zeroes,
            read_only,
            recovery,
            merges,
            reorder,
            memory_pressure,
            compressible,
        } = *self;
        write!(f, "bytes={bytes} logical_block={logical_block} max_io_bytes={max_io_bytes} queues={queues} ")?;
        write!(f, "queue_depth={queue_depth} workers={workers} io_depth={io_depth} ")?;
        write!(f, "volatile_cache={volatile_cache} fua={fua} discard={discard} discard_zeroes={discard_zeroes} ")?;
        write!(f, "write_zeroes={write_zeroes} read_only={read_only} recovery={recovery} merges={merges} ")?;
        write!(f, "reorder={reorder} memory_pressure={memory_pressure} compressible={compressible}")
    }
}

/// A sentence: `worker 1 writes sectors 8+8`.
impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let worker = self.worker;
        match self.act {
            Act::Op { kind: OpKind::Flush, .. } => write!(f, "worker {worker} flushes"),
            Act::Op { kind, range } => write!(f, "worker {worker} {} sectors {range}", verb(kind)),
            Act::PowerCut => f.write_str("the power is cut"),
            Act::Kill => f.write_str("the server dies, and another takes over"),
            Act::Reopen => f.write_str("the device is closed and opened again"),
            Act::FaultsOff => f.write_str("faults are switched off"),
            Act::FaultsOn => f.write_str("faults are switched on"),
            Act::Sweep => f.write_str("everything is read and checked"),
        }
    }
}

const fn verb(kind: OpKind) -> &'static str {
    match kind {
        OpKind::Read => "reads",
        OpKind::Write => "writes",
        OpKind::WriteFua => "writes with FUA",
        OpKind::Flush => "flushes",
        OpKind::Discard => "discards",
        OpKind::WriteZeroes => "zeroes",
    }
}
