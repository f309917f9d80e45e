//! What a scenario is tried on: a device served by this process, with a look into its storage.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use clap::ValueEnum;
use nix::libc;
use serde_json::{Value, json};
use ublkit::backends;
use ublkit::{Backend, Closed, DataMode, Deletion, Device, Geometry};
use ublkit_harness::mutant::{EVERY, Hits};
use ublkit_harness::observe::{Counters, Counts};
use ublkit_harness::{Event, Evidence, Mutant, MutantBackend, Observed};

use crate::context::Context;
use crate::scenario::Failure;
use crate::units::{parse_bytes, parse_bytes_u32};

/// Where the device's bytes are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BackendKind {
    /// Memory: pages come with the first write to them.
    Memory,
    /// A sparse temporary file, written through the page cache, with flush and FUA.
    File,
}

/// How data moves between kernel and server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// The driver copies.
    Copy,
    /// The server copies, through the character device.
    UserCopy,
}

/// What the device can do beside reading and writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Capability {
    /// A volatile cache, and so flushes.
    Flush,
    /// FUA writes; implies flush.
    Fua,
    /// Discard.
    Discard,
    /// Write zeroes.
    Zeroes,
}

/// The device to try.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Device")]
pub struct TargetArgs {
    /// Where the device's bytes are kept
    #[arg(long, value_enum, default_value = "memory")]
    pub backend: BackendKind,
    /// Size of the device
    #[arg(long, value_name = "BYTES", default_value = "256M", value_parser = parse_bytes)]
    pub size: u64,
    /// Hardware queues
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub queues: u16,
    /// Requests in flight for each queue
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub depth: u16,
    /// How data moves between kernel and server
    #[arg(long, value_enum, default_value = "copy")]
    pub mode: Mode,
    /// Threads that run the backend; 0 for the queue threads themselves
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub workers_backend: usize,
    /// Logical block size
    #[arg(long, value_name = "BYTES", default_value = "512", value_parser = parse_bytes_u32)]
    pub logical_block: u32,
    /// Largest request the driver may hand over
    #[arg(long, value_name = "BYTES", default_value = "512k", value_parser = parse_bytes_u32)]
    pub max_io: u32,
    /// What the device can do beside reading and writing, or `none`
    #[arg(long, value_name = "LIST", default_value = "flush,fua,discard,zeroes", value_parser = parse_capabilities)]
    pub capabilities: Capabilities,
    /// Plant a bug in the backend: lost-write, misdirected-write or bitflip-read; NAME:N for one in N requests
    #[arg(long, value_name = "NAME[:N]", value_parser = parse_planted)]
    pub mutant: Option<Planted>,
}

/// A planted bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planted {
    /// Which.
    pub mutant: Mutant,
    /// It errs once in so many requests of its kind.
    pub every: u64,
}

impl std::fmt::Display for Planted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.mutant, self.every)
    }
}

fn parse_planted(text: &str) -> Result<Planted, String> {
    let (name, every) = match text.split_once(':') {
        None => (text, EVERY),
        Some((name, every)) => match every.parse() {
            Ok(every @ 1..) => (name, every),
            _ => return Err(format!("'{every}' in '{text}' is not a whole number from 1")),
        },
    };
    let mutant = name.parse::<Mutant>().map_err(|error| error.to_string())?;
    Ok(Planted { mutant, every })
}

/// A set of [`Capability`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capabilities(Vec<Capability>);

impl Capabilities {
    fn has(&self, capability: Capability) -> bool {
        self.0.contains(&capability)
    }
}

fn parse_capabilities(text: &str) -> Result<Capabilities, String> {
    if text == "none" {
        return Ok(Capabilities::default());
    }
    text.split(',')
        .map(|name| {
            Capability::from_str(name, false).map_err(|_| {
                format!("'{name}' is no capability: write a list of flush, fua, discard, zeroes, or none")
            })
        })
        .collect::<Result<_, _>>()
        .map(Capabilities)
}

impl TargetArgs {
    /// The options by name.
    #[must_use]
    pub fn options(&self) -> BTreeMap<String, Value> {
        let name = |value: &dyn Fn() -> Option<clap::builder::PossibleValue>| {
            value().map(|value| value.get_name().to_owned()).unwrap_or_default()
        };
        let list: Vec<_> = self.capabilities.0.iter().map(|one| name(&|| one.to_possible_value())).collect();
        [
            ("backend", json!(name(&|| self.backend.to_possible_value()))),
            ("size", json!(self.size)),
            ("queues", json!(self.queues)),
            ("depth", json!(self.depth)),
            ("mode", json!(name(&|| self.mode.to_possible_value()))),
            ("workers_backend", json!(self.workers_backend)),
            ("logical_block", json!(self.logical_block)),
            ("max_io", json!(self.max_io)),
            ("capabilities", json!(list)),
            ("mutant", json!(self.mutant.map(|planted| planted.to_string()))),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
    }

    /// The geometry the device is declared with.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        let mut geometry = Geometry::bytes(self.size).logical_block(self.logical_block);
        if self.capabilities.has(Capability::Flush) {
            geometry = geometry.volatile_cache();
        }
        if self.capabilities.has(Capability::Fua) {
            geometry = geometry.fua();
        }
        if self.capabilities.has(Capability::Discard) {
            geometry = geometry.discard(4096);
        }
        if self.capabilities.has(Capability::Zeroes) {
            geometry = geometry.write_zeroes();
        }
        geometry
    }

    /// Makes the storage and serves it.
    ///
    /// # Errors
    /// What the library says to the options, or what the environment lacks.
    pub fn start(&self, context: &Context) -> Result<Target, Failure> {
        self.serve(context, self.storage()?)
    }

