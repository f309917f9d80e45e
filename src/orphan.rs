//! Devices that nobody serves: finding them, and deleting them without touching any other.
//!
//! A server that dies leaves its device behind. Which of the devices on a machine are such leftovers is less obvious
//! than it looks, and each shortcut deletes somebody's disk:
//!
//! - A missing `/dev/ublkbN` proves nothing: it may be in another mount namespace, or not there yet.
//! - The server's pid proves nothing: numbers are used again, differ between pid namespaces, and some kernels keep the
//!   one that the server gave of itself. It is reported here and never asked.
//! - The state `DEAD` proves nothing by itself: between its ADD and its START a device looks just so.
//! - An id proves nothing later on: it may belong to another device by then. A device is known here by its inode in sysfs, whose
//!   numbers are not used again.
//!
//! So a device is [`Class::Dead`] only if it is in the state `DEAD`, no process holds its character device, and both
//! were so at both ends of a grace period. Just before it is deleted, both are looked at again, and its character
//! device is opened: since that can be open only once, no server can start the device from then on.
//! No process is ever signalled.
//!
//! ```no_run
//! use ublkit::{Controller, orphan};
//! let controller = Controller::open()?;
//! let found = orphan::list(&controller, orphan::GRACE)?;
//! for device in &found {
//!     println!("{device}");
//! }
//! for cleaned in orphan::clean(&controller, &found) {
//!     println!("{cleaned}");
//! }
//! # Ok::<(), ublkit::Error>(())
//! ```

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::libc;

use crate::ctrl::{Controller, State, character_path};
use crate::error::{Error, ErrorKind, Result};
use crate::holders::{self, Holders, Node, Roots};
use crate::sys::file::stat_path;

/// How long a device must have looked dead, by default.
pub const GRACE: Duration = Duration::from_secs(5);
/// How long a search for holders may take.
const SEARCH_LIMIT: Duration = Duration::from_secs(5);
/// How long a deleted device is waited for.
const GONE_LIMIT: Duration = Duration::from_secs(5);

/// What a device is, as far as orphans are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Class {
    /// Started, and served by somebody.
    Served,
    /// Not served, but it may be about to be, or is being recovered or closed: somebody holds its character device, or it is
    /// not known long enough or well enough to say that nobody does.
    Starting,
    /// Its server is gone, and another can take it over with its I/O (`QUIESCED`, `FAIL_IO`). Deleted only when asked for by id.
    Recoverable,
    /// Nobody serves it and nobody can.
    Dead,
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Served => "served",
            Self::Starting => "starting",
            Self::Recoverable => "recoverable",
            Self::Dead => "dead",
        })
    }
}

/// A device, and what was found out about it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Found {
    /// The N of `/dev/ublkcN`.
    pub id: u32,
    /// What it is.
    pub class: Class,
    /// The driver's word for its state; `None` if the driver would not say.
    pub state: Option<State>,
    /// Its server's process id, as the driver tells it: for information, it proves nothing. 0 or less if there is none.
    pub server_pid: i32,
    /// Who holds its character device. Not searched for where the state says enough.
    pub holders: Holders,
    /// Why it is classed so, for a person to read.
    pub reason: String,
    identity: Identity,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ublk device {}: {} ({})", self.id, self.class, self.reason)
    }
}

/// What became of a device that was to be cleaned.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Outcome {
    /// It is gone, and its id is free.
    Deleted,
    /// It is deleted, but somebody has its block device open: it goes when they let go.
    Deleting,
    /// It was left alone, for this reason.
    Left(String),
    /// The kernel would not delete it.
    Failed(Error),
}

/// One device that was to be cleaned.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Cleaned {
    /// The device's id.
    pub id: u32,
    /// What became of it.
    pub outcome: Outcome,
}

