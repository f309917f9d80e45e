//! The device under torture: one of our own, or somebody else's.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::libc;
use ublkit::blkdev;
use ublkit_harness::DiscardPromise;
use ublkit_harness::plan::Capabilities;

use crate::context::Context;
use crate::external::External;
use crate::scenario::Failure;
use crate::target::Target;

/// What is tortured.
pub(crate) enum Subject {
    /// A device that this process serves.
    Ours(Target),
    /// A block device that was there already. It is held exclusively, so that nothing mounts it meanwhile.
    SomebodyElses(External),
}

/// An opening of the subject, past the page cache, and what was learnt of it.
#[expect(clippy::struct_excessive_bools, reason = "each is a property of its own")]
pub(crate) struct Opened {
    pub(crate) file: File,
    pub(crate) bytes: u64,
    pub(crate) logical_block: u64,
    pub(crate) max_io_bytes: u64,
    pub(crate) capabilities: Capabilities,
    pub(crate) discard: DiscardPromise,
    /// Whether a range can be zeroed and its space given back in one operation.
    pub(crate) unmap_zeroes: bool,
    /// A read may find a block torn while a write to it is under way.
    pub(crate) torn_by_races: bool,
    /// Every sector reads as zeroes before the first write.
    pub(crate) zeroed: bool,
    pub(crate) ours: bool,
    /// What tells this device's sectors from another's.
    pub(crate) device_id: u32,
}

impl Subject {
    /// Opens it, past the page cache.
    pub(crate) fn open(&self) -> Result<Opened, Failure> {
        match self {
            Self::Ours(target) => open_ours(target),
            Self::SomebodyElses(external) => open_somebody_elses(external.path()),
        }
    }

    /// The device, which is one of our own.
    pub(crate) fn ours(&self) -> Result<&Target, Failure> {
        match self {
            Self::Ours(target) => Ok(target),
            Self::SomebodyElses(_) => Err(Failure::Internal("this is for devices of our own".to_owned())),
        }
    }

    /// Keeps those away who look at every new disk, udev above all, for as long as what it returns lives: an error that is
    /// injected into a read of theirs is one that no worker sees. They hold a lock while they look, and do not look while
    /// somebody else holds it.
    pub(crate) fn keep_to_ourselves(&self) -> Result<Option<Flock<File>>, Failure> {
        let Self::Ours(target) = self else { return Ok(None) };
        locked(target).map(Some)
    }

    /// Fails if a server that we started for it has ended.
    pub(crate) fn alive(&self) -> Result<(), Failure> {
        match self {
            Self::Ours(_) => Ok(()),
            Self::SomebodyElses(external) => external.alive(),
        }
    }

    pub(crate) fn close(self, context: &mut Context) -> Result<(), Failure> {
        match self {
            Self::Ours(target) => {
                if target.closes_under_load() {
                    super::late_reader(&target)?;
                }
                target.close(context)
            }
            Self::SomebodyElses(external) => external.close(context),
        }
    }
}

/// Keeps those away who look at every new disk, for as long as what it returns lives.
pub(crate) fn locked(target: &Target) -> Result<Flock<File>, Failure> {
    let lock = Flock::lock(target.open_direct()?, FlockArg::LockExclusive);
    lock.map_err(|(_, errno)| Failure::Environment(format!("failed to lock the device: {errno}")))
}

fn open_ours(target: &Target) -> Result<Opened, Failure> {
    let geometry = target.geometry();
    Ok(Opened {
        file: target.open_direct()?,
        bytes: geometry.size,
        logical_block: u64::from(geometry.logical_block),
        max_io_bytes: u64::from(target.max_io_bytes()),
        capabilities: Capabilities::of(geometry),
        discard: target.discard_promise(),
        unmap_zeroes: geometry.write_zeroes.is_some(),
        torn_by_races: target.torn_by_races(),
        zeroed: true,
        ours: true,
        device_id: target.id(),
    })
}

fn open_somebody_elses(path: &Path) -> Result<Opened, Failure> {
    let broken = |what: &str, error: &io::Error| Failure::io(format_args!("{what} {}", path.display()), error);
    let open = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path);
    let file = open.map_err(|error| broken("open", &error))?;
    let bytes = blkdev::size(&file).map_err(|error| broken("ask the size of", &error))?;
    let logical_block = blkdev::logical_block(&file).map_err(|error| broken("ask the logical block of", &error))?;
    let queue = Limits::of(path);
    let max_io_bytes = queue.number("max_sectors_kb").unwrap_or(512) * 1024;
    Ok(Opened {
        file,
        bytes,
        logical_block: u64::from(logical_block),
        // A device that takes very long requests would make every buffer as long.
        max_io_bytes: max_io_bytes.clamp(u64::from(logical_block), 1 << 20),
        capabilities: Capabilities {
            flush: true,
            fua: true,
            discard: queue.number("discard_max_bytes").unwrap_or(0) > 0,
            // The kernel writes zeroes itself where the device cannot.
            write_zeroes: true,
        },
        discard: DiscardPromise::Nothing,
        unmap_zeroes: queue.number("write_zeroes_max_bytes").unwrap_or(0) > 0,
        // Nobody promises more than that requests which overlap end in some order.
        torn_by_races: true,
        zeroed: false,
        ours: false,
        device_id: u32::MAX,
    })
}

/// A block device's queue limits, in sysfs.
struct Limits(Option<PathBuf>);

impl Limits {
    fn of(path: &Path) -> Self {
        // By its real name: the path may be a link of udev's.
        let name = path.canonicalize().ok().and_then(|path| path.file_name().map(ToOwned::to_owned));
        Self(name.map(|name| Path::new("/sys/class/block").join(name).join("queue")))
    }

    fn number(&self, limit: &str) -> Option<u64> {
        std::fs::read_to_string(self.0.as_ref()?.join(limit)).ok()?.trim().parse().ok()
    }
}
