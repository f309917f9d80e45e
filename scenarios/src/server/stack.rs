//! What lies between the kernel and a device's storage.
//!
//! From the top: a table of what is in flight, counters, a socket, and what is plugged into it: the planted bug, a witness, the faults, and the storage.
//! At an outage everything above the faults goes, with all that it kept in memory, and is made anew over the same storage.
//! A bug between the driver and the server comes with a [bridge](super::bridge) above all this.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ublkit::{Backend, Geometry};
use ublkit_harness::fault::{Effect, Errno, FaultPlan, Faults, Injection, Stage};
use ublkit_harness::mutant::{Hits, OnDevice, Open, Planted, Plot, declared_geometry, plant_backend, plant_server};
use ublkit_harness::observe::{Counters, Counts};
use ublkit_harness::sim::medium::{CutReport, Medium};
use ublkit_harness::sim::server::{PlainServer, Server};
use ublkit_harness::{Mutant, Observed, Pattern, Seed, SeededRng};

use super::bridge::{Bridge, Forward, Shape};
use super::freezer::Freezer;
use super::hang::{Hangs, Plant};
use super::lies::Lie;
use super::noted::InTable;
use super::socket::Socket;
use super::timed::Timed;
use super::witness::{Notes, Testimony, Witness};
use crate::clock::nanoseconds;
use crate::flush_trace::{Recorded, Recorder, Recording, Tracing, cost_ns};
use crate::in_flight::InFlight;
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
    top: Arc<dyn Backend>,
    counters: Arc<Counters>,
    below: Mutex<Below>,
    planted: Option<Planted>,
    plot: Plot,
    bridge: Option<Bridge>,
    hang: Plant,
    in_flight: InFlight,
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
    held_most: Duration,
    lie: Option<Lie>,
    /// Calls of the storage are recorded here.
    recorder: Option<Arc<Recorder>>,
}

impl Below {
    /// The storage, as it is seen from above.
    fn storage(&self) -> Arc<dyn Backend> {
        let storage = Arc::clone(&self.storage.freezer);
        match &self.recorder {
            Some(recorder) => Arc::new(Recorded::new(storage, Arc::clone(recorder))),
            None => storage,
        }
    }

    /// What is plugged in.
    fn plug(&self, plot: &Plot) -> Arc<dyn Backend> {
        let faulty = Arc::new(self.faults.backend(self.storage()));
        let faulty = Timed::new(faulty, self.faults.clone(), self.held_most);
        // Beside a planted bug speed does not count, and more can be told of what it did.
        let witness = Arc::new(Witness::new(faulty, self.notes.clone(), self.planted.is_some()));
        let backend = match self.planted {
            Some(planted) => plant_backend(planted, witness, plot),
            None => witness,
        };
        match self.lie {
            Some(lie) => lie.plant(backend),
            None => backend,
        }
    }
}

