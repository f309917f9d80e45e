//! Writing dirty pages back before a stop that would not.

use std::fs::File;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Instant;

use crate::ctrl::DeviceInfo;
use crate::error::{Error, ErrorKind, Result};
use crate::holders::{self, How};

/// Writes back what file systems and the page cache hold for a device, which is served.
///
/// On a thread of its own: it is left behind, to end when its I/O fails, if the server does not finish it by `deadline`.
pub(crate) fn write_back(info: &DeviceInfo, deadline: Instant) -> Result<()> {
    let info = *info;
    let (done, result) = mpsc::channel();
    let what = format!("write back the dirty pages of device {}", info.id());
    let work = move || {
        let _ = done.send(file_systems(&info).and_then(|()| File::open(info.block_path())?.sync_all()));
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

/// Those that are mounted on it, in this mount namespace or another.
fn file_systems(info: &DeviceInfo) -> std::io::Result<()> {
    for holder in holders::of_device(info) {
        let How::Mount(path) = holder.how else { continue };
        let path = match holder.pid {
            Some(pid) => PathBuf::from(format!("/proc/{pid}/root")).join(path.strip_prefix("/").unwrap_or(&path)),
            None => path,
        };
        // One that was unmounted meanwhile has been written back by that.
        if let Ok(root) = File::open(path) {
            nix::unistd::syncfs(&root)?;
        }
    }
    Ok(())
}
