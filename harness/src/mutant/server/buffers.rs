//! Servers that use the wrong memory.

use std::collections::BTreeMap;

use ublkit::Operation;

use super::{Inner, ServerTwist, twisted};
use crate::mutant::Mutant;
use crate::mutant::twist::Turn;
use crate::sector::SECTOR;
use crate::sim::server::{Buffers, Commit, Server, TagId, Work};

/// How much of a request's data is contiguous, where a server takes all of it to be.
pub(in crate::mutant) const SEGMENT: usize = 64 << 10;

/// How many steps a deferred write waits for its buffer to be used again.
const WAITS: u32 = 64;

pub(super) fn plant(mutant: Mutant, inner: Box<dyn Server>, turn: &Turn) -> Result<Box<dyn Server>, Box<dyn Server>> {
    Ok(match mutant {
        Mutant::TagSwap => twisted(inner, turn, TagSwap { turn: turn.clone(), held: None }),
        Mutant::BufferReuse => {
            let reuse = BufferReuse { turn: turn.clone(), ready: Vec::new(), deferred: BTreeMap::new() };
            twisted(inner, turn, reuse)
        }
        Mutant::UserCopyOffset | Mutant::SglContiguity | Mutant::ZcEarlyUnregister | Mutant::AutobufFallback => {
            twisted(inner, turn, WrongMemory { turn: turn.clone(), reads: BTreeMap::new() })
        }
        _ => return Err(inner),
    })
}

/// A read's buffer is committed for another read, and the other way round.
#[derive(Debug)]
struct TagSwap {
    turn: Turn,
    /// A read that is done and waits for another one.
    held: Option<(Work, Commit)>,
}

impl ServerTwist for TagSwap {
    fn step(&mut self, inner: &mut Inner, _buffers: &mut Buffers, commits: &mut Vec<Commit>) {
        // No other read will come before this one is heard of, perhaps.
        if !inner.works().any(|work| work.operation == Operation::Read) {
            commits.extend(self.held.take().map(|(_, commit)| commit));
        }
    }

    fn commit(
        &mut self,
        inner: &mut Inner,
        work: Work,
        commit: Commit,
        buffers: &mut Buffers,
        commits: &mut Vec<Commit>,
    ) {
        if work.operation != Operation::Read || commit.result < 0 {
            commits.push(commit);
        } else if let Some((other, held)) = self.held.take() {
            self.turn.hit();
            let mine = buffers.get_mut(work.tag)[..work.len as usize].to_vec();
            let theirs = buffers.get_mut(other.tag)[..other.len as usize].to_vec();
            let common = mine.len().min(theirs.len());
            buffers.get_mut(work.tag)[..common].copy_from_slice(&theirs[..common]);
            buffers.get_mut(other.tag)[..common].copy_from_slice(&mine[..common]);
            commits.extend([held, commit]);
        } else if inner.works().any(|work| work.operation == Operation::Read) && self.turn.comes().is_some() {
            self.held = Some((work, commit));
        } else {
            commits.push(commit);
        }
    }

    fn held(&self) -> usize {
        usize::from(self.held.is_some())
    }
}

/// A write is committed, and done with what its buffer holds when the slot has its next write.
#[derive(Debug)]
struct BufferReuse {
    turn: Turn,
    ready: Vec<Commit>,
    deferred: BTreeMap<TagId, Deferred>,
}

#[derive(Debug)]
struct Deferred {
    work: Work,
    data: Vec<u8>,
    steps_left: u32,
}

impl ServerTwist for BufferReuse {
    fn take(&mut self, inner: &mut Inner, work: Work, buffers: &mut Buffers) {
        if work.operation == Operation::Write {
            if let Some(deferred) = self.deferred.remove(&work.tag) {
                self.turn.hit();
                inner.take(deferred.work, buffers);
                inner.finish(work.tag, buffers);
            } else if self.turn.comes().is_some() {
                let data = buffers.get_mut(work.tag)[..work.len as usize].to_vec();
                self.deferred.insert(work.tag, Deferred { work, data, steps_left: WAITS });
                self.ready.push(Commit { tag: work.tag, result: work.len as i32 });
                return;
            }
        }
        inner.take(work, buffers);
    }

