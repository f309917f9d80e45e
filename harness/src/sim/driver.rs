//! The block layer and the ublk driver, between the operations of an application and a server.
//!
//! An operation is cut into requests by the device's limits; each waits in the queue of its worker, where a neighbour may
//! join it, until a tag is free. The data of a write is copied into the tag's buffer, and the server is handed the
//! request. What it commits is judged by the rules of the kernel's driver, and when all parts of an operation have ended,
//! the application is told so, sooner or later.
//!
//! Whatever might happen next is drawn from a seed, one thing at a time, by whoever calls in.

mod commit;
mod death;
mod dump;
mod errno;
mod request;
mod split;
mod submit;
#[cfg(test)]
mod tests;

use ublkit::{Geometry, Operation};

pub use self::errno::arrives_as;
use self::errno::{EIO, EREMOTEIO};
pub(crate) use self::request::Bio;
use self::request::{Queue, Request, Stage, State, Until};
use self::split::Limits;
use crate::fault::{Faults, Timing};
use crate::ledger::OpId;
use crate::plan::OpKind;
use crate::range::SectorRange;
use crate::script::{Recovery, Setup};
use crate::seed::{Seed, SeededRng};
use crate::sim::server::{Buffers, Commit, Server, TagId, Work};
use crate::sim::trace::{Trace, What};

/// How far a request may overtake others.
const NEAR: usize = 64;
/// In how many steps one of the requests that are held is released.
const RELEASE: u64 = 512;

/// What the driver did.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) splits: u64,
    pub(crate) merges: u64,
    pub(crate) requests: u64,
    pub(crate) flush_requests: u64,
    pub(crate) flushes_shared: u64,
    pub(crate) held: u64,
    pub(crate) short: u64,
    pub(crate) clamped: u64,
    pub(crate) requeued: u64,
    pub(crate) refused_commits: u64,
    pub(crate) reissued: u64,
}

#[derive(Debug)]
pub(crate) struct Driver {
    setup: Setup,
    limits: Limits,
    server: Option<Box<dyn Server>>,
    faults: Option<Faults>,
    /// The step at which there is a server again, after one died.
    back_at: u64,
    buffers: Buffers,
    queues: Vec<Queue>,
    /// Which request each tag has.
    owners: Vec<Option<u32>>,
    requests: Vec<Request>,
    free_requests: Vec<u32>,
    bios: Vec<Bio>,
    free_bios: Vec<u32>,
    /// Operations that have ended, and of which the application does not know.
    finished: Vec<u32>,
    /// Requests that are held back from the server.
    held: Vec<u32>,
    /// Empty but while the server works.
    commits: Vec<Commit>,
    rng: SeededRng,
    server_rng: SeededRng,
    pub(crate) now: u64,
    pub(crate) counts: Counts,
    /// Writes of which the application knows the end.
    writes_ended: u64,
    /// Errors are the driver's own for now.
    excuse: bool,
    /// What `writes_ended` was when the server began to wait for memory.
    starved_at: Option<u64>,
}

impl Driver {
    pub(crate) fn new(setup: &Setup, geometry: Geometry, seed: Seed, slots: usize, faults: Option<Faults>) -> Self {
        let tags = usize::from(setup.queues) * usize::from(setup.queue_depth);
        let bio = || Bio {
            id: OpId::default(),
            kind: OpKind::Read,
            range: SectorRange::default(),
            data: Vec::new(),
            errno: 0,
            began: 0,
            progress: 0,
            parts: 0,
            stage: Stage::Free,
            excused: false,
        };
        Self {
            setup: *setup,
            limits: Limits::new(setup.max_io_bytes, geometry),
            server: None,
            faults,
            back_at: 0,
            buffers: Buffers::new(setup.queues, setup.queue_depth, 0),
            queues: (0..setup.queues).map(|_| Queue::default()).collect(),
            owners: vec![None; tags],
            requests: Vec::new(),
            free_requests: Vec::new(),
            bios: (0..slots).map(|_| bio()).collect(),
            free_bios: (0..slots as u32).rev().collect(),
            finished: Vec::new(),
            held: Vec::new(),
            commits: Vec::new(),
            rng: seed.derive("driver", 0).rng(),
            server_rng: seed.derive("server", 0).rng(),
            now: 0,
            counts: Counts::default(),
            writes_ended: 0,
            excuse: false,
            starved_at: None,
        }
    }

