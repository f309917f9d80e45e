//! Raw I/O commands: whatever they say, the memory they name is kept for as long as the process lives.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::{Kind, Ring, descriptors};
use crate::sys::map::{Map, page_size};
use crate::sys::ublk::{IoCmd, IoDesc};
use crate::sys::uring::{self, Sqe};

/// Memory of channels that are gone. The driver may hold an address for a while after the ring that named it was closed, so
/// none of it is ever unmapped or used for anything else.
static RETIRED: Mutex<Vec<Map>> = Mutex::new(Vec::new());

/// Memory that a channel's commands may name. It is retired, and not unmapped, with the channel.
///
/// An address is all that the driver is told of a buffer. What it copies there is as long as the device's requests are, whatever
/// the channel was made for: upwards, into the buffers behind that one, and in the end into a page that stops it.
#[derive(Debug)]
struct Lent(Option<Map>);

impl Lent {
    /// `len` bytes, of which the first `clean` are zeroes.
    fn new(len: usize, clean: usize) -> io::Result<Self> {
        let mut retired = RETIRED.lock().unwrap_or_else(PoisonError::into_inner);
        // The guard is a page of its own.
        let all = len.next_multiple_of(page_size()) + page_size();
        let Some(index) = retired.iter().position(|map| map.len() == all) else {
            return Map::guarded(len).map(|map| Self(Some(map)));
        };
        let map = retired.swap_remove(index);
        assert!(clean <= len);
        // SAFETY: in bounds by the assertion. Nobody else has this map; a kernel that still writes to it writes what the next
        // one to look at it must expect anyway, and no reference to it is ever made.
        unsafe { map.start().as_ptr().write_bytes(0, clean) };
        Ok(Self(Some(map)))
    }

    fn start(&self) -> *mut u8 {
        // `None` only while it is dropped.
        self.0.as_ref().map_or(std::ptr::null_mut(), |map| map.start().as_ptr())
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        RETIRED.lock().unwrap_or_else(PoisonError::into_inner).extend(self.0.take());
    }
}

/// The longest list of elements that a batch command can describe, in bytes: 16 bits of count, 8 bits of size.
const ELEMENTS_LEN: usize = u16::MAX as usize * u8::MAX as usize;

/// An address at which nothing can be read or written.
pub(crate) fn inaccessible() -> io::Result<u64> {
    static NOWHERE: OnceLock<Map> = OnceLock::new();
    if NOWHERE.get().is_none() {
        // Lost if another thread was faster.
        let _ = NOWHERE.set(Map::inaccessible(1 << 20)?);
    }
    NOWHERE.get().map(|map| map.start().as_ptr() as u64).ok_or_else(|| Errno::ENOMEM.into())
}

/// What stands in the address field of an I/O command.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Address {
    /// 0.
    #[default]
    None,
    /// The channel's buffer with this number.
    Buffer(u16),
    /// An address at which nothing can be read or written.
    Inaccessible,
    /// A number that is no address: the index of a registered buffer. Below 4096 for every other command.
    Number(u64),
}

/// An I/O command, any at all: nothing of it is checked, except that it names no memory but the channel's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoCommand {
    /// The operation, such as [`IO_FETCH_REQ`](crate::sys::ublk::IO_FETCH_REQ).
    pub operation: u32,
    /// The queue.
    pub queue: u16,
    /// The tag.
    pub tag: u16,
    /// The result: bytes or a negative errno.
    pub result: i32,
    /// The buffer.
    pub address: Address,
    /// `sqe->addr`: index and flags of an automatic buffer registration. 0 for batch commands.
    pub registration: u64,
    /// Comes back in the completion.
    pub user_data: u64,
}

/// A command for many tags at once (`struct ublk_batch_io`), any at all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BatchCommand {
    /// The operation, such as [`IO_PREP_IO_CMDS`](crate::sys::ublk::IO_PREP_IO_CMDS).
    pub operation: u32,
    /// The queue.
    pub queue: u16,
    /// The flags. With bit 1 (`UBLK_BATCH_F_HAS_BUF_ADDR`) every element's address is 0.
    pub flags: u16,
    /// How many elements there are said to be; zeroes follow those that are given.
    pub elements_claimed: u16,
    /// How many bytes an element is said to have.
    pub element_bytes: u8,
    /// Tags and results.
    pub elements: Vec<(u16, i32)>,
    /// Comes back in the completion.
    pub user_data: u64,
}

