//! What must not be there when it is all over: processes that cannot be killed, and complaints of the kernel.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::libc;

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
    let stat = std::fs::read_to_string(task.join("stat")).ok()?;
    let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
    rest.trim_start().starts_with('D').then(|| name.to_owned())
}

/// The kernel's messages from some moment on.
pub(super) struct KernelLog(Option<File>);

impl KernelLog {
    /// From here on. Where it may not be read, it says nothing.
    pub(super) fn from_here() -> Self {
        let open = || -> io::Result<File> {
            let mut log = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg")?;
            log.seek(SeekFrom::End(0))?;
            Ok(log)
        };
        Self(open().ok())
    }

    /// What a sound kernel never says. Errors of I/O are not among it: they are what is caused here.
    pub(super) fn complaints(&mut self) -> Vec<String> {
        const ALARMS: [&str; 6] =
            ["WARNING:", "BUG:", "Oops", "blocked for more than", "general protection", "rcu: INFO"];
        let Some(log) = &mut self.0 else { return Vec::new() };
        let mut record = [0; 8192];
        let mut lines = Vec::new();
        // One record for each read, until there is none; one that was overwritten meanwhile is an error of its own.
        for _ in 0..10_000 {
            match log.read(&mut record) {
                Ok(len) => {
                    let text = String::from_utf8_lossy(&record[..len]);
                    let message = text.split_once(';').map_or(&*text, |(_, message)| message);
                    lines.push(message.lines().next().unwrap_or_default().to_owned());
                }
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
                Err(_) => break,
            }
        }
        if lines.iter().any(|line| ALARMS.iter().any(|alarm| line.contains(alarm))) { lines } else { Vec::new() }
    }
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
            std::fs::write(dir.path().join("stat"), text).expect("write");
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
