//! Any command to the driver, malformed ones too, for those who test a driver or look into one.
//!
//! [`Controller::command`] sends any control command, and an [`IoChannel`] any I/O command, with whatever numbers, flags,
//! ids and lengths; the driver's answer comes back as it is. Neither can harm this process: a command names only memory
//! that is lent to it, as much of it as is there, or an address at which nothing can be read or written.
//!
//! They can harm the *kernel*. A driver with bugs may crash on what it should have refused, so this is for machines that can
//! be lost.
//!
//! ```no_run
//! use std::time::Duration;
//! use ublkit::Controller;
//! use ublkit::raw::{RawCommand, RawOutcome};
//! use ublkit::sys::ublk;
//!
//! let controller = Controller::open()?;
//! let stop = RawCommand { operation: ublk::CMD_STOP_DEV, dev_id: 1000, ..RawCommand::default() };
//! match controller.command(&stop, Duration::from_secs(5))? {
//!     RawOutcome::Answered { result: -19, .. } => println!("there is no such device: ENODEV"),
//!     other => println!("{other:?}"),
//! }
//! # Ok::<(), ublkit::Error>(())
//! ```
//!
//! A server of one's own can be written with it: [`Controller::add`], [`parameters`], [`Controller::set_params`], a thread for
//! each queue with an [`IoChannel`] and [`Descriptors`], on which it sends
//! [`IO_FETCH_REQ`](crate::sys::ublk::IO_FETCH_REQ) for each tag and, for each request that comes,
//! [`IO_COMMIT_AND_FETCH_REQ`](crate::sys::ublk::IO_COMMIT_AND_FETCH_REQ); then [`Controller::start`]. An [`Io`](crate::Io) says
//! what is asked. In copy mode the data are in the channel's buffers; in user-copy mode they are read from and written to
//! the character device at [`user_copy_offset`](crate::sys::ublk::user_copy_offset). Nothing of what [`Device`](crate::Device)
//! takes care of is taken care of there.
//!
//! This module is there with the feature `raw`.

use std::io;
use std::time::Duration;

pub use crate::ring::raw::{Address, BatchCommand, Completion, Descriptors, IoChannel, IoCommand};

use crate::backend::Geometry;
use crate::ctrl::{Controller, explain_ring};
use crate::error::{Error, Result};
use crate::params;
use crate::ring::command::{CommandRing, Memory, Outcome, Pace};
use crate::sys::process;
use crate::sys::ublk::{CtrlCmd, DevInfo, Params, Plain};

/// The driver's parameters for a device of this geometry, which was granted requests of at most `max_io_bytes` bytes: what
/// [`Device`](crate::Device) sets.
///
/// # Errors
/// [`InvalidInput`](crate::ErrorKind::InvalidInput) for a geometry that no device can have.
pub fn parameters(geometry: &Geometry, max_io_bytes: u32) -> Result<Params> {
    params::check_geometry(geometry)?;
    Ok(params::params(geometry, max_io_bytes))
}

/// Marks the calling thread as part of the I/O path (`PR_SET_IO_FLUSHER`), so that memory reclaim on its behalf does not wait for
/// the device that it serves. For the threads of a server of one's own; those of the library mark themselves.
///
/// # Errors
/// What prctl(2) says: `EPERM` without `CAP_SYS_RESOURCE`.
pub fn set_io_flusher() -> io::Result<()> {
    process::set_io_flusher()
}

/// What the address and the length of a control command name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Payload {
    /// Nothing: both are 0.
    #[default]
    None,
    /// These bytes, which the driver may read and write.
    Bytes(Vec<u8>),
    /// The address of these bytes, and fewer than there are of them.
    Truncated(Vec<u8>, u16),
    /// The address 0 and a length.
    Null(u16),
    /// An address at which nothing can be read or written, and a length.
    Inaccessible(u16),
}

/// A control command, any at all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RawCommand {
    /// The operation, such as [`CMD_ADD_DEV`](crate::sys::ublk::CMD_ADD_DEV).
    pub operation: u32,
    /// The device.
    pub dev_id: u32,
    /// The queue; all ones where a command is about none.
    pub queue_id: u16,
    /// The argument.
    pub data: u64,
    /// How many bytes of the payload are said to be the path of the character device.
    pub dev_path_len: u16,
    /// The memory.
    pub payload: Payload,
    /// Sent in an entry of 64 bytes, which has no room for all of it.
    pub narrow: bool,
}

