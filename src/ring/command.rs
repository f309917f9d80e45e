//! Control commands: one at a time on a ring with 128-byte entries, payload owned, time bounded.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::{Kind, Ring};
use crate::sys::ublk::CtrlCmd;
use crate::sys::uring::{self, Sqe};

/// How often a waiting command looks whether it was called off.
const SLICE: Duration = Duration::from_millis(20);
/// How long a called-off command may take to come back before its ring and payload are given up.
const CANCEL_PATIENCE: Duration = Duration::from_secs(1);
/// A command that never waits for anything, and has not been answered for so long, is likely not to have begun.
const URGE_AFTER: Duration = Duration::from_secs(1);

const COMMAND: u64 = 1;
const CANCEL: u64 = 2;
const URGE: u64 = 3;

/// How a command ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The kernel answered: its result (negative errno), and the payload as the kernel left it.
    Answered(i32, Box<[u8]>),
    /// The deadline passed, or the command was called off, and the kernel has let go of it since: its result, and the payload as
    /// the kernel left it.
    CalledOff(i32, Box<[u8]>),
    /// As above, but the kernel still holds the command: its payload, if it has one, is leaked on purpose with its ring.
    Stuck,
}

/// How long a command may take, and whether it waits for others in that time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    /// It does.
    Waiting(Duration),
    /// It does not. Kernels sometimes leave a command in the queue of their worker pool for seconds, with no worker for it
    /// (docs/landmines.md): if it is not answered, it is cancelled once a second, and given again if it had not begun. One that has
    /// begun is not disturbed by that.
    Prompt(Duration),
}

/// A ring for control commands.
#[derive(Debug)]
pub(crate) struct CommandRing {
    ring: Ring,
}

/// The memory of a command.
#[derive(Debug)]
pub(crate) enum Memory {
    /// Bytes to read and write, at least as many as the command's length says; the address 0 if there are none.
    Payload(Box<[u8]>),
    /// An address at which nothing can be read or written.
    #[cfg(feature = "raw")]
    Inaccessible,
}

impl CommandRing {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { ring: Ring::new(4, Kind::Commands)? })
    }

    /// A ring whose entries have no room for a whole control command, which the driver has to notice. It belongs to the
    /// calling thread.
    #[cfg(feature = "raw")]
    pub(crate) fn narrow() -> io::Result<Self> {
        Ok(Self { ring: Ring::new(4, Kind::ThisThread)? })
    }

    /// Writes an entry, as much of it as the ring has room for.
    ///
    /// # Safety
    /// As [`Ring::push`], apart from the ring's kind.
    unsafe fn push(&mut self, entry: &Sqe, rest: [u64; 8]) {
        // SAFETY: the caller's promise; the kind is looked at.
        unsafe { if self.ring.wide { self.ring.push_wide(entry, rest) } else { self.ring.push(entry) } }
    }

    /// Runs one command and hands the ring back if it can be used again.
    ///
    /// `payload` becomes the command's `addr` and `len`, unless it is empty. `called_off` is asked every 20 ms.
    ///
    /// # Errors
    /// The ring itself failed; the command may or may not have been carried out.
    pub(crate) fn run(
        self,
        control: &File,
        operation: u32,
        command: CtrlCmd,
        payload: Box<[u8]>,
        pace: Pace,
        called_off: &dyn Fn() -> bool,
    ) -> io::Result<(Outcome, Option<Self>)> {
        let len = payload.len() as u16;
        let command = CtrlCmd { len, ..command };
        self.run_with(control, operation, command, Memory::Payload(payload), pace, called_off)
    }

    /// As [`run`](Self::run), of a command whose length is given, with memory of any kind.
    pub(crate) fn run_with(
        self,
        control: &File,
        operation: u32,
        mut command: CtrlCmd,
        memory: Memory,
        pace: Pace,
        called_off: &dyn Fn() -> bool,
    ) -> io::Result<(Outcome, Option<Self>)> {
        let mut payload = match memory {
            Memory::Payload(payload) => payload,
            #[cfg(feature = "raw")]
            Memory::Inaccessible => {
                command.addr = super::raw::inaccessible()?;
                Box::default()
            }
        };
        if !payload.is_empty() {
            assert!(usize::from(command.len) <= payload.len(), "the kernel is told of memory that is there");
            command.addr = payload.as_mut_ptr() as u64;
        }
        let words = command.to_words();
        let entry = Sqe {
            opcode: uring::OP_URING_CMD,
            fd: control.as_fd().as_raw_fd(),
            off: u64::from(operation),
            user_data: COMMAND,
            cmd: [words[0], words[1]],
            ..Sqe::default()
        };
        let rest = [words[2], words[3], 0, 0, 0, 0, 0, 0];
        // SAFETY: the only memory named is `payload`, or memory that nobody can write to.
        unsafe { self.give(&entry, rest, payload, pace, called_off) }
    }

    /// Gives the kernel this entry, whose user data is [`COMMAND`], and waits for the answer.
    ///
    /// # Safety
    /// As [`push`](Self::push), of an entry that names no other memory than `payload`.
    unsafe fn give(
        mut self,
        entry: &Sqe,
        rest: [u64; 8],
        payload: Box<[u8]>,
        pace: Pace,
        called_off: &dyn Fn() -> bool,
    ) -> io::Result<(Outcome, Option<Self>)> {
        // SAFETY: the payload stays where it is until the kernel has answered, or is leaked below when it does not.
        unsafe { self.push(entry, rest) };
        let mut answer = None;
        let mut pending = 1;
        let mut cancel_until = None;
        let given = Instant::now();
        let (deadline, mut urge_at) = match pace {
            Pace::Waiting(limit) => (given + limit, None),
            Pace::Prompt(limit) => (given + limit, Some(given + URGE_AFTER)),
        };
        loop {
            let now = Instant::now();
            let limit = cancel_until.unwrap_or(deadline);
            if now >= limit && cancel_until.is_some() {
                break;
            }
            if cancel_until.is_none() && (now >= deadline || called_off()) {
                // SAFETY: a cancel names no memory: its `addr` is the user data of what it cancels.
                unsafe { self.push(&cancel(CANCEL), [0; 8]) };
                pending += 1;
                cancel_until = Some(now + CANCEL_PATIENCE);
                continue;
            }
            if cancel_until.is_none() && answer.is_none() && urge_at.is_some_and(|at| now >= at) {
                // SAFETY: as above.
                unsafe { self.push(&cancel(URGE), [0; 8]) };
                pending += 1;
                urge_at = Some(now + URGE_AFTER);
            }
            let slice = limit.saturating_duration_since(now).min(SLICE).max(Duration::from_micros(1));
            if let Err(error) = self.ring.enter_timeout(1, slice) {
                // Whether the kernel holds the payload is unknown now.
                std::mem::forget((self, payload));
                return Err(error);
            }
            while let Some(cqe) = self.ring.next() {
                pending -= 1;
                if cqe.user_data != COMMAND {
                    continue;
                }
                if cqe.result == -(Errno::ECANCELED as i32) && urge_at.is_some() && cancel_until.is_none() {
                    // SAFETY: as before: the kernel has let go of it, and gets it again.
                    unsafe { self.push(entry, rest) };
                    pending += 1;
                } else {
                    answer = Some(cqe.result);
                }
            }
            if pending == 0 {
                break;
            }
        }
        match (answer, cancel_until) {
            (Some(result), None) => Ok((Outcome::Answered(result, payload), Some(self))),
            (Some(result), Some(_)) => {
                // A cancel that is still under way would answer the next command's wait.
                Ok((Outcome::CalledOff(result, payload), (pending == 0).then_some(self)))
            }
            (None, _) => {
                // Without a payload the kernel holds nothing of this process, and ends the ring when the command ends.
                if !payload.is_empty() {
                    std::mem::forget((self, payload));
                }
                Ok((Outcome::Stuck, None))
            }
        }
    }
}

