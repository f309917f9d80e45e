//! Error accounting: every error that is made is seen, every error that is seen was made, and none outlives its cause.
//!
//! One operation becomes several calls of the backend, calls may serve several operations, and one flush may serve many, so
//! errors are matched by what could have caused what. A call can have been made for an operation when the operation was in
//! flight during all of it, is of a kind that leads to such a call, and shares sectors with it. Then:
//!
//! * each sector of a call that failed is a sector of some operation that failed and that the call can have been for;
//! * an operation that failed did so with the errno of a call that can have been for it, as the kernel passes it on.
//!
//! With operations that overlap this is less than exact, and never wrong: what is found is a broken promise. Where errors
//! are dropped or turned by rights, an [`Allowance`] says so, and why.
//!
//! A call is told before the operations that ended after it, unless [`ErrorOptions::calls_late`] is set, and
//! [`horizon`](ErrorLedger::horizon) is told how far all is told.
//! Memory is bounded by what happens between two horizons; while there are no errors nothing is kept.

mod allow;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, VecDeque};

use serde::{Deserialize, Serialize};

pub use self::allow::{Allowance, KERNEL};
use crate::event::Finding;
use crate::fault::{Errno, Injection};
use crate::ledger::OpId;
use crate::near::{Near, subtract};
use crate::oracle::Oracle;
use crate::plan::OpKind;
use crate::range::SectorRange;
use crate::stamp::Stamp;
use crate::vacuity::Evidence;

/// Where flushes are: on a sector that no device has.
const FLUSH: SectorRange = SectorRange::new(u64::MAX - 1, 1);

/// How many of the last injections are shown with a finding.
const RECENT: usize = 8;

/// How errors are accounted for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ErrorOptions {
    /// Errors that nobody has to see: [`KERNEL`] on a device, and nothing where the block layer is not the kernel's.
    pub allowances: &'static [Allowance],
    /// Others use the device too, as whoever looks for partitions: a call that can have been for no operation is theirs.
    pub others: bool,
    /// Operations may be told before the calls that were made for them. Those that succeeded are kept until the horizon.
    pub calls_late: bool,
}

/// How an operation ended, as its caller saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Seen {
    /// It was acknowledged.
    Done,
    /// It failed with this errno. Anything that is no errno is told as it is, and found.
    Failed(i32),
    /// It was not heard of again.
    Unknown,
}

/// The accounts.
#[derive(Debug)]
pub struct ErrorLedger {
    options: ErrorOptions,
    /// Calls that failed by injection, of which not all that can have asked for them has been told.
    calls: Near<Call>,
    /// Operations that failed and, where calls are late, others.
    ops: Near<Op>,
    excuses: HashMap<OpId, Excuse>,
    deaths: Vec<Stamp>,
    switches: Vec<(Stamp, bool)>,
    recent: VecDeque<(Injection, Stamp, Stamp)>,
    counts: ErrorCounts,
}

/// What came of the errors.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorCounts {
    /// Calls that failed by injection, by errno as the application sees it.
    pub injected: BTreeMap<Errno, u64>,
    /// Operations that failed, by errno.
    pub seen: BTreeMap<Errno, u64>,
    /// Operations that failed for another reason, by the reason that was given.
    pub excused: BTreeMap<String, u64>,
    /// Calls whose error nobody saw, by rights.
    pub dropped: u64,
    /// Calls that were not for any operation of the run.
    pub others: u64,
}

#[derive(Debug)]
struct Call {
    injection: Injection,
    errno: Errno,
    began: Stamp,
    ended: Stamp,
    /// Sectors of which no operation that failed has been seen.
    unseen: Vec<SectorRange>,
    /// Sectors of which no operation has been seen that the call can have been for.
    unasked: Vec<SectorRange>,
}

#[derive(Debug)]
struct Op {
    id: OpId,
    kind: OpKind,
    range: SectorRange,
    seen: Seen,
    began: Stamp,
    ended: Stamp,
    /// The errnos of the calls that can have been for it.
    errnos: Vec<Errno>,
    excused: Option<String>,
}

#[derive(Clone, Debug)]
struct Excuse {
    errno: Option<Errno>,
    why: String,
}

/// Whether an operation of one kind leads to calls of another.
const fn leads_to(op: OpKind, call: OpKind) -> bool {
    match call {
        OpKind::Read => matches!(op, OpKind::Read),
        // Zeroes are written where the device cannot make them.
        OpKind::Write => matches!(op, OpKind::Write | OpKind::WriteFua | OpKind::WriteZeroes),
        OpKind::WriteFua => matches!(op, OpKind::WriteFua),
        // A write that has to be durable is a write and a flush where the device has no such write.
        OpKind::Flush => matches!(op, OpKind::Flush | OpKind::WriteFua),
        OpKind::Discard => matches!(op, OpKind::Discard),
        OpKind::WriteZeroes => matches!(op, OpKind::WriteZeroes),
    }
}

