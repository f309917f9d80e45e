//! A control group with limits of memory, put back as it was when it is dropped.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};

use crate::context::Context;
use crate::runs::{Change, Undo};
use crate::scenario::Failure;

/// A control group (v2) with limits of memory. Whoever is in it has to have ended when it is dropped.
pub(super) struct Group {
    path: PathBuf,
    // In this order they are put back.
    _made: Change,
    _root: Root,
}

/// How much memory a group may have, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Beyond this it has to give some back, and is kept waiting meanwhile.
    pub(super) high: u64,
    /// More than this it never has.
    pub(super) max: u64,
}

/// What limits have led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pressure {
    /// How often a limit was met.
    pub(super) hits: u64,
    /// How many pages were looked at to find some to give back.
    pub(super) scanned: u64,
    /// How many processes were killed for want of memory.
    pub(super) killed: u64,
}

/// The hierarchy, and what was changed of it.
struct Root {
    path: PathBuf,
    // In this order they are put back.
    enabled: Option<Change>,
    _mounted: Option<Change>,
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

/// What a file of a control group says of `name`, in lines of names and numbers; 0 where it says nothing.
fn count(lines: &str, name: &str) -> u64 {
    let mut lines = lines.lines().filter_map(|line| line.split_once(' '));
    lines.find(|(key, _)| *key == name).and_then(|(_, value)| value.trim().parse().ok()).unwrap_or(0)
}

impl Root {
    fn find(context: &Context) -> Result<Self, Failure> {
        let mountinfo =
            fs::read_to_string("/proc/self/mountinfo").map_err(|error| cannot("read what is mounted", &error))?;
        let mut root = if let Some(path) = mounted(&mountinfo) {
            Self { path, enabled: None, _mounted: None }
        } else {
            let dir = tempfile::Builder::new()
                .prefix("ublk-torture-cgroup-")
                .tempdir()
                .map_err(|error| cannot("make a directory", &error))?;
            let path = dir.keep();
            let change = context.record.changing(Undo::Unmount(path.clone()));
            let none: Option<&str> = None;
            mount(Some("none"), &path, Some("cgroup2"), MsFlags::empty(), none)
                .map_err(|errno| cannot("mount cgroup2", &errno.into()))?;
            Self { path, enabled: None, _mounted: Some(change) }
        };
        let control = root.path.join("cgroup.subtree_control");
        let has = |text: String| text.split_whitespace().any(|word| word == "memory");
        if !fs::read_to_string(&control).is_ok_and(has) {
            let text = "-memory".to_owned();
            let undo = Undo::Write { file: control.clone(), text, unless_not: None };
            root.enabled = Some(context.record.changing(undo));
            fs::write(&control, "+memory").map_err(|error| cannot("switch the memory controller on", &error))?;
        }
        Ok(root)
    }
}

impl Group {
    pub(super) fn new(context: &Context, name: &str, limits: Limits) -> Result<Self, Failure> {
        let root = Root::find(context)?;
        let path = root.path.join(format!("ublk-torture-{}-{name}", std::process::id()));
        let made = context.record.changing(Undo::Rmdir(path.clone()));
        fs::create_dir(&path).map_err(|error| cannot("make a control group", &error))?;
        let group = Self { path, _made: made, _root: root };
        for (limit, bytes) in [("memory.max", limits.max), ("memory.high", limits.high)] {
            fs::write(group.path.join(limit), bytes.to_string()).map_err(|error| cannot("limit memory", &error))?;
        }
        // Absent where there is no swap.
        let _none = fs::write(group.path.join("memory.swap.max"), "0");
        Ok(group)
    }

    /// Where processes are entered.
    pub(super) fn procs(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }

    /// What the limits have led to until now.
    pub(super) fn pressure(&self) -> Result<Pressure, Failure> {
        let read = |name: &str| {
            let text = fs::read_to_string(self.path.join(name));
            text.map_err(|error| cannot("read how often memory was short", &error))
        };
        let (events, stat) = (read("memory.events")?, read("memory.stat")?);
        Ok(Pressure {
            hits: count(&events, "high") + count(&events, "max"),
            scanned: count(&stat, "pgscan"),
            killed: count(&events, "oom_kill"),
        })
    }
}

/// Enters a process.
pub(super) fn enter(procs: &Path, pid: u32) -> io::Result<()> {
    fs::write(procs, pid.to_string())
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

    #[test]
    fn what_limits_led_to_is_read() {
        let events = "low 0\nhigh 12\nmax 3\noom 0\noom_kill 1\noom_group_kill 0\n";
        assert_eq!(["high", "max", "oom_kill", "none"].map(|name| count(events, name)), [12, 3, 1, 0]);
    }
}
