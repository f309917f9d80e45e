//! Where each thread of a process stands in user space: functions, with files and lines.
//!
//! Done by a helper, a process that is this program in another role: a process cannot look at its own threads while they
//! run, and one that hangs can do nothing at all. It stops every thread for some milliseconds, takes registers and
//! stacks, lets them go on, and only then names what it has: by the symbol table first, which is quick, and then with
//! files and lines. It tells of one thread after the other, so that what it knew is not lost when it is killed for taking
//! too long; killed at any moment it leaves no thread stopped.
//!
//! A thread in uninterruptible sleep cannot be stopped. The kernel tells where in user space it came from all the same,
//! and that is mostly enough.

mod child;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod image;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod names;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod stop;

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use ublkit_harness::watchdog::UserStack;

pub(crate) use child::main;

/// The argument with which this program looks at another process, whose id comes after it.
pub(crate) const ARGUMENT: &str = "dump-threads";

/// What the helper says: one line of JSON each.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Told {
    /// Where a thread stands. What comes later of the same thread says more.
    Thread { pid: u32, tid: u32, frames: Vec<String> },
    /// Why something is missing.
    Remark(String),
    /// That was all.
    End,
}

/// The helper, killed when it is dropped: the threads go on then, wherever it was.
struct Helper(Option<Child>);

impl Drop for Helper {
    fn drop(&mut self) {
        let Some(mut child) = self.0.take() else { return };
        // Gone already where all went well.
        let _ = child.kill();
        // On a busy machine its end takes longer than there is time for what it has told.
        let _ = thread::Builder::new().name("backtraces".to_owned()).spawn(move || child.wait());
    }
}

/// Where the threads of `pids` stand, and why some are missing, within `limit`.
pub(crate) fn of(pids: &[u32], limit: Duration) -> (Vec<UserStack>, Vec<String>) {
    let deadline = Instant::now() + limit;
    let (sender, receiver) = mpsc::channel();
    let _helper = match start(pids, sender) {
        Ok(helper) => helper,
        Err(error) => return (Vec::new(), vec![format!("no backtraces: failed to start a helper: {error}")]),
    };
    let mut stacks: Vec<UserStack> = Vec::new();
    let mut remarks = Vec::new();
    loop {
        match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Told::Thread { pid, tid, frames }) => {
                stacks.retain(|known| known.tid != tid);
                stacks.push(UserStack { pid, tid, frames });
            }
            Ok(Told::Remark(text)) => remarks.push(format!("backtraces: {text}")),
            Ok(Told::End) => break,
            Err(RecvTimeoutError::Disconnected) => {
                remarks.push("backtraces: the helper ended early".to_owned());
                break;
            }
            Err(RecvTimeoutError::Timeout) => {
                let seconds = limit.as_secs_f64();
                remarks.push(format!("backtraces: incomplete, or without lines: not done within {seconds:.1} s"));
                break;
            }
        }
    }
    (stacks, remarks)
}

fn start(pids: &[u32], sender: mpsc::Sender<Told>) -> std::io::Result<Helper> {
    let mut child = Command::new("/proc/self/exe")
        .arg(ARGUMENT)
        .args(pids.iter().map(u32::to_string))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let out = child.stdout.take();
    let helper = Helper(Some(child));
    thread::Builder::new().name("backtraces".to_owned()).spawn(move || {
        for line in out.into_iter().flat_map(|out| BufReader::new(out).lines()) {
            let told = line.ok().and_then(|line| serde_json::from_str(&line).ok());
            if told.is_none_or(|told| sender.send(told).is_err()) {
                break;
            }
        }
    })?;
    Ok(helper)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The helper itself is tried in `tests/backtrace.rs`, on another process; here, what is said when there is none.
    #[test]
    fn what_a_helper_says_is_read() {
        let line =
            serde_json::to_string(&Told::Thread { pid: 2, tid: 3, frames: vec!["main".to_owned()] }).expect("writes");
        assert!(matches!(serde_json::from_str(&line), Ok(Told::Thread { tid: 3, .. })));
        assert!(serde_json::from_str::<Told>("nonsense").is_err());
    }
}
