//! How an operation becomes requests.

use ublkit::{Geometry, Operation};

use super::errno::{EOPNOTSUPP, EPERM};
use super::request::Segment;
use super::{Driver, EIO, EREMOTEIO, Stage};
use crate::ledger::OpId;
use crate::plan::OpKind;
use crate::range::SectorRange;
use crate::sim::trace::{Trace, What};

/// How many waiting requests are looked at for one to join.
const JOIN: usize = 4;

impl Driver {
    /// Takes an operation; its data is in the slot's buffer. Returns whether it was refused at the door.
    pub(crate) fn submit(&mut self, slot: u32, id: OpId, kind: OpKind, range: SectorRange, trace: &mut Trace) {
        let now = self.now;
        let bio = &mut self.bios[slot as usize];
        (bio.id, bio.kind, bio.range, bio.errno, bio.parts) = (id, kind, range, 0, 1);
        (bio.began, bio.progress, bio.stage, bio.excused) = (now, now, Stage::InFlight, false);
        trace.note(What::Begin, [u64::from(id.worker) << 32 | kind as u64, range.first, range.sectors], || {
            format!("{now}: worker {} begins #{} {kind} {range}", id.worker, id.index)
        });
        let refused = self.refusal(kind, range);
        self.excuse = refused != 0 || self.is_failing();
        if refused == 0 {
            self.cut(slot, kind, range, trace);
        }
        // The part that kept it alive until all others were made.
        self.end_part(slot, refused);
        self.excuse = false;
    }

    /// The errno with which the block layer refuses an operation, or 0.
    pub(crate) fn refusal(&self, kind: OpKind, range: SectorRange) -> i32 {
        let geometry = self.limits.geometry();
        if geometry.read_only && kind.changes() {
            EPERM
        } else if range.end() > geometry.sectors() {
            EIO
        } else if kind == OpKind::Discard && geometry.discard.is_none() {
            EOPNOTSUPP
        } else {
            0
        }
    }

    fn cut(&mut self, slot: u32, kind: OpKind, range: SectorRange, trace: &mut Trace) {
        let Geometry { volatile_cache, fua, write_zeroes, .. } = *self.limits.geometry();
        let queue = (self.bios[slot as usize].id.worker % u32::from(self.setup.queues)) as u16;
        let (operation, durable) = match kind {
            OpKind::Read => (Operation::Read, false),
            OpKind::Write => (Operation::Write, false),
            OpKind::WriteFua => (Operation::Write, volatile_cache),
            OpKind::Discard => (Operation::Discard, false),
            OpKind::WriteZeroes if write_zeroes.is_none() => {
                self.data_mut(slot, range.len_bytes() as usize).fill(0);
                (Operation::Write, false)
            }
            OpKind::WriteZeroes => (Operation::WriteZeroes, false),
            OpKind::Flush => {
                if volatile_cache {
                    self.bios[slot as usize].parts += 1;
                    if self.is_failing() {
                        self.end_part(slot, EREMOTEIO);
                    } else {
                        self.queues[usize::from(queue)].flush_pending.push(slot);
                    }
                }
                return;
            }
        };
        let no_unmap = kind == OpKind::WriteZeroes && self.rng.chance(1, 2);
        let (mut at, len) = (0, range.len_bytes());
        while at < len {
            let offset = range.offset_bytes() + at;
            let piece = self.limits.first_piece(operation, offset, len - at);
            self.counts.splits += u64::from(at > 0);
            let segment = Segment { bio: slot, at, len: piece };
            self.bios[slot as usize].parts += 1;
            at += piece;
            if self.is_failing() {
                self.end_part(slot, EREMOTEIO);
                continue;
            }
            let mergeable = self.setup.merges && !durable && operation != Operation::WriteZeroes;
            if mergeable && self.join(queue, operation, offset, segment, trace) {
                continue;
            }
            let index = self.new_request(operation, queue);
            let request = &mut self.requests[index as usize];
            (request.offset, request.left) = (offset, piece);
            (request.fua, request.flush_after) = (durable && fua, durable && !fua);
            (request.no_unmap, request.mergeable) = (no_unmap, mergeable);
            request.segments.push(segment);
            self.queues[usize::from(queue)].waiting.push_back(index);
        }
    }

    /// Adds a part to a request that waits for its neighbour.
    fn join(&mut self, queue: u16, operation: Operation, offset: u64, segment: Segment, trace: &mut Trace) -> bool {
        let longest = match operation {
            Operation::Discard => self.limits.geometry().discard.map_or(0, |limits| limits.max_bytes),
            _ => u64::from(self.setup.max_io_bytes),
        };
        for index in self.queues[usize::from(queue)].waiting.iter().rev().take(JOIN) {
            let request = &mut self.requests[*index as usize];
            if !request.mergeable || request.operation != operation || request.left + segment.len > longest {
                continue;
            }
            if request.offset + request.left == offset {
                request.segments.push(segment);
            } else if offset + segment.len == request.offset {
                request.segments.insert(0, segment);
                request.offset = offset;
            } else {
                continue;
            }
            request.left += segment.len;
            self.counts.merges += 1;
            trace.note(What::Merge, [u64::from(*index), offset, segment.len], || {
                format!("{}: {} at {offset} joins another, now {} bytes", self.now, operation.name(), request.left)
            });
            return true;
        }
        false
    }
}