fn switched_off(plan: FaultPlan, seed: Seed) -> Faults {
    let faults = Faults::with_clock(plan, seed, Arc::new(nanoseconds));
    faults.switch(false);
    faults
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Stack {
    pub(super) fn new(storage: Storage, args: &TargetArgs, seed: Seed, in_flight: InFlight) -> Result<Self, Failure> {
        let faults = switched_off(args.faults.clone(), seed.derive("faults", 0));
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
        let recorder = args.tracing.map(|Tracing { room, lose }| Arc::new(Recorder::new(room, lose)));
        let (notes, planted, held_most) = (Notes::default(), args.mutant, args.patience.held);
        let below = Below { storage, faults, notes, planted, held_most, lie: args.lie, recorder };
        let socket = Arc::new(Socket::new(below.plug(&plot)));
        let hang = Plant::new(args.hang);
        let (top, counters) = Observed::new(Hangs { inner: Arc::clone(&socket), plant: hang.clone() });
        // On the raw level a server has its bugs by itself.
        let raw = args.mutant.is_some_and(|planted| planted.mutant.spec().device == OnDevice::Raw);
        let in_server = args.mutant.filter(|planted| !raw && planted.mutant.spec().is_in_server());
        let bridged = in_server.is_some() || hang.is_in_handler();
        // Behind a bridge a request is in flight from its arrival on, and is noted there.
        let top: Arc<dyn Backend> =
            if bridged { Arc::new(top) } else { Arc::new(InTable { inner: top, table: in_flight.clone() }) };
        let bridge = if bridged {
            let (backend, plot) = (Arc::clone(&top), plot.clone());
            let make = move |why| -> Box<dyn Server> {
                let plain = Box::new(PlainServer::new(Arc::clone(&backend), REORDER));
                match in_server {
                    Some(planted) => plant_server(planted, plain, &plot.again(why, plot.medium.clone())),
                    None => plain,
                }
            };
            let shape = Shape { queues: args.queues, depth: args.depth, max_io_bytes: args.max_io };
            let bridge = Bridge::start(shape, Box::new(make), seed.derive("bridge", 0).rng());
            Some(bridge.map_err(|error| Failure::Environment(format!("failed to start a thread: {error}")))?)
        } else {
            None
        };
        let power = Mutex::new(seed.derive("power", 0).rng());
        let below = Mutex::new(below);
        let planted = args.mutant;
        Ok(Self { socket, top, counters, below, planted, plot, bridge, hang, in_flight, power, admitted })
    }

    /// What the device declares.
    pub(super) fn declared(&self, geometry: Geometry) -> Geometry {
        let geometry = lock(&self.below).lie.map_or(geometry, |lie| lie.declared(geometry));
        let declared = self.planted.map_or(geometry, |planted| declared_geometry(planted, geometry));
        if declared != geometry {
            // That is the bug: it may be found before anybody has asked for what it lies about.
            self.plot.hits.hit();
        }
        declared
    }

    /// Whether the server's threads are to be marked as part of the I/O path.
    pub(super) fn io_flusher(&self) -> bool {
        let forgets = self.planted.is_some_and(|planted| planted.mutant == Mutant::NoIoFlusher);
        if forgets {
            self.plot.hits.hit();
        }
        !forgets
    }

    /// What a bug is planted with that is neither in the backend nor in its handlers.
    pub(super) fn plot(&self) -> &Plot {
        &self.plot
    }

    /// What the device is served with.
    pub(super) fn backend(&self) -> Arc<dyn Backend> {
        Arc::clone(&self.top)
    }

    /// What its queues are served with, where that is not a backend.
    pub(super) fn handlers(&self) -> Option<impl Fn(u16) -> Forward + Send + Sync + use<>> {
        self.bridge.as_ref().map(|bridge| bridge.opener(self.in_flight.clone(), self.hang.clone()))
    }

    /// Fails every request from now on, and loses what an outage loses. Returns what that was.
    pub(super) fn kill(&self, outage: Outage) -> Option<CutReport> {
        let mut report = None;
        let why = match outage {
            Outage::PowerCut => Open::AfterPowerCut,
            Outage::Restart => Open::AfterKill,
        };
        let below = lock(&self.below);
        below.faults.release_all();
        let plot = self.plot.again(why, self.plot.medium.clone());
        self.socket.kill(|| {
            if let (Outage::PowerCut, Some(medium)) = (outage, &below.storage.medium) {
                report = Some(medium.power_cut_told(&mut lock(&self.power)));
            }
            below.plug(&plot)
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
    pub(super) fn stopping(&self, faults_stay: bool) {
        self.plot.stopping.store(true, Ordering::Relaxed);
        if !faults_stay {
            self.faults(false);
        }
        self.hang.closing();
    }

    /// Switches the faults on or off.
    pub(super) fn faults(&self, on: bool) {
        if !on {
            self.hang.drawn();
        }
        lock(&self.below).faults.switch(on);
    }

    /// Takes other faults, while no request is under way that anybody counts. They are off.
    pub(super) fn replan(&self, plan: FaultPlan, seed: Seed) {
        let mut below = lock(&self.below);
        below.faults.switch(false);
        below.faults = switched_off(plan, seed);
        self.socket.kill(|| below.plug(&self.plot));
        self.socket.revive();
    }

    /// How many requests are held.
    pub(super) fn held(&self) -> u64 {
        lock(&self.below).faults.held()
    }

    /// What happened at the storage since this was last asked.
    pub(super) fn testimony(&self) -> Testimony {
        let below = lock(&self.below);
        let mut injections = below.faults.take_injections();
        injections.append(&mut lock(&self.admitted));
        Testimony { calls: below.notes.take(), injections }
    }

    /// The calls of the storage until now, if they are recorded.
    pub(super) fn recording(&self) -> Recording {
        let seen = lock(&self.below).recorder.as_ref().map(|recorder| recorder.recording());
        Recording { cost_ns: cost_ns(), ..seen.unwrap_or_default() }
    }

    /// What the kernel has asked for.
    pub(super) fn counts(&self) -> Counts {
        self.counters.counts()
    }

    /// How often the planted bug was hit.
    pub(super) fn hits(&self) -> Option<u64> {
        self.planted_hits().map(|hits| hits.count())
    }

    /// What counts that.
    pub(super) fn planted_hits(&self) -> Option<Hits> {
        self.planted.map(|_| self.plot.hits.clone())
    }
}
