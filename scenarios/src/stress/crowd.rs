//! `stress many`: many devices at once, each of which holds what was written to it and nothing of the others', also while others
//! are closed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit};
use ublkit::ctrl::block_path;
use ublkit_harness::{Pattern, SECTOR, SectorRange};

use super::load::{BLOCK, Load, open_direct};
use super::protocol::{Order, Report, Shape};
use super::stressed::{Stressed, unexpected};
use super::{Args, Bug, Kind};
use crate::context::Context;
use crate::footprint::Measure;
use crate::runner::no_thread;
use crate::scenario::Failure;

/// Each device is as large as what is written to it.
const DEVICE_BYTES: u64 = 16 * BLOCK as u64;
/// Threads that load the devices.
const LOADERS: usize = 4;
/// Threads that close them.
const CALLERS: u32 = 4;
/// Descriptors that a device takes of its server.
const DESCRIPTORS_EACH: u64 = 7;
/// Memory that a device takes, the kernel's and the server's: with two processors a fifth of this.
const MEMORY_EACH: u64 = 1 << 20;

/// Of those that stay, how many at most are verified while a close is held up.
const MEANWHILE_MOST: u64 = 32;

/// A device of the crowd.
struct Member {
    slot: u32,
    id: u32,
    load: Load,
}

pub(super) fn run(args: &Args, context: &mut Context) -> Result<(), Failure> {
    let devices = u64::from(args.devices());
    check_limits(devices)?;
    let extent = args.extent(Kind::Many, context.duration());
    let crowds = extent.least(1);
    for (name, minimum) in [
        ("crowds", crowds),
        ("devices_started", crowds * devices),
        // All of them through the device and in the storage, and those that stay longest there once more.
        ("crowd_bytes_verified", crowds * (2 * devices + staying(devices)) * DEVICE_BYTES),
        ("verified_while_others_closed", crowds * verified_meanwhile(staying(devices)) * DEVICE_BYTES),
    ] {
        context.evidence().require(name, minimum);
    }
    let limit = Duration::from_secs(180) + extent.limit(Duration::from_secs(6 * devices));
    context.step("many at once", limit, |context| {
        let mut stressed = Stressed::start("many at once")?;
        let first = stressed.sample(context, 0)?;
        let (mut done, mut compared, mut full) = (0, 0, None);
        let begun = Instant::now();
        while !extent.is_over(done, begun.elapsed()) {
            let mut crowd = start_all(args, context, &mut stressed, done)?;
            if full.is_none() {
                full = Some(stressed.sample(context, devices)?);
            }
            compared += verify_all(context, &mut stressed, &mut crowd)?;
            close_all(args, context, &mut stressed, crowd)?;
            stressed.forget(context)?;
            context.evidence().add("crowds", 1);
            done += 1;
        }
        let full = full.unwrap_or_else(|| first.clone());
        let each = |measure: Measure| full.of(measure).saturating_sub(first.of(measure)) / devices;
        context.note(format!(
            "a device takes {} descriptors, {} threads, {} maps, {} KiB of its server's memory, {} KiB of the kernel's, {} KiB \
             of the machine's altogether",
            each(Measure::Descriptors),
            each(Measure::Threads),
            each(Measure::Maps),
            each(Measure::ResidentBytes) >> 10,
            each(Measure::KernelBytes) >> 10,
            each(Measure::UnavailableBytes) >> 10,
        ));
        super::account(context, stressed, &first)?;
        context.detail(format!("{done} times {devices} devices, {compared} bytes verified while all were there"));
        Ok(())
    })
}

/// How many of a crowd stay when the first are closed.
const fn staying(devices: u64) -> u64 {
    devices - devices / 2
}

/// How many of those are verified while others are closed for certain, and not only if that takes long enough.
fn verified_meanwhile(staying: u64) -> u64 {
    staying.min(MEANWHILE_MOST)
}