    /// START: the device takes requests, once every tag is fetched.
    ///
    /// # Errors
    /// A tag that is not, for which START waits for ever.
    pub(crate) fn start(&mut self, server: Box<dyn Server>, geometry: Geometry) -> Result<(), TagId> {
        let Setup { queue_depth, max_io_bytes, .. } = self.setup;
        self.limits = Limits::new(max_io_bytes, geometry);
        let bytes = max_io_bytes.max(geometry.logical_block) as usize;
        self.buffers.renew(bytes);
        self.owners.fill(None);
        self.starved_at = None;
        for (queue, number) in self.queues.iter_mut().zip(0_u16..) {
            queue.free_tags.clear();
            for tag in (0..queue_depth).rev() {
                if !server.fetches(TagId { queue: number, tag }) {
                    return Err(TagId { queue: number, tag });
                }
                queue.free_tags.push(tag);
            }
        }
        self.server = Some(server);
        Ok(())
    }

    /// The device ends in order: nothing is in flight.
    pub(crate) fn stop(&mut self) {
        self.server = None;
    }

    /// A free slot for an operation.
    pub(crate) fn slot(&mut self) -> Option<u32> {
        self.free_bios.pop()
    }

    pub(crate) fn bio(&self, slot: u32) -> &Bio {
        &self.bios[slot as usize]
    }

    /// The buffer of the operation in a slot, of this length.
    pub(crate) fn data_mut(&mut self, slot: u32, len: usize) -> &mut [u8] {
        let data = &mut self.bios[slot as usize].data;
        if data.len() < len {
            data.resize(len, 0);
        }
        &mut data[..len]
    }

    /// Operations in flight.
    pub(crate) fn in_flight(&self) -> usize {
        self.bios.len() - self.free_bios.len()
    }

    pub(crate) fn bios_in_flight(&self) -> impl Iterator<Item = (u32, &Bio)> {
        (0..).zip(&self.bios).filter(|(_, bio)| bio.stage != Stage::Free)
    }

    /// Whether an operation in flight has a sector in common with `range`, and one of the two changes it.
    pub(crate) fn overlaps(&self, kind: OpKind, range: SectorRange) -> bool {
        self.in_flight() > 0
            && self.bios.iter().any(|bio| {
                bio.stage != Stage::Free && (bio.kind.changes() || kind.changes()) && bio.range.overlaps(range)
            })
    }

    fn new_request(&mut self, operation: Operation, queue: u16) -> u32 {
        let index = self.free_requests.pop().unwrap_or_else(|| {
            self.requests.push(Request::new());
            self.requests.len() as u32 - 1
        });
        let request = &mut self.requests[index as usize];
        request.segments.clear();
        (request.operation, request.queue, request.state) = (operation, queue, State::Waiting);
        (request.offset, request.left, request.first, request.skip) = (0, 0, 0, 0);
        (request.fua, request.no_unmap, request.flush_after) = (false, false, false);
        (request.mergeable, request.made, request.limit) = (false, self.now, u64::MAX);
        self.counts.requests += 1;
        index
    }

    /// Whether a request could be handed over, or a flush begun.
    pub(crate) fn can_dispatch(&self) -> bool {
        self.server.is_some() && self.queues.iter().any(Queue::is_ready)
    }

