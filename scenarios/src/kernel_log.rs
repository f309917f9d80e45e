//! The kernel's messages from some moment on, read from `/dev/kmsg`.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;

use nix::libc;
use ublkit_harness::kernel_log::{Complaint, Record, complaints};

/// Longer than any record.
const RECORD_BYTES: usize = 8192;
/// Records that are read at a time: those that come as fast as they are read have to end somewhere.
const RECORDS_MAX: usize = 200_000;

/// The kernel's messages since it was opened, or last read.
#[derive(Debug)]
pub struct KernelLog {
    log: File,
    lost: u64,
}

impl KernelLog {
    /// What comes from now on.
    ///
    /// # Errors
    /// The log may not be read: that needs `CAP_SYSLOG`, or `kernel.dmesg_restrict=0`.
    pub fn from_here() -> io::Result<Self> {
        let mut log = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg")?;
        log.seek(SeekFrom::End(0))?;
        Ok(Self { log, lost: 0 })
    }

    /// What came since the last time.
    pub fn read(&mut self) -> Vec<Record> {
        let mut bytes = vec![0; RECORD_BYTES];
        let mut records = Vec::new();
        // One record for each read, until there is none.
        for _ in 0..RECORDS_MAX {
            match self.log.read(&mut bytes) {
                Ok(len) => records.extend(Record::parse(&String::from_utf8_lossy(&bytes[..len]))),
                // Some were overwritten before they were read; the next read goes on behind them.
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => self.lost += 1,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        records
    }

    /// What of that a sound kernel never says; with `io`, errors of I/O too.
    pub fn complaints(&mut self, io: bool) -> Vec<Complaint> {
        complaints(&self.read(), io)
    }

    /// How often records were overwritten before they were read.
    #[must_use]
    pub const fn lost(&self) -> u64 {
        self.lost
    }
}
