//! The process whose devices are stressed: does what it is told, and closes everything when nobody is there to tell it.

use std::collections::{BTreeMap, BTreeSet};
use std::hint::black_box;
use std::io::{self, BufRead};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ublkit::backends::Memory;
use ublkit::{Backend, Closed, Controller, Deletion, Device, Event, Phase};

use super::concurrent;
use super::cycle::{Cycle, Cycler, DEVICE_BYTES};
use super::disk::Disk;
use super::protocol::{ChurnOrder, Churned, Order, Plant, Report, Shape, Trouble};
use crate::clock::nanoseconds;
use crate::footprint::{self, Sample};
use crate::inventory::Inventory;
use crate::role;
use crate::runner::no_thread;

/// The argument with which this program becomes such a process.
pub(crate) const ARGUMENT: &str = "stress-for-parent";
/// Every how many cycles dirty pages are left to the close.
const DIRTY_EVERY: u64 = 8;
/// How many cycles at the beginning are not in the costs.
const UNCOUNTED: u64 = 5;
/// Every how many cycles the process is looked at, at most and, where their number is not known, at first.
const LOOK_EVERY_MOST: u64 = 100;
const LOOK_EVERY_AT_FIRST: u64 = 5;
/// How often at most progress is told.
const PROGRESS: Duration = Duration::from_millis(500);
/// How long the requests may take to come that are to be in flight at a close.
const GATHER: Duration = Duration::from_secs(20);

/// A device that is served.
struct Serving {
    device: Arc<Device>,
    disk: Arc<Disk>,
}

/// The process.
struct Worker {
    orders: Receiver<Order>,
    enough: Arc<AtomicBool>,
    before: Inventory,
    serving: BTreeMap<u32, Serving>,
    /// Storages of devices that are closed.
    storages: BTreeMap<u32, Arc<Memory>>,
}

/// Runs the process until its standard input ends, and returns its exit status.
pub(crate) fn main() -> u8 {
    let (tell, orders) = mpsc::channel();
    let enough = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&enough);
    let reader = std::thread::Builder::new().name("orders".to_owned()).spawn(move || {
        for line in io::stdin().lock().lines() {
            let Ok(line) = line else { break };
            match serde_json::from_str(&line) {
                Ok(Order::Enough) => told.store(true, Ordering::SeqCst),
                Ok(order) => {
                    if tell.send(order).is_err() {
                        break;
                    }
                }
                Err(error) => say(&Report::Failed(Trouble::broke("stress", format!("not understood: {error}")))),
            }
        }
        told.store(true, Ordering::SeqCst);
    });
    if let Err(error) = reader {
        say(&Report::Failed(no_thread(&error).into()));
        return 4;
    }
    raise_descriptor_limit();
    let mut worker =
        Worker { orders, enough, before: Inventory::take(), serving: BTreeMap::new(), storages: BTreeMap::new() };
    while let Ok(order) = worker.orders.recv() {
        if let Err(trouble) = worker.obey(order) {
            say(&Report::Failed(trouble));
        }
    }
    worker.end()
}

/// As many descriptors as root may give this process: a device takes six.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
        // What it does not get is said when it is needed.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, most, most);
    }
}

/// A reader that is gone is noticed at the orders.
pub(super) fn say(report: &Report) {
    say_with(report, &[]);
}

fn say_with(report: &Report, bytes: &[u8]) {
    let _reader_gone = role::say(report, bytes);
}

impl Worker {
    fn obey(&mut self, order: Order) -> Result<(), Trouble> {
        match order {
            Order::Churn(order) => say(&Report::Churned(churn(&order, &self.enough)?)),
            Order::Start { slot, shape } => self.start(slot, &shape)?,
            Order::CloseInFlight { slot, minimum, release_ms } => self.close_in_flight(slot, minimum, release_ms)?,
            Order::Close { slot } => {
                self.close(slot)?;
                say(&Report::ClosedAll);
            }
            Order::CloseMany { slots, callers } => {
                self.close_many(&slots, callers)?;
                say(&Report::ClosedAll);
            }
            Order::Concurrently(order) => say(&Report::Concurred(concurrent::run(&order, &self.enough)?)),
            Order::Read { slot, offset, len } => {
                let memory = self.storage(slot)?;
                let mut bytes = vec![0; len];
                memory.read_at(&mut bytes, offset).map_err(|error| {
                    Trouble::Environment(format!("failed to read the storage of device {slot}: {error}"))
                })?;
                say_with(&Report::Bytes { len }, &bytes);
            }
            Order::Forget => {
                self.storages.clear();
                say(&Report::Done);
            }
            Order::Footprint { cycles } => {
                say(&Report::Sample(Sample::take(cycles)));
                say(&Report::Done);
            }
            Order::Left => say(&Report::Left(self.before.surplus_after_settling())),
            Order::Enough => {}
        }
        Ok(())
    }