/// How a control command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RawOutcome {
    /// The driver answered within the deadline.
    Answered {
        /// 0 or more, or a negative errno.
        result: i32,
        /// The payload as the driver left it.
        payload: Vec<u8>,
    },
    /// It did not end within the deadline; it was cancelled then, and ended with this.
    Cancelled(i32),
    /// It did not end, and does not let itself be cancelled.
    Stuck,
}

impl Controller {
    /// Sends any control command, and cancels it if it has not ended by `deadline`.
    ///
    /// # Errors
    /// The ring failed; or [`InvalidInput`](crate::ErrorKind::InvalidInput) for a payload that is shorter than it is said to
    /// be, or longer than a command can say.
    pub fn command(&self, command: &RawCommand, deadline: Duration) -> Result<RawOutcome> {
        self.command_until(command, deadline, &|| false)
    }

    /// As [`command`](Self::command); `called_off` is asked every 20 ms, and once it says yes the command is cancelled.
    ///
    /// # Errors
    /// As [`command`](Self::command).
    pub fn command_until(
        &self,
        command: &RawCommand,
        deadline: Duration,
        called_off: &dyn Fn() -> bool,
    ) -> Result<RawOutcome> {
        let owned = |bytes: &Vec<u8>, len| (Memory::Payload(bytes.clone().into_boxed_slice()), len);
        let (memory, len) = match &command.payload {
            Payload::None => (Memory::Payload(Box::default()), 0),
            Payload::Bytes(bytes) => owned(bytes, bytes.len()),
            Payload::Truncated(bytes, len) => owned(bytes, usize::from(*len)),
            Payload::Null(len) => (Memory::Payload(Box::default()), usize::from(*len)),
            Payload::Inaccessible(len) => (Memory::Inaccessible, usize::from(*len)),
        };
        if let Memory::Payload(bytes) = &memory
            && !bytes.is_empty()
            && len > bytes.len()
        {
            return Err(Error::invalid(format!("the payload has {} bytes and is said to have {len}", bytes.len())));
        }
        let len = u16::try_from(len).map_err(|_| Error::invalid("a payload has at most 65535 bytes"))?;
        let header = CtrlCmd {
            dev_id: command.dev_id,
            queue_id: command.queue_id,
            len,
            data: command.data,
            dev_path_len: command.dev_path_len,
            ..CtrlCmd::default()
        };
        let ring = if command.narrow { CommandRing::narrow() } else { CommandRing::new() };
        let ring = ring.map_err(|error| explain_ring(&error))?;
        let (outcome, _) = ring
            .run_with(self.control(), command.operation, header, memory, Pace::Waiting(deadline), called_off)
            .map_err(|error| Error::io(&error, format_args!("send the command {:#x}", command.operation)))?;
        Ok(match outcome {
            Outcome::Answered(result, payload) => RawOutcome::Answered { result, payload: payload.into_vec() },
            Outcome::CalledOff(result, _) => RawOutcome::Cancelled(result),
            Outcome::Stuck => RawOutcome::Stuck,
        })
    }
}

impl DevInfo {
    /// The bytes, as a payload.
    #[must_use]
    pub fn to_bytes(self) -> Vec<u8> {
        self.to_boxed_bytes().into_vec()
    }

    /// From the beginning of a payload; what is missing is 0.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self::from_byte_prefix(bytes)
    }
}

impl Params {
    /// The bytes, as a payload.
    #[must_use]
    pub fn to_bytes(self) -> Vec<u8> {
        self.to_boxed_bytes().into_vec()
    }

    /// From the beginning of a payload; what is missing is 0.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self::from_byte_prefix(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use crate::sys::ublk;

    #[test]
    fn parameters_are_those_of_a_device_or_an_error() {
        let params = parameters(&Geometry::bytes(1 << 20).discard(4096), 64 << 10).expect("a geometry");
        assert_eq!(params.types, ublk::PARAM_TYPE_BASIC | ublk::PARAM_TYPE_DISCARD);
        assert_eq!((params.basic.dev_sectors, params.basic.max_sectors), (2048, 128));
        let error = parameters(&Geometry::bytes(1000), 64 << 10).expect_err("no multiple of a block");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
}
