//! The server's side: does what it is told, and closes everything when nobody is there to tell it any more.

use std::io::{self, BufRead};
use std::sync::Arc;
use std::time::Duration;

use ublkit::ctrl::DeviceInfo;
use ublkit::{Backend, Closed, DataMode, Deletion, DeviceBuilder, Event, Geometry, Serve};
use ublkit_harness::Seed;
use ublkit_harness::mutant::Hits;
use ublkit_harness::sim::medium::{Medium, MediumDisk};

use super::freezer::Freezer;
use super::hang::{Hang, never_returns};
use super::protocol::{Call, Closing, Reply, Served, Status};
use super::raw;
use super::stack::{Stack, Storage};
use super::teller::Struck;
use crate::in_flight::InFlight;
use crate::inventory::Inventory;
use crate::role::say;
use crate::scenario::Failure;
use crate::target::{Made, Mode, Patience, TargetArgs};

/// A device that is served, by the library or on its raw level.
enum Device {
    Library(Box<ublkit::Device>),
    Raw(Box<raw::Device>),
}

impl Device {
    fn start(stack: &Stack, args: &TargetArgs) -> Result<Self, Failure> {
        let geometry = stack.declared(args.geometry());
        if args.is_raw() {
            return raw::Device::start(stack, args, &geometry).map(|device| Self::Raw(Box::new(device)));
        }
        let flusher = stack.io_flusher();
        let device = match stack.handlers() {
            None => builder(
                ublkit::Device::builder(stack.backend()).workers(args.workers_backend),
                args,
                geometry,
                flusher,
            )
            .start(),
            Some(open) => {
                let handlers = ublkit::Device::builder_with_handlers(geometry, move |queue| Ok(open(queue.queue)));
                builder(handlers, args, geometry, flusher).start()
            }
        };
        Ok(Self::Library(Box::new(device?)))
    }

    fn info(&self) -> &DeviceInfo {
        match self {
            Self::Library(device) => device.info(),
            Self::Raw(device) => device.info(),
        }
    }

    fn requests(&self) -> u64 {
        match self {
            Self::Library(device) => device.stats().iter().map(|queue| queue.requests).sum(),
            Self::Raw(device) => device.requests(),
        }
    }

    fn first_error(&self) -> Option<String> {
        match self {
            Self::Library(device) => device.first_error().map(|error| error.to_string()),
            Self::Raw(device) => device.error(),
        }
    }

    /// Returns what keeps its id from being given back at once.
    fn close(&mut self, patience: Patience) -> Result<Option<String>, Failure> {
        match self {
            Self::Library(device) => Ok(match device.close()? {
                Closed { deletion: Deletion::Complete, .. } => None,
                deferred => Some(deferred.to_string()),
            }),
            Self::Raw(device) => device.close(patience.stop, patience.delete),
        }
    }
}

/// A device that is served, and what is known of it.
struct Serving {
    device: Device,
    stack: Stack,
    patience: Patience,
    /// Storage on another device: nobody is to hold that when this one is closed.
    over: Option<usize>,
    /// Has the strikes of its planted bug counted in, should all hang.
    _struck: Option<Arc<Hits>>,
}

/// The server.
#[derive(Default)]
struct Server {
    /// None for those that were let go of, or were to be forgotten.
    storages: Vec<Option<Storage>>,
    devices: Vec<Option<Serving>>,
    in_flight: InFlight,
    struck: Struck,
    /// A planted hang: it never ends.
    endless: bool,
    /// What this process had before its first device.
    before: Option<Inventory>,
}

/// Runs the server until its standard input ends, and returns its exit status.
pub(crate) fn main() -> u8 {
    let mut server = Server::default();
    if let Err(error) = super::teller::start(server.in_flight.clone(), server.struck.clone()) {
        let text = format!("what the server has in flight cannot be told of, should it hang: {error}");
        let _ = say(&Reply::Note(text), &[]);
    }
    for line in io::stdin().lock().lines() {
        let Ok(line) = line else { break };
        let reply = match serde_json::from_str(&line) {
            Ok(call) => server.answer(call),
            Err(error) => Err(Failure::Internal(format!("the server was told what it does not understand: {error}"))),
        };
        let (reply, bytes) = reply.unwrap_or_else(|failure| (Reply::Failed(failure.into()), Vec::new()));
        if say(&reply, &bytes).is_err() {
            break;
        }
    }
    server.end()
}