fn place(kind: OpKind, range: SectorRange) -> SectorRange {
    if kind == OpKind::Flush { FLUSH } else { range }
}

impl Call {
    fn may_be_for(&self, op: &Op) -> bool {
        let kind = self.injection.kind;
        leads_to(op.kind, kind)
            && (kind == OpKind::Flush || self.injection.range.overlaps(op.range))
            && op.began <= self.began
            && self.ended <= op.ended
    }

    /// Matches the two, if the call can have been for the operation.
    fn meet(&mut self, op: &mut Op, deaths: &[Stamp]) {
        if !self.may_be_for(op) {
            return;
        }
        // A call for a write covers what it is for; so does a flush.
        let cut = if self.injection.kind == OpKind::Flush { FLUSH } else { op.range };
        // What a server had not committed when it died was given to the next one, and may have succeeded there.
        let again = || deaths.iter().any(|death| self.began <= *death && *death <= op.ended);
        subtract(&mut self.unasked, cut);
        if op.seen != Seen::Done || again() {
            subtract(&mut self.unseen, cut);
        }
        op.errnos.push(self.errno);
    }
}

impl ErrorLedger {
    /// Accounts with nothing in them.
    #[must_use]
    pub fn new(options: ErrorOptions) -> Self {
        Self {
            options,
            calls: Near::default(),
            ops: Near::default(),
            excuses: HashMap::new(),
            deaths: Vec::new(),
            switches: Vec::new(),
            recent: VecDeque::new(),
            counts: ErrorCounts::default(),
        }
    }

    /// An operation that began at `began` ended at `ended`; at [`Stamp::MAX`] if it was given up, but may still be served.
    #[inline]
    pub fn observed(&mut self, id: OpId, kind: OpKind, range: SectorRange, seen: Seen, began: Stamp, ended: Stamp) {
        if seen != Seen::Done || !self.calls.is_empty() || !self.excuses.is_empty() || self.options.calls_late {
            self.observe(Op { id, kind, range, seen, began, ended, errnos: Vec::new(), excused: None });
        }
    }

    #[cold]
    fn observe(&mut self, mut op: Op) {
        let excuse = self.excuses.remove(&op.id);
        if let Seen::Failed(errno) = op.seen {
            let errno = Errno::new(errno);
            op.excused = excuse
                .filter(|excuse| excuse.errno.is_none_or(|excused| Some(excused) == errno))
                .map(|excuse| excuse.why);
            if let Some(errno) = errno {
                *self.counts.seen.entry(errno).or_default() += 1;
            }
        }
        let place = place(op.kind, op.range);
        for (_, call) in self.calls.on(place) {
            call.meet(&mut op, &self.deaths);
        }
        if op.kind == OpKind::WriteFua {
            for (_, call) in self.calls.on(FLUSH) {
                call.meet(&mut op, &self.deaths);
            }
        }
        if op.seen != Seen::Done || self.options.calls_late {
            self.ops.insert(place, op.ended, op);
        }
    }

    /// A fault happened to a call that began at `began` and ended at `ended`. What is no error is not counted.
    pub fn injected(&mut self, injection: &Injection, began: Stamp, ended: Stamp) {
        let Some(errno) = injection.errno.and_then(Errno::new).map(Errno::seen) else { return };
        *self.counts.injected.entry(errno).or_default() += 1;
        self.recent.truncate(RECENT - 1);
        self.recent.push_front((*injection, began, ended));
        let place = place(injection.kind, injection.range);
        let mut call = Call { injection: *injection, errno, began, ended, unseen: vec![place], unasked: vec![place] };
        if injection.kind == OpKind::Flush {
            // Whatever had to be durable may have needed it, wherever it is. Few failed, and are told before.
            self.ops.all().for_each(|op| call.meet(op, &self.deaths));
        } else {
            self.ops.on(place).for_each(|(_, op)| call.meet(op, &self.deaths));
        }
        self.calls.insert(place, began, call);
    }

    /// An operation may fail for another reason than a fault: with this errno, or with any. To be told while it is in
    /// flight, or once it has failed and before the horizon.
    pub fn excuse(&mut self, op: OpId, errno: Option<Errno>, why: impl Into<String>) {
        let known = self.ops.all().find(|own| own.id == op);
        if let Some(Op { seen: Seen::Failed(seen), excused, .. }) = known {
            if errno.is_none_or(|errno| errno.number() == *seen) {
                *excused = Some(why.into());
            }
        } else {
            self.excuses.insert(op, Excuse { errno, why: why.into() });
        }
    }

    /// The server died. Errors that it had not given to the kernel yet were lost with it.
    pub fn server_died(&mut self, now: Stamp) {
        self.deaths.push(now);
    }

    /// No faults from now on: no operation that begins later may fail.
    pub fn faults_off(&mut self, now: Stamp) {
        self.switches.push((now, false));
    }

