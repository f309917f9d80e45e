//! Who holds a device node open: the answer to "why does this device not go away?".
//!
//! Nodes are compared by device number and not by path, so that holders in other mount namespaces, in containers, and
//! of a node that has been removed are found too.
//!
//! ```no_run
//! let holders = ublkit::holders::of("/dev/ublkb0")?;
//! println!("{holders}"); // pid 123 (fio) fd 7, mounted on /mnt
//! # Ok::<(), std::io::Error>(())
//! ```

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use nix::sys::stat::SFlag;

use crate::ctrl::{DeviceInfo, block_path, character_path};
use crate::sys::file::stat_path;

/// How long a search may take: reading another process's maps can block for as long as that process does.
const TIME_LIMIT: Duration = Duration::from_secs(5);
/// The most holders that are collected.
const HOLDERS_MAX: usize = 1000;
/// What the link of the initial pid namespace says (`PID_NS_INIT_INO` in `include/uapi/linux/nsfs.h`).
const INITIAL_PID_NAMESPACE: &str = "pid:[4026531836]";

/// In what way a device is held.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum How {
    /// An open file descriptor, with its number.
    Fd(i32),
    /// A memory map, which holds the device after its descriptor is closed.
    Map,
    /// A file system that is mounted at this path.
    Mount(PathBuf),
    /// Swap space.
    Swap,
    /// Another block device on top of it: device mapper, md, loop, …
    Device(String),
}

/// One holder of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The process, if it is one; for a mount in another mount namespace, a process that sees it.
    pub pid: Option<i32>,
    /// The process's name, as the kernel keeps it: at most 15 bytes.
    pub comm: String,
    /// In what way it holds the device.
    pub how: How,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.how, self.pid) {
            (How::Mount(path), None) => return write!(f, "mounted on {}", path.display()),
            (How::Mount(path), Some(pid)) => {
                return write!(f, "mounted on {} where pid {pid} ({}) lives", path.display(), self.comm);
            }
            (_, Some(pid)) => write!(f, "pid {pid} ({}) ", self.comm)?,
            (_, None) => {}
        }
        match &self.how {
            How::Fd(fd) => write!(f, "fd {fd}"),
            How::Map => f.write_str("memory map"),
            How::Swap => f.write_str("swap"),
            How::Device(name) => write!(f, "device {name}"),
            How::Mount(_) => Ok(()),
        }
    }
}

/// What a search found.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Holders {
    /// The holders, at most 1000.
    pub found: Vec<Holder>,
    /// Why there may be more than were found: processes that may not be looked into or cannot be seen from here, or
    /// a search that took too long. `None` if everything was seen.
    pub incomplete: Option<String>,
}

impl fmt::Display for Holders {
    /// All holders in one line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.found.is_empty() {
            f.write_str("nobody")?;
        }
        for (index, holder) in self.found.iter().enumerate() {
            write!(f, "{}{holder}", if index > 0 { ", " } else { "" })?;
        }
        match &self.incomplete {
            Some(why) => write!(f, " (there may be more: {why})"),
            None => Ok(()),
        }
    }
}

/// A device by its kind and number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Node {
    kind: SFlag,
    number: (u32, u32),
}

impl Node {
    /// The block device with this number; its partitions are searched for as well.
    #[must_use]
    pub const fn block(major: u32, minor: u32) -> Self {
        Self { kind: SFlag::S_IFBLK, number: (major, minor) }
    }

    /// The character device with this number.
    #[must_use]
    pub const fn character(major: u32, minor: u32) -> Self {
        Self { kind: SFlag::S_IFCHR, number: (major, minor) }
    }

    /// The device that the node at `path` stands for.
    ///
    /// # Errors
    /// `InvalidInput` if it is neither a block nor a character device, and those of `statx(2)`.
    pub fn at(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref();
        let stat = stat_path(path)?;
        let kind = SFlag::from_bits_truncate(stat.mode) & SFlag::S_IFMT;
        if kind != SFlag::S_IFBLK && kind != SFlag::S_IFCHR {
            return Err(io::Error::new(ErrorKind::InvalidInput, format!("{} is no device node", path.display())));
        }
        Ok(Self { kind, number: stat.rdev })
    }

    /// Searches for everybody who holds this device. Takes milliseconds, and at most 5 seconds.
    #[must_use]
    pub fn holders(self) -> Holders {
        self.holders_in(&Roots::default(), TIME_LIMIT)
    }

    pub(crate) fn holders_in(self, roots: &Roots, time_limit: Duration) -> Holders {
        Wanted { nodes: HashSet::from([self]), removed: Vec::new(), mounts_only: false }.search(roots, time_limit)
    }
}

