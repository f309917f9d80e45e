//! What moves through the driver: operations, the requests that they are cut into, and the queues they wait in.

use std::collections::VecDeque;

use ublkit::Operation;

use crate::fault::HoldId;
use crate::ledger::OpId;
use crate::plan::OpKind;
use crate::range::SectorRange;

/// An operation of the application, in one of the driver's slots.
#[derive(Debug)]
pub(crate) struct Bio {
    pub(crate) id: OpId,
    pub(crate) kind: OpKind,
    pub(crate) range: SectorRange,
    /// What is written, or what was read. At least as long as the range; what is behind is left from earlier.
    pub(crate) data: Vec<u8>,
    /// How it ended so far: the first error, or 0.
    pub(crate) errno: i32,
    /// The step when it was submitted.
    pub(crate) began: u64,
    /// The step when it last came closer to its end.
    pub(super) progress: u64,
    /// Parts that have not ended.
    pub(super) parts: u32,
    pub(super) stage: Stage,
    /// The error is the driver's own, as when it refused or a server died, or that of another in the same request.
    pub(crate) excused: bool,
}

/// How far an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Free,
    InFlight,
    /// It ended, and the application is not told yet.
    Finished,
}

/// How long a request is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Until {
    /// Until this step.
    Step(u64),
    /// Until it is released.
    Released(HoldId),
}

/// Where a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Free,
    /// In its queue.
    Waiting,
    /// It has a tag, but the server does not see it yet.
    Held(Until),
    /// The server has it.
    AtServer,
}

/// A part of an operation that a request is for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    pub(super) bio: u32,
    /// Where it begins in the operation's data.
    pub(super) at: u64,
    pub(super) len: u64,
}

#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a property of its own")]
pub(super) struct Request {
    pub(super) operation: Operation,
    pub(super) queue: u16,
    pub(super) tag: u16,
    pub(super) state: State,
    /// Where what is left of it begins, in whole sectors.
    pub(super) offset: u64,
    /// How long what is left of it is.
    pub(super) left: u64,
    pub(super) fua: bool,
    pub(super) no_unmap: bool,
    /// When it is done, a flush is to follow before its operation ends.
    pub(super) flush_after: bool,
    /// How much of it the server is to see at first.
    pub(super) limit: u64,
    /// Others may join it.
    pub(super) mergeable: bool,
    /// The step when it came into being.
    pub(super) made: u64,
    /// What it is for, in order of place; none for a flush.
    pub(super) segments: Vec<Segment>,
    /// The segments before this one have ended.
    pub(super) first: usize,
    /// How much of the first segment is done.
    pub(super) skip: u64,
}

impl Request {
    pub(super) fn new() -> Self {
        Self {
            operation: Operation::Flush,
            queue: 0,
            tag: 0,
            state: State::Free,
            offset: 0,
            left: 0,
            fua: false,
            no_unmap: false,
            flush_after: false,
            limit: u64::MAX,
            mergeable: false,
            made: 0,
            segments: Vec::new(),
            first: 0,
            skip: 0,
        }
    }
}

/// A hardware queue with its flush machinery.
#[derive(Debug, Default)]
pub(super) struct Queue {
    pub(super) waiting: VecDeque<u32>,
    pub(super) free_tags: Vec<u16>,
    /// Operations that wait for a flush that has not begun.
    pub(super) flush_pending: Vec<u32>,
    /// Operations that wait for the flush under way.
    pub(super) flush_running: Vec<u32>,
    pub(super) flushing: bool,
}