    fn storage(&self, slot: u32) -> Result<Arc<Memory>, Trouble> {
        let open = self.serving.get(&slot).map(|serving| serving.disk.memory());
        open.or_else(|| self.storages.get(&slot)).cloned().ok_or_else(|| unknown(slot))
    }

    fn start(&mut self, slot: u32, shape: &Shape) -> Result<(), Trouble> {
        let odd_one = slot % 2 == 1;
        let shared = (shape.plant == Some(Plant::CrossTalk) && odd_one)
            .then(|| self.serving.get(&(slot - 1)).map(|before| Arc::clone(before.disk.memory())))
            .flatten();
        let memory = shared.unwrap_or_else(|| Arc::new(Memory::new(shape.bytes)));
        let disk = Arc::new(Disk::new(memory, Duration::from_millis(shape.write_ms), shape.plant));
        let sink = Sink(Arc::clone(&disk));
        let device = Device::builder(Arc::clone(&disk))
            .depth(shape.depth)
            .max_io_bytes(shape.max_io)
            .workers(shape.workers)
            .delete_deadline(Duration::from_millis(shape.delete_ms))
            .stop_deadline(Duration::from_millis(shape.stop_ms))
            .on_event(move |event| sink.hear(event))
            .start()
            .map_err(|error| explain_limits(error, slot))?;
        let device = Arc::new(device);
        let id = device.id();
        say(&Report::Made { id });
        self.storages.insert(slot, Arc::clone(disk.memory()));
        self.serving.insert(slot, Serving { device, disk });
        let double = (shape.plant == Some(Plant::DoubleServed) && odd_one)
            .then(|| self.serving.get(&(slot - 1)).map(|before| before.device.id()))
            .flatten();
        say(&Report::Served { slot, id: double.unwrap_or(id) });
        Ok(())
    }

    fn close_in_flight(&mut self, slot: u32, minimum: u64, release_ms: u64) -> Result<(), Trouble> {
        let serving = self.serving.get(&slot).ok_or_else(|| unknown(slot))?;
        let disk = Arc::clone(&serving.disk);
        disk.shut();
        let until = Instant::now() + GATHER;
        // Those that are held stay; what else the server has taken may be answered before the close begins.
        while disk.held() < minimum && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        let opener = std::thread::Builder::new().name("opener".to_owned()).spawn({
            let disk = Arc::clone(&disk);
            move || {
                let until = Instant::now() + GATHER;
                while !disk.is_stopping() && Instant::now() < until {
                    std::thread::sleep(Duration::from_millis(1));
                }
                std::thread::sleep(Duration::from_millis(release_ms));
                disk.open();
            }
        });
        let opener = opener.map_err(|error| {
            disk.open();
            no_thread(&error)
        })?;
        let closed = self.close(slot);
        disk.open();
        let _panicked = opener.join();
        closed?;
        say(&Report::ClosedAll);
        Ok(())
    }

    fn close(&mut self, slot: u32) -> Result<(), Trouble> {
        let serving = self.serving.remove(&slot).ok_or_else(|| unknown(slot))?;
        close_one(slot, &serving)
    }

    fn close_many(&mut self, slots: &[u32], callers: u32) -> Result<(), Trouble> {
        let mut taken = Vec::new();
        for slot in slots {
            let serving = self.serving.remove(slot).ok_or_else(|| unknown(*slot))?;
            taken.push((*slot, serving));
        }
        let (next, troubles) = (Mutex::new(taken.into_iter()), Mutex::new(Vec::new()));
        let close_some = || {
            loop {
                let Some((slot, serving)) = next.lock().unwrap_or_else(PoisonError::into_inner).next() else { break };
                if let Err(trouble) = close_one(slot, &serving) {
                    troubles.lock().unwrap_or_else(PoisonError::into_inner).push(trouble);
                }
            }
        };
        std::thread::scope(|scope| {
            for caller in 0..callers.max(1) {
                let thread = std::thread::Builder::new().name(format!("close {caller}"));
                // Those that there are do all of it; that they were too few is told afterwards.
                if let Err(error) = thread.spawn_scoped(scope, close_some) {
                    troubles.lock().unwrap_or_else(PoisonError::into_inner).push(no_thread(&error).into());
                    break;
                }
            }
        });
        troubles.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter().next().map_or(Ok(()), Err)
    }