/// An answer to an I/O command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Of the command.
    pub user_data: u64,
    /// What the driver says: 0 for a request, 1 for one that wants a buffer, or a negative errno.
    pub result: i32,
}

/// A ring on which any I/O command can be sent to one character device. It belongs to the thread that made it.
#[derive(Debug)]
pub struct IoChannel {
    // Goes before the memory does.
    ring: Ring,
    device: Arc<File>,
    /// The buffers, then room for elements.
    memory: Lent,
    buffers: u16,
    stride: usize,
    pending: u32,
    entries: u32,
}

impl IoChannel {
    /// A channel to `device` for at most `commands` commands under way, with `buffers` buffers of `buffer_bytes` bytes each.
    ///
    /// # Errors
    /// The ring or the memory could not be had.
    pub fn new(device: Arc<File>, commands: u16, buffers: u16, buffer_bytes: usize) -> io::Result<Self> {
        let entries = u32::from(commands.max(1)).next_power_of_two();
        let stride = buffer_bytes.max(1).next_multiple_of(page_size());
        let of_buffers = stride * usize::from(buffers);
        Ok(Self {
            ring: Ring::new(entries, Kind::ThisThread)?,
            device,
            memory: Lent::new(of_buffers + ELEMENTS_LEN, of_buffers)?,
            buffers,
            stride,
            pending: 0,
            entries,
        })
    }