    /// Hands one waiting request over, or begins a flush.
    pub(crate) fn dispatch(&mut self, trace: &mut Trace) {
        let count = self.queues.len();
        let from = if count > 1 { self.rng.below(count as u64) as usize } else { 0 };
        let Some(queue) = (from..from + count).map(|queue| queue % count).find(|at| self.queues[*at].is_ready())
        else {
            return;
        };
        self.begin_flush(queue as u16);
        let waiting = &mut self.queues[queue].waiting;
        let overtakes = waiting.len() > 1 && self.rng.chance(u64::from(self.setup.reorder), 100);
        let at = if overtakes { self.rng.below(waiting.len().min(NEAR) as u64) as usize } else { 0 };
        if self.queues[queue].free_tags.is_empty() {
            return;
        }
        let Some(index) = self.queues[queue].waiting.remove(at) else { return };
        let Some(tag) = self.queues[queue].free_tags.pop() else { return };
        let request = &mut self.requests[index as usize];
        request.tag = tag;
        let id = TagId { queue: queue as u16, tag };
        let owner = self.owner_index(id);
        self.owners[owner] = Some(index);
        let Some(timing) = self.timing(index) else { return self.hand_over(index, trace) };
        let until = match timing {
            Timing::Delay(steps) => Until::Step(self.now.saturating_add(steps)),
            Timing::Hold(hold) => Until::Released(hold),
            // What is left of a request fails as a whole. Of one that operations share, those would fail too that were
            // not in the part which was asked for.
            Timing::Short { .. } if self.requests[index as usize].segments.len() != 1 => {
                return self.hand_over(index, trace);
            }
            Timing::Short { blocks } => {
                let block = u64::from(self.limits.geometry().logical_block);
                self.requests[index as usize].limit = blocks.max(1) * block;
                return self.hand_over(index, trace);
            }
        };
        self.requests[index as usize].state = State::Held(until);
        self.held.push(index);
        self.counts.held += 1;
        trace.note(What::Hold, [u64::from(index), 0, 0], || format!("{}: held: {timing:?}", self.now));
    }

    /// What the faults say of a request.
    fn timing(&self, index: u32) -> Option<Timing> {
        let faults = self.faults.as_ref()?;
        let work = self.work(index);
        let kind = match work.operation {
            Operation::Read => OpKind::Read,
            Operation::Write if work.fua => OpKind::WriteFua,
            Operation::Write => OpKind::Write,
            Operation::Discard => OpKind::Discard,
            Operation::WriteZeroes => OpKind::WriteZeroes,
            _ => OpKind::Flush,
        };
        faults.timing(kind, SectorRange::new(work.offset / 512, work.len / 512))
    }

    /// Begins a flush for everyone who waits for one; who comes later waits for the next.
    fn begin_flush(&mut self, number: u16) {
        let queue = &mut self.queues[usize::from(number)];
        // Sometimes others are waited for.
        if queue.flushing || queue.flush_pending.is_empty() || !queue.waiting.is_empty() && self.rng.chance(1, 2) {
            return;
        }
        std::mem::swap(&mut queue.flush_pending, &mut queue.flush_running);
        queue.flushing = true;
        self.counts.flush_requests += 1;
        self.counts.flushes_shared += queue.flush_running.len() as u64 - 1;
        let index = self.new_request(Operation::Flush, number);
        self.queues[usize::from(number)].waiting.push_front(index);
    }

    fn work(&self, index: u32) -> Work {
        let request = &self.requests[index as usize];
        Work {
            tag: TagId { queue: request.queue, tag: request.tag },
            operation: request.operation,
            offset: request.offset,
            len: request.left.min(request.limit) / 512 * 512,
            fua: request.fua,
            no_unmap: request.no_unmap,
        }
    }

    fn owner_index(&self, tag: TagId) -> usize {
        usize::from(tag.queue) * usize::from(self.setup.queue_depth) + usize::from(tag.tag)
    }

    /// Copies the data of a write into the tag's buffer and hands the request to the server.
    fn hand_over(&mut self, index: u32, trace: &mut Trace) {
        let work = self.work(index);
        let request = &mut self.requests[index as usize];
        request.state = State::AtServer;
        request.limit = u64::MAX;
        if work.operation == Operation::Write {
            let buffer = &mut self.buffers.get_mut(work.tag)[..work.len as usize];
            let (mut skip, mut at) = (request.skip as usize, 0);
            for segment in &request.segments[request.first..] {
                let data = &self.bios[segment.bio as usize].data;
                let data = &data[segment.at as usize + skip..(segment.at + segment.len) as usize];
                let take = data.len().min(buffer.len() - at);
                buffer[at..at + take].copy_from_slice(&data[..take]);
                at += take;
                skip = 0;
            }
        }
        let tag = u64::from(work.tag.queue) << 16 | u64::from(work.tag.tag);
        trace.note(What::Dispatch, [tag, work.offset, work.len], || {
            let Work { tag: TagId { queue, tag }, operation, offset, len, fua, .. } = work;
            let fua = if fua { " fua" } else { "" };
            format!("{}: queue {queue} tag {tag}: {}{fua} {offset}+{len}", self.now, operation.name())
        });
        if let Some(server) = &mut self.server {
            server.take(work, &mut self.buffers);
        }
    }