    /// Closes what is left. Returns the exit status.
    fn end(self) -> u8 {
        let mut status = 0;
        for serving in self.serving.into_values() {
            serving.disk.open();
            if let Err(error) = serving.device.close() {
                eprintln!("ublk-torture: failed to close device {}: {error}", serving.device.id());
                status = 1;
            }
        }
        status
    }
}

fn unknown(slot: u32) -> Trouble {
    Trouble::broke("stress", format!("there is no device number {slot} in this process"))
}

/// Tells what becomes of a device.
struct Sink(Arc<Disk>);

impl Sink {
    fn hear(&self, event: &Event) {
        match event {
            Event::Phase(Phase::Stopping) => {
                say(&Report::Stopping { in_flight: self.0.held(), at: nanoseconds() });
                self.0.stopping();
            }
            Event::Phase(Phase::Stopped) => say(&Report::Stopped),
            Event::Phase(_) => {}
            other => say(&Report::Note(other.to_string())),
        }
    }
}

fn close_one(slot: u32, serving: &Serving) -> Result<(), Trouble> {
    let id = serving.device.id();
    let begun = Instant::now();
    let planted = serving.disk.plant();
    let closed = if planted == Some(Plant::NeverDeleted) {
        Controller::open()?.stop(id, Duration::from_secs(10))?;
        say(&Report::Closed { slot, deferred: None, elapsed_ms: begun.elapsed().as_millis() as u64 });
        // As if nobody had thought of it: the device stays with its server.
        std::mem::forget(Arc::clone(&serving.device));
        return Ok(());
    } else {
        serving.device.close()?
    };
    if let Some(error) = serving.device.first_error() {
        return Err(Trouble::broke("server", format!("a queue of device {id} failed: {error}")));
    }
    let deferred = match &closed {
        Closed { deletion: Deletion::Complete, .. } => None,
        _ if planted == Some(Plant::UnnamedHolder) => Some("held by somebody".to_owned()),
        deferred => Some(deferred.to_string()),
    };
    say(&Report::Gone { id });
    say(&Report::Closed { slot, deferred, elapsed_ms: begun.elapsed().as_millis() as u64 });
    Ok(())
}

/// What a start lacked, if it was something that can be raised.
fn explain_limits(error: ublkit::Error, already: u32) -> Trouble {
    use nix::errno::Errno;
    use nix::sys::resource::{Resource, getrlimit};
    let errno = error.errno().map(Errno::from_raw);
    let what = format!("with {already} devices there already, failed to {error}");
    match errno {
        Some(Errno::EMFILE | Errno::ENFILE) => {
            let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, most)| most);
            Trouble::Environment(format!(
                "{what}; a device takes up to seven descriptors, and this process may have {limit}: raise the hard limit \
                 (`ulimit -Hn`), and /proc/sys/fs/file-max, or stress fewer --devices"
            ))
        }
        Some(Errno::ENOMEM | Errno::EAGAIN) => Trouble::Environment(format!(
            "{what}; a device takes up to 1 MiB of memory and a thread: give the machine more memory, raise the \
             limits of threads (`ulimit -u`, /proc/sys/kernel/threads-max, the cgroup's pids.max), or stress fewer --devices"
        )),
        _ => error.into(),
    }
}

/// Every how many cycles the process is looked at: often enough for a leak to show in each part of them, and not so often
/// that it is the work. Where it is not known how many there will be, the parts are those of what was `done`.
fn look_every(exactly: Option<u64>, done: u64) -> u64 {
    match exactly {
        Some(cycles) => (cycles / 12).clamp(1, LOOK_EVERY_MOST),
        None => (done / 12).clamp(LOOK_EVERY_AT_FIRST, LOOK_EVERY_MOST),
    }
}

