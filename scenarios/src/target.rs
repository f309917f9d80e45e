//! What a scenario is tried on: a device served by a process of its own, with a look into its storage.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use nix::libc;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use ublkit::{Backend, Geometry, backends};
use ublkit_harness::fault::FaultPlan;
use ublkit_harness::mutant::{OnDevice, Planted};
use ublkit_harness::observe::Counts;
use ublkit_harness::script::Setup;
use ublkit_harness::sim::medium::{CutReport, Medium, MediumDisk, MediumOptions};
use ublkit_harness::{DiscardPromise, Evidence, Mutant, Seed};

use crate::context::Context;
use crate::flush_trace::{Recording, Tracing};
use crate::scenario::Failure;
use crate::server::{Hang, Lie, Moment, Served, Server, Status, Testimony};
use crate::torture::outage::Outage;
use crate::units::{parse_bytes, parse_bytes_u32};

/// The id of a device that there never is. Where a planted bug lets another device's bytes through, they are this one's.
pub(crate) const NEIGHBOUR: u32 = u32::MAX - 1;

/// Where the device's bytes are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum BackendKind {
    /// Memory: pages come with the first write to them.
    Memory,
    /// A sparse temporary file, written through the page cache, with flush and FUA.
    File,
    /// A simulated disk in memory, whose volatile cache a power cut may lose.
    Medium,
}

/// How data moves between kernel and server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Mode {
    /// The driver copies.
    Copy,
    /// The server copies, through the character device.
    UserCopy,
}

/// What the device can do beside reading and writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
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
#[derive(Clone, Debug, clap::Args, Serialize, Deserialize)]
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
    /// Promise nothing of what was discarded; otherwise it reads as zeroes
    #[arg(long)]
    pub discard_promises_nothing: bool,
    /// Serve it read-only, filled beforehand: what would change it has to be refused
    #[arg(long)]
    #[serde(default)]
    pub read_only: bool,
    /// Plant a bug, such as lost-write or bitflip-read; NAME:N for one in N requests
    #[arg(long, value_name = "NAME[:N]", value_parser = parse_planted)]
    pub mutant: Option<Planted>,
    /// Serve it with a server of this program's own on the library's raw level, as it is for bugs that the library does not let
    /// a server have
    #[arg(long, hide = true)]
    #[serde(default)]
    pub(crate) raw_server: bool,
    /// Faults between the device and its storage, once they are switched on
    #[arg(skip)]
    pub faults: FaultPlan,
    /// How long the server waits for this and that
    #[arg(skip)]
    #[serde(default)]
    pub patience: Patience,
    /// A bug of the server that is planted
    #[arg(skip)]
    pub(crate) lie: Option<Lie>,
    /// Where the server hangs, once it has to
    #[arg(skip)]
    pub(crate) hang: Option<Hang>,
    /// How the calls of the storage are recorded, if they are
    #[arg(skip)]
    pub(crate) tracing: Option<Tracing>,
    /// The block device that the bytes are kept on, instead of what [`backend`](Self::backend) says
    #[arg(skip)]
    #[serde(default)]
    pub(crate) over: Option<PathBuf>,
}

/// How long a server waits for this and that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Patience {
    /// How long a request is held if nobody releases it.
    pub held: Duration,
    /// How long closing may wait for requests that do not end.
    pub stop: Duration,
    /// How long it may wait for whoever holds the device.
    pub delete: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        // To stop, as long as the library gives it. To delete, longer: udev, which looks at a disk once more when somebody
        // who could write has closed it, may take its time to let go.
        Self { held: Duration::from_millis(500), stop: Duration::from_secs(30), delete: Duration::from_secs(20) }
    }
}

/// A set of [`Capability`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities(Vec<Capability>);

impl Capabilities {
    /// Those of the device that a script is for.
    pub(crate) fn of(setup: &Setup) -> Self {
        let all = [
            (setup.volatile_cache, Capability::Flush),
            (setup.fua, Capability::Fua),
            (setup.discard, Capability::Discard),
            (setup.write_zeroes, Capability::Zeroes),
        ];
        Self(all.into_iter().filter_map(|(has, capability)| has.then_some(capability)).collect())
    }

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

pub(crate) fn parse_planted(text: &str) -> Result<Planted, String> {
    let planted: Planted = text.parse()?;
    let spec = planted.mutant.spec();
    match spec.device {
        OnDevice::Yes | OnDevice::Raw => Ok(planted),
        OnDevice::No(why) => Err(format!("'{}' cannot be planted in a device: {why}", spec.name)),
    }
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
            ("discard_promises_nothing", json!(self.discard_promises_nothing)),
            ("read_only", json!(self.read_only)),
            ("mutant", json!(self.mutant.map(|planted| planted.to_string()))),
            ("raw_server", json!(self.is_raw())),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
    }

