//! What is said between the scenario and the processes that hold devices for it: one JSON line each way.

use serde::{Deserialize, Serialize};

use crate::role::Word;

/// Tags of the one queue that the devices here have.
pub(super) const DEPTH: u16 = 2;
/// The size of a device in sectors.
pub(super) const SECTORS: u64 = 16 << 10;
/// The largest request in bytes.
pub(super) const MAX_IO: u32 = 64 << 10;
/// A request for this sector is kept by a server that was told to: nobody else reads here.
pub(super) const HELD_SECTOR: u64 = 7_720;

/// The address of an I/O command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Addr {
    None,
    /// The tag's own buffer.
    Own,
    Nowhere,
    Number(u64),
}

/// An I/O command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Io {
    pub(super) operation: u32,
    pub(super) queue: u16,
    pub(super) tag: u16,
    pub(super) result: i32,
    pub(super) addr: Addr,
    /// For a batch command: its flags, elements and bytes of each; `tag` and `result` are not used then.
    pub(super) batch: Option<(u16, u16, u8)>,
}

/// What a process is asked to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Call {
    /// Open the character device, and a ring on it.
    Open(u32),
    /// Close both.
    Close,
    /// Send an I/O command and wait this many milliseconds for its answer; from another thread's ring if so said.
    Io { io: Io, patience_ms: u64, elsewhere: bool },
    /// Map the descriptors: offset, length, writable.
    Map(usize, usize, bool),
    /// Keep the requests for [`HELD_SECTOR`] from now on.
    Hold,
    /// Wait for such a request.
    Held { patience_ms: u64 },
    /// Complete it.
    Release,
    /// Open the block device.
    OpenBlock(u32),
    /// Close it.
    CloseBlock,
    /// Read the sector that is kept, and do not wait.
    Read(u32),
    /// Wait for that read.
    HasRead { patience_ms: u64 },
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Reply {
    /// 0 or more, or a negative errno.
    Result(i32),
    /// It has no answer yet.
    Pending,
    /// The machine did not give what it takes, such as a thread: this says nothing of the driver.
    Lacking(String),
}

impl Word for Reply {}
