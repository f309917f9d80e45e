//! The scenario's side of a process that holds a device.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use ublkit_harness::threads::stacks;

use super::ARGUMENT;
use super::protocol::{Call, Reply};
use crate::role::{self, Role};
use crate::scenario::Failure;

/// How long a call may take beyond what it is told to wait.
const CALL_DEADLINE: Duration = Duration::from_secs(20);
/// How long a killed process may take to be gone.
const REAP_DEADLINE: Duration = Duration::from_secs(40);

/// A process that holds a device. It is killed when this is dropped.
#[derive(Debug)]
pub(super) struct Peer {
    role: Role,
    replies: Receiver<(Reply, Vec<u8>)>,
}

impl Peer {
    pub(super) fn start() -> Result<Self, Failure> {
        let (role, replies) = Role::start(ARGUMENT, "a process that holds a device")?;
        let replies = role::listen(replies)?;
        Ok(Self { role, replies })
    }

    pub(super) fn pid(&self) -> u32 {
        self.role.pid()
    }

    /// Has it do something.
    pub(super) fn call(&mut self, call: &Call) -> Result<Reply, Failure> {
        self.role.tell(call)?;
        let patience = match call {
            Call::Io { patience_ms, .. } | Call::Held { patience_ms } | Call::HasRead { patience_ms } => *patience_ms,
            _ => 0,
        };
        match self.replies.recv_timeout(Duration::from_millis(patience) + CALL_DEADLINE) {
            Ok((reply, _)) => Ok(reply),
            Err(RecvTimeoutError::Timeout) => {
                Err(Failure::Hang(format!("process {} did not do {call:?}:\n{}", self.pid(), stacks(self.pid()))))
            }
            Err(RecvTimeoutError::Disconnected) => Err(self.role.lost(&format!("while it was to do {call:?}"))),
        }
    }

    /// As [`call`](Self::call), of what has to succeed.
    pub(super) fn done(&mut self, call: &Call) -> Result<i32, Failure> {
        match self.call(call)? {
            Reply::Result(result) if result >= 0 => Ok(result),
            Reply::Lacking(what) => Err(Failure::Environment(what)),
            other => Err(Failure::broke("control", format!("{call:?} gives {other:?}"))),
        }
    }

    /// Kills it, and does not wait.
    pub(super) fn kill(&mut self) {
        self.role.kill();
    }

    /// Kills it, and waits for its end.
    pub(super) fn end(mut self) -> Result<(), Failure> {
        self.kill();
        self.role.reap(REAP_DEADLINE).map(drop)
    }
}
