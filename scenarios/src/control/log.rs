//! What the kernel complains of in its log while a run goes on.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;

use nix::libc;

use crate::scenario::Failure;

/// Words of a kernel in trouble.
const COMPLAINTS: &[&str] = &[
    "WARNING:",
    "BUG:",
    "Oops",
    "general protection fault",
    "blocked for more than",
    "soft lockup",
    "refcount_t",
    "UBSAN",
];

/// The kernel's log from a moment on.
pub(super) struct KernelLog(Option<File>);

impl KernelLog {
    /// From now on. Where it may not be read there is nothing to see, and nothing is said.
    pub(super) fn from_here() -> Result<Self, Failure> {
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg");
        let Ok(mut file) = file else { return Ok(Self(None)) };
        let moved = file.seek(SeekFrom::End(0));
        moved.map_err(|error| Failure::Environment(format!("cannot read the kernel log: {error}")))?;
        Ok(Self(Some(file)))
    }

    /// The complaints since it was asked last.
    pub(super) fn complaints(&mut self) -> Vec<String> {
        let Some(file) = &mut self.0 else { return Vec::new() };
        let mut found = Vec::new();
        let mut record = vec![0; 8192];
        loop {
            match file.read(&mut record) {
                Ok(len) => {
                    let text = String::from_utf8_lossy(&record[..len]);
                    let line = text.lines().next().unwrap_or_default();
                    let message = line.split_once(';').map_or(line, |(_, message)| message);
                    if COMPLAINTS.iter().any(|word| message.contains(word)) {
                        found.push(message.to_owned());
                    }
                }
                // Lines that were overwritten before they were read.
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return found,
            }
        }
    }
}
