//! `stress held`: a device is closed while somebody holds it open, and while a file system on it is mounted.
//!
//! The close is bounded all the same and names who holds the device; what was dirty is in the storage; and once they
//! let go the id is free.

use std::fs;
use std::io::Write;
use std::time::{Duration, Instant};

use ublkit::ctrl::block_path;

use super::load::open_direct;
use super::protocol::{Order, Report, Shape};
use super::stressed::{Stressed, exists, unexpected};
use super::{Args, Kind};
use crate::context::Context;
use crate::probe::filesystem::{Mounted, mkfs};
use crate::scenario::Failure;

/// What closing may take beyond the time it waits for others to let go.
const CLOSE_SLACK: Duration = Duration::from_secs(30);
/// How long it waits for them.
const DELETE_MS: u64 = 500;
/// How long an id may take to become free once nobody holds the device.
const FREE_DEADLINE: Duration = Duration::from_secs(20);
/// In one of how many rounds a file system is mounted too, which takes longer than the rest.
const MOUNT_EVERY: u64 = 3;
const DEVICE_BYTES: u64 = 16 << 20;
/// What the file on the mounted device holds, to be found in the storage.
const MAGIC: &[u8; 16] = b"written by close";
const FILE_BYTES: usize = 256 << 10;

pub(super) fn run(args: &Args, context: &mut Context) -> Result<(), Failure> {
    let extent = args.extent(Kind::Held, context.duration());
    let rounds = extent.least(1);
    let mounts = rounds.div_ceil(MOUNT_EVERY);
    for (name, minimum) in [
        ("closes_while_open", rounds),
        ("closes_while_mounted", mounts),
        ("holders_named", rounds + mounts),
        ("ids_free_after_letting_go", rounds + mounts),
        ("file_bytes_written_back", mounts * FILE_BYTES as u64),
    ] {
        context.evidence().require(name, minimum);
    }
    let limit = Duration::from_secs(300) + extent.limit(Duration::from_secs(60));
    context.step("close while held", limit, |context| {
        let mut stressed = Stressed::start("close while held")?;
        let first = stressed.sample(context, 0)?;
        let (mut done, mut mounted) = (0, 0);
        let begun = Instant::now();
        while !extent.is_over(done, begun.elapsed()) {
            if context.interruption().came() {
                return Err(Failure::Interrupted);
            }
            while_open(args, context, &mut stressed, 0)?;
            if done % MOUNT_EVERY == 0 {
                while_mounted(args, context, &mut stressed, 1)?;
                mounted += 1;
            }
            stressed.forget(context)?;
            done += 1;
            stressed.show(context, done, extent.exactly().unwrap_or(0));
        }
        super::account(context, stressed, &first)?;
        context.detail(format!("{done} held open, {mounted} mounted"));
        Ok(())
    })
}

fn start(args: &Args, context: &Context, stressed: &mut Stressed, slot: u32) -> Result<u32, Failure> {
    let shape = Shape {
        bytes: DEVICE_BYTES,
        depth: 32,
        max_io: 512 << 10,
        workers: 0,
        write_ms: 0,
        delete_ms: DELETE_MS,
        stop_ms: 30_000,
        plant: args.plant,
    };
    stressed.start_device(context, slot, shape)
}

/// Closes a device that somebody holds; what the close says of them.
fn close(context: &Context, stressed: &mut Stressed, slot: u32) -> Result<String, Failure> {
    stressed.order(&Order::Close { slot })?;
    let mut told = None;
    loop {
        match stressed.hear(context)? {
            Report::Stopping { .. } | Report::Stopped => {}
            Report::Closed { deferred, elapsed_ms, .. } => {
                let took = Duration::from_millis(elapsed_ms);
                if took > Duration::from_millis(DELETE_MS) + CLOSE_SLACK {
                    return Err(Failure::Hang(format!("closing a device that is held took {took:?}")));
                }
                told = Some(deferred);
            }
            Report::ClosedAll => {
                return match told.flatten() {
                    Some(told) => Ok(told),
                    None => Err(Failure::broke(
                        "close",
                        "a device that is held was closed, and its deletion was not said to wait for whoever holds it",
                    )),
                };
            }
            other => return Err(unexpected(&other)),
        }
    }
}

fn must_name(context: &Context, told: &str, who: &str) -> Result<(), Failure> {
    if !told.contains(who) {
        return Err(Failure::broke("close", format!("{who} holds the device, and the close says: {told}")));
    }
    context.evidence().add("holders_named", 1);
    Ok(())
}

fn must_become_free(context: &Context, id: u32) -> Result<(), Failure> {
    let until = Instant::now() + FREE_DEADLINE;
    while exists(id) {
        if Instant::now() > until {
            let what = format!("id {id} is still taken {FREE_DEADLINE:?} after nobody holds its device any more");
            return Err(Failure::broke("leak", what));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    context.evidence().add("ids_free_after_letting_go", 1);
    Ok(())
}

fn while_open(args: &Args, context: &mut Context, stressed: &mut Stressed, slot: u32) -> Result<(), Failure> {
    let id = start(args, context, stressed, slot)?;
    let held = open_direct(&block_path(id))?;
    let told = close(context, stressed, slot)?;
    must_name(context, &told, &format!("pid {}", std::process::id()))?;
    context.evidence().add("closes_while_open", 1);
    if block_path(id).exists() {
        return Err(Failure::broke("close", format!("{} is there after the close", block_path(id).display())));
    }
    drop(held);
    must_become_free(context, id)
}

fn while_mounted(args: &Args, context: &mut Context, stressed: &mut Stressed, slot: u32) -> Result<(), Failure> {
    let id = start(args, context, stressed, slot)?;
    mkfs(&block_path(id))?;
    let mounted = Mounted::mount(context, &block_path(id))?;
    let text: Vec<u8> = MAGIC.iter().copied().cycle().take(FILE_BYTES).collect();
    fs::File::create(mounted.path().join("file"))
        .and_then(|mut file| file.write_all(&text))
        .map_err(|error| Failure::io("write a file", &error))?;
    // Not synced: that is for the close.
    let told = close(context, stressed, slot)?;
    must_name(context, &told, &mounted.path().display().to_string())?;
    context.evidence().add("closes_while_mounted", 1);
    let found = count_magic(context, stressed, slot)?;
    if found < FILE_BYTES as u64 {
        let what = format!("of {FILE_BYTES} bytes of a file, {found} are in the storage after the close");
        return Err(Failure::broke("writeback", what));
    }
    context.evidence().add("file_bytes_written_back", found);
    // The device under it is gone, and so is what would be written to it: a mount that ends in any way will do.
    drop(mounted);
    must_become_free(context, id)
}

/// How many bytes of the storage are the file's.
fn count_magic(context: &Context, stressed: &mut Stressed, slot: u32) -> Result<u64, Failure> {
    const CHUNK: usize = 1 << 20;
    let mut found = 0;
    let mut buf = vec![0; CHUNK];
    for offset in (0..DEVICE_BYTES).step_by(CHUNK) {
        stressed.read(context, slot, offset, &mut buf)?;
        let pieces = buf.chunks_exact(MAGIC.len());
        found += pieces.filter(|piece| piece == MAGIC).count() as u64 * MAGIC.len() as u64;
    }
    Ok(found)
}
