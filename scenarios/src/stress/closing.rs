//! `stress io-while-close`: a device is closed while requests are in flight, loaded from this process.
//!
//! What is in flight is not left to chance: the backend holds the writes before the close begins and lets them go once it
//! has begun. Every request has to end; what was acknowledged has to be in the storage, dirty pages too; and nothing may
//! fail before the close began.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ublkit::ctrl::block_path;
use ublkit_harness::{Pattern, SECTOR, SectorRange};

use super::load::{Acknowledged, BLOCK, Broken, Load, open_buffered, open_direct};
use super::protocol::{Order, Report, Shape};
use super::stressed::{Stressed, unexpected};
use super::{Args, Bug, Kind};
use crate::context::Context;
use crate::runner::no_thread;
use crate::scenario::Failure;

/// Threads that load the device, one write under way each, each on a part of its own.
const LOADERS: u32 = 8;
const PART_BYTES: u64 = 256 << 10;
/// The last part is written through the page cache and left dirty.
const DEVICE_BYTES: u64 = PART_BYTES * (LOADERS as u64 + 1);
/// Requests that have to be in flight when a close begins.
const IN_FLIGHT_MIN: u64 = 4;
/// Writes that have to be acknowledged before a close begins.
const WRITES_BEFORE_MIN: u64 = 10;
/// How long what is in flight may take to end once it is let go.
const END_DEADLINE: Duration = Duration::from_secs(40);

pub(super) fn run(args: &Args, context: &mut Context) -> Result<(), Failure> {
    let extent = args.extent(Kind::IoWhileClose, context.duration());
    let rounds = extent.least(1);
    for (name, minimum) in [
        ("closes_under_load", rounds),
        ("in_flight_at_close", rounds * IN_FLIGHT_MIN),
        ("writes_acknowledged", rounds * WRITES_BEFORE_MIN),
        ("dirty_bytes_written_back", rounds * PART_BYTES),
    ] {
        context.evidence().require(name, minimum);
    }
    let limit = Duration::from_secs(120) + extent.limit(Duration::from_secs(120));
    context.step("close under load", limit, |context| {
        let mut stressed = Stressed::start("close under load")?;
        let first = stressed.sample(context, 0)?;
        let (mut least, mut done) = (u64::MAX, 0);
        let begun = Instant::now();
        while !extent.is_over(done, begun.elapsed()) {
            if context.interruption().came() {
                return Err(Failure::Interrupted);
            }
            let in_flight = one_round(args, context, &mut stressed, done as u32)?;
            least = least.min(in_flight);
            done += 1;
            stressed.show(context, done, extent.exactly().unwrap_or(0));
        }
        super::account(context, stressed, &first)?;
        context.detail(format!("{done} closes, at least {least} requests in flight at each"));
        Ok(())
    })
}

/// How a thread that loads the device ended.
struct Loaded {
    load: Load,
    broken: Option<Broken>,
}