/// Everybody who holds the device whose node is at `path`.
///
/// # Errors
/// As [`Node::at`]. That something cannot be looked into is no error: see [`Holders::incomplete`].
pub fn of(path: impl AsRef<Path>) -> io::Result<Holders> {
    Ok(Node::at(path)?.holders())
}

/// Everybody who holds the block or the character device of a ublk device, which may have been stopped or deleted: of nodes
/// that are gone, the kernel still knows the name under which they were opened.
#[must_use]
pub fn of_ublk(id: u32) -> Holders {
    Wanted::ublk(id).search(&Roots::default(), TIME_LIMIT)
}

/// Where a ublk device, or a partition of it, is mounted. What else holds it is not looked for.
pub(crate) fn mounts_of_ublk(id: u32) -> Holders {
    Wanted { mounts_only: true, ..Wanted::ublk(id) }.search(&Roots::default(), TIME_LIMIT)
}

pub(crate) fn of_device(device: &DeviceInfo) -> Vec<Holder> {
    of_ublk(device.id()).found
}

/// What is searched for.
#[derive(Clone, Debug)]
struct Wanted {
    /// Devices, to which their partitions are added.
    nodes: HashSet<Node>,
    /// Names of nodes that may have been removed.
    removed: Vec<String>,
    /// Whether file systems are all that is searched for: most of a search is other processes' descriptors and maps.
    mounts_only: bool,
}

impl Wanted {
    fn ublk(id: u32) -> Self {
        let nodes = [block_path(id), character_path(id)].into_iter().filter_map(|path| Node::at(path).ok());
        let removed = vec![format!("ublkb{id}"), format!("ublkc{id}")];
        Self { nodes: nodes.collect(), removed, mounts_only: false }
    }

    fn search(self, roots: &Roots, time_limit: Duration) -> Holders {
        let deadline = Instant::now() + time_limit;
        let (sender, receiver) = mpsc::channel();
        let search = Search { roots: roots.clone(), wanted: self, sender, denied: 0 };
        // On a thread of its own, which is left behind if the kernel makes it wait: the caller may be closing a device, and
        // what it waits for may be just that.
        let spawned = std::thread::Builder::new().name("ublkit-holders".into()).spawn(move || search.run());
        let mut holders = Holders::default();
        if let Err(error) = spawned {
            holders.incomplete = Some(format!("no thread to search with: {error}"));
            return holders;
        }
        loop {
            match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(News::Holder(_)) if holders.found.len() >= HOLDERS_MAX => {
                    holders.incomplete = Some(format!("the first {HOLDERS_MAX} are listed"));
                    return holders;
                }
                Ok(News::Holder(holder)) => holders.found.push(holder),
                Ok(News::Incomplete(why)) => holders.incomplete = Some(why),
                Ok(News::Done) => return holders,
                Err(RecvTimeoutError::Timeout) => {
                    holders.incomplete = Some(format!("the search was given up after {time_limit:?}"));
                    return holders;
                }
                Err(RecvTimeoutError::Disconnected) => {
                    holders.incomplete = Some("the search ended early".into());
                    return holders;
                }
            }
        }
    }
}

/// Where the kernel's file systems are mounted.
#[derive(Clone, Debug)]
pub(crate) struct Roots {
    pub(crate) proc: PathBuf,
    pub(crate) sys: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Self { proc: "/proc".into(), sys: "/sys".into() }
    }
}

enum News {
    Holder(Holder),
    Incomplete(String),
    Done,
}

struct Search {
    roots: Roots,
    wanted: Wanted,
    sender: Sender<News>,
    /// How many things of processes could not be looked into.
    denied: u32,
}

impl Search {
    /// What can block for a process that hangs comes last.
    fn run(mut self) {
        self.add_partitions();
        let mut processes = self.processes();
        processes.sort_unstable();
        let everything = !self.wanted.mounts_only;
        if everything {
            for &pid in &processes {
                self.descriptors(pid);
            }
        }
        if self.wanted.nodes.iter().any(|node| node.kind == SFlag::S_IFBLK) || !self.wanted.removed.is_empty() {
            self.mounts(&processes);
            if everything {
                self.swap();
                self.devices_on_top();
            }
        }
        if everything {
            self.maps(&processes);
        }
        if let Some(why) = self.blind_spot() {
            self.tell(News::Incomplete(why));
        }
        self.tell(News::Done);
    }

    /// Nobody listens any more when the search has taken too long.
    fn tell(&self, news: News) {
        let _ = self.sender.send(news);
    }

