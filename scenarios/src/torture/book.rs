//! What a region may hold, kept by one worker or by several that share it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use ublkit_harness::ledger::{self, Ledger};
use ublkit_harness::{
    Access, DiscardPromise, Mismatch, Op, OpId, OpKind, Outcome, SectorRange, Shadow, Verified, shadow,
};

/// The index of reads that belong to no plan: passes over the whole region.
const PASS: u64 = u64::MAX;

/// What a region may hold.
///
/// A ledger's stamps are taken under its lock: an operation is begun before it is submitted and ended after its completion
/// was seen, so that what the ledger takes for ordered was so.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there are as many as regions")]
pub(crate) enum Book {
    /// A region of one worker, whose operations in flight do not overlap.
    Own { shadow: Mutex<Shadow>, discard: DiscardPromise },
    /// A region in which operations overlap, whoever's they are.
    Shared(Mutex<Ledger>),
}

/// An operation in flight; to be given back to [`Book::end`] or [`Book::end_read`].
#[derive(Debug)]
pub(crate) enum Entry {
    Own(shadow::Ticket),
    /// A pass over a region, which nothing changes meanwhile.
    OwnPass(SectorRange),
    Shared(ledger::Ticket),
    /// What a shadow does not need to know of.
    None,
}

fn lock<T>(book: &Mutex<T>) -> MutexGuard<'_, T> {
    book.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Book {
    pub(crate) fn own(shadow: Shadow, discard: DiscardPromise) -> Self {
        Self::Own { shadow: Mutex::new(shadow), discard }
    }

    pub(crate) fn shared(ledger: Ledger) -> Self {
        Self::Shared(Mutex::new(ledger))
    }

    /// The sectors it covers.
    pub(crate) fn region(&self) -> SectorRange {
        match self {
            Self::Own { shadow, .. } => lock(shadow).options().region,
            Self::Shared(ledger) => lock(ledger).options().region,
        }
    }

    /// Whether operations may overlap, and passes run beside them.
    pub(crate) const fn is_shared(&self) -> bool {
        matches!(self, Self::Shared(_))
    }

    /// Whether an operation may not begin yet.
    pub(crate) fn has_to_wait(&self, op: Op) -> bool {
        match self {
            Self::Own { shadow, .. } if op.kind != OpKind::Flush => {
                let access = if op.kind == OpKind::Read { Access::Read } else { Access::Change };
                lock(shadow).overlaps_in_flight(op.range, access)
            }
            _ => false,
        }
    }

    /// Begins an operation of `worker`, and fills the payload of a write. Says whether it overlaps another one that is in
    /// flight, of which one changes something.
    pub(crate) fn begin(&self, worker: u32, op: Op, payload: &mut [u8]) -> (Entry, bool) {
        let Op { index, kind, range } = op;
        match self {
            Self::Own { shadow, discard } => {
                let mut shadow = lock(shadow);
                let ticket = match kind {
                    OpKind::Read => shadow.begin_read(index, range),
                    OpKind::Write => shadow.begin_write(index, range, payload),
                    OpKind::WriteFua => shadow.begin_write_fua(index, range, payload),
                    OpKind::WriteZeroes => shadow.begin_write_zeroes(index, range),
                    OpKind::Discard => shadow.begin_discard(index, range, *discard),
                    OpKind::Flush => return (Entry::None, false),
                };
                (Entry::Own(ticket), false)
            }
            Self::Shared(ledger) => {
                let mut ledger = lock(ledger);
                let overlaps = ledger.overlaps_in_flight(range, kind);
                (Entry::Shared(ledger.begin(OpId { worker, index }, kind, range, payload)), overlaps)
            }
        }
    }

    /// Begins a read of a pass.
    pub(crate) fn begin_pass(&self, worker: u32, range: SectorRange) -> Entry {
        match self {
            Self::Own { .. } => Entry::OwnPass(range),
            Self::Shared(_) => self.begin(worker, Op { index: PASS, kind: OpKind::Read, range }, &mut []).0,
        }
    }

    /// Ends an operation. A read ends here only if it failed.
    pub(crate) fn end(&self, entry: Entry, outcome: Outcome) {
        match (self, entry) {
            (Self::Own { shadow, .. }, Entry::Own(ticket)) => lock(shadow).finish(ticket, outcome),
            (Self::Shared(ledger), Entry::Shared(ticket)) => lock(ledger).end(ticket, outcome),
            _ => {}
        }
    }

    /// Ends a read that returned `data`.
    pub(crate) fn end_read(&self, entry: Entry, data: &[u8]) -> Result<Verified, Box<Mismatch>> {
        let result = match (self, entry) {
            (Self::Own { shadow, .. }, Entry::Own(ticket)) => lock(shadow).finish_read(ticket, data),
            (Self::Own { shadow, .. }, Entry::OwnPass(range)) => lock(shadow).verify(range, data),
            (Self::Shared(ledger), Entry::Shared(ticket)) => lock(ledger).end_read(ticket, data),
            _ => Ok(Verified::default()),
        };
        result.map_err(|mut mismatch| {
            mismatch.op = mismatch.op.filter(|index| *index != PASS);
            for past in &mut mismatch.history {
                past.op = past.op.filter(|index| *index != PASS);
            }
            mismatch
        })
    }

    /// The power was cut while nothing was in flight.
    pub(crate) fn power_cut(&self) {
        if let Self::Shared(ledger) = self {
            lock(ledger).power_cut();
        }
    }
}
