//! Writing dirty pages back before a stop that would not.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Instant;

use crate::ctrl::block_path;
use crate::error::{Error, ErrorKind, Result};
use crate::holders::{self, How};

/// Writes back what file systems and the page cache hold for a device, which is served.
///
/// On a thread of its own: it is left behind, to end when its I/O fails, if the server does not finish it by `deadline`.
pub(crate) fn write_back(id: u32, deadline: Instant) -> Result<()> {
    let (done, result) = mpsc::channel();
    let what = format!("write back the dirty pages of device {id}");
    let work = move || {
        let of_files = file_systems(id);
        // Whatever the file systems said: what is in the device's own cache is to be there.
        let of_device = File::open(block_path(id)).and_then(|device| device.sync_all());
        let _ = done.send(of_files.and(of_device));
    };
    std::thread::Builder::new()
        .name("ublkit-sync".into())
        .spawn(work)
        .map_err(|error| Error::io(&error, format_args!("{what}: start a thread")))?;
    match result.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        Ok(written) => written.map_err(|error| Error::io(&error, what)),
        Err(_) => Err(Error::new(ErrorKind::TimedOut, format!("{what}: not done in time"))),
    }
}

/// Those that are mounted on it, in this mount namespace or another. All of them, and the first error.
fn file_systems(id: u32) -> io::Result<()> {
    let mounts = holders::mounts_of_ublk(id);
    let mut written = Ok(());
    for holder in mounts.found {
        let How::Mount(path) = holder.how else { continue };
        let path = match holder.pid {
            Some(pid) => PathBuf::from(format!("/proc/{pid}/root")).join(path.strip_prefix("/").unwrap_or(&path)),
            None => path,
        };
        let synced = match File::open(path) {
            Ok(root) => nix::unistd::syncfs(&root).map_err(io::Error::from),
            // One that was unmounted meanwhile has been written back by that.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        };
        written = written.and(synced);
    }
    if mounts.incomplete.is_some() {
        // In a container, say, one cannot see who else has it mounted. This reaches every file system of the machine.
        nix::unistd::sync();
    }
    written
}
