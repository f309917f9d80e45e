//! Where each thread of a process stands, as the kernel tells it in `/proc`.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Where one thread stands. What the kernel would not tell is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadDump {
    /// The process.
    pub pid: u32,
    /// The thread.
    pub tid: u32,
    /// The thread's name.
    pub comm: String,
    /// Its state: `R` running, `S` sleeping, `D` waiting and not to be interrupted, …
    pub state: String,
    /// The kernel function it waits in.
    pub wchan: String,
    /// The number of the system call it is in and its arguments.
    pub syscall: String,
    /// The kernel stack, innermost first.
    pub stack: Vec<String>,
}

/// Where each thread of process `pid` stands, by thread id; `proc_root` is `/proc` but in tests.
///
/// A thread that ends meanwhile is left out, as is everything when there is no such process.
#[must_use]
pub fn dump_threads(proc_root: &Path, pid: u32) -> Vec<ThreadDump> {
    let _ = (proc_root, pid);
    todo!()
}

/// One line, and one more for each function of the stack.
impl fmt::Display for ThreadDump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} {} {}", self.pid, self.tid, self.comm, self.state)
    }
}
