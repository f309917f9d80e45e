//! Whether a block device is free: not mounted, not swapped to, not part of anything, not read-only.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::libc;
use nix::sys::stat::{major, minor};
use ublkit::holders::{Holder, How};

use crate::scenario::Failure;

/// Claims the block device at `path` if nobody uses it. While the file is open, nobody mounts or claims it.
pub(super) fn claim(path: &Path) -> Result<File, Failure> {
    let shown = path.display();
    let cannot = |error: &io::Error| match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EBUSY) => Failure::Usage(format!(
            "{shown} is mounted or held by somebody ({error}): unmount it, or have them let go, then try again"
        )),
        Some(Errno::EROFS) => Failure::Usage(format!("{shown} is read-only: it cannot be written to")),
        Some(Errno::EACCES | Errno::EPERM) => {
            Failure::Environment(format!("failed to open {shown}: {error}: run as root"))
        }
        _ => Failure::Usage(format!("failed to open {shown}: {error}")),
    };
    let meta = fs::metadata(path).map_err(|error| cannot(&error))?;
    if !meta.file_type().is_block_device() {
        return Err(Failure::Usage(format!("{shown} is not a block device")));
    }
    let users = users(meta.rdev(), path).map_err(|error| cannot(&error))?;
    if !users.is_empty() {
        return Err(Failure::Usage(format!(
            "{shown} is in use, and what is on it would be destroyed: {}",
            users.join("; ")
        )));
    }
    // On a block device O_EXCL without O_CREAT is a claim: it fails while somebody has mounted or claimed it.
    let open = OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL).open(path);
    let claim = open.map_err(|error| cannot(&error))?;
    match ublkit::blkdev::size(&claim) {
        Ok(0) => Err(Failure::Usage(format!("{shown} has no medium: its size is 0"))),
        Ok(_) => Ok(claim),
        Err(error) => Err(cannot(&error)),
    }
}

/// Everybody who uses a device, or a partition of it, and what else speaks against writing to it, with the remedy.
fn users(device: u64, path: &Path) -> io::Result<Vec<String>> {
    let dir = PathBuf::from(format!("/sys/dev/block/{}:{}", major(device), minor(device)));
    let mut users = Vec::new();
    if fs::read_to_string(dir.join("ro")).is_ok_and(|ro| ro.trim() == "1") {
        users.push("it is read-only: `blockdev --setrw` if that is not meant".to_owned());
    }
    users.extend(ublkit::holders::of(path)?.found.iter().filter_map(in_use));
    Ok(users)
}

/// In what way somebody's hold on the device is a use of what is on it, with the remedy. That it is open is none: everybody
/// who looks at disks has it open now and then, and who has claimed it is met by our own claim.
fn in_use(holder: &Holder) -> Option<String> {
    match (&holder.how, holder.pid) {
        (How::Mount(at), None) => Some(format!("it is mounted at {0}: `umount {0}`", at.display())),
        (How::Mount(at), Some(pid)) => Some(format!(
            "it is mounted at {0} where process {pid} ({1}) lives: `nsenter -m -t {pid} umount {0}`",
            at.display(),
            holder.comm
        )),
        (How::Swap, _) => Some("it is swapped to: `swapoff` it; /proc/swaps has its name".to_owned()),
        (How::Device(name), _) => Some(format!("it is part of {name}: take that apart first")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_user_is_named_with_a_remedy() {
        let told = |pid, how| in_use(&Holder { pid, comm: "sleep".to_owned(), how });
        let mount = || How::Mount("/data".into());
        for (pid, how, what) in [
            (None, mount(), "is mounted at /data: `umount /data`"),
            (Some(7), mount(), "is mounted at /data where process 7 (sleep) lives"),
            (None, How::Swap, "is swapped to"),
            (None, How::Device("dm-0".to_owned()), "is part of dm-0"),
        ] {
            let found = told(pid, how).expect("a use");
            assert!(found.contains(what), "{found}");
        }
        assert_eq!(told(Some(7), How::Fd(3)), None);
        assert_eq!(told(Some(7), How::Map), None);
    }

    #[test]
    fn what_is_no_block_device_is_refused() {
        for (path, why) in [("/dev/null", "not a block device"), ("/nonexistent/disk", "failed to open")] {
            let refused = claim(Path::new(path)).expect_err("refused");
            assert!(matches!(&refused, Failure::Usage(message) if message.contains(why)), "{refused}");
        }
    }
}