    /// Whether it is served on the library's raw level.
    pub(crate) fn is_raw(&self) -> bool {
        self.raw_server || self.mutant.is_some_and(|planted| planted.mutant.spec().device == OnDevice::Raw)
    }

    /// Whether it is closed while somebody reads it: a server may drop what it has in hand.
    fn closes_under_load(&self) -> bool {
        self.raw_server || self.mutant.is_some_and(|planted| planted.mutant == Mutant::StopWithInflight)
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
        if self.read_only { geometry.read_only() } else { geometry }
    }

    /// Starts a server process, and has it make the storage and serve it. The bug that is to be planted goes on top.
    ///
    /// # Errors
    /// What the library says to the options, or what the environment lacks.
    pub fn start(&self, context: &Context) -> Result<Target, Failure> {
        let server = Server::start(context)?;
        self.serve_by(context, server, None)
    }

    /// Serves storage that is there already, with these options, by the server that has it.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn serve(&self, context: &Context, storage: &Storage) -> Result<Target, Failure> {
        self.serve_by(context, Arc::clone(&storage.server), Some(storage.index))
    }

    /// As [`start`](Self::start), by the server that has `storage`, which nobody uses any more and which it forgets.
    pub(crate) fn start_in_place_of(&self, context: &Context, storage: Storage) -> Result<Target, Failure> {
        let server = Arc::clone(&storage.server);
        storage.forget()?;
        self.serve_by(context, server, None)
    }

    fn serve_by(&self, context: &Context, server: Arc<Server>, storage: Option<usize>) -> Result<Target, Failure> {
        // A server that is killed with a STOP under way may not end: it has to have given up before.
        let stop = context.at_most(self.patience.stop * 2) / 2;
        let args = Self { patience: Patience { stop, ..self.patience }, ..self.clone() };
        let (device, index) = server.serve(&args, context.seed(), storage)?;
        context.record.made(device.id);
        Ok(Target {
            served: device,
            storage: Storage { server, index },
            geometry: self.geometry(),
            // The page cache copies without a lock.
            torn_by_races: self.backend == BackendKind::File,
            discard: if self.discard_promises_nothing { DiscardPromise::Nothing } else { DiscardPromise::Zeroes },
            closes_under_load: self.closes_under_load(),
            lowest: None,
        })
    }

    /// Serves a device whose bytes are kept on another one: by a server of its own, or by that of the device below.
    /// What is behind it, to be looked at and to be broken, is what is behind the lowest of them.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub(crate) fn start_over(&self, context: &Context, below: &Target, own_server: bool) -> Result<Target, Failure> {
        let server = if own_server { Server::start(context)? } else { Arc::clone(&below.storage.server) };
        let args = Self { over: Some(below.path()), ..self.clone() };
        let target = args.serve_by(context, server, None)?;
        Ok(Target { torn_by_races: below.torn_by_races, lowest: Some(below.lowest()), ..target })
    }

    /// Makes the storage, in this process.
    pub(crate) fn storage(&self) -> Result<Made, Failure> {
        let geometry = self.geometry();
        if let Some(below) = &self.over {
            let opened = backends::File::options().direct(true).logical_block(self.logical_block).open(below);
            let opened = opened.map_err(|error| Failure::io(format_args!("open {}", below.display()), &error))?;
            if !opened.is_direct() || opened.geometry().size != geometry.size {
                let what = format!("{} cannot be read past the page cache, or has another size", below.display());
                return Err(Failure::broke("geometry", what));
            }
            return Ok(Made::of(opened));
        }
        Ok(match self.backend {
            BackendKind::Memory => Made::of(backends::Memory::with_geometry(geometry)),
            BackendKind::File => Made::of(temporary_file(&geometry)?),
            BackendKind::Medium => {
                let medium = Medium::new(MediumOptions {
                    bytes: geometry.size,
                    volatile_cache: geometry.volatile_cache,
                    atomic_bytes: geometry.logical_block,
                });
                Made { backend: Arc::new(MediumDisk::new(medium.clone(), geometry)), medium: Some(medium) }
            }
        })
    }
}

/// Storage that was made.
pub(crate) struct Made {
    pub(crate) backend: Arc<dyn Backend>,
    /// The disk that can lose its cache, if it is one.
    pub(crate) medium: Option<Medium>,
}

