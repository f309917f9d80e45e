//! Whether a server's threads are marked as part of the I/O path.
//!
//! Memory reclaim may write to the very device that a thread serves: one that allocates and is not marked
//! (`PR_SET_IO_FLUSHER`, prctl(2)) can then wait for itself. That takes a shortage of memory at the wrong moment; the mark can be
//! seen at any time, in the thread's flags.

use std::fs;
use std::io;
use std::path::Path;

use ublkit_harness::threads::Stat;

use crate::scenario::Failure;

/// What the mark sets in a thread's flags: `PF_MEMALLOC_NOIO` and `PF_LOCAL_THROTTLE` (include/linux/sched.h).
const MARK: u64 = 0x0008_0000 | 0x0010_0000;

/// Fails unless every thread that serves device `id` in process `pid`, and there are `least` of them, is marked. Returns
/// how many there are.
pub(crate) fn check(pid: u32, id: u32, least: usize) -> Result<usize, Failure> {
    let threads = serving_threads(Path::new(&format!("/proc/{pid}/task")), &format!("ublk{id}-"))
        .map_err(|error| Failure::Internal(format!("cannot list the threads of the server, {pid}: {error}")))?;
    if threads.len() < least {
        let what = format!("device {id} is served by {} threads of process {pid}, not by {least}", threads.len());
        return Err(Failure::Internal(what));
    }
    let unmarked: Vec<String> =
        threads.iter().filter(|(_, flags)| flags & MARK != MARK).map(|(name, _)| name.clone()).collect();
    if unmarked.is_empty() {
        return Ok(threads.len());
    }
    let what = format!(
        "{} of {} threads that serve device {id} are not marked as part of the I/O path (PR_SET_IO_FLUSHER): where memory \
         is short, they wait for themselves",
        unmarked.len(),
        threads.len()
    );
    Err(Failure::broke_with("resources", what, unmarked))
}

/// Names and flags of the threads whose names begin with `prefix`.
fn serving_threads(tasks: &Path, prefix: &str) -> io::Result<Vec<(String, u64)>> {
    let mut threads = Vec::new();
    for task in fs::read_dir(tasks)? {
        // One that ends meanwhile serves nothing any more.
        if let Some(stat) = Stat::read(&task?.path()).filter(|stat| stat.comm.starts_with(prefix)) {
            threads.push((stat.comm, stat.flags));
        }
    }
    Ok(threads)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_without_the_mark_are_named() {
        let tasks = tempfile::tempdir().expect("a directory");
        for (tid, name, flags) in
            [(1, "main", 0), (2, "ublk7-q0", MARK | 0x40), (3, "ublk7-w0", 0x40), (4, "ublk70-q0", 0)]
        {
            let dir = tasks.path().join(tid.to_string());
            fs::create_dir(&dir).expect("a directory");
            fs::write(dir.join("stat"), format!("{tid} ({name}) S 1 1 1 0 -1 {flags} 0 0 0 0 1 2 3 4 20 0 1 0 9\n"))
                .expect("a file");
        }
        let mut threads = serving_threads(tasks.path(), "ublk7-").expect("listed");
        threads.sort();
        assert_eq!(threads, [("ublk7-q0".to_owned(), MARK | 0x40), ("ublk7-w0".to_owned(), 0x40)]);
    }
}
