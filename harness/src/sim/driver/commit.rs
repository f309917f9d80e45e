//! What a commit means: the rules of `ublk_drv.c` for results.

use ublkit::Operation;

use super::{Driver, EIO, State, arrives_as};
use crate::sim::server::{Commit, TagId};
use crate::sim::trace::{Trace, What, result_words};

impl Driver {
    /// Takes a result for a tag.
    pub(super) fn commit(&mut self, commit: Commit, trace: &mut Trace) {
        let Commit { tag: TagId { queue, tag }, result } = commit;
        let numbers = [u64::from(queue) << 16 | u64::from(tag), result as u64, 0];
        let Some(index) = self.request_of(commit.tag) else {
            self.counts.refused_commits += 1;
            trace.note(What::Refused, numbers, || {
                format!("{}: queue {queue} tag {tag}: commit refused, no request there", self.now)
            });
            return;
        };
        trace.note(What::Commit, numbers, || {
            format!("{}: queue {queue} tag {tag}: result {}", self.now, result_words(result))
        });
        let request = &self.requests[index as usize];
        match (request.operation, result) {
            (_, ..0) => self.end(index, arrives_as(result)),
            (Operation::Read, 0) => self.end(index, EIO),
            (Operation::Write, 0) => {
                self.counts.requeued += 1;
                self.give_back_tag(index);
                self.requeue(index);
            }
            (Operation::Read | Operation::Write, 1..) => self.advance(index, result as u64, trace),
            _ => self.end(index, 0),
        }
    }

    /// The request that a server may commit with this tag.
    fn request_of(&self, tag: TagId) -> Option<u32> {
        if tag.queue >= self.setup.queues || tag.tag >= self.setup.queue_depth {
            return None;
        }
        let index = self.owners[self.owner_index(tag)]?;
        (self.requests[index as usize].state == State::AtServer).then_some(index)
    }

    /// A read or write moved so many bytes. What is left of it is asked for again, with the same tag.
    fn advance(&mut self, index: u32, moved: u64, trace: &mut Trace) {
        let request = &mut self.requests[index as usize];
        self.counts.clamped += u64::from(moved > request.left);
        let moved = moved.min(request.left);
        let tag = TagId { queue: request.queue, tag: request.tag };
        let (reads, after) = (request.operation == Operation::Read, request.flush_after);
        // The start is in sectors: of a result that is not, the rest is shifted.
        request.offset += moved / 512 * 512;
        request.left -= moved;
        request.mergeable = false;
        let left = request.left;
        let mut copied = 0;
        while copied < moved {
            let request = &mut self.requests[index as usize];
            let segment = request.segments[request.first];
            let take = (moved - copied).min(segment.len - request.skip);
            let at = (segment.at + request.skip) as usize;
            request.skip += take;
            let ends = request.skip == segment.len;
            if ends {
                request.first += 1;
                request.skip = 0;
            }
            let bio = &mut self.bios[segment.bio as usize];
            bio.progress = self.now;
            if reads {
                let place = &mut bio.data[at..at + take as usize];
                place.copy_from_slice(&self.buffers.get_mut(tag)[copied as usize..(copied + take) as usize]);
            }
            copied += take;
            if ends && after {
                self.queues[usize::from(tag.queue)].flush_pending.push(segment.bio);
            } else if ends {
                self.end_part(segment.bio, 0);
            }
        }
        if left > 0 {
            self.counts.short += 1;
            self.hand_over(index, trace);
        } else {
            self.give_back_tag(index);
            self.free_request(index);
        }
    }

    /// Ends a request, and every part that it still has.
    pub(super) fn end(&mut self, index: u32, errno: i32) {
        if self.requests[index as usize].state != State::Waiting {
            self.give_back_tag(index);
        }
        let request = &mut self.requests[index as usize];
        let (first, queue) = (request.first, usize::from(request.queue));
        if request.operation == Operation::Flush {
            let mut running = std::mem::take(&mut self.queues[queue].flush_running);
            self.queues[queue].flushing = false;
            for slot in running.drain(..) {
                self.end_part(slot, errno);
            }
            self.queues[queue].flush_running = running;
        } else {
            let segments = std::mem::take(&mut request.segments);
            // What fails a part of a request fails the others that joined it, whatever they are for.
            let excuse = self.excuse;
            self.excuse |= segments.len() > first + 1;
            for segment in &segments[first..] {
                self.end_part(segment.bio, errno);
            }
            self.excuse = excuse;
            self.requests[index as usize].segments = segments;
        }
        self.free_request(index);
    }

    pub(super) fn requeue(&mut self, index: u32) {
        let request = &mut self.requests[index as usize];
        request.state = State::Waiting;
        request.mergeable = false;
        self.queues[usize::from(request.queue)].waiting.push_back(index);
    }

    pub(super) fn give_back_tag(&mut self, index: u32) {
        let request = &self.requests[index as usize];
        let tag = TagId { queue: request.queue, tag: request.tag };
        self.queues[usize::from(tag.queue)].free_tags.push(tag.tag);
        let owner = self.owner_index(tag);
        self.owners[owner] = None;
    }

    fn free_request(&mut self, index: u32) {
        self.requests[index as usize].state = State::Free;
        self.free_requests.push(index);
    }
}