    /// Makes the storage.
    ///
    /// # Errors
    /// What the environment lacks, or what is wrong with the options.
    pub fn storage(&self) -> Result<Storage, Failure> {
        let geometry = self.geometry();
        Ok(Storage(match self.backend {
            BackendKind::Memory => Arc::new(backends::Memory::with_geometry(geometry)),
            BackendKind::File => Arc::new(temporary_file(&geometry)?),
        }))
    }

    /// Serves storage that is there already, with these options. The bug that is to be planted goes on top of it.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn serve(&self, context: &Context, storage: Storage) -> Result<Target, Failure> {
        let geometry = self.geometry();
        let below = Arc::clone(&storage.0);
        let (backend, counters, planted): (Arc<dyn Backend>, _, _) = match self.mutant {
            None => {
                let (observed, counters) = Observed::new(below);
                (Arc::new(observed), counters, None)
            }
            Some(planted) => {
                let mutant = MutantBackend::new(below, planted.mutant, planted.every, context.seed());
                let hits = mutant.hits();
                let (observed, counters) = Observed::new(mutant);
                (Arc::new(observed), counters, Some(hits))
            }
        };
        let sink = context.sink().clone();
        let device = Device::builder(backend)
            .geometry(geometry)
            .queues(self.queues)
            .depth(self.depth)
            .max_io_bytes(self.max_io)
            .workers(self.workers_backend)
            .data_mode(match self.mode {
                Mode::Copy => DataMode::Copy,
                Mode::UserCopy => DataMode::UserCopy,
            })
            .on_event(move |event| sink.send(Event::note(event.to_string())))
            .start()?;
        context.record.made(device.id());
        Ok(Target { device, storage, geometry, counters, planted })
    }
}

fn temporary_file(geometry: &Geometry) -> Result<backends::File, Failure> {
    let cannot = |error: io::Error| {
        Failure::Environment(format!(
            "failed to make a temporary file of {} bytes in {}: {error}; set TMPDIR to a directory with room",
            geometry.size,
            std::env::temp_dir().display()
        ))
    };
    let directory = tempfile::Builder::new().prefix("ublk-torture-").tempdir().map_err(cannot)?;
    // The directory goes with its name when this returns; the file lives for as long as it is open.
    backends::File::options()
        .logical_block(geometry.logical_block)
        .create(directory.path().join("storage"), geometry.size)
        .map_err(|error| match error.kind() {
            io::ErrorKind::InvalidInput => Failure::Usage(error.to_string()),
            _ => cannot(error),
        })
}

/// The bytes behind a device, beneath everything that is planted between them and the kernel.
#[derive(Clone)]
pub struct Storage(Arc<dyn Backend>);

impl Storage {
    /// Storage of one's own.
    #[must_use]
    pub fn new(backend: Arc<dyn Backend>) -> Self {
        Self(backend)
    }

    /// The backend itself.
    #[must_use]
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.0
    }

    /// Reads `buf` from `offset`, in bytes, past the device.
    ///
    /// # Errors
    /// The storage's own.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buf, offset)
    }
}

impl std::fmt::Debug for Storage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Storage").finish_non_exhaustive()
    }
}

/// A device that is being served, and what is behind it.
///
/// Dropping it closes the device as well as that can be done; [`close`](Self::close) says how it went.
#[derive(Debug)]
pub struct Target {
    device: Device,
    storage: Storage,
    geometry: Geometry,
    counters: Arc<Counters>,
    planted: Option<Hits>,
}

impl Target {
    /// The device.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Path of the block device.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.device.path()
    }

    /// The bytes behind it.
    #[must_use]
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// The geometry it was declared with.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// What the kernel has asked of the backend until now.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counters.counts()
    }

    /// Opens the block device past the page cache, for reading and writing.
    ///
    /// # Errors
    /// [`Failure::DeviceBroke`] if it does not open.
    pub fn open_direct(&self) -> Result<File, Failure> {
        self.open_with(libc::O_DIRECT)
    }

    /// Opens the block device through the page cache, for reading and writing.
    ///
    /// # Errors
    /// As [`open_direct`](Self::open_direct).
    pub fn open_buffered(&self) -> Result<File, Failure> {
        self.open_with(0)
    }

    fn open_with(&self, flags: i32) -> Result<File, Failure> {
        let path = self.path();
        OpenOptions::new()
            .read(true)
            .write(!self.geometry.read_only)
            .custom_flags(flags)
            .open(&path)
            .map_err(|error| Failure::io(format_args!("open {}", path.display()), &error))
    }

    /// Closes the device and gives its id back. What the backend was asked for is added to the evidence.
    ///
    /// # Errors
    /// That it did not end in time, that somebody still holds it, or the first error that its queues could not serve
    /// past.
    pub fn close(self, context: &Context) -> Result<(), Failure> {
        let id = self.device.id();
        let failed = self.device.first_error();
        let closed = self.device.close()?;
        context.record.gone(id);
        let mut evidence = Evidence::new();
        self.counts().add_to(&mut evidence);
        context.evidence().merge(&evidence);
        if let Some(hits) = &self.planted {
            context.evidence().add("mutant_hits", hits.count());
        }
        if let Some(error) = failed {
            return Err(Failure::broke("server", format!("a queue failed: {error}")));
        }
        match &closed {
            Closed { deletion: Deletion::Complete, .. } => Ok(()),
            deferred => Err(Failure::broke("close", format!("device {id}: {deferred}"))),
        }
    }
}
