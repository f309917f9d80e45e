//! What becomes of requests when a server dies, or the machine.

use super::{Bio, Driver, EIO, EREMOTEIO, Operation, Stage, State, Until};
use crate::script::Recovery;
use crate::sim::trace::{Trace, What};

/// How long there is no server after one died, in steps.
const GAP: u64 = 400;

impl Driver {
    /// The server dies. Returns whether there was one.
    pub(crate) fn kill(&mut self, trace: &mut Trace) -> bool {
        if self.server.take().is_none() {
            return false;
        }
        let recovery = self.setup.recovery;
        trace.note(What::Kill, [self.now, 0, 0], || format!("{}: the server dies, recovery {recovery:?}", self.now));
        self.starved_at = None;
        self.held.clear();
        self.excuse = true;
        let had: Vec<u32> =
            (0..).zip(&self.requests).filter(|(_, had)| had.has_tag()).map(|(index, _)| index).collect();
        for index in had.iter().rev().copied() {
            if recovery == Recovery::Reissue {
                self.counts.reissued += 1;
                self.give_back_tag(index);
                self.requeue(index);
                // Ahead of those that nobody has seen.
                let waiting = &mut self.queues[usize::from(self.requests[index as usize].queue)].waiting;
                waiting.rotate_right(1);
            } else {
                self.end(index, EIO);
            }
        }
        match recovery {
            Recovery::None => self.fail_waiting(EIO),
            Recovery::FailIo => self.fail_waiting(EREMOTEIO),
            Recovery::Wait | Recovery::Reissue => {}
        }
        self.excuse = false;
        // A device without recovery is gone, and another takes its place.
        self.back_at = self.now + if recovery == Recovery::None { 0 } else { self.rng.below(GAP) };
        true
    }

    /// Whether there is no server, and it is time for one.
    pub(crate) fn wants_server(&self) -> bool {
        self.server.is_none() && self.now >= self.back_at
    }

    /// Whether there is no server.
    pub(crate) fn is_down(&self) -> bool {
        self.server.is_none()
    }

    /// Skips to the step when there is a server again.
    pub(crate) fn skip_gap(&mut self) {
        self.now = self.now.max(self.back_at);
    }

    /// Fails what the server has not seen.
    fn fail_waiting(&mut self, errno: i32) {
        for queue in 0..self.queues.len() {
            while let Some(index) = self.queues[queue].waiting.pop_front() {
                self.end(index, errno);
            }
            let mut pending = std::mem::take(&mut self.queues[queue].flush_pending);
            for slot in pending.drain(..) {
                self.end_part(slot, errno);
            }
            self.queues[queue].flush_pending = pending;
        }
    }

    /// The machine is gone with everything in it. Hands every operation that was in flight to `lost`; their slots are
    /// free.
    pub(crate) fn vanish(&mut self, mut lost: impl FnMut(u32, &Bio)) {
        self.server = None;
        self.back_at = self.now;
        self.starved_at = None;
        self.held.clear();
        self.finished.clear();
        self.owners.fill(None);
        for queue in &mut self.queues {
            queue.waiting.clear();
            queue.flush_pending.clear();
            queue.flush_running.clear();
            queue.flushing = false;
        }
        for (index, request) in (0..).zip(&mut self.requests) {
            if request.state != State::Free {
                request.state = State::Free;
                self.free_requests.push(index);
            }
        }
        for (slot, bio) in (0..).zip(&mut self.bios) {
            if bio.stage != Stage::Free {
                bio.stage = Stage::Free;
                self.free_bios.push(slot);
                lost(slot, bio);
            }
        }
    }
}

impl super::Request {
    fn has_tag(&self) -> bool {
        matches!(self.state, State::Held(_) | State::AtServer)
    }

    /// One line about it.
    pub(super) fn words(&self, now: u64) -> String {
        let place = match self.state {
            State::Held(Until::Released(_)) => format!("tag {}, held", self.tag),
            State::Held(Until::Step(until)) => format!("tag {}, held until step {until}", self.tag),
            State::AtServer => format!("tag {}, the server has it", self.tag),
            State::Waiting | State::Free => "waiting for a tag".to_owned(),
        };
        let range = match self.operation {
            Operation::Flush => String::new(),
            _ => format!(" {}+{}", self.offset / 512, self.left / 512),
        };
        let (queue, name, age) = (self.queue, self.operation.name(), now - self.made);
        format!("queue {queue}: {name}{range}, {age} steps old: {place}")
    }
}