    fn found(&self, pid: Option<i32>, how: How) {
        let comm = pid.and_then(|pid| fs::read_to_string(self.process(pid).join("comm")).ok());
        let comm = comm.map_or_else(String::new, |comm| comm.trim_end().to_owned());
        self.tell(News::Holder(Holder { pid, comm, how }));
    }

    fn process(&self, pid: i32) -> PathBuf {
        self.roots.proc.join(pid.to_string())
    }

    fn is_wanted(&self, path: &Path) -> io::Result<bool> {
        let stat = stat_path(path)?;
        let kind = SFlag::from_bits_truncate(stat.mode) & SFlag::S_IFMT;
        if kind != SFlag::S_IFBLK && kind != SFlag::S_IFCHR {
            return Ok(false);
        }
        Ok(self.wanted.nodes.contains(&Node { kind, number: stat.rdev }) || self.is_removed(path))
    }

    /// Whether a link of /proc leads to a node that was removed and had one of the names that are wanted.
    fn is_removed(&self, link: &Path) -> bool {
        let wanted = || {
            let target = fs::read_link(link).ok()?;
            let name = target.file_name()?.to_str()?.strip_suffix(" (deleted)")?;
            Some(self.wanted.removed.iter().any(|removed| is_disk_or_partition(removed, name)))
        };
        !self.wanted.removed.is_empty() && wanted().unwrap_or(false)
    }

    /// Notes what may not be looked into. What is gone was a process that ended meanwhile, and holds nothing.
    fn note<T>(&mut self, result: io::Result<T>) -> Option<T> {
        result.map_err(|error| self.denied += u32::from(error.kind() == ErrorKind::PermissionDenied)).ok()
    }

    /// Why not every process can be seen, if that is so.
    fn blind_spot(&self) -> Option<String> {
        if self.denied > 0 {
            return Some(format!(
                "no permission for {} look-ups in other processes; root sees them all",
                self.denied
            ));
        }
        match fs::read_link(self.roots.proc.join("self/ns/pid")) {
            Ok(link) if link.as_os_str() != INITIAL_PID_NAMESPACE => {
                return Some("processes outside this pid namespace cannot be seen".into());
            }
            Ok(_) => {}
            Err(error) => return Some(format!("{} cannot be read: {error}", self.roots.proc.display())),
        }
        // Mounted with hidepid, /proc leaves out the processes of others.
        (!self.process(1).exists()).then(|| format!("{} does not show all processes", self.roots.proc.display()))
    }

    fn add_partitions(&mut self) {
        let disks: Vec<Node> = self.wanted.nodes.iter().copied().filter(|node| node.kind == SFlag::S_IFBLK).collect();
        for disk in disks {
            for entry in entries(&self.sysfs(disk)) {
                if entry.join("partition").exists()
                    && let Some(number) = fs::read_to_string(entry.join("dev")).ok().as_deref().and_then(parse_number)
                {
                    self.wanted.nodes.insert(Node { number, ..disk });
                }
            }
        }
    }

    fn sysfs(&self, node: Node) -> PathBuf {
        self.roots.sys.join(format!("dev/block/{}:{}", node.number.0, node.number.1))
    }

    fn processes(&mut self) -> Vec<i32> {
        match fs::read_dir(&self.roots.proc) {
            Ok(entries) => entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect(),
            Err(_) => Vec::new(),
        }
    }

    fn descriptors(&mut self, pid: i32) {
        let Some(entries) = self.note(fs::read_dir(self.process(pid).join("fd"))) else { return };
        for entry in entries.flatten() {
            let Some(fd) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            if self.note(self.is_wanted(&entry.path())) == Some(true) {
                self.found(Some(pid), How::Fd(fd));
            }
        }
    }

    /// Once for each mount namespace that some process lives in, this process's first.
    fn mounts(&mut self, processes: &[i32]) {
        let mut seen = HashSet::new();
        let of_self = self.roots.proc.join("self");
        if let Ok(namespace) = fs::read_link(of_self.join("ns/mnt")) {
            seen.insert(namespace);
        }
        self.mounts_of(&of_self, None);
        for &pid in processes {
            let process = self.process(pid);
            if let Some(namespace) = self.note(fs::read_link(process.join("ns/mnt")))
                && seen.insert(namespace)
            {
                self.mounts_of(&process, Some(pid));
            }
        }
    }