    /// Hands over what was held long enough; all of it with `all`.
    pub(crate) fn release(&mut self, all: bool, trace: &mut Trace) {
        if let Some(faults) = self.faults.as_ref() {
            if all {
                faults.release_all();
            } else if self.rng.chance(1, RELEASE) {
                faults.release_oldest();
            }
        }
        let mut at = 0;
        while let Some(index) = self.held.get(at).copied() {
            match self.requests[index as usize].state {
                State::Held(until) if !all && self.is_held(until) => at += 1,
                State::Held(_) => {
                    self.held.remove(at);
                    self.hand_over(index, trace);
                }
                _ => {
                    self.held.remove(at);
                }
            }
        }
    }

    fn is_held(&self, until: Until) -> bool {
        match until {
            Until::Step(step) => step > self.now,
            Until::Released(hold) => self.faults.as_ref().is_some_and(|faults| !faults.released(hold)),
        }
    }

    /// Whether requests are held back.
    pub(crate) fn holds(&self) -> bool {
        !self.held.is_empty()
    }

    /// Whether the server could do something.
    pub(crate) fn can_step(&self) -> bool {
        self.server.as_ref().is_some_and(|server| server.pending() > 0) && !self.starves()
    }

    /// Whether the server waits for memory, and nobody has given any back.
    fn starves(&self) -> bool {
        self.starved_at == Some(self.writes_ended)
    }

    /// Lets the server work a little, and takes what it commits.
    pub(crate) fn step(&mut self, trace: &mut Trace) {
        let Some(server) = &mut self.server else { return };
        if self.setup.memory_pressure && self.starved_at.is_none() && server.allocates() && !server.io_flusher() {
            let dirty = self.bios.iter().any(|bio| bio.stage != Stage::Free && bio.kind.changes());
            if dirty {
                self.starved_at = Some(self.writes_ended);
                return;
            }
        }
        self.starved_at = None;
        let mut commits = std::mem::take(&mut self.commits);
        server.step(&mut self.buffers, &mut self.server_rng, &mut commits);
        for commit in commits.drain(..) {
            self.commit(commit, trace);
        }
        self.commits = commits;
    }

    /// Whether there is something to tell the application.
    pub(crate) fn can_deliver(&self) -> bool {
        !self.finished.is_empty()
    }

    /// The next operation whose end the application hears of. Its slot is given back with [`free`](Self::free).
    pub(crate) fn deliver(&mut self) -> Option<u32> {
        let strays = self.finished.len() > 1 && self.rng.chance(u64::from(self.setup.reorder), 100);
        let at = if strays { self.rng.below(self.finished.len() as u64) as usize } else { 0 };
        if self.finished.is_empty() {
            return None;
        }
        let slot = self.finished.remove(at);
        self.writes_ended += u64::from(self.bios[slot as usize].kind.changes());
        Some(slot)
    }

    pub(crate) fn free(&mut self, slot: u32) {
        self.bios[slot as usize].stage = Stage::Free;
        self.free_bios.push(slot);
    }

    fn end_part(&mut self, slot: u32, errno: i32) {
        let bio = &mut self.bios[slot as usize];
        bio.progress = self.now;
        if bio.errno == 0 {
            bio.errno = errno;
            bio.excused = self.excuse;
        }
        bio.parts -= 1;
        if bio.parts == 0 {
            bio.stage = Stage::Finished;
            self.finished.push(slot);
        }
    }

    /// Whether there is no server, and the device fails what comes.
    fn is_failing(&self) -> bool {
        self.server.is_none() && self.setup.recovery == Recovery::FailIo
    }
}

impl Queue {
    /// Whether a request could be handed over, or a flush begun.
    fn is_ready(&self) -> bool {
        !self.flushing && !self.flush_pending.is_empty() || !self.waiting.is_empty() && !self.free_tags.is_empty()
    }
}