/// Goes through cycles until there are enough of them.
fn churn(order: &ChurnOrder, enough: &AtomicBool) -> Result<Churned, Trouble> {
    let mut cycler = Cycler { seed: order.seed, plant: order.plant, costs: super::cycle::Costs::default() };
    let mut churned = Churned::default();
    let mut ids = BTreeSet::new();
    let mut samples = Vec::new();
    let mut planted = Planted::default();
    let exactly = order.extent.exactly();
    // What is made once and kept comes with the first cycles.
    let warm_up =
        exactly.map_or(4 * LOOK_EVERY_AT_FIRST, |cycles| (cycles / 5).min(2 * look_every(exactly, 0))).max(1);
    let mut next_look = warm_up;
    let begun = Instant::now();
    let mut told = Instant::now();
    let mut before = None;
    for number in 0.. {
        if order.extent.is_over(number, begun.elapsed()) || enough.load(Ordering::SeqCst) {
            break;
        }
        let dirty = number % DIRTY_EVERY == DIRTY_EVERY - 1;
        // The first ones read the program itself from where it is stored.
        let counted = number >= UNCOUNTED.min(order.extent.at_most().unwrap_or(u64::MAX) / 2);
        let outcome = cycler.cycle(number, Cycle { dirty, counted }, &|id| {
            if order.announce {
                say(&Report::Made { id });
            }
        })?;
        if order.announce {
            say(&Report::Gone { id: outcome.id });
        } else if !ids.contains(&outcome.id) {
            say(&Report::Made { id: outcome.id });
            say(&Report::Gone { id: outcome.id });
        }
        if outcome.deferred {
            churned.deferred += 1;
        }
        ids.insert(outcome.id);
        churned.cycles += 1;
        churned.dirty_cycles += u64::from(dirty);
        churned.bytes_verified += outcome.bytes_verified;
        planted.strike(order.plant)?;
        if churned.cycles == warm_up {
            before = Some(Inventory::take());
        }
        if churned.cycles >= next_look {
            next_look = churned.cycles + look_every(exactly, churned.cycles);
            let sample = Sample::take(churned.cycles);
            say(&Report::Sample(sample.clone()));
            samples.push(sample);
            fail_on_leaks(&samples, before.as_ref())?;
        }
        if told.elapsed() >= PROGRESS {
            told = Instant::now();
            say(&Report::Progress { done: churned.cycles, of: exactly.unwrap_or(0) });
        }
    }
    churned.ids = ids.len() as u64;
    churned.costs = cycler.costs;
    // To the letter, at the end: one thing left in a thousand cycles is one too many.
    let left = before.map(|before| before.surplus_after_settling()).unwrap_or_default();
    if !left.is_empty() {
        let what = format!("{} things are left after {} cycles", left.len(), churned.cycles);
        return Err(Trouble::Broke { oracle: "leak".to_owned(), what, detail: left });
    }
    Ok(churned)
}

/// Ends a run in which something grows from look to look; what of it can be named is.
fn fail_on_leaks(samples: &[Sample], before: Option<&Inventory>) -> Result<(), Trouble> {
    let mut found = footprint::leaks(samples);
    let Some(first) = found.first().cloned() else { return Ok(()) };
    // Between two cycles nothing is on its way out for long; and what grows was found without this.
    found.extend(before.map(Inventory::surplus_now).unwrap_or_default().into_iter().take(10));
    Err(Trouble::Broke { oracle: "leak".to_owned(), what: first, detail: found })
}

/// What planted bugs have left.
#[derive(Default)]
pub(super) struct Planted {
    done: u64,
}

impl Planted {
    fn strike(&mut self, plant: Option<Plant>) -> Result<(), Trouble> {
        self.done += 1;
        match plant {
            Some(Plant::LeakedFd) => match std::fs::File::open("/dev/null") {
                Ok(file) => std::mem::forget(file),
                Err(error) => return Err(Trouble::Environment(format!("failed to leak a descriptor: {error}"))),
            },
            // Large enough to be a map of its own.
            // What nobody can see an optimising compiler would not do.
            Some(Plant::LeakedMap) => drop(black_box(Vec::<u8>::with_capacity(DEVICE_BYTES as usize)).leak()),
            Some(Plant::LeakedMemory) => drop(black_box(vec![0xee_u8; 4096]).leak()),
            Some(Plant::LeakedThread) => {
                let parked = || {
                    loop {
                        std::thread::park();
                    }
                };
                drop(std::thread::Builder::new().spawn(parked).map_err(|error| no_thread(&error))?);
            }
            Some(Plant::SkippedDelete) if self.done % 10 == 5 => Self::forget_a_device()?,
            _ => {}
        }
        Ok(())
    }

    /// A device of which this process believes that it is gone.
    pub(super) fn forget_a_device() -> Result<(), Trouble> {
        let add = ublkit::ctrl::AddDevice {
            id: None,
            queues: 1,
            depth: 1,
            max_io_bytes: 4096,
            features: ublkit::sys::ublk::Features::NONE,
        };
        let id = Controller::open()?.add(&add)?.id();
        say(&Report::Made { id });
        say(&Report::Gone { id });
        Ok(())
    }
}
