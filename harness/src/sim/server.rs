//! What a ublk server is to the driver: it is handed requests, works on them, and commits results.

mod plain;

use std::fmt;

use ublkit::Operation;

pub use self::plain::{PlainServer, serve};

use crate::seed::SeededRng;

/// One request slot of one queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TagId {
    /// The queue.
    pub queue: u16,
    /// The tag, unique among the queue's requests in flight.
    pub tag: u16,
}

/// A request as its descriptor has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// The slot it came in, whose buffer has the data of a write and takes the data of a read.
    pub tag: TagId,
    /// What is asked.
    pub operation: Operation,
    /// Where its range begins, in bytes.
    pub offset: u64,
    /// How long its range is, in bytes; 0 for a flush.
    pub len: u64,
    /// Durable before it is committed.
    pub fua: bool,
    /// The space behind zeroes stays allocated.
    pub no_unmap: bool,
}

/// A result that the server gives back with a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    /// The slot.
    pub tag: TagId,
    /// Bytes moved by a read or write, 0 or more for everything else, or a negative errno.
    pub result: i32,
}

/// The slots' buffers. The driver copies the data of a write in before it hands the request over, and the data of a read
/// out when its result is committed; what an earlier request left stays there.
pub struct Buffers {
    queue_depth: u16,
    bytes: usize,
    slots: Vec<Vec<u8>>,
}

impl Buffers {
    /// Buffers of `bytes` bytes for `queues` queues of `queue_depth` slots.
    #[must_use]
    pub fn new(queues: u16, queue_depth: u16, bytes: usize) -> Self {
        let slots = usize::from(queues) * usize::from(queue_depth);
        Self { queue_depth, bytes, slots: vec![Vec::new(); slots] }
    }

    /// Makes them buffers of `bytes` bytes that nothing has used, and keeps their memory.
    pub(crate) fn renew(&mut self, bytes: usize) {
        self.bytes = bytes;
        self.slots.iter_mut().for_each(Vec::clear);
    }

    /// The length of each buffer, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn slot(&self, tag: TagId) -> usize {
        usize::from(tag.queue) * usize::from(self.queue_depth) + usize::from(tag.tag)
    }

    /// The buffer of a slot.
    ///
    /// # Panics
    /// When there is no such slot.
    #[must_use]
    pub fn get_mut(&mut self, tag: TagId) -> &mut [u8] {
        let slot = self.slot(tag);
        let bytes = self.bytes;
        let buffer = &mut self.slots[slot];
        if buffer.is_empty() {
            // Not before it is used: most runs keep few of many slots busy.
            buffer.resize(bytes, 0);
        }
        buffer
    }
}

impl fmt::Debug for Buffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffers({} of {} bytes)", self.slots.len(), self.bytes)
    }
}

/// A queue loop with its backend. Nothing happens between its calls: whatever it does, it does in [`step`](Self::step).
///
/// A blocking backend does one call in a step; one that is asynchronous polls.
pub trait Server: fmt::Debug {
    /// Whether it fetches this slot when it starts.
    fn fetches(&self, tag: TagId) -> bool {
        let _ = tag;
        true
    }

    /// Takes a request that the driver hands over.
    fn take(&mut self, work: Work, buffers: &mut Buffers);

    /// Works a little: at most one call of the backend. Results go to `commits`.
    fn step(&mut self, buffers: &mut Buffers, rng: &mut SeededRng, commits: &mut Vec<Commit>);

    /// How many requests it has in hand. With none, a step does nothing.
    fn pending(&self) -> usize;

    /// Whether it needs memory for its next step. A server on its data path should not: where memory is short, whoever
    /// asks for some waits for writeback, which may be what this server is to do.
    fn allocates(&self) -> bool {
        false
    }

    /// Whether it declared itself part of writeback (`PR_SET_IO_FLUSHER`), so that it is given memory without waiting.
    fn io_flusher(&self) -> bool {
        true
    }
}