    fn step(&mut self, inner: &mut Inner, buffers: &mut Buffers, commits: &mut Vec<Commit>) {
        commits.append(&mut self.ready);
        for deferred in self.deferred.values_mut() {
            deferred.steps_left = deferred.steps_left.saturating_sub(1);
        }
        let due = |deferred: &Deferred| deferred.steps_left == 0 && !inner.has(deferred.work.tag);
        let due: Vec<_> = self.deferred.iter().filter(|(_, deferred)| due(deferred)).map(|(tag, _)| *tag).collect();
        for Deferred { work, data, .. } in due.iter().filter_map(|tag| self.deferred.remove(tag)) {
            // Nobody used the buffer, but for reads: the write is late and right.
            let buffer = buffers.get_mut(work.tag);
            let used = buffer[..data.len()].to_vec();
            buffer[..data.len()].copy_from_slice(&data);
            inner.take(work, buffers);
            inner.finish(work.tag, buffers);
            buffers.get_mut(work.tag)[..data.len()].copy_from_slice(&used);
        }
    }

    fn held(&self) -> usize {
        self.ready.len() + self.deferred.len()
    }
}

/// A part of a request's data, or all, is taken from or put into other memory than its buffer.
#[derive(Debug)]
struct WrongMemory {
    turn: Turn,
    /// Where a read that is in hand goes wrong, and what its buffer held before.
    reads: BTreeMap<TagId, (usize, Vec<u8>)>,
}

impl WrongMemory {
    /// From where on a request's data are elsewhere, if they are.
    fn begins(&self, work: &Work) -> Option<usize> {
        let len = work.len as usize;
        let concerned = match self.turn.mutant() {
            Mutant::UserCopyOffset => work.tag.queue > 0,
            Mutant::SglContiguity => len > SEGMENT,
            _ => true,
        };
        let mut rng = if concerned { self.turn.comes()? } else { return None };
        Some(match self.turn.mutant() {
            Mutant::SglContiguity => SEGMENT,
            Mutant::ZcEarlyUnregister => rng.below((len / SECTOR) as u64) as usize * SECTOR,
            _ => 0,
        })
    }

    /// The slot that the wrong bits lead to.
    fn other(tag: TagId) -> TagId {
        TagId { queue: tag.queue - 1, ..tag }
    }
}

impl ServerTwist for WrongMemory {
    fn take(&mut self, inner: &mut Inner, work: Work, buffers: &mut Buffers) {
        let len = work.len as usize;
        let moves = matches!(work.operation, Operation::Read | Operation::Write);
        if let Some(begin) = moves.then(|| self.begins(&work)).flatten() {
            self.turn.hit();
            if work.operation == Operation::Read {
                self.reads.insert(work.tag, (begin, buffers.get_mut(work.tag)[begin..len].to_vec()));
            } else {
                let elsewhere = match self.turn.mutant() {
                    Mutant::UserCopyOffset => buffers.get_mut(Self::other(work.tag))[..len].to_vec(),
                    // What comes behind the first segment: here, the first segment.
                    Mutant::SglContiguity => {
                        buffers.get_mut(work.tag)[..SEGMENT].iter().copied().cycle().take(len - begin).collect()
                    }
                    _ => vec![0; len - begin],
                };
                buffers.get_mut(work.tag)[begin..len].copy_from_slice(&elsewhere);
            }
        }
        inner.take(work, buffers);
    }

    fn commit(
        &mut self,
        _inner: &mut Inner,
        work: Work,
        commit: Commit,
        buffers: &mut Buffers,
        commits: &mut Vec<Commit>,
    ) {
        if let Some((begin, before)) = self.reads.remove(&work.tag) {
            let buffer = &mut buffers.get_mut(work.tag)[begin..begin + before.len()];
            if self.turn.mutant() == Mutant::UserCopyOffset {
                let data = buffer.to_vec();
                buffer.copy_from_slice(&before);
                buffers.get_mut(Self::other(work.tag))[..data.len()].copy_from_slice(&data);
            } else if self.turn.mutant() == Mutant::AutobufFallback {
                buffer.fill(0);
            } else {
                buffer.copy_from_slice(&before);
            }
        }
        commits.push(commit);
    }
}
