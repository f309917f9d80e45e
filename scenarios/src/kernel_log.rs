//! What the kernel says while something is done.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;

use nix::libc;

/// What a sound kernel never says. I/O errors are not among it: they are caused here.
const ALARMS: [&str; 6] = ["WARNING:", "BUG:", "Oops", "blocked for more than", "general protection", "rcu: INFO"];
/// As many records are read at a time, of which the kernel's buffer holds fewer.
const RECORDS_MAX: usize = 100_000;

/// The kernel's messages from some moment on.
#[derive(Debug)]
pub struct KernelLog(File);

impl KernelLog {
    /// From now on.
    ///
    /// # Errors
    /// The kernel's, most likely that this is not root.
    pub fn from_here() -> io::Result<Self> {
        let mut log = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg")?;
        log.seek(SeekFrom::End(0))?;
        Ok(Self(log))
    }

    /// Everything said since this was last asked.
    pub fn news(&mut self) -> String {
        let mut record = [0; 8192];
        let mut text = String::new();
        // One record for each read, until there is none; one that was overwritten meanwhile is an error of its own.
        for _ in 0..RECORDS_MAX {
            match self.0.read(&mut record) {
                Ok(len) => text.push_str(&String::from_utf8_lossy(&record[..len])),
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
                Err(_) => break,
            }
        }
        text
    }

    /// Everything said since this was last asked, if there is something in it that a sound kernel never says.
    pub fn complaints(&mut self) -> Option<String> {
        let news = self.news();
        alarm(&news).is_some().then_some(news)
    }
}

/// The first line of a kernel log that a sound kernel does not say, without what stands before the message.
#[must_use]
pub fn alarm(log: &str) -> Option<&str> {
    let line = log.lines().find(|line| ALARMS.iter().any(|alarm| line.contains(alarm)))?;
    Some(line.split_once(';').map_or(line, |(_, message)| message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alarm_is_told_without_its_prefix() {
        let log = "6,12,345,-;Buffer I/O error on dev ublkb0\n4,13,346,-;WARNING: CPU: 1 PID: 7 at block/x.c:1\n";
        assert_eq!(alarm(log), Some("WARNING: CPU: 1 PID: 7 at block/x.c:1"));
        assert_eq!(alarm("6,12,345,-;Buffer I/O error on dev ublkb0\n"), None);
    }
}