impl Made {
    pub(crate) fn of(backend: impl Backend) -> Self {
        Self { backend: Arc::new(backend), medium: None }
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

/// The bytes behind a device, beneath everything that is planted between them and the kernel. They are the server's.
#[derive(Clone, Debug)]
pub struct Storage {
    server: Arc<Server>,
    index: usize,
}

impl Storage {
    /// Reads `buf` from `offset`, in bytes, past the device.
    ///
    /// # Errors
    /// The storage's own, as [`Failure::Environment`]; or the server is gone.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), Failure> {
        self.server.read(self.index, buf, offset)
    }

    /// Stops requests on their way to the storage, calls `then`, and copies the storage as it is at that moment.
    ///
    /// # Errors
    /// As [`read_at`](Self::read_at).
    pub fn copy<T>(&self, then: impl FnOnce() -> T) -> Result<(T, Self), Failure> {
        let (then, index) = self.server.copy(self.index, then)?;
        Ok((then, self.other(index)))
    }

    /// Stops requests on their way to the disk from a moment on, calls `then`, and copies the disk as it is, its cache
    /// included. The moment is now when `patience` is over.
    pub(crate) fn fork<T>(
        &self,
        moment: Moment,
        patience: Duration,
        then: impl FnOnce() -> T,
    ) -> Result<(T, Self), Failure> {
        let (then, index) = self.server.fork(self.index, moment, patience, then)?;
        Ok((then, self.other(index)))
    }

    /// What a power cut now could leave of the disk, which stays as it is.
    pub(crate) fn crash(&self, seed: Seed) -> Result<(Self, CutReport), Failure> {
        let (index, report) = self.server.crash(self.index, seed)?;
        Ok((self.other(index), report))
    }

    /// Gives its memory back. Nobody may use it any more.
    pub(crate) fn forget(self) -> Result<(), Failure> {
        self.server.forget(self.index)
    }

    fn other(&self, index: usize) -> Self {
        Self { server: Arc::clone(&self.server), index }
    }
}

/// A device that is being served, and what is behind it.
///
/// When the last of a server's targets is dropped, the server closes what is left and ends; [`close`](Self::close) says
/// how it went.
#[derive(Debug)]
pub struct Target {
    served: Served,
    storage: Storage,
    geometry: Geometry,
    torn_by_races: bool,
    discard: DiscardPromise,
    closes_under_load: bool,
    /// Where this one is kept on other devices, the lowest of them: what is behind that is behind all.
    lowest: Option<Lowest>,
}

/// The lowest of devices that are stacked on each other.
#[derive(Clone, Debug)]
struct Lowest {
    served: Served,
    storage: Storage,
}

impl Target {
    fn lowest(&self) -> Lowest {
        let own = || Lowest { served: self.served, storage: self.storage.clone() };
        self.lowest.clone().unwrap_or_else(own)
    }

    /// The server and the device that are next to the storage.
    fn behind(&self) -> (&Server, &Served) {
        match &self.lowest {
            Some(lowest) => (&lowest.storage.server, &lowest.served),
            None => (&self.storage.server, &self.served),
        }
    }

    /// Process id of its server.
    pub(crate) fn server_pid(&self) -> u32 {
        self.storage.server.pid()
    }

    /// The device's id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.served.id
    }

    /// How many queues the driver granted.
    #[must_use]
    pub fn queues(&self) -> u16 {
        self.served.queues
    }

    /// How many requests it granted for each queue.
    #[must_use]
    pub fn depth(&self) -> u16 {
        self.served.depth
    }

    /// The largest request it granted, in bytes.
    #[must_use]
    pub fn max_io_bytes(&self) -> u32 {
        self.served.max_io_bytes
    }