impl fmt::Display for Cleaned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ublk device {}: ", self.id)?;
        match &self.outcome {
            Outcome::Deleted => f.write_str("deleted"),
            Outcome::Deleting => f.write_str("deleted, but its block device is still open somewhere"),
            Outcome::Left(why) => write!(f, "left alone: {why}"),
            Outcome::Failed(error) => write!(f, "failed to {error}"),
        }
    }
}

/// All ublk devices, in the order of their ids. Changes nothing. Takes `grace` if any of them looks dead, else returns at once.
///
/// # Errors
/// [`ErrorKind::Kernel`] when sysfs cannot be read.
pub fn list(controller: &Controller, grace: Duration) -> Result<Vec<Found>> {
    Survey::of(controller).list(grace)
}

/// Deletes those of the devices that were found [`Class::Dead`] and still are the same, dead and not held; the others are left
/// alone.
#[must_use]
pub fn clean(controller: &Controller, found: &[Found]) -> Vec<Cleaned> {
    Survey::of(controller).clean(found, |class| class == Class::Dead)
}

/// Deletes the devices with these ids if they are [`Class::Dead`] or [`Class::Recoverable`], as seen over `grace`. With a
/// recoverable device go the I/O that waits for a server and whatever is mounted on it.
///
/// # Errors
/// As [`list`]. What becomes of each device is in the answer; ids that no device has are answered with
/// [`Outcome::Left`].
pub fn clean_ids(controller: &Controller, ids: &[u32], grace: Duration) -> Result<Vec<Cleaned>> {
    Survey::of(controller).clean_ids(ids, grace)
}

/// What is needed of the driver.
trait Driver: Sync {
    /// A character device that is open.
    type Claim;
    /// State and server of a device; `None` if there is no such device.
    fn info(&self, id: u32) -> Result<Option<(State, i32)>>;
    /// Opens the character device at `path`, which only one can do at a time.
    fn claim(&self, path: &Path) -> io::Result<Self::Claim>;
    /// Removes the device's nodes, then waits until nobody has them open and the id is free.
    fn delete(&self, id: u32, deadline: Duration) -> Result<()>;
}

impl Driver for Controller {
    type Claim = fs::File;

    fn info(&self, id: u32) -> Result<Option<(State, i32)>> {
        // Devices of unprivileged users want the second form.
        let info = self.get_dev_info(id).or_else(|error| match error.kind() {
            ErrorKind::NotFound => Err(error),
            _ => self.get_dev_info2(id),
        });
        match info {
            Ok(info) => Ok(Some((info.state(), info.server_pid()))),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn claim(&self, path: &Path) -> io::Result<fs::File> {
        fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)
    }

    fn delete(&self, id: u32, deadline: Duration) -> Result<()> {
        Controller::delete(self, id, deadline)
    }
}

/// The device's directory in sysfs: its file system and inode. Its times would not do: sysfs makes them up when it is looked
/// at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    device: (u32, u32),
    inode: u64,
}

/// What tells the device that has this id now from one that had it before or has it later; `None` if sysfs does not show it.
pub(crate) fn identity(controller: &Controller, id: u32) -> Option<Identity> {
    Survey::of(controller).identity(id)
}

struct Survey<'a, D> {
    driver: &'a D,
    roots: Roots,
    /// Where the character devices are; where else than in /dev only tests know.
    node: fn(&Roots, u32) -> PathBuf,
}

impl<'a> Survey<'a, Controller> {
    fn of(controller: &'a Controller) -> Self {
        Self { driver: controller, roots: Roots::default(), node: |_, id| character_path(id) }
    }
}

