//! One queue: its tags, and the loop that serves them.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::libc;
use ublkit::raw::{Address, Completion, Descriptors, IoChannel, IoCommand, set_io_flusher};
use ublkit::sys::ublk;
use ublkit::{Io, Operation, WriteFlags, result_code};

use super::Common;
use super::bug::{Bug, Deferred};
use super::data::{Data, UserCopy};
use crate::target::Mode;

/// How long a queue waits for requests before it looks whether it is to end.
const TURN: Duration = Duration::from_millis(10);

/// One queue, on the thread that serves it.
pub(super) struct Queue {
    number: u16,
    common: Arc<Common>,
    channel: IoChannel,
    descriptors: Descriptors,
    data: Data,
    bug: Bug,
    /// Tags that were fetched and that the driver has not taken back.
    fetched: u16,
}

impl Queue {
    pub(super) fn new(number: u16, common: Arc<Common>, device: Arc<File>) -> io::Result<Self> {
        if common.io_flusher {
            set_io_flusher()?;
        }
        let (depth, max_io) = (common.depth, common.max_io_bytes as usize);
        let descriptors = Descriptors::map(&device, number, depth)?;
        let (buffers, data) = match common.mode {
            Mode::Copy => (depth, Data::Buffers),
            Mode::UserCopy => (0, Data::UserCopy(UserCopy::new(Arc::clone(&device), max_io))),
        };
        let channel = IoChannel::new(device, depth, buffers, max_io)?;
        let bug = Bug::new(common.turn());
        Ok(Self { number, common, channel, descriptors, data, bug, fetched: 0 })
    }

    /// Hands every tag to the driver.
    pub(super) fn fetch(&mut self) -> io::Result<()> {
        for tag in 0..self.common.depth {
            if self.bug.fetches(self.number, tag) {
                self.command(ublk::IO_FETCH_REQ, tag, 0)?;
                self.fetched += 1;
            }
        }
        Ok(())
    }

    /// Serves until the driver has taken every tag back, or the device is given up.
    pub(super) fn serve(&mut self) -> io::Result<()> {
        while self.fetched > 0 && !self.common.given_up.load(Ordering::Relaxed) {
            for Completion { user_data, result } in self.channel.completions(1, TURN)? {
                match result {
                    ublk::IO_RES_OK => self.request(user_data as u16)?,
                    ublk::IO_RES_ABORT => self.fetched -= 1,
                    refused => return Err(io::Error::from_raw_os_error(-refused)),
                }
            }
            let late = self.bug.due();
            late.iter().try_for_each(|deferred| self.store_late(deferred))?;
        }
        let late = self.bug.all_deferred();
        late.iter().try_for_each(|deferred| self.store_late(deferred))
    }

    fn command(&mut self, operation: u32, tag: u16, result: i32) -> io::Result<()> {
        let address = match self.data {
            Data::Buffers => Address::Buffer(tag),
            Data::UserCopy(_) => Address::None,
        };
        self.channel.submit(&IoCommand {
            operation,
            queue: self.number,
            tag,
            result,
            address,
            registration: 0,
            user_data: u64::from(tag),
        })
    }

    fn commit(&mut self, tag: u16, result: i32) -> io::Result<()> {
        self.command(ublk::IO_COMMIT_AND_FETCH_REQ, tag, result)
    }

    fn request(&mut self, tag: u16) -> io::Result<()> {
        let descriptor = self.descriptors.get(tag).ok_or(io::ErrorKind::InvalidData)?;
        let io = Io::new(self.number, tag, descriptor);
        self.common.requests.fetch_add(1, Ordering::Relaxed);
        if self.bug.drops() {
            return Ok(());
        }
        if let Some(result) = self.bug.fails(&io) {
            return self.commit(tag, result);
        }
        if let Some(earlier) = self.bug.committed_again(&io) {
            self.commit(tag, earlier)?;
            // Nobody learns what becomes of it.
            let _ = self.perform(&io);
            return Ok(());
        }
        let result = match self.perform(&io) {
            Err(error) => result_code(&error),
            Ok(()) => match io.operation() {
                Operation::Read | Operation::Write => io.len() as i32,
                _ => 0,
            },
        };
        let result = self.bug.result(&io, result);
        self.commit(tag, result)
    }

    fn perform(&mut self, io: &Io) -> io::Result<()> {
        let backend = Arc::clone(&self.common.backend);
        match io.operation() {
            Operation::Read => {
                let mut data = vec![0; io.len() as usize];
                backend.read_at(&mut data, io.offset())?;
                self.data.give(&mut self.channel, &self.bug, io, &data)
            }
            Operation::Write => {
                let data = self.data.take(&self.channel, &self.bug, io)?;
                if let Some(deferred) = self.bug.meets_deferred(io.tag(), &data) {
                    backend.write_at(&deferred.data, deferred.offset, deferred.flags)?;
                } else if self.bug.defers(io, &data) {
                    return Ok(());
                }
                backend.write_at(&data, io.offset(), io.write_flags())
            }
            Operation::Flush => backend.flush(),
            Operation::Discard => backend.discard(io.offset(), io.len()),
            Operation::WriteZeroes => backend.write_zeroes(io.offset(), io.len(), io.zero_flags()),
            Operation::Other(_) | _ => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
        }
    }

    fn store_late(&self, deferred: &Deferred) -> io::Result<()> {
        self.common.backend.write_at(&deferred.data, deferred.offset, WriteFlags::NONE)
    }
}