/// Writes to all of them, and reads all of it back, from the devices and from their storages.
fn verify_all(context: &Context, stressed: &mut Stressed, crowd: &mut [Member]) -> Result<u64, Failure> {
    for member in &mut *crowd {
        // Once everywhere before the first is read, so that what one has of another is seen.
        write_all(member)?;
    }
    let through = for_each(crowd, |member| member.load.verify_device(&open_direct(&block_path(member.id))?))?;
    let mut compared: u64 = through.iter().sum();
    for member in crowd {
        let slot = member.slot;
        compared += member.load.verify(|offset, buf| stressed.read(context, slot, offset, buf))?;
    }
    context.evidence().add("crowd_bytes_verified", compared);
    context.evidence().add("bytes_verified", compared);
    Ok(compared)
}

/// What a crowd takes has to be there: found out before the first device, said with what to raise.
fn check_limits(devices: u64) -> Result<(), Failure> {
    let descriptors = 64 + DESCRIPTORS_EACH * devices;
    let most = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(_, most)| most);
    if most < descriptors {
        return Err(Failure::Environment(format!(
            "{devices} devices take {descriptors} descriptors, and this process may have {most}: raise the hard limit (`ulimit -Hn \
             {descriptors}`), or stress fewer --devices"
        )));
    }
    let available = crate::footprint::available_bytes();
    if available < MEMORY_EACH * devices {
        return Err(Failure::Environment(format!(
            "{devices} devices take some {} MiB of memory, and {} MiB are available: give the machine more (`ci/vm --memory`), or \
             stress fewer --devices",
            (MEMORY_EACH * devices) >> 20,
            available >> 20
        )));
    }
    Ok(())
}

fn start_all(
    args: &Args,
    context: &mut Context,
    stressed: &mut Stressed,
    crowd: u64,
) -> Result<Vec<Member>, Failure> {
    let mut ids = BTreeMap::new();
    for slot in 0..args.devices() {
        if context.interruption().came() {
            return Err(Failure::Interrupted);
        }
        let shape = Shape {
            bytes: DEVICE_BYTES,
            depth: 4,
            max_io: 64 << 10,
            workers: 0,
            write_ms: 0,
            delete_ms: 60_000,
            stop_ms: 30_000,
            plant: args.plant,
        };
        let id = stressed.start_device(context, slot, shape)?;
        if let Some(other) = ids.insert(id, slot) {
            let what = format!("devices number {other} and {slot}, both alive, have the id {id}");
            return Err(Failure::broke("identity", what));
        }
        if slot % 8 == 7 {
            stressed.show(context, u64::from(slot) + 1, u64::from(args.devices()));
        }
    }
    context.evidence().add("devices_started", ids.len() as u64);
    let seed = context.seed().derive("crowd", crowd);
    // A few others, so that a sector that came from one of them is called by its name.
    let foreign: Arc<[Pattern]> = ids.keys().take(32).map(|id| Pattern::new(seed, *id)).collect();
    let region = SectorRange::device(DEVICE_BYTES);
    let member = |(id, slot): (u32, u32)| {
        let pattern = Arc::new(Pattern::new(seed, id));
        Member { slot, id, load: Load::new(seed, slot, region, DEVICE_BYTES, &pattern, &foreign) }
    };
    Ok(ids.into_iter().map(member).collect())
}