    fn mounts_of(&mut self, process: &Path, pid: Option<i32>) {
        let Some(text) = self.note(fs::read_to_string(process.join("mountinfo"))) else { return };
        for line in text.lines() {
            // 36 35 98:0 /root-of-the-mount /mnt rw,noatime master:1 - ext4 /dev/sda1 rw
            let Some((left, right)) = line.split_once(" - ") else { continue };
            let left: Vec<&str> = left.split(' ').collect();
            let (Some(number), Some(at)) = (left.get(2).copied().and_then(parse_number), left.get(4)) else {
                continue;
            };
            // A file system over several devices (btrfs) has a number of its own and names one of them as its source.
            let source = unescape(right.split(' ').nth(1).unwrap_or_default());
            let by_source = || {
                source.strip_prefix("/dev/").is_some_and(|name| {
                    self.wanted.removed.iter().any(|removed| is_disk_or_partition(removed, name))
                        || self.is_wanted(&process.join("root/dev").join(name)).unwrap_or(false)
                        || self.is_wanted(Path::new(&source)).unwrap_or(false)
                })
            };
            if self.wanted.nodes.contains(&Node { kind: SFlag::S_IFBLK, number }) || by_source() {
                self.found(pid, How::Mount(unescape(at).into()));
            }
        }
    }

    fn swap(&self) {
        let text = fs::read_to_string(self.roots.proc.join("swaps")).unwrap_or_default();
        for line in text.lines().skip(1) {
            let path = unescape(line.split_whitespace().next().unwrap_or_default());
            if self.is_wanted(Path::new(&path)).unwrap_or(false) {
                self.found(None, How::Swap);
            }
        }
    }

    fn devices_on_top(&self) {
        for &node in self.wanted.nodes.iter().filter(|node| node.kind == SFlag::S_IFBLK) {
            for holder in entries(&self.sysfs(node).join("holders")) {
                self.found(None, How::Device(name_of(&holder)));
            }
        }
        // Loop devices hold a file, which the driver core knows nothing of.
        for device in entries(&self.roots.sys.join("block")) {
            let Ok(backing) = fs::read_to_string(device.join("loop/backing_file")) else { continue };
            if self.is_wanted(Path::new(backing.trim_end_matches('\n'))).unwrap_or(false) {
                self.found(None, How::Device(name_of(&device)));
            }
        }
    }

    fn maps(&mut self, processes: &[i32]) {
        // Most processes map the same few files: each is looked at once.
        let mut known: HashMap<String, bool> = HashMap::new();
        for &pid in processes {
            let process = self.process(pid);
            let Some(text) = self.note(fs::read_to_string(process.join("maps"))) else { continue };
            for line in text.lines() {
                // 7f00-7f01 rw-s 00000000 00:06 123 /dev/ublkc0
                let mut fields = line.split_whitespace();
                let (Some(range), Some(device), Some(inode)) = (fields.next(), fields.nth(2), fields.next()) else {
                    continue;
                };
                if inode == "0" || !fields.next().is_some_and(|path| path.starts_with('/')) {
                    continue;
                }
                let file = format!("{device} {inode}");
                let wanted = if let Some(&wanted) = known.get(&file) {
                    wanted
                } else {
                    let link = process.join("map_files").join(without_leading_zeroes(range));
                    let Some(wanted) = self.note(self.is_wanted(&link)) else { continue };
                    known.insert(file, wanted);
                    wanted
                };
                if wanted {
                    self.found(Some(pid), How::Map);
                    break;
                }
            }
        }
    }
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).map(|entries| entries.flatten().map(|entry| entry.path()).collect()).unwrap_or_default()
}

/// Whether `name` is the disk's or that of one of its partitions: `ublkb0`, `ublkb0p1`, and not `ublkb01`.
fn is_disk_or_partition(disk: &str, name: &str) -> bool {
    name.strip_prefix(disk).is_some_and(|rest| {
        rest.is_empty()
            || rest.strip_prefix('p').is_some_and(|n| !n.is_empty() && n.bytes().all(|byte| byte.is_ascii_digit()))
    })
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// "8:1", as sysfs and mountinfo write device numbers.
pub(crate) fn parse_number(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.trim_end().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The kernel writes addresses with leading zeroes in maps and without them in `map_files`.
fn without_leading_zeroes(range: &str) -> String {
    let strip = |address: &str| match address.trim_start_matches('0') {
        "" => "0".to_owned(),
        rest => rest.to_owned(),
    };
    range.split('-').map(strip).collect::<Vec<_>>().join("-")
}

/// Undoes the `\040` with which the kernel writes blanks and the like in paths.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        match after {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..] if first == b'\\' => {
                bytes.push(((a - b'0') << 6) | ((b - b'0') << 3) | (c - b'0'));
                rest = after;
            }
            _ => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
pub(crate) mod testing;

#[cfg(test)]
mod tests;
