//! How the data of a request get from the driver to the server and back.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use ublkit::Io;
use ublkit::raw::IoChannel;
use ublkit::sys::ublk::user_copy_offset;

use super::bug::Bug;

/// What the memory of a server that copies consists of, in bytes.
pub(super) const SEGMENT: usize = 64 << 10;

/// How the data of a request move.
pub(super) enum Data {
    /// By the driver, to and from the channel's buffer of the request's tag.
    Buffers,
    /// By the server.
    UserCopy(UserCopy),
}

impl Data {
    /// The data of a write.
    pub(super) fn take(&mut self, channel: &IoChannel, bug: &Bug, io: &Io) -> io::Result<Vec<u8>> {
        match self {
            Self::Buffers => channel.read_buffer(io.tag(), io.len() as usize),
            Self::UserCopy(copy) => copy.take(bug, io),
        }
    }

    /// Gives a read its data.
    pub(super) fn give(&mut self, channel: &mut IoChannel, bug: &Bug, io: &Io, data: &[u8]) -> io::Result<()> {
        match self {
            Self::Buffers => channel.write_buffer(io.tag(), data),
            Self::UserCopy(copy) => copy.give(bug, io, data),
        }
    }
}

/// A server's own memory, in segments of which no two that a request has lie side by side, and the way there.
pub(super) struct UserCopy {
    device: Arc<File>,
    memory: Vec<u8>,
    free: VecDeque<usize>,
}

/// Where a part of a request's data is: the place in memory, in the request, and how long it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    place: usize,
    at: usize,
    len: usize,
}

impl UserCopy {
    pub(super) fn new(device: Arc<File>, max_io: usize) -> Self {
        let segments = 4 * max_io.div_ceil(SEGMENT);
        let free = (0..segments).step_by(2).chain((1..segments).step_by(2)).collect();
        // Whoever takes the segments to lie side by side gets beyond the last one.
        Self { device, memory: vec![0; segments * SEGMENT + max_io], free }
    }

    /// The parts that a request of `len` bytes has.
    fn parts(&mut self, len: usize) -> Vec<Part> {
        let mut parts = Vec::new();
        for at in (0..len).step_by(SEGMENT) {
            let Some(segment) = self.free.pop_front() else { break };
            // One request at a time: the oldest of the free ones is another next time.
            self.free.push_back(segment);
            parts.push(Part { place: segment * SEGMENT, at, len: SEGMENT.min(len - at) });
        }
        parts
    }

    /// The parts between which the data are moved in one call each.
    fn moved(bug: &Bug, parts: &[Part], len: usize) -> Vec<Part> {
        match parts {
            [first, _, ..] if bug.takes_to_be_contiguous() => vec![Part { len, ..*first }],
            parts => parts.to_vec(),
        }
    }

    fn take(&mut self, bug: &Bug, io: &Io) -> io::Result<Vec<u8>> {
        let len = io.len() as usize;
        let parts = self.parts(len);
        for part in Self::moved(bug, &parts, len) {
            let buf = &mut self.memory[part.place..][..part.len];
            let begin = match bug.other_queue(io, part.at) {
                Some(other) => bug.taken(self.device.read_at(buf, other)),
                None => 0,
            };
            self.device.read_exact_at(&mut buf[begin..], offset(io, part.at + begin))?;
        }
        Ok(parts.iter().flat_map(|part| &self.memory[part.place..][..part.len]).copied().collect())
    }

    fn give(&mut self, bug: &Bug, io: &Io, data: &[u8]) -> io::Result<()> {
        let parts = self.parts(data.len());
        for part in &parts {
            self.memory[part.place..][..part.len].copy_from_slice(&data[part.at..][..part.len]);
        }
        for part in Self::moved(bug, &parts, data.len()) {
            let buf = &self.memory[part.place..][..part.len];
            let begin = match bug.other_queue(io, part.at) {
                Some(other) => bug.taken(self.device.write_at(buf, other)),
                None => 0,
            };
            self.device.write_all_at(&buf[begin..], offset(io, part.at + begin))?;
        }
        Ok(())
    }
}

/// The place on the character device of what is `at` so many bytes into a request's data.
fn offset(io: &Io, at: usize) -> u64 {
    user_copy_offset(io.queue(), io.tag(), at as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_segments_of_a_request_lie_side_by_side() {
        for max_io in [128 << 10, 192 << 10, 1 << 20] {
            let null = Arc::new(File::open("/dev/null").expect("open"));
            let mut copy = UserCopy::new(null, max_io);
            for len in (1..200).map(|n| n * 12_345 % max_io + 1) {
                let parts = copy.parts(len);
                assert_eq!(parts.iter().map(|part| part.len).sum::<usize>(), len);
                assert!(parts.windows(2).all(|two| two[0].place + SEGMENT != two[1].place), "{parts:?}");
                let mut places: Vec<_> = parts.iter().map(|part| part.place).collect();
                places.dedup();
                assert_eq!(places.len(), len.div_ceil(SEGMENT));
                assert!(places.iter().all(|place| place + len <= copy.memory.len()));
            }
        }
    }
}