/// Cancels the command; `user_data` is the cancel's own.
fn cancel(user_data: u64) -> Sqe {
    Sqe { opcode: uring::OP_ASYNC_CANCEL, fd: -1, addr: COMMAND, user_data, ..Sqe::default() }
}

#[cfg(test)]
mod tests {
    use std::io::{PipeReader, Write, pipe};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    /// What begins when it is given, and is not answered before there is something to read.
    fn wait_for(pipe: &PipeReader, pace: Pace, called_off: &dyn Fn() -> bool) -> Outcome {
        let readable = u32::from(nix::poll::PollFlags::POLLIN.bits() as u16);
        let entry = Sqe {
            opcode: uring::OP_POLL_ADD,
            fd: pipe.as_raw_fd(),
            op_flags: readable,
            user_data: COMMAND,
            ..Sqe::default()
        };
        let ring = CommandRing::new().expect("a ring");
        // SAFETY: it names no memory.
        let (outcome, ring) =
            unsafe { ring.give(&entry, [0; 8], Box::default(), pace, called_off) }.expect("a ring that works");
        assert!(ring.is_some(), "it can be used again");
        outcome
    }

    #[test]
    fn what_had_not_begun_is_given_again() {
        let (reader, mut writer) = pipe().expect("a pipe");
        let given = Instant::now();
        let later = std::thread::spawn(move || {
            // By then the kernel has been told twice to let go of it.
            std::thread::sleep(URGE_AFTER * 5 / 2);
            writer.write_all(b"x").expect("write");
            writer
        });
        let outcome = wait_for(&reader, Pace::Prompt(LIMIT), &|| false);
        assert!(matches!(outcome, Outcome::Answered(events, _) if events > 0), "{outcome:?}");
        assert!(given.elapsed() >= URGE_AFTER * 2);
        let _open = later.join();
    }

    #[test]
    fn what_waits_for_others_is_not_disturbed() {
        let (reader, _writer) = pipe().expect("a pipe");
        let given = Instant::now();
        let limit = URGE_AFTER * 3 / 2;
        let outcome = wait_for(&reader, Pace::Waiting(limit), &|| false);
        assert!(given.elapsed() >= limit);
        assert!(
            matches!(outcome, Outcome::CalledOff(result, _) if result == -(Errno::ECANCELED as i32)),
            "{outcome:?}"
        );
    }

    #[test]
    fn what_is_called_off_is_not_given_again() {
        let (reader, _writer) = pipe().expect("a pipe");
        let given = Instant::now();
        let called_off = || given.elapsed() > URGE_AFTER * 3 / 2;
        let outcome = wait_for(&reader, Pace::Prompt(LIMIT), &called_off);
        assert!(given.elapsed() < LIMIT / 2);
        assert!(
            matches!(outcome, Outcome::CalledOff(result, _) if result == -(Errno::ECANCELED as i32)),
            "{outcome:?}"
        );
    }
}