    /// Path of the block device.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        ublkit::ctrl::block_path(self.served.id)
    }

    /// The bytes behind it.
    #[must_use]
    pub fn storage(&self) -> &Storage {
        self.lowest.as_ref().map_or(&self.storage, |lowest| &lowest.storage)
    }

    /// Looks whether the threads that serve it are marked as part of the I/O path. Returns how many they are.
    ///
    /// # Errors
    /// [`Failure::DeviceBroke`] if one is not.
    pub fn check_reclaim(&self) -> Result<usize, Failure> {
        crate::reclaim::check(self.storage.server.pid(), self.served.id, usize::from(self.served.queues))
    }

    /// The geometry it was declared with.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// What it promises of what was discarded.
    #[must_use]
    pub const fn discard_promise(&self) -> DiscardPromise {
        self.discard
    }

    /// Whether somebody has to read it while it is closed.
    pub(crate) const fn closes_under_load(&self) -> bool {
        self.closes_under_load
    }

    /// Whether a read may find a block torn while a write to it is under way.
    #[must_use]
    pub const fn torn_by_races(&self) -> bool {
        self.torn_by_races
    }

    /// Cuts the power, or ends the server: from now on every request fails, and whatever was between kernel and storage is
    /// gone. Returns when nothing is under way any more, and what a power cut took from a disk.
    pub(crate) fn kill(&self, outage: Outage) -> Result<Option<CutReport>, Failure> {
        let (server, device) = self.behind();
        server.kill(device, outage)
    }

    /// Requests are served again.
    pub(crate) fn revive(&self) -> Result<(), Failure> {
        let (server, device) = self.behind();
        server.revive(device)
    }

    /// Switches the faults on or off.
    pub(crate) fn faults(&self, on: bool) -> Result<(), Failure> {
        let (server, device) = self.behind();
        server.faults(device, on)
    }

    /// Gives the device other faults. They are off.
    pub(crate) fn replan(&self, plan: &FaultPlan, seed: ublkit_harness::Seed) -> Result<(), Failure> {
        let (server, device) = self.behind();
        server.replan(device, plan, seed)
    }

    /// How many requests are held.
    pub(crate) fn held(&self) -> Result<u64, Failure> {
        let (server, device) = self.behind();
        server.held(device)
    }

    /// What happened at the storage since this was last asked.
    pub(crate) fn testimony(&self) -> Result<Testimony, Failure> {
        let (server, device) = self.behind();
        server.testimony(device)
    }

    /// The calls of the storage that were recorded until now.
    pub(crate) fn recording(&self) -> Result<Recording, Failure> {
        self.storage.server.recording(&self.served)
    }

    /// What the kernel has asked of the backend until now.
    ///
    /// # Errors
    /// The server is gone.
    pub fn counts(&self) -> Result<Counts, Failure> {
        Ok(self.storage.server.status(&self.served)?.counts)
    }

    /// How often the planted bug was hit until now.
    pub(crate) fn mutant_hits(&self) -> Result<u64, Failure> {
        Ok(self.storage.server.status(&self.served)?.hits.unwrap_or(0))
    }

    /// How many requests came through the queues until now.
    ///
    /// # Errors
    /// The server is gone.
    pub fn served_requests(&self) -> Result<u64, Failure> {
        Ok(self.storage.server.status(&self.served)?.requests)
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

    /// Opens the block device with these flags beside those for reading and writing.
    pub(crate) fn open_with(&self, flags: i32) -> Result<File, Failure> {
        let path = self.path();
        OpenOptions::new()
            .read(true)
            .write(!self.geometry.read_only)
            .custom_flags(flags)
            .open(&path)
            .map_err(|error| Failure::io(format_args!("open {}", path.display()), &error))
    }

    /// Begins to close the device with its faults as they are: requests that are held stay so. Whatever comes of it, what
    /// is left is [closed](Self::close) afterwards.
    ///
    /// # Errors
    /// That it did not end in time, which it cannot while a request is held.
    pub(crate) fn begin_to_close(&self) -> Result<(), Failure> {
        self.storage.server.close(&self.served, true).map(drop)
    }

    /// Closes the device and gives its id back. What the backend was asked for is added to the evidence.
    ///
    /// # Errors
    /// That it did not end in time, that somebody still holds it, that the server kept something of it, or the first
    /// error that its queues could not serve past.
    pub fn close(self, context: &Context) -> Result<(), Failure> {
        self.close_as(context, false, false)
    }

    /// As [`close`](Self::close), with the faults as they are.
    pub(crate) fn close_with_faults(self, context: &Context) -> Result<(), Failure> {
        self.close_as(context, true, false)
    }

    /// As [`close`](Self::close), once [`begin_to_close`](Self::begin_to_close) has failed: that the device did not stop in time
    /// is known.
    pub(crate) fn close_what_is_left(self, context: &Context) -> Result<(), Failure> {
        self.close_as(context, false, true)
    }

    /// Closes the device while somebody holds it. Returns what is said of who that is, if the deletion has to wait for
    /// them; the id is still this run's then.
    pub(crate) fn close_while_held(self) -> Result<Option<String>, Failure> {
        Ok(self.storage.server.close(&self.served, false)?.deferred)
    }

    fn close_as(self, context: &Context, faults_stay: bool, error_is_known: bool) -> Result<(), Failure> {
        let id = self.served.id;
        let closing = self.storage.server.close(&self.served, faults_stay).inspect_err(|_| {
            // How often a planted bug struck is to be known all the same.
            if let Ok(hits @ 1..) = self.mutant_hits() {
                context.evidence().add("mutant_hits", hits);
            }
        })?;
        context.record.said_to_be_gone(id);
        let Status { counts, hits, error, .. } = closing.last;
        let mut evidence = Evidence::new();
        counts.add_to(&mut evidence);
        context.evidence().merge(&evidence);
        if let Some(hits) = hits {
            context.evidence().add("mutant_hits", hits);
        }
        if let Some(error) = error.filter(|_| !error_is_known) {
            return Err(Failure::broke("server", format!("a queue failed: {error}")));
        }
        if let Some(deferred) = closing.deferred {
            return Err(Failure::broke("close", format!("device {id}: {deferred}")));
        }
        if !closing.left.is_empty() {
            let what = format!("the server kept {} things of its closed devices", closing.left.len());
            return Err(Failure::broke_with("leak", what, closing.left));
        }
        Ok(())
    }
}