fn write_all(member: &mut Member) -> Result<(), Failure> {
    let file = open_direct(&block_path(member.id))?;
    for block in 0..DEVICE_BYTES / BLOCK as u64 {
        member.load.write_block(&file, block).map_err(|broken| {
            Failure::io(format_args!("write block {block} of device {}", member.id), &broken.error)
        })?;
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Does something with every member, on several threads; returns what came of each, or the first failure.
fn for_each<T: Send>(
    crowd: &mut [Member],
    work: impl Fn(&mut Member) -> Result<T, Failure> + Sync,
) -> Result<Vec<T>, Failure> {
    let (members, done, failed) = (Mutex::new(crowd.iter_mut()), Mutex::new(Vec::new()), Mutex::new(None));
    let do_some = || {
        loop {
            let Some(member) = lock(&members).next() else { break };
            match work(member) {
                Ok(result) => lock(&done).push(result),
                Err(failure) => {
                    lock(&failed).get_or_insert(failure);
                    break;
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for loader in 0..LOADERS {
            let thread = std::thread::Builder::new().name(format!("load {loader}"));
            if let Err(error) = thread.spawn_scoped(scope, do_some) {
                lock(&failed).get_or_insert(no_thread(&error));
                break;
            }
        }
    });
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(failure) => Err(failure),
        None => Ok(done.into_inner().unwrap_or_else(PoisonError::into_inner)),
    }
}

/// Closes all of them in random order, half of them while the other half is loaded and verified.
///
/// That it is so is not left to the time that each takes: one of those that are closed is held open, so that they are not all
/// closed before enough of the others are verified.
fn close_all(
    args: &Args,
    context: &mut Context,
    stressed: &mut Stressed,
    mut crowd: Vec<Member>,
) -> Result<(), Failure> {
    let mut rng = context.seed().derive("order", 0).rng();
    rng.shuffle(&mut crowd);
    let mut staying = crowd.split_off(crowd.len() / 2);
    let mut slots: Vec<u32> = crowd.iter().map(|member| member.slot).collect();
    if args.plant == Some(Bug::ClosedNeighbour)
        && let (Some(slot), Some(neighbour)) = (slots.last_mut(), staying.first())
    {
        *slot = neighbour.slot;
    }
    // The first: somebody closes it from the beginning on, while others close the rest.
    let held = crowd.first().map(|member| open_direct(&block_path(member.id))).transpose()?;
    stressed.order(&Order::CloseMany { slots, callers: CALLERS })?;
    while !matches!(hear_of_close(context, stressed)?, Report::Stopping { .. }) {}
    let load = |member: &mut Member| {
        let file = open_direct(&block_path(member.id))?;
        for _ in 0..4 {
            let written = member.load.write(&file);
            written.map_err(|broken| Failure::io(format_args!("write to device {}", member.id), &broken.error))?;
        }
        member.load.verify_device(&file)
    };
    let enough = verified_meanwhile(staying.len() as u64) as usize;
    let (meanwhile, others) = staying.split_at_mut(enough);
    let compared: u64 = for_each(meanwhile, load)?.iter().sum();
    context.evidence().add("verified_while_others_closed", compared);
    drop(held);
    let compared = compared + for_each(others, load)?.iter().sum::<u64>();
    context.evidence().add("bytes_verified", compared);
    while !matches!(hear_of_close(context, stressed)?, Report::ClosedAll) {}
    // Those that stayed are as they were.
    for member in &mut staying {
        let slot = member.slot;
        let bytes = member.load.verify(|offset, buf| stressed.read(context, slot, offset, buf))?;
        context.evidence().add("crowd_bytes_verified", bytes);
    }
    for member in &staying {
        let file = open_direct(&block_path(member.id))?;
        let size = ublkit::blkdev::size(&file).map_err(|error| Failure::io("ask for a size", &error))?;
        if size != DEVICE_BYTES || !size.is_multiple_of(SECTOR as u64) {
            return Err(Failure::broke("size", format!("device {} has {size} bytes", member.id)));
        }
    }
    let slots = staying.iter().map(|member| member.slot).collect();
    stressed.order(&Order::CloseMany { slots, callers: CALLERS })?;
    while !matches!(hear_of_close(context, stressed)?, Report::ClosedAll) {}
    Ok(())
}

/// What the process says next of closes: nothing but what belongs to one that is complete.
fn hear_of_close(context: &Context, stressed: &mut Stressed) -> Result<Report, Failure> {
    match stressed.hear(context)? {
        Report::Closed { deferred: Some(why), slot, .. } => {
            Err(Failure::broke("close", format!("device number {slot}: {why}")))
        }
        report @ (Report::Stopping { .. } | Report::Stopped | Report::Closed { .. } | Report::ClosedAll) => {
            Ok(report)
        }
        other => Err(unexpected(&other)),
    }
}
