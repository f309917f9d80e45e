//! A control group with a memory limit, put back as it was when it is dropped.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::scenario::Failure;

/// How long a group may take to be empty.
const EMPTY: Duration = Duration::from_secs(5);

/// A control group (v2) with a memory limit.
pub(super) struct Group {
    root: Root,
    path: PathBuf,
    /// Where each process came from.
    moved: Vec<(u32, String)>,
}

/// The hierarchy, and what was changed of it.
struct Root {
    path: PathBuf,
    mounted: bool,
    enabled: bool,
}

fn cannot(what: &str, error: &io::Error) -> Failure {
    Failure::Environment(format!(
        "failed to {what}: {error}; memory pressure needs cgroup v2 with the memory controller at its root; leave the part out \
         with --only"
    ))
}

/// Where cgroup v2 is mounted, by `/proc/self/mountinfo`.
fn mounted(mountinfo: &str) -> Option<PathBuf> {
    let line = mountinfo
        .lines()
        .find(|line| line.split_once(" - ").is_some_and(|(_, rest)| rest.split(' ').next() == Some("cgroup2")))?;
    line.split(' ').nth(4).map(PathBuf::from)
}

impl Root {
    fn find() -> Result<Self, Failure> {
        let mountinfo =
            fs::read_to_string("/proc/self/mountinfo").map_err(|error| cannot("read what is mounted", &error))?;
        let mut root = if let Some(path) = mounted(&mountinfo) {
            Self { path, mounted: false, enabled: false }
        } else {
            let dir = tempfile::Builder::new()
                .prefix("ublk-torture-cgroup-")
                .tempdir()
                .map_err(|error| cannot("make a directory", &error))?;
            let none: Option<&str> = None;
            mount(Some("none"), dir.path(), Some("cgroup2"), MsFlags::empty(), none)
                .map_err(|errno| cannot("mount cgroup2", &errno.into()))?;
            Self { path: dir.keep(), mounted: true, enabled: false }
        };
        let control = root.path.join("cgroup.subtree_control");
        let has = |text: String| text.split_whitespace().any(|word| word == "memory");
        if !fs::read_to_string(&control).is_ok_and(has) {
            fs::write(&control, "+memory").map_err(|error| cannot("switch the memory controller on", &error))?;
            root.enabled = true;
        }
        Ok(root)
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        if self.enabled {
            let _best_effort = fs::write(self.path.join("cgroup.subtree_control"), "-memory");
        }
        if self.mounted && umount2(&self.path, MntFlags::empty()).is_ok() {
            let _best_effort = fs::remove_dir(&self.path);
        }
    }
}

impl Group {
    /// A group of at most `bytes`.
    pub(super) fn new(name: &str, bytes: u64) -> Result<Self, Failure> {
        let root = Root::find()?;
        let path = root.path.join(format!("ublk-torture-{}-{name}", std::process::id()));
        fs::create_dir(&path).map_err(|error| cannot("make a control group", &error))?;
        let group = Self { root, path, moved: Vec::new() };
        fs::write(group.path.join("memory.max"), bytes.to_string())
            .map_err(|error| cannot("limit memory", &error))?;
        // Absent where there is no swap.
        let _none = fs::write(group.path.join("memory.swap.max"), "0");
        Ok(group)
    }

    /// Where processes are entered.
    pub(super) fn procs(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }

    /// Moves a process into it, for as long as it lives. What it has already stays charged where it was.
    pub(super) fn enter(&mut self, pid: u32) -> Result<(), Failure> {
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup"))
            .map_err(|error| cannot("read a process's control group", &error))?;
        let own = groups.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/").to_owned();
        enter(&self.procs(), pid).map_err(|error| cannot("move a server into a control group", &error))?;
        self.moved.push((pid, own));
        Ok(())
    }

    /// How often the limit was met, and how many processes were killed for it.
    pub(super) fn hits(&self) -> Result<(u64, u64), Failure> {
        let events = fs::read_to_string(self.path.join("memory.events"))
            .map_err(|error| cannot("read how often memory was short", &error))?;
        let count = |name: &str| {
            let mut lines = events.lines().filter_map(|line| line.split_once(' '));
            lines.find(|(key, _)| *key == name).and_then(|(_, value)| value.trim().parse().ok()).unwrap_or(0)
        };
        Ok((count("max"), count("oom_kill")))
    }
}

/// Enters a process.
pub(super) fn enter(procs: &Path, pid: u32) -> io::Result<()> {
    fs::write(procs, pid.to_string())
}

impl Drop for Group {
    fn drop(&mut self) {
        for (pid, own) in &self.moved {
            let back = self.root.path.join(own.trim_start_matches('/')).join("cgroup.procs");
            // One that has ended is nowhere.
            let _best_effort = enter(&back, *pid);
        }
        let until = Instant::now() + EMPTY;
        while fs::remove_dir(&self.path).is_err() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hierarchy_is_found() {
        let v1 = "30 24 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
        assert_eq!(mounted(v1), None);
        let v2 = format!("{v1}31 24 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:4 - cgroup2 cgroup2 rw\n");
        assert_eq!(mounted(&v2), Some(PathBuf::from("/sys/fs/cgroup/unified")));
    }
}
