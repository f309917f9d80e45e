//! Servers that commit the wrong result, too often, or never; and some that begin or end wrongly.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};

use ublkit::Operation;

use super::{Inner, ServerTwist, twisted};
use crate::mutant::Mutant;
use crate::mutant::lifecycle::kind_of;
use crate::mutant::twist::{EIO, Turn};
use crate::sector::SECTOR;
use crate::sim::server::{Buffers, Commit, Server, TagId, Work};

pub(super) fn plant(mutant: Mutant, inner: Box<dyn Server>, turn: &Turn) -> Result<Box<dyn Server>, Box<dyn Server>> {
    let own = turn.clone();
    Ok(match mutant {
        Mutant::DoubleCommit => twisted(inner, turn, DoubleCommit::new(own)),
        Mutant::WrongResultLen => twisted(inner, turn, WrongResultLen(own)),
        Mutant::ErrnoSign => twisted(inner, turn, ErrnoSign { turn: own, ready: Vec::new() }),
        Mutant::OpFlagMask => twisted(inner, turn, OpFlagMask(own)),
        Mutant::CqeDropped => twisted(inner, turn, CqeDropped(own)),
        Mutant::FetchMissing => twisted(inner, turn, FetchMissing(own)),
        Mutant::StopWithInflight => {
            twisted(inner, turn, StopWithInflight { turn: own, told: AtomicBool::new(false) })
        }
        Mutant::NoIoFlusher => twisted(inner, turn, NoIoFlusher(own)),
        _ => return Err(inner),
    })
}

/// A result is committed once more when its slot has the next request, which is not done yet.
#[derive(Debug)]
struct DoubleCommit {
    turn: Turn,
    doubled: BTreeMap<TagId, Commit>,
    ready: Vec<(Commit, Work)>,
    /// Requests that were completed by another one's result.
    forgotten: BTreeSet<TagId>,
}

impl DoubleCommit {
    fn new(turn: Turn) -> Self {
        Self { turn, doubled: BTreeMap::new(), ready: Vec::new(), forgotten: BTreeSet::new() }
    }
}

impl ServerTwist for DoubleCommit {
    fn take(&mut self, inner: &mut Inner, work: Work, buffers: &mut Buffers) {
        if self.forgotten.remove(&work.tag) {
            inner.finish(work.tag, buffers);
        }
        match self.doubled.remove(&work.tag) {
            Some(commit) => self.ready.push((commit, work)),
            None => inner.take(work, buffers),
        }
    }

    fn step(&mut self, inner: &mut Inner, buffers: &mut Buffers, commits: &mut Vec<Commit>) {
        for (commit, work) in self.ready.drain(..) {
            self.turn.hit();
            commits.push(commit);
            self.forgotten.insert(work.tag);
            inner.take(work, buffers);
        }
    }

    fn commit(
        &mut self,
        _inner: &mut Inner,
        work: Work,
        commit: Commit,
        _buffers: &mut Buffers,
        commits: &mut Vec<Commit>,
    ) {
        if self.forgotten.remove(&work.tag) {
            return;
        }
        if self.turn.comes().is_some() {
            self.doubled.insert(commit.tag, commit);
        }
        commits.push(commit);
    }

    fn held(&self) -> usize {
        self.ready.len()
    }
}

/// A read or write that moved everything is committed with a status, or with sectors for bytes.
#[derive(Debug)]
struct WrongResultLen(Turn);

impl ServerTwist for WrongResultLen {
    fn commit(
        &mut self,
        _inner: &mut Inner,
        work: Work,
        mut commit: Commit,
        _buffers: &mut Buffers,
        commits: &mut Vec<Commit>,
    ) {
        if matches!(work.operation, Operation::Read | Operation::Write)
            && commit.result > 0
            && let Some(mut rng) = self.0.comes()
        {
            self.0.hit();
            let status = work.operation == Operation::Read && rng.chance(1, 2);
            commit.result = if status { 0 } else { commit.result / SECTOR as i32 };
        }
        commits.push(commit);
    }
}

/// An error is committed without its sign. It makes some that it admits to, for storage that has none.
#[derive(Debug)]
struct ErrnoSign {
    turn: Turn,
    ready: Vec<Commit>,
}

impl ServerTwist for ErrnoSign {
    fn take(&mut self, inner: &mut Inner, work: Work, buffers: &mut Buffers) {
        if self.turn.comes().is_some() {
            self.turn.hit();
            let _admitted = self.turn.error(kind_of(work.operation, work.fua), work.offset, work.len);
            self.ready.push(Commit { tag: work.tag, result: EIO });
        } else {
            inner.take(work, buffers);
        }
    }

    fn step(&mut self, _inner: &mut Inner, _buffers: &mut Buffers, commits: &mut Vec<Commit>) {
        commits.append(&mut self.ready);
    }

    fn commit(
        &mut self,
        _inner: &mut Inner,
        _work: Work,
        mut commit: Commit,
        _buffers: &mut Buffers,
        commits: &mut Vec<Commit>,
    ) {
        if commit.result < 0 {
            self.turn.hit();
            commit.result = commit.result.saturating_neg();
        }
        commits.push(commit);
    }

    fn held(&self) -> usize {
        self.ready.len()
    }
}

/// A request's flags are not seen.
#[derive(Debug)]
struct OpFlagMask(Turn);

impl ServerTwist for OpFlagMask {
    fn take(&mut self, inner: &mut Inner, mut work: Work, buffers: &mut Buffers) {
        if work.fua && self.0.comes().is_some() {
            self.0.hit();
            (work.fua, work.no_unmap) = (false, false);
        }
        inner.take(work, buffers);
    }
}

/// A result is never committed.
#[derive(Debug)]
struct CqeDropped(Turn);

impl ServerTwist for CqeDropped {
    fn commit(
        &mut self,
        _inner: &mut Inner,
        _work: Work,
        commit: Commit,
        _buffers: &mut Buffers,
        commits: &mut Vec<Commit>,
    ) {
        if self.0.comes().is_some() {
            self.0.hit();
        } else {
            commits.push(commit);
        }
    }
}

/// The first slot is not fetched.
#[derive(Debug)]
struct FetchMissing(Turn);

impl ServerTwist for FetchMissing {
    fn fetches(&self, tag: TagId) -> bool {
        let missing = tag == TagId { queue: 0, tag: 0 };
        if missing {
            self.0.hit();
        }
        !missing
    }
}

/// When it is to stop, it does nothing any more.
#[derive(Debug)]
struct StopWithInflight {
    turn: Turn,
    told: AtomicBool,
}

impl ServerTwist for StopWithInflight {
    fn stopped(&self, inner: &Inner) -> bool {
        let stopped = self.turn.plot().stopping.load(Ordering::Relaxed);
        if stopped && inner.pending() > 0 && !self.told.swap(true, Ordering::Relaxed) {
            self.turn.hit();
        }
        stopped
    }
}

/// It did not declare itself part of writeback, and needs memory at times.
#[derive(Debug)]
struct NoIoFlusher(Turn);

impl ServerTwist for NoIoFlusher {
    fn allocates(&self) -> bool {
        let allocates = self.0.comes().is_some();
        if allocates {
            self.0.hit();
        }
        allocates
    }

    fn io_flusher(&self) -> bool {
        false
    }
}
