//! What a process has, to be compared with what it has later.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use crate::context::Context;
use crate::scenario::Failure;

/// How long threads and descriptors that are on their way out may take.
const SETTLE: Duration = Duration::from_secs(5);

/// The open descriptors and threads of this process, and what is mounted.
#[derive(Debug)]
pub(crate) struct Inventory {
    descriptors: BTreeMap<String, String>,
    threads: BTreeMap<String, String>,
    mounts: BTreeMap<String, String>,
}

impl Inventory {
    pub(crate) fn take() -> Self {
        Self { descriptors: descriptors(), threads: threads(), mounts: mounts() }
    }

    /// Fails if there is more now than when this was taken.
    pub(crate) fn compare(&self, context: &mut Context) -> Result<(), Failure> {
        let left = self.surplus_after_settling();
        if left.is_empty() {
            let (descriptors, threads) = (self.descriptors.len(), self.threads.len());
            context.detail(format!("{descriptors} descriptors and {threads} threads, as at the start"));
            return Ok(());
        }
        let what = format!("{} things are left that were not there at the start", left.len());
        Err(Failure::broke_with("leak", what, left))
    }

    /// What there is more than when this was taken, as lines, once what is on its way out has had its time.
    pub(crate) fn surplus_after_settling(&self) -> Vec<String> {
        let patience = Instant::now() + SETTLE;
        loop {
            let left = self.surplus_now();
            if left.is_empty() || Instant::now() > patience {
                return left;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What there is more than when this was taken, as lines, what is on its way out among it.
    pub(crate) fn surplus_now(&self) -> Vec<String> {
        let now = Self::take();
        let mut left = surplus("descriptor", &self.descriptors, &now.descriptors);
        // A thread gives itself its name, some time after it was started.
        let new = |thread: &(&String, &String)| !self.threads.contains_key(thread.0);
        left.extend(now.threads.iter().filter(new).map(|(id, name)| format!("thread {id}: {name}")));
        left.extend(surplus("mount", &self.mounts, &now.mounts));
        left
    }
}

/// What is in `now` and was not in `before`, as lines.
fn surplus(what: &str, before: &BTreeMap<String, String>, now: &BTreeMap<String, String>) -> Vec<String> {
    now.iter()
        .filter(|(key, value)| before.get(*key) != Some(value))
        .map(|(key, value)| format!("{what} {key}: {value}"))
        .collect()
}

fn descriptors() -> BTreeMap<String, String> {
    let Ok(entries) = fs::read_dir("/proc/self/fd") else { return BTreeMap::new() };
    // The one that reads this directory is gone when its link is followed.
    let listed: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    listed
        .iter()
        .filter_map(|path| {
            Some((path.file_name()?.to_string_lossy().into_owned(), fs::read_link(path).ok()?.display().to_string()))
        })
        .collect()
}

fn threads() -> BTreeMap<String, String> {
    let Ok(entries) = fs::read_dir("/proc/self/task") else { return BTreeMap::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let name = fs::read_to_string(entry.path().join("comm")).ok()?;
            // The kernel's own workers, which it keeps for a process that used an io_uring and ends when it likes.
            if name.starts_with("iou-wrk-") {
                return None;
            }
            Some((entry.file_name().to_string_lossy().into_owned(), name.trim().to_owned()))
        })
        .collect()
}

/// Mounts of ublk devices.
fn mounts() -> BTreeMap<String, String> {
    let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    table
        .lines()
        .filter(|line| line.starts_with("/dev/ublkb"))
        .filter_map(|line| line.split_once(' '))
        .map(|(device, rest)| (device.to_owned(), rest.to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_new_is_named() {
        let before = BTreeMap::from([("3".to_owned(), "/dev/null".to_owned())]);
        let mut now = before.clone();
        assert!(surplus("descriptor", &before, &now).is_empty());
        now.insert("4".to_owned(), "/dev/ublkc0".to_owned());
        assert_eq!(surplus("descriptor", &before, &now), ["descriptor 4: /dev/ublkc0"]);
        assert!(surplus("descriptor", &now, &before).is_empty(), "what went is no leak");
    }

    #[test]
    fn an_open_file_and_a_thread_are_seen() {
        let before = Inventory::take();
        let (release, wait) = std::sync::mpsc::channel::<()>();
        let _file = fs::File::open("/dev/zero").expect("opens");
        let thread = std::thread::spawn(move || wait.recv());
        let now = Inventory::take();
        assert!(surplus("d", &before.descriptors, &now.descriptors).iter().any(|line| line.ends_with("/dev/zero")));
        assert!(!surplus("t", &before.threads, &now.threads).is_empty());
        drop(release);
        assert!(thread.join().expect("no panic").is_err());
    }
}
