//! What must not be there when it is all over: processes that cannot be killed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ublkit_harness::threads::Stat;

/// How long a thread may wait uninterruptibly: the disk of a busy machine is no hang.
const STUCK: Duration = Duration::from_secs(8);

/// Threads that have waited uninterruptibly, in one stay, for too long: a line for each, with where it is.
pub(super) fn stuck_threads() -> Vec<String> {
    let begun = Instant::now();
    let mut stuck = waiting();
    while !stuck.is_empty() {
        if begun.elapsed() >= STUCK {
            return stuck
                .iter()
                .map(|(task, (name, _))| {
                    let frames = std::fs::read_to_string(task.join("stack")).unwrap_or_default();
                    format!("{} ({name}): {}", task.display(), frames.lines().collect::<Vec<_>>().join(" < "))
                })
                .collect();
        }
        std::thread::sleep(Duration::from_millis(20));
        let now = waiting();
        // One that has been switched to since was not stuck.
        stuck.retain(|task, was| now.get(task) == Some(was));
    }
    Vec::new()
}

/// Threads that wait uninterruptibly now: their names, and how often they were switched to.
fn waiting() -> BTreeMap<PathBuf, (String, String)> {
    let mut waiting = BTreeMap::new();
    let Ok(processes) = std::fs::read_dir("/proc") else { return waiting };
    let numeric = |name: &std::ffi::OsStr| name.as_encoded_bytes().iter().all(u8::is_ascii_digit);
    for process in processes.flatten().filter(|entry| numeric(&entry.file_name())) {
        let Ok(tasks) = std::fs::read_dir(process.path().join("task")) else { continue };
        for task in tasks.flatten().map(|task| task.path()) {
            let Some(name) = waits(&task) else { continue };
            let switches = std::fs::read_to_string(task.join("status")).unwrap_or_default();
            let switches = switches.lines().filter(|line| line.contains("ctxt_switches")).collect();
            waiting.insert(task, (name, switches));
        }
    }
    waiting
}

/// The name of a thread in state D.
fn waits(task: &Path) -> Option<String> {
    Stat::read(task).filter(|stat| stat.state == 'D').map(|stat| stat.comm)
}

/// The resident memory of this process, in KiB.
pub(super) fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_waits_uninterruptibly_is_named() {
        let dir = tempfile::tempdir().expect("a directory");
        let stat = |text: &str| {
            // Further fields follow, of which one is when it began.
            std::fs::write(dir.path().join("stat"), format!("{text}{}", " 0".repeat(44))).expect("write");
            waits(dir.path())
        };
        // Whoever names a thread may put anything into the name.
        assert_eq!(stat("7 (a) S (b) D 1 7 7 0").as_deref(), Some("a) S (b"));
        assert_eq!(stat("7 (a) D (b) S 1 7 7 0"), None);
        assert_eq!(stat("7 (D) R 1 7 7 0"), None);
        assert_eq!(stat(""), None, "it has ended meanwhile");
        assert_eq!(waits(&dir.path().join("gone")), None);
    }

    #[test]
    fn what_a_process_writes_to_is_in_its_memory() {
        let before = resident_kib();
        let written = vec![1_u8; 16 << 20];
        assert!(resident_kib() >= before + 8 * 1024, "{} bytes more", written.len());
    }
}
