//! What lies between the kernel and a device's storage.
//!
//! From the top: counters, a socket, and what is plugged into it: the planted bug, a witness, the faults, and the storage.
//! At an outage everything above the faults goes, with all that it kept in memory, and is made anew over the same storage.
//! A bug between the driver and the server comes with a [bridge](super::bridge) above all this.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ublkit::{Backend, Geometry};
use ublkit_harness::fault::{Effect, Errno, Faults, Injection, Stage};
use ublkit_harness::mutant::{Open, Planted, Plot, declared_geometry, plant_backend, plant_server};
use ublkit_harness::observe::{Counters, Counts};
use ublkit_harness::sim::medium::{CutReport, Medium};
use ublkit_harness::sim::server::PlainServer;
use ublkit_harness::{Observed, Pattern, Seed, SeededRng};

use super::bridge::{Bridge, Forward, Shape};
use super::freezer::Freezer;
use super::socket::Socket;
use super::timed::Timed;
use super::witness::{Notes, Testimony, Witness};
use crate::clock::nanoseconds;
use crate::scenario::Failure;
use crate::target::{NEIGHBOUR, TargetArgs};
use crate::torture::outage::Outage;

/// A storage that the server has.
#[derive(Clone)]
pub(super) struct Storage {
    pub(super) freezer: Arc<Freezer>,
    /// The disk that can lose its cache, if it is one.
    pub(super) medium: Option<Medium>,
}

/// How often, in percent, a request overtakes another in a server behind a bridge.
const REORDER: u8 = 30;

/// What lies between the kernel and a device's storage.
pub(super) struct Stack {
    socket: Arc<Socket>,
    top: Arc<Observed<Arc<Socket>>>,
    counters: Arc<Counters>,
    below: Below,
    plot: Plot,
    bridge: Option<Bridge>,
    /// What survives power cuts is drawn from this.
    power: Mutex<SeededRng>,
    /// Errors that the planted bug makes by itself and admits to.
    admitted: Arc<Mutex<Vec<Injection>>>,
}

/// What stays through an outage.
#[derive(Clone)]
struct Below {
    storage: Storage,
    faults: Faults,
    notes: Notes,
    planted: Option<Planted>,
}

impl Below {
    /// What is plugged in.
    fn plug(&self, plot: &Plot) -> Arc<dyn Backend> {
        let faulty =
            Timed::new(Arc::new(self.faults.backend(Arc::clone(&self.storage.freezer))), self.faults.clone());
        // Beside a planted bug speed does not count, and more can be told of what it did.
        let witness = Arc::new(Witness::new(faulty, self.notes.clone(), self.planted.is_some()));
        match self.planted {
            Some(planted) => plant_backend(planted, witness, plot),
            None => witness,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Stack {
    pub(super) fn new(storage: Storage, args: &TargetArgs, seed: Seed) -> Result<Self, Failure> {
        let faults = Faults::with_clock(args.faults.clone(), seed.derive("faults", 0), Arc::new(nanoseconds));
        faults.switch(false);
        let admitted = Arc::new(Mutex::new(Vec::new()));
        let mut plot = Plot::new(seed);
        plot.medium.clone_from(&storage.medium);
        plot.logical_block = args.logical_block;
        plot.foreign = Some(Arc::new(Pattern::new(seed, NEIGHBOUR)));
        plot.injected = Some(Arc::new({
            let admitted = Arc::clone(&admitted);
            move |kind, range, errno| {
                let Some(known) = Errno::new(errno) else { return };
                let effect = Effect::Error { errno: known, stage: Stage::Before };
                let now = nanoseconds();
                let (number, rule) = (0, u32::MAX);
                let made =
                    Injection { number, rule, kind, range, effect, errno: Some(errno), began: now, ended: now };
                lock(&admitted).push(made);
            }
        }));
        let below = Below { storage, faults, notes: Notes::default(), planted: args.mutant };
        let socket = Arc::new(Socket::new(below.plug(&plot)));
        let (top, counters) = Observed::new(Arc::clone(&socket));
        let top = Arc::new(top);
        let bridge = match args.mutant {
            Some(planted) if planted.mutant.spec().is_in_server() => {
                let (backend, plot): (Arc<dyn Backend>, _) = (Arc::clone(&top) as _, plot.clone());
                let make = move |why| {
                    let plain = Box::new(PlainServer::new(Arc::clone(&backend), REORDER));
                    plant_server(planted, plain, &plot.again(why, plot.medium.clone()))
                };
                let shape = Shape { queues: args.queues, depth: args.depth, max_io_bytes: args.max_io };
                let bridge = Bridge::start(shape, Box::new(make), seed.derive("bridge", 0).rng());
                Some(bridge.map_err(|error| Failure::Environment(format!("failed to start a thread: {error}")))?)
            }
            _ => None,
        };
        let power = Mutex::new(seed.derive("power", 0).rng());
        Ok(Self { socket, top, counters, below, plot, bridge, power, admitted })
    }

    /// What the device declares.
    pub(super) fn declared(&self, geometry: Geometry) -> Geometry {
        self.below.planted.map_or(geometry, |planted| declared_geometry(planted, geometry))
    }

    /// What the device is served with.
    pub(super) fn backend(&self) -> Arc<dyn Backend> {
        Arc::clone(&self.top) as _
    }

    /// What its queues are served with, where that is not a backend.
    pub(super) fn handlers(&self) -> Option<impl Fn(u16) -> Forward + Send + Sync + use<>> {
        self.bridge.as_ref().map(Bridge::opener)
    }

    /// Fails every request from now on, and loses what an outage loses. Returns what that was.
    pub(super) fn kill(&self, outage: Outage) -> Option<CutReport> {
        let mut report = None;
        let why = match outage {
            Outage::PowerCut => Open::AfterPowerCut,
            Outage::Restart => Open::AfterKill,
        };
        self.below.faults.release_all();
        let plot = self.plot.again(why, self.plot.medium.clone());
        self.socket.kill(|| {
            if let (Outage::PowerCut, Some(medium)) = (outage, &self.below.storage.medium) {
                report = Some(medium.power_cut_told(&mut lock(&self.power)));
            }
            self.below.plug(&plot)
        });
        if let Some(bridge) = &self.bridge {
            bridge.restart(why);
        }
        report
    }

    /// Serves requests again.
    pub(super) fn revive(&self) {
        self.socket.revive();
    }

    /// The device is about to be closed in order.
    pub(super) fn stopping(&self) {
        self.plot.stopping.store(true, Ordering::Relaxed);
        self.below.faults.switch(false);
    }

    /// Switches the faults on or off.
    pub(super) fn faults(&self, on: bool) {
        self.below.faults.switch(on);
    }

    /// What happened at the storage since this was last asked.
    pub(super) fn testimony(&self) -> Testimony {
        let mut injections = self.below.faults.take_injections();
        injections.append(&mut lock(&self.admitted));
        Testimony { calls: self.below.notes.take(), injections }
    }

    /// What the kernel has asked for.
    pub(super) fn counts(&self) -> Counts {
        self.counters.counts()
    }

    /// How often the planted bug was hit.
    pub(super) fn hits(&self) -> Option<u64> {
        self.below.planted.map(|_| self.plot.hits.count())
    }
}