    /// Faults again.
    pub fn faults_on(&mut self, now: Stamp) {
        self.switches.push((now, true));
    }

    /// All operations and calls that began before `oldest` have ended and been told.
    ///
    /// # Errors
    /// The first broken promise among them; asked again, the next.
    #[inline]
    pub fn horizon(&mut self, oldest: Stamp) -> Result<(), Finding> {
        if self.calls.is_empty() && self.ops.is_empty() { Ok(()) } else { self.settle(oldest) }
    }

    /// All operations and calls have ended and been told. The counts, if no promise was broken.
    ///
    /// # Errors
    /// The first broken promise; asked again, the next.
    pub fn judge(&mut self) -> Result<ErrorCounts, Finding> {
        self.horizon(Stamp::MAX)?;
        Ok(self.counts.clone())
    }

    /// What came of the errors so far.
    #[must_use]
    pub const fn counts(&self) -> &ErrorCounts {
        &self.counts
    }

    /// How many calls and operations are kept.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.calls.len() + self.ops.len()
    }

    #[cold]
    fn settle(&mut self, oldest: Stamp) -> Result<(), Finding> {
        while let Some(op) = self.ops.pop_due(oldest) {
            self.settle_op(&op)?;
        }
        while let Some(call) = self.calls.pop_due(oldest) {
            self.settle_call(&call)?;
        }
        self.deaths.retain(|death| *death >= oldest);
        Ok(())
    }

    fn settle_op(&mut self, op: &Op) -> Result<(), Finding> {
        let Seen::Failed(number) = op.seen else { return Ok(()) };
        if Errno::new(number).is_some_and(|errno| op.errnos.contains(&errno)) {
            return Ok(());
        }
        if let Some(why) = &op.excused {
            *self.counts.excused.entry(why.clone()).or_default() += 1;
            return Ok(());
        }
        let name = Errno::new(number).map_or_else(|| number.to_string(), |errno| errno.to_string());
        let Op { id, kind, range, began, ended, .. } = op;
        let failed = format!(
            "operation {} of worker {}, {kind} {range} in flight from {began} to {ended}, failed with {name}",
            id.index, id.worker
        );
        let off = self.switches.iter().rev().find(|(at, _)| at <= began).filter(|(_, on)| !on);
        let what = if let Some(first) = op.errnos.first() {
            format!("{kind} {range} failed with {name}, where {first} was injected")
        } else if let Some((at, _)) = off {
            format!("{kind} {range} failed with {name} although faults were off since {at}, before it began")
        } else {
            format!("{kind} {range} failed with {name}, which nothing injected")
        };
        Err(self.finding(what, failed))
    }

    fn settle_call(&mut self, call: &Call) -> Result<(), Finding> {
        if call.unseen.is_empty() {
            return Ok(());
        }
        let kind = call.injection.kind;
        if self.options.allowances.iter().any(|allowance| allowance.allows(kind, call.errno)) {
            self.counts.dropped += 1;
            return Ok(());
        }
        let mut asked = call.unseen.clone();
        call.unasked.iter().for_each(|range| subtract(&mut asked, *range));
        if self.options.others && asked.is_empty() {
            self.counts.others += 1;
            return Ok(());
        }
        let range = if kind == OpKind::Flush { String::new() } else { format!(" {}", call.injection.range) };
        let what = if asked.is_empty() {
            format!("{} on {kind}{range} was injected into a call that no operation can have led to", call.errno)
        } else {
            format!("{} on {kind}{range} was injected and not seen: what it was for succeeded", call.errno)
        };
        let made = format!("{}, in a call from {} to {}", call.injection, call.began, call.ended);
        Err(self.finding(what, made))
    }

    fn finding(&self, what: String, first: String) -> Finding {
        let mut detail = vec![first];
        detail
            .extend(self.recent.iter().map(|(injection, began, ended)| format!("{injection} ({began} to {ended})")));
        detail.extend(self.excuses.iter().map(|(op, excuse)| {
            let errno = excuse.errno.map_or("any errno".to_owned(), |errno| errno.to_string());
            format!("operation {} of worker {} may fail with {errno}: {}", op.index, op.worker, excuse.why)
        }));
        Finding { oracle: Oracle::Errors.name().to_owned(), what, detail }
    }
}

impl ErrorCounts {
    /// Adds the counts to `evidence`, as `errors_injected`, `errors_seen`, `errors_seen_EIO` and so on.
    pub fn add_to(&self, evidence: &mut Evidence) {
        for (name, counts) in [("errors_injected", &self.injected), ("errors_seen", &self.seen)] {
            evidence.add(name, counts.values().sum());
            for (errno, count) in counts {
                evidence.add(&format!("{name}_{errno}"), *count);
            }
        }
        evidence.add("errors_excused", self.excused.values().sum());
        evidence.add("errors_dropped", self.dropped);
        evidence.add("errors_of_others", self.others);
    }
}