/// A device with what is asked for on the command line.
fn builder<S: Serve>(
    builder: DeviceBuilder<S>,
    args: &TargetArgs,
    geometry: Geometry,
    io_flusher: bool,
) -> DeviceBuilder<S> {
    builder
        .geometry(geometry)
        .io_flusher(io_flusher)
        .stop_deadline(args.patience.stop)
        .delete_deadline(args.patience.delete)
        .queues(args.queues)
        .depth(args.depth)
        .max_io_bytes(args.max_io)
        .data_mode(match args.mode {
            Mode::Copy => DataMode::Copy,
            Mode::UserCopy => DataMode::UserCopy,
        })
        .on_event(|event| {
            if !matches!(event, Event::Phase(_)) {
                // The reader is gone only when the devices are about to be closed.
                let _ = say(&Reply::Note(event.to_string()), &[]);
            }
        })
}

type Answer = Result<(Reply, Vec<u8>), Failure>;

fn unknown(what: &str) -> Failure {
    Failure::Internal(format!("there is no such {what} at the server"))
}

impl Server {
    fn answer(&mut self, call: Call) -> Answer {
        let reply = match call {
            Call::Serve { args, seed, storage } => Reply::Served(self.serve(&args, seed, storage)?),
            Call::Read { storage, offset, len } => {
                let mut bytes = vec![0; len];
                let read = self.storage(storage)?.peek(&mut bytes, offset);
                read.map_err(|error| Failure::Environment(format!("failed to read the storage: {error}")))?;
                return Ok((Reply::Bytes(len), bytes));
            }
            Call::Freeze { storage, moment, patience_ms } => {
                self.storage(storage)?.freeze(moment, Duration::from_millis(patience_ms));
                Reply::Frozen
            }
            Call::ForkAndThaw { storage } => {
                let fork = self.disk(storage).map(|(medium, geometry)| (medium.fork(), geometry));
                self.storage(storage)?.thaw();
                let (medium, geometry) = fork?;
                Reply::Copied { storage: self.keep_disk(medium, geometry) }
            }
            Call::Crash { storage, seed } => {
                let (medium, geometry) = self.disk(storage)?;
                let (medium, report) = medium.crash_image(&mut seed.rng());
                Reply::Crashed { storage: self.keep_disk(medium, geometry), report }
            }
            Call::Forget { storage } => {
                *self.storages.get_mut(storage).ok_or_else(|| unknown("storage"))? = None;
                Reply::Forgotten
            }
            Call::CopyAndThaw { storage } => {
                let frozen = self.storage(storage)?;
                let copy = frozen.copy();
                frozen.thaw();
                let copy =
                    copy.map_err(|error| Failure::Environment(format!("failed to copy the storage: {error}")))?;
                Reply::Copied { storage: self.keep(Made::of(copy)) }
            }
            Call::Kill { device, outage } => Reply::Dead(self.device(device)?.stack.kill(outage)),
            Call::Revive { device } => {
                self.device(device)?.stack.revive();
                Reply::Alive
            }
            Call::Faults { device, on } => {
                self.device(device)?.stack.faults(on);
                Reply::Switched
            }
            Call::Replan { device, plan, seed } => {
                self.device(device)?.stack.replan(plan, seed);
                Reply::Switched
            }
            Call::Held { device } => Reply::Held(self.device(device)?.stack.held()),
            Call::Testify { device } => {
                let serving = self.device(device)?;
                Reply::Testimony(serving.stack.testimony())
            }
            Call::Recording { device } => Reply::Recording(self.device(device)?.stack.recording()),
            Call::Status { device } => Reply::Status(self.device(device)?.status()),
            Call::Close { device, faults_stay } => Reply::Closed(self.close(device, faults_stay)?),
        };
        Ok((reply, Vec::new()))
    }

    fn storage(&self, index: usize) -> Result<&Arc<Freezer>, Failure> {
        self.kept(index).map(|storage| &storage.freezer)
    }

    fn kept(&self, index: usize) -> Result<&Storage, Failure> {
        self.storages.get(index).and_then(Option::as_ref).ok_or_else(|| unknown("storage"))
    }