    /// Sends a command. A command that the driver refuses has completed when this returns.
    ///
    /// # Errors
    /// `InvalidInput` for an address that this channel does not own and for one command too many; or the ring failed.
    pub fn submit(&mut self, command: &IoCommand) -> io::Result<()> {
        let number = command.operation & 0xff;
        let (register, batch) = ((0x23..=0x24).contains(&number), (0x25..=0x27).contains(&number));
        let addr = match command.address {
            Address::None => 0,
            Address::Buffer(index) => self.buffer(index)? as u64,
            Address::Inaccessible => inaccessible()?,
            // The first page is never mapped.
            Address::Number(number) if register || number < 4096 => number,
            Address::Number(_) => return Err(io::ErrorKind::InvalidInput.into()),
        };
        if command.registration != 0 && (batch || !(0x20..=0x24).contains(&number)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let words = IoCmd { q_id: command.queue, tag: command.tag, result: command.result, addr }.to_words();
        self.send(command.operation, words, command.registration, 0, command.user_data)
    }

    /// Sends a command for many tags.
    ///
    /// # Errors
    /// As [`submit`](Self::submit).
    pub fn submit_batch(&mut self, command: &BatchCommand) -> io::Result<()> {
        const HAS_ZONE_LBA: u16 = 1;
        const HAS_BUF_ADDR: u16 = 2;
        let each = 8
            + if command.flags & HAS_ZONE_LBA != 0 { 8 } else { 0 }
            + if command.flags & HAS_BUF_ADDR != 0 { 8 } else { 0 };
        let len = usize::from(command.elements_claimed) * usize::from(command.element_bytes);
        if command.elements.len() > usize::from(command.elements_claimed) || len > ELEMENTS_LEN {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let start = self.elements();
        // Read with another shape than it was written in, a tag could pass for an address.
        let odd_shape = usize::from(command.element_bytes) != each;
        // SAFETY: the room for elements is this long; see `write_buffer` for who else may look at it.
        unsafe { start.write_bytes(0, len) };
        if !odd_shape {
            for (index, (tag, result)) in command.elements.iter().enumerate() {
                let mut bytes = [0; 8];
                bytes[..2].copy_from_slice(&tag.to_ne_bytes());
                bytes[4..].copy_from_slice(&result.to_ne_bytes());
                // SAFETY: `index` is below the claimed count, whose bytes fit by the check above.
                unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), start.add(index * each), 8) };
            }
        }
        let (q, f) = (command.queue.to_ne_bytes(), command.flags.to_ne_bytes());
        let n = command.elements_claimed.to_ne_bytes();
        let word = u64::from_ne_bytes([q[0], q[1], f[0], f[1], n[0], n[1], command.element_bytes, 0]);
        self.send(command.operation, [word, 0], start as u64, len as u32, command.user_data)
    }

    fn send(&mut self, operation: u32, words: [u64; 2], addr: u64, len: u32, user_data: u64) -> io::Result<()> {
        if self.pending >= self.entries {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let entry = Sqe {
            opcode: uring::OP_URING_CMD,
            fd: self.device.as_fd().as_raw_fd(),
            off: u64::from(operation),
            addr,
            len,
            user_data,
            cmd: words,
            ..Sqe::default()
        };
        // SAFETY: every address that gets here lies in memory that only this channel uses and that is never unmapped, or is
        // one at which nothing can be written; no reference to that memory is ever made.
        unsafe { self.ring.push(&entry) };
        self.pending += 1;
        self.ring.enter(0)
    }

    /// Waits until there are `want` completions or `timeout` has passed, and returns those that there are.
    ///
    /// # Errors
    /// The ring failed.
    pub fn completions(&mut self, want: usize, timeout: Duration) -> io::Result<Vec<Completion>> {
        let deadline = Instant::now() + timeout;
        let mut found = Vec::new();
        loop {
            while let Some(cqe) = self.ring.next() {
                self.pending = self.pending.saturating_sub(1);
                found.push(Completion { user_data: cqe.user_data, result: cqe.result });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if found.len() >= want || left.is_zero() {
                return Ok(found);
            }
            self.ring.enter_timeout(1, left)?;
        }
    }

    /// How many commands have not been answered.
    #[must_use]
    pub fn pending(&self) -> u32 {
        self.pending
    }

    /// Fills a buffer from its start.
    ///
    /// # Errors
    /// `InvalidInput` for a buffer that is not there or shorter.
    pub fn write_buffer(&mut self, index: u16, bytes: &[u8]) -> io::Result<()> {
        let start = self.buffer(index)?;
        if bytes.len() > self.stride {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: in bounds by the checks. The only other one to use this memory is the kernel, for which no reference is made;
        // what it copies at the same time is torn, and that is the caller's.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), start, bytes.len()) };
        Ok(())
    }

    /// The first `len` bytes of a buffer.
    ///
    /// # Errors
    /// As [`write_buffer`](Self::write_buffer).
    pub fn read_buffer(&self, index: u16, len: usize) -> io::Result<Vec<u8>> {
        let start = self.buffer(index)?;
        if len > self.stride {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut bytes = vec![0; len];
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(start, bytes.as_mut_ptr(), len) };
        Ok(bytes)
    }

    fn buffer(&self, index: u16) -> io::Result<*mut u8> {
        if index >= self.buffers {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(self.memory.start().wrapping_add(self.stride * usize::from(index)))
    }

    fn elements(&self) -> *mut u8 {
        self.memory.start().wrapping_add(self.stride * usize::from(self.buffers))
    }
}

/// The descriptors of one queue, mapped.
#[derive(Debug)]
pub struct Descriptors(descriptors::Descriptors);

impl Descriptors {
    /// Maps the descriptors of queue `queue`, of `depth` tags.
    ///
    /// # Errors
    /// What `mmap(2)` says.
    pub fn map(device: &File, queue: u16, depth: u16) -> io::Result<Self> {
        descriptors::Descriptors::map(device, queue, depth).map(Self)
    }

    /// Tries a mapping of another shape, and undoes it: the driver has to refuse all but one length and every
    /// mapping that can be written to.
    ///
    /// # Errors
    /// What `mmap(2)` says.
    pub fn try_map(device: &File, offset: usize, len: usize, writable: bool) -> io::Result<()> {
        if writable { Map::shared(device, offset, len) } else { Map::shared_read_only(device, offset, len) }.map(drop)
    }

    /// A tag's descriptor as it stands there now.
    #[must_use]
    pub fn get(&self, tag: u16) -> Option<IoDesc> {
        self.0.get(tag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::ublk;

    fn channel() -> IoChannel {
        let null = File::options().read(true).write(true).open("/dev/null").expect("open");
        IoChannel::new(Arc::new(null), 4, 2, 4096).expect("channel")
    }

    #[test]
    fn commands_are_answered_one_by_one() {
        let mut channel = channel();
        for user_data in 0..20 {
            let command = IoCommand {
                operation: ublk::IO_FETCH_REQ,
                address: Address::Buffer(1),
                user_data,
                ..IoCommand::default()
            };
            channel.submit(&command).expect("submit");
            let answers = channel.completions(1, Duration::from_secs(10)).expect("completions");
            assert_eq!(answers, [Completion { user_data, result: 0 }], "/dev/null answers everything with 0");
        }
        assert_eq!(channel.pending(), 0);
        assert!(channel.completions(1, Duration::from_millis(5)).expect("completions").is_empty());
    }

    #[test]
    fn no_memory_can_be_named_but_the_channels() {
        let mut channel = channel();
        let mut refused = |operation, address, registration| {
            let command = IoCommand { operation, address, registration, ..IoCommand::default() };
            channel.submit(&command).err().map(|error| error.kind()) == Some(io::ErrorKind::InvalidInput)
        };
        let here = &raw const channel_is_elsewhere as u64;
        assert!(refused(ublk::IO_FETCH_REQ, Address::Number(here), 0));
        assert!(refused(0xdead_0000, Address::Number(here), 0));
        assert!(refused(ublk::IO_FETCH_REQ, Address::Buffer(2), 0));
        assert!(refused(ublk::IO_PREP_IO_CMDS, Address::None, here));
        assert!(refused(0x7f, Address::None, here));
        assert!(!refused(ublk::IO_FETCH_REQ, Address::Number(1), 0));
        assert!(!refused(ublk::IO_REGISTER_IO_BUF, Address::Number(70_000), 0));
        assert!(!refused(ublk::IO_FETCH_REQ, Address::Inaccessible, 1 << 16));
    }

    #[expect(non_upper_case_globals)]
    static channel_is_elsewhere: u8 = 0;

    #[test]
    fn memory_is_used_again_and_comes_back_empty() {
        let mut first = channel();
        first.write_buffer(1, b"left behind").expect("write");
        assert_eq!(first.read_buffer(1, 4).expect("read"), b"left");
        assert!(first.write_buffer(2, b"x").is_err() && first.read_buffer(0, 4097).is_err());
        drop(first);
        assert_eq!(channel().read_buffer(1, 4).expect("read"), [0; 4]);
    }

    #[test]
    fn memory_that_was_named_once_stays_when_the_next_channel_cannot_be_had() {
        // Of a size that no other test has.
        let len = (3 * page_size() + ELEMENTS_LEN).next_multiple_of(page_size()) + page_size();
        let new = |commands| {
            let null = File::options().read(true).write(true).open("/dev/null").expect("open");
            IoChannel::new(Arc::new(null), commands, 3, 1)
        };
        let retired = || {
            let retired = RETIRED.lock().expect("lock");
            retired.iter().filter(|map| map.len() == len).map(|map| map.start().as_ptr() as usize).collect::<Vec<_>>()
        };
        drop(new(4).expect("channel"));
        let before = retired();
        assert_eq!(before.len(), 1);
        assert!(new(u16::MAX).is_err(), "more than a ring can have");
        assert_eq!(retired(), before);
    }

    #[test]
    fn batches_say_what_they_are_told_to() {
        let mut channel = channel();
        let command = BatchCommand {
            operation: ublk::IO_PREP_IO_CMDS,
            elements_claimed: u16::MAX,
            element_bytes: u8::MAX,
            elements: vec![(1, 2); 3],
            ..BatchCommand::default()
        };
        channel.submit_batch(&command).expect("submit");
        assert_eq!(channel.completions(1, Duration::from_secs(10)).expect("completions").len(), 1);
        let too_many = BatchCommand { elements_claimed: 1, ..command };
        assert!(channel.submit_batch(&too_many).is_err());
    }
}