impl<D: Driver> Survey<'_, D> {
    fn list(&self, grace: Duration) -> Result<Vec<Found>> {
        let mut ids = self.ids()?;
        ids.sort_unstable();
        Ok(self.classify(&ids, grace))
    }

    fn clean_ids(&self, ids: &[u32], grace: Duration) -> Result<Vec<Cleaned>> {
        let present = self.ids()?;
        let (present, absent): (Vec<_>, Vec<_>) = ids.iter().partition(|id| present.contains(id));
        let found = self.classify(&present, grace);
        let mut cleaned = self.clean(&found, |class| matches!(class, Class::Dead | Class::Recoverable));
        let gone = present.iter().filter(|id| found.iter().all(|found| found.id != **id));
        for &id in absent.iter().chain(gone) {
            cleaned.push(Cleaned { id, outcome: Outcome::Left("there is no such device".into()) });
        }
        cleaned.sort_by_key(|cleaned| ids.iter().position(|&id| id == cleaned.id));
        Ok(cleaned)
    }

    fn ids(&self) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        for dir in ["class/ublk-char", "devices/virtual/ublk-char"] {
            let dir = self.roots.sys.join(dir);
            let entries = match fs::read_dir(&dir) {
                Ok(entries) => entries,
                // The class is there once the driver is: without it there are no devices.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(Error::io(&error, format_args!("read {}", dir.display()))),
            };
            let id = |name: &str| name.strip_prefix("ublkc")?.parse::<u32>().ok();
            ids.extend(entries.flatten().filter_map(|entry| id(entry.file_name().to_str()?)));
        }
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    /// The devices with these ids that exist. If any look dead, they are looked at again after the grace period.
    fn classify(&self, ids: &[u32], grace: Duration) -> Vec<Found> {
        let mut found: Vec<Found> = ids.iter().filter_map(|&id| self.look(id)).collect();
        if found.iter().all(|device| device.class != Class::Dead) {
            return found;
        }
        std::thread::sleep(grace);
        for device in found.iter_mut().filter(|device| device.class == Class::Dead) {
            let Some(mut again) = self.look(device.id) else {
                // It went by itself: not to be reported as anything that is there.
                device.class = Class::Starting;
                device.reason = "it went away meanwhile".into();
                continue;
            };
            if again.identity != device.identity {
                again.class = Class::Starting;
                again.reason = "it is new: its id was another device's a moment ago".into();
            } else if again.class == Class::Dead {
                again.reason = format!("DEAD, and held by nobody, for {grace:?}");
            }
            *device = again;
        }
        found
    }

    /// A device as it looks now; [`Class::Dead`] means that it may be.
    fn look(&self, id: u32) -> Option<Found> {
        let identity = self.identity(id)?;
        let (state, server_pid) = match self.driver.info(id) {
            Ok(info) => info?,
            Err(error) => {
                let reason = format!("the driver would not describe it: {error}");
                let holders = Holders::default();
                return Some(Found {
                    id,
                    class: Class::Starting,
                    state: None,
                    server_pid: 0,
                    holders,
                    reason,
                    identity,
                });
            }
        };
        let unserved = match state {
            State::Dead => Some(Class::Dead),
            State::Quiesced | State::FailIo => Some(Class::Recoverable),
            _ => None,
        };
        let (mut class, mut holders, mut reason) = (Class::Served, Holders::default(), state.to_string());
        if let Some(unserved) = unserved {
            holders = self.holders(id);
            (class, reason) = match unheld(&holders) {
                Ok(()) => (unserved, format!("{state}, and held by nobody")),
                Err(why) => (Class::Starting, format!("{state}, but {why}")),
            };
        }
        Some(Found { id, class, state: Some(state), server_pid, holders, reason, identity })
    }

    fn sysfs(&self, id: u32) -> PathBuf {
        let class = self.roots.sys.join(format!("class/ublk-char/ublkc{id}"));
        if class.exists() { class } else { self.roots.sys.join(format!("devices/virtual/ublk-char/ublkc{id}")) }
    }

    fn identity(&self, id: u32) -> Option<Identity> {
        let stat = stat_path(&self.sysfs(id)).ok()?;
        Some(Identity { device: stat.device, inode: stat.inode })
    }

    fn number(&self, id: u32) -> Option<Node> {
        let text = fs::read_to_string(self.sysfs(id).join("dev")).ok()?;
        holders::parse_number(&text).map(|(major, minor)| Node::character(major, minor))
    }

    fn holders(&self, id: u32) -> Holders {
        match self.number(id) {
            Some(node) => node.holders_in(&self.roots, SEARCH_LIMIT),
            None => Holders { incomplete: Some("its device number is not in sysfs".into()), ..Holders::default() },
        }
    }

    fn clean(&self, found: &[Found], wanted: fn(Class) -> bool) -> Vec<Cleaned> {
        let clean = |device: &Found| {
            let outcome = if wanted(device.class) {
                self.remove(device)
            } else {
                Outcome::Left(format!("{} ({})", device.class, device.reason))
            };
            Cleaned { id: device.id, outcome }
        };
        found.iter().map(clean).collect()
    }

    fn remove(&self, device: &Found) -> Outcome {
        if let Err(why) = unheld(&self.holders(device.id)) {
            return Outcome::Left(why);
        }
        // From here to the end nobody else can open the character device, so that what is seen below stays true.
        let claim = match self.claim(device.id) {
            Ok(claim) => claim,
            Err(why) => return Outcome::Left(why),
        };
        if self.identity(device.id) != Some(device.identity) {
            return Outcome::Left("its id now belongs to another device, or to none".into());
        }
        match self.driver.info(device.id) {
            Ok(Some((state, _))) if Some(state) == device.state => {}
            Ok(Some((state, _))) => return Outcome::Left(format!("it is {state} now")),
            Ok(None) => return Outcome::Left("it went away meanwhile".into()),
            Err(error) => return Outcome::Left(format!("the driver would not describe it: {error}")),
        }
        self.delete(device, claim)
    }

    /// The kernel removes the character device first and then waits until nobody holds it: so the claim is kept up to there,
    /// and no longer.
    fn delete(&self, device: &Found, claim: D::Claim) -> Outcome {
        let deleted = std::thread::scope(|scope| {
            let deleting = std::thread::Builder::new()
                .name("ublkit-orphan".into())
                .spawn_scoped(scope, || self.driver.delete(device.id, GONE_LIMIT))
                .map_err(|error| Error::io(&error, "start a thread to delete it"))?;
            let deadline = Instant::now() + GONE_LIMIT;
            while !deleting.is_finished()
                && self.identity(device.id) == Some(device.identity)
                && Instant::now() < deadline
            {
                std::thread::sleep(Duration::from_millis(5));
            }
            drop(claim);
            deleting.join().unwrap_or_else(|_| Err(Error::new(ErrorKind::State, "delete it: the thread panicked")))
        });
        match deleted {
            Ok(()) => Outcome::Deleted,
            Err(error)
                if error.kind() == ErrorKind::TimedOut && self.identity(device.id) != Some(device.identity) =>
            {
                Outcome::Deleting
            }
            Err(error) => Outcome::Failed(error),
        }
    }

    /// Opens the device's character node, after making sure that it is that of the device in sysfs.
    fn claim(&self, id: u32) -> Result<D::Claim, String> {
        let path = (self.node)(&self.roots, id);
        let node =
            Node::at(&path).map_err(|error| format!("{} cannot be used to claim it: {error}", path.display()))?;
        if Some(node) != self.number(id) {
            return Err(format!("{} is the node of another device", path.display()));
        }
        self.driver.claim(&path).map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => format!("somebody has just opened {}", path.display()),
            _ => format!("{} cannot be opened to claim it: {error}", path.display()),
        })
    }
}

/// Whether it is certain that nobody holds a device; if not, why.
fn unheld(holders: &Holders) -> Result<(), String> {
    match &holders.incomplete {
        _ if !holders.found.is_empty() => Err(format!("held by {holders}")),
        Some(why) => Err(format!("whether somebody holds it cannot be said: {why}")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