    fn disk(&self, index: usize) -> Result<(&Medium, Geometry), Failure> {
        let Storage { freezer, medium } = self.kept(index)?;
        let medium = medium.as_ref().ok_or_else(|| unknown("disk"))?;
        Ok((medium, freezer.geometry()))
    }

    fn device(&self, index: usize) -> Result<&Serving, Failure> {
        self.devices.get(index).and_then(Option::as_ref).ok_or_else(|| unknown("device"))
    }

    fn keep(&mut self, made: Made) -> usize {
        self.storages.push(Some(Storage { freezer: Arc::new(Freezer::new(made.backend)), medium: made.medium }));
        self.storages.len() - 1
    }

    fn keep_disk(&mut self, medium: Medium, geometry: Geometry) -> usize {
        let backend = Arc::new(MediumDisk::new(medium.clone(), geometry));
        self.keep(Made { backend, medium: Some(medium) })
    }

    fn serve(&mut self, args: &TargetArgs, seed: Seed, storage: Option<usize>) -> Result<Served, Failure> {
        self.endless |= args.hang == Some(Hang::End);
        let storage = match storage {
            Some(storage) => storage,
            None => self.keep(args.storage()?),
        };
        let over = args.over.is_some().then_some(storage);
        let served = self.serve_storage(args, seed, storage, over);
        if served.is_err() {
            self.let_go(over);
        }
        served
    }

    /// Closes the device that a storage is on.
    fn let_go(&mut self, over: Option<usize>) {
        if let Some(storage) = over.and_then(|index| self.storages.get_mut(index)) {
            *storage = None;
        }
    }

    fn serve_storage(
        &mut self,
        args: &TargetArgs,
        seed: Seed,
        storage: usize,
        over: Option<usize>,
    ) -> Result<Served, Failure> {
        let below = self.kept(storage)?.clone();
        if self.devices.iter().all(Option::is_none) {
            self.before = Some(Inventory::take());
        }
        let stack = Stack::new(below, args, seed, self.in_flight.clone())?;
        let struck = stack.planted_hits().map(|hits| self.struck.count_in(hits));
        let device = Device::start(&stack, args).inspect_err(|_| {
            if let Some(hits @ 1..) = stack.hits() {
                // The reader is gone only when everything is about to end.
                let _ = say(&Reply::Hits(hits), &[]);
            }
        })?;
        let info = *device.info();
        self.devices.push(Some(Serving { device, stack, patience: args.patience, over, _struck: struck }));
        Ok(Served {
            device: self.devices.len() - 1,
            storage,
            id: info.id(),
            queues: info.queues(),
            depth: info.depth(),
            max_io_bytes: info.max_io_bytes(),
        })
    }

    fn close(&mut self, index: usize, faults_stay: bool) -> Result<Closing, Failure> {
        let serving = self.devices.get_mut(index).and_then(Option::as_mut).ok_or_else(|| unknown("device"))?;
        let error = serving.status().error;
        serving.stack.stopping(faults_stay);
        let closed = serving.device.close(serving.patience);
        let deferred = closed?;
        let last = Status { error, ..serving.status() };
        let over = self.devices[index].take().and_then(|serving| serving.over);
        self.let_go(over);
        let last_one = self.devices.iter().all(Option::is_none);
        let left = match &self.before {
            Some(before) if last_one => before.surplus_after_settling(),
            _ => Vec::new(),
        };
        Ok(Closing { last, deferred, left })
    }

    /// Closes what is left, as nobody waits for it any more. Returns the exit status.
    fn end(mut self) -> u8 {
        if self.endless {
            never_returns();
        }
        let mut status = 0;
        for storage in self.storages.iter().flatten() {
            storage.freezer.thaw();
        }
        // The last one first: it may be kept on one that was there before.
        while let Some(serving) = self.devices.pop() {
            let Some(mut serving) = serving else { continue };
            if let Err(error) = serving.device.close(serving.patience) {
                // A backend that does not come back: the kernel takes the device from this process when it ends, and the next
                // run deletes it.
                status = 1;
                eprintln!("ublk-torture: failed to close device {}: {error}", serving.device.info().id());
            }
            let over = serving.over;
            drop(serving);
            self.let_go(over);
        }
        status
    }
}

impl Serving {
    fn status(&self) -> Status {
        Status {
            counts: self.stack.counts(),
            requests: self.device.requests(),
            hits: self.stack.hits(),
            error: self.device.first_error(),
        }
    }
}
