//! Whether a block device is free: not mounted, not swapped to, not part of anything, not read-only.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::libc;
use nix::sys::stat::{major, minor};

use crate::scenario::Failure;

/// The kernel's file systems in which users of a device show.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) sys: PathBuf,
    pub(super) proc: PathBuf,
}

impl Default for Seen {
    fn default() -> Self {
        Self { sys: "/sys".into(), proc: "/proc".into() }
    }
}

/// Claims the block device at `path` if nobody uses it. While the file is open, nobody mounts or claims it.
pub(super) fn claim(path: &Path, seen: &Seen) -> Result<File, Failure> {
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
    let users = users(meta.rdev(), seen);
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
pub(super) fn users(device: u64, seen: &Seen) -> Vec<String> {
    let numbers = |device: u64| format!("{}:{}", major(device), minor(device));
    let dir = seen.sys.join("dev/block").join(numbers(device));
    let mut users = Vec::new();
    // The device and its partitions: directories below it that say which partition they are.
    let mut those = vec![(dir.clone(), numbers(device))];
    for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
        if entry.path().join("partition").exists()
            && let Ok(number) = fs::read_to_string(entry.path().join("dev"))
        {
            those.push((entry.path(), number.trim().to_owned()));
        }
    }
    if fs::read_to_string(dir.join("ro")).is_ok_and(|ro| ro.trim() == "1") {
        users.push("it is read-only: `blockdev --setrw` if that is not meant".to_owned());
    }
    let mounts = fs::read_to_string(seen.proc.join("self/mountinfo")).unwrap_or_default();
    let swaps = fs::read_to_string(seen.proc.join("swaps")).unwrap_or_default();
    for (dir, number) in those {
        let name = fs::canonicalize(&dir).ok().and_then(|dir| Some(dir.file_name()?.to_string_lossy().into_owned()));
        let name = name.unwrap_or_else(|| number.clone());
        for mount in mounts.lines() {
            let mut fields = mount.split(' ');
            if fields.nth(2) == Some(&number) {
                let at = fields.nth(1).unwrap_or_default();
                users.push(format!("{name} is mounted at {at}: `umount {at}`"));
            }
        }
        for swap in swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next()) {
            // By number: a swap area is listed under whatever name it was switched on by.
            let same = fs::metadata(swap).is_ok_and(|meta| numbers(meta.rdev()) == number);
            if same || Path::new(swap).file_name().is_some_and(|file| file.to_string_lossy() == name) {
                users.push(format!("{name} is swapped to: `swapoff {swap}`"));
            }
        }
        for holder in fs::read_dir(dir.join("holders")).into_iter().flatten().flatten() {
            let holder_name = holder.file_name().to_string_lossy().into_owned();
            let known_as = fs::read_to_string(holder.path().join("dm/name"))
                .map_or_else(|_| String::new(), |name| format!(" ({})", name.trim()));
            users.push(format!("{name} is part of {holder_name}{known_as}: take that apart first"));
        }
    }
    users
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::makedev;

    /// A /sys and /proc with a disk 8:0 that has a partition 8:1.
    fn machine() -> (tempfile::TempDir, Seen) {
        let root = tempfile::tempdir().expect("a directory");
        let seen = Seen { sys: root.path().join("sys"), proc: root.path().join("proc") };
        let disk = seen.sys.join("devices/sda");
        for dir in
            [disk.join("holders"), disk.join("sda1/holders"), seen.sys.join("dev/block"), seen.proc.join("self")]
        {
            fs::create_dir_all(dir).expect("directory");
        }
        let write = |path: PathBuf, text: &str| fs::write(path, text).expect("write");
        write(disk.join("ro"), "0\n");
        write(disk.join("sda1/partition"), "1\n");
        write(disk.join("sda1/dev"), "8:1\n");
        write(seen.proc.join("self/mountinfo"), "22 1 9:0 / / rw - ext4 /dev/md0 rw\n");
        write(seen.proc.join("swaps"), "Filename Type Size Used Priority\n/dev/nowhere/zram0 partition 1 0 100\n");
        std::os::unix::fs::symlink(&disk, seen.sys.join("dev/block/8:0")).expect("link");
        (root, seen)
    }

    fn of_the_disk(seen: &Seen) -> Vec<String> {
        users(makedev(8, 0), seen)
    }

    #[test]
    fn a_free_disk_has_no_users() {
        assert_eq!(of_the_disk(&machine().1), [""; 0]);
    }

    #[test]
    fn every_kind_of_user_is_named_with_a_remedy() {
        let (_root, seen) = machine();
        let disk = seen.sys.join("devices/sda");
        fs::write(disk.join("ro"), "1\n").expect("write");
        fs::write(seen.proc.join("self/mountinfo"), "30 22 8:1 / /data rw - ext4 /dev/sda1 rw\n").expect("write");
        fs::write(seen.proc.join("swaps"), "Filename\n/dev/nowhere/sda partition 1 0 1\n").expect("write");
        fs::create_dir_all(disk.join("sda1/holders/dm-0/dm")).expect("directory");
        fs::write(disk.join("sda1/holders/dm-0/dm/name"), "vg-root\n").expect("write");
        let found = of_the_disk(&seen).join("\n");
        for part in ["read-only", "sda1 is mounted at /data", "sda is swapped to", "sda1 is part of dm-0 (vg-root)"] {
            assert!(found.contains(part), "{part} is not in {found}");
        }
    }

    #[test]
    fn what_is_no_block_device_is_refused() {
        for (path, why) in [("/dev/null", "not a block device"), ("/nonexistent/disk", "failed to open")] {
            let refused = claim(Path::new(path), &Seen::default()).expect_err("refused");
            assert!(matches!(&refused, Failure::Usage(message) if message.contains(why)), "{refused}");
        }
    }
}
