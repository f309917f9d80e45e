//! Reads and writes that are done in pieces, with other requests in between: right, as a block is all that is atomic.

use std::collections::BTreeMap;

use ublkit::Operation;

use super::Mutant;
use super::controls::shuffled;
use super::server::{Inner, ServerTwist, twisted};
use super::twist::Turn;
use crate::sim::server::{Buffers, Commit, Server, TagId, Work};

/// How many pieces a request falls into at most.
const PIECES: u64 = 16;

pub(super) fn plant(mutant: Mutant, inner: Box<dyn Server>, turn: &Turn) -> Result<Box<dyn Server>, Box<dyn Server>> {
    let operation = match mutant {
        Mutant::ReadInPieces => Operation::Read,
        Mutant::WriteInPieces => Operation::Write,
        _ => return Err(inner),
    };
    Ok(twisted(inner, turn, InPieces { turn: turn.clone(), operation, cut: BTreeMap::new() }))
}

/// Some requests of one kind are done piece by piece, in any order.
#[derive(Debug)]
struct InPieces {
    turn: Turn,
    operation: Operation,
    cut: BTreeMap<TagId, Cut>,
}

/// A request in pieces.
#[derive(Debug)]
struct Cut {
    work: Work,
    /// All of its data: its buffer has one piece's.
    data: Vec<u8>,
    piece_bytes: usize,
    /// The pieces to come, and last the one that is in hand.
    left: Vec<usize>,
}

impl Cut {
    /// Where the piece in hand is in the data.
    fn piece(&self) -> Option<std::ops::Range<usize>> {
        let begin = self.left.last()? * self.piece_bytes;
        Some(begin..self.data.len().min(begin + self.piece_bytes))
    }

    fn next(&self, inner: &mut Inner, buffers: &mut Buffers) -> bool {
        let Some(piece) = self.piece() else { return false };
        let (offset, len) = (self.work.offset + piece.start as u64, piece.len() as u64);
        if self.work.operation == Operation::Write {
            buffers.get_mut(self.work.tag)[..piece.len()].copy_from_slice(&self.data[piece]);
        }
        inner.take(Work { offset, len, ..self.work }, buffers);
        true
    }
}

impl ServerTwist for InPieces {
    fn take(&mut self, inner: &mut Inner, work: Work, buffers: &mut Buffers) {
        let block = u64::from(self.turn.plot().logical_block);
        if work.operation == self.operation
            && work.len > block
            && work.offset.is_multiple_of(block)
            && let Some(mut rng) = self.turn.comes()
        {
            self.turn.hit();
            let piece_bytes = work.len.div_ceil(PIECES).next_multiple_of(block) as usize;
            let data = buffers.get_mut(work.tag)[..work.len as usize].to_vec();
            let left = shuffled(&mut rng, data.len().div_ceil(piece_bytes));
            let cut = Cut { work, data, piece_bytes, left };
            cut.next(inner, buffers);
            self.cut.insert(work.tag, cut);
        } else {
            inner.take(work, buffers);
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
        let Some(mut cut) = self.cut.remove(&work.tag) else {
            commits.push(commit);
            return;
        };
        let buffer = buffers.get_mut(work.tag);
        if let Some(piece) = cut.piece() {
            let len = piece.len();
            cut.data[piece].copy_from_slice(&buffer[..len]);
        }
        cut.left.pop();
        // One that failed takes the pieces to come with it.
        if commit.result >= 0 && cut.next(inner, buffers) {
            self.cut.insert(work.tag, cut);
            return;
        }
        buffers.get_mut(work.tag)[..cut.data.len()].copy_from_slice(&cut.data);
        commits.push(if commit.result < 0 { commit } else { Commit { result: cut.work.len as i32, ..commit } });
    }
}