fn one_round(args: &Args, context: &mut Context, stressed: &mut Stressed, round: u32) -> Result<u64, Failure> {
    let seed = context.seed().derive("closing", u64::from(round));
    let mut rng = seed.rng();
    let shape = Shape {
        bytes: DEVICE_BYTES,
        depth: 64,
        max_io: 64 << 10,
        // As many as have to be in flight can be held, and in some rounds more or fewer than there are loads.
        workers: rng.within(IN_FLIGHT_MIN..=12) as usize,
        write_ms: rng.within(0..=3),
        delete_ms: 30_000,
        stop_ms: 30_000,
        plant: args.plant,
    };
    // Where a request is forgotten, the server gives it up after this, and then those who wait for it and hold the device.
    let shape = match args.plant {
        Some(Bug::ForgottenRequest) => Shape { stop_ms: 4_000, delete_ms: 1_000, ..shape },
        _ => shape,
    };
    let id = stressed.start_device(context, round, shape)?;
    let path = block_path(id);
    let pattern = Arc::new(Pattern::new(seed, id));
    let foreign: Arc<[Pattern]> = Arc::new([]);
    let part =
        |index: u32| SectorRange::new(u64::from(index) * PART_BYTES / SECTOR as u64, PART_BYTES / SECTOR as u64);
    let load = |index| Load::new(seed, index, part(index), DEVICE_BYTES, &pattern, &foreign);

    let mut dirty = load(LOADERS);
    let buffered = open_buffered(&path)?;
    for block in 0..PART_BYTES / BLOCK as u64 {
        dirty
            .write_block(&buffered, block)
            .map_err(|broken| Failure::io("write through the page cache", &broken.error))?;
    }
    let (acknowledged, over) = (Arc::new(Acknowledged::default()), Arc::new(AtomicBool::new(false)));
    let mut loaders: Vec<JoinHandle<Loaded>> = Vec::new();
    for index in 0..LOADERS {
        let (mut load, file) = (load(index), open_direct(&path)?);
        let (acknowledged, enough) = (Arc::clone(&acknowledged), Arc::clone(&over));
        let thread = std::thread::Builder::new().name(format!("load {index}"));
        let body = move || {
            let mut broken = None;
            while !enough.load(Ordering::SeqCst) && broken.is_none() {
                match load.write(&file) {
                    Ok(()) => acknowledged.one(),
                    Err(error) => broken = Some(error),
                }
            }
            Loaded { load, broken }
        };
        match thread.spawn(body) {
            Ok(loader) => loaders.push(loader),
            Err(error) => {
                over.store(true, Ordering::SeqCst);
                return Err(no_thread(&error));
            }
        }
    }
    let before = WRITES_BEFORE_MIN + rng.below(30);
    let until = Instant::now() + END_DEADLINE;
    while acknowledged.count() < before && Instant::now() < until && !loaders.iter().any(JoinHandle::is_finished) {
        std::thread::sleep(Duration::from_millis(1));
    }
    let order = Order::CloseInFlight { slot: round, minimum: IN_FLIGHT_MIN, release_ms: rng.within(0..=60) };
    let closed = stressed.order(&order).and_then(|()| hear_close(context, stressed, buffered));
    // Whatever came of it: who waits for the device is not to wait any longer.
    over.store(true, Ordering::SeqCst);
    // A close that failed is told before what it may have kept from ending.
    let closing = closed?;
    let until = Instant::now() + END_DEADLINE;
    while loaders.iter().any(|one| !one.is_finished()) {
        if Instant::now() > until {
            let stuck = loaders.iter().filter(|one| !one.is_finished()).count();
            return Err(Failure::Hang(format!("{stuck} writes did not end within {END_DEADLINE:?} of the close")));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    context.evidence().add("writes_acknowledged", acknowledged.count());
    context.evidence().add("in_flight_at_close", closing.in_flight);
    context.evidence().add("closes_under_load", u64::from(closing.in_flight >= IN_FLIGHT_MIN));
    let mut verified = 0;
    for loader in loaders {
        let loaded =
            loader.join().map_err(|_| Failure::Internal("a thread that loads a device panicked".to_owned()))?;
        let Loaded { mut load, broken } = loaded;
        if let Some(broken) = broken {
            if broken.at < closing.began_at {
                let before = Duration::from_nanos(closing.began_at - broken.at);
                return Err(Failure::io(format_args!("write, {before:?} before the close began"), &broken.error));
            }
            context.evidence().add("writes_failed_after_close", 1);
        }
        verified += load.verify(|offset, buf| stressed.read(context, round, offset, buf))?;
    }
    let written_back = dirty.verify(|offset, buf| stressed.read(context, round, offset, buf))?;
    context.evidence().add("dirty_bytes_written_back", written_back);
    context.evidence().add("bytes_verified", verified + written_back);
    stressed.forget(context)?;
    Ok(closing.in_flight)
}

/// How a close went.
struct Closing {
    in_flight: u64,
    began_at: u64,
}

/// Listens to a close; lets go of `held` once the device is stopped, and not before: closing a device's last descriptor
/// would write its pages back too.
fn hear_close(context: &Context, stressed: &mut Stressed, held: std::fs::File) -> Result<Closing, Failure> {
    let mut held = Some(held);
    let mut closing = Closing { in_flight: 0, began_at: u64::MAX };
    loop {
        match stressed.hear(context)? {
            Report::Stopping { in_flight, at } => (closing.in_flight, closing.began_at) = (in_flight, at),
            Report::Stopped => drop(held.take()),
            Report::Closed { deferred: None, .. } => {}
            Report::Closed { deferred: Some(why), slot, .. } => {
                return Err(Failure::broke("close", format!("device number {slot}: {why}")));
            }
            Report::ClosedAll => return Ok(closing),
            other => return Err(unexpected(&other)),
        }
    }
}
