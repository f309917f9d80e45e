//! Buffered writes far beyond the memory that those who write may have, while the servers have a limit of their own.
//!
//! The pages that have to be written before any become free are those of the very devices that are served. A part of
//! the storage has no memory yet, so that the servers do have to ask for some. The two limits are apart: where one
//! was shared, and full of dirty pages of the server's own device, the kernel killed the server for want of memory.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ublkit::blkdev;
use ublkit_harness::Seed;

use super::cgroup::{self, Group};
use super::stack::Chain;
use crate::aligned::AlignedBuf;
use crate::context::Context;
use crate::scenario::Failure;
use crate::server;

/// The argument with which this program becomes the load.
pub(crate) const ARGUMENT: &str = "load-under-pressure";
/// How much is written, in bytes, and how often it is written over.
pub(super) const BYTES: u64 = 24 << 20;
const ROUNDS: u64 = 4;
/// The first of it are new to the storage.
const FRESH: u64 = 2 << 20;
/// What the process that writes may have.
const LIMIT: u64 = 20 << 20;
/// What the servers may have, together and beside what they had before.
const SERVERS_LIMIT: u64 = FRESH + (14 << 20);
const CHUNK: usize = 1 << 20;
/// How long the writes may take, on a slow machine.
const DEADLINE: Duration = Duration::from_secs(150);
const LOOK: Duration = Duration::from_millis(10);

pub(super) fn check(context: &mut Context, chain: &Chain) -> Result<(), Failure> {
    context.step("memory pressure", DEADLINE + Duration::from_secs(60), |context| press(context, chain))
}

fn press(context: &mut Context, chain: &Chain) -> Result<(), Failure> {
    let top = chain.top()?;
    let _ours_alone = crate::torture::device::locked(top)?;
    let direct = top.open_direct()?;
    blkdev::discard(&direct, 0, BYTES).map_err(|error| Failure::io("discard at the top", &error))?;
    let zeroes = AlignedBuf::zeroed(CHUNK);
    for at in (FRESH..BYTES).step_by(CHUNK) {
        direct.write_all_at(&zeroes, at).map_err(|error| Failure::io("write at the top", &error))?;
    }
    // The one that was made first is the last to go: it puts back what was changed of the hierarchy.
    let mut servers = Group::new("servers", SERVERS_LIMIT)?;
    for pid in chain.servers()? {
        servers.enter(pid)?;
    }
    let group = Group::new("load", LIMIT)?;
    let seed = context.seed().derive("pressure", 0);
    let began = Instant::now();
    let mut load = Load::start(&top.path(), &group.procs(), seed)?;
    load.wait(context)?;
    let (hits, killed) = group.hits()?;
    let killed = killed + servers.hits()?.1;
    let took = began.elapsed();
    drop(group);
    drop(servers);
    if killed > 0 {
        return Err(Failure::broke("memory", format!("{killed} processes were killed for want of memory")));
    }
    context.evidence().add("memory_limit_hits", hits);
    let mut found = AlignedBuf::zeroed(CHUNK);
    let mut stored = vec![0; CHUNK];
    let mut right = vec![0; CHUNK];
    for at in (0..BYTES).step_by(CHUNK) {
        fill(&mut right, seed, ROUNDS - 1, at);
        direct.read_exact_at(&mut found, at).map_err(|error| Failure::io("read at the top", &error))?;
        top.storage().read_at(&mut stored, at)?;
        for (bytes, place) in [(&found[..], "the top"), (&stored[..], "the bottom")] {
            if let Some(difference) = crate::probe::filesystem::difference(bytes, &right) {
                let what = format!("after writes under memory pressure, {place} is wrong from {at} on: {difference}");
                return Err(Failure::broke("content", what));
            }
        }
        context.evidence().add("pressure_bytes_verified", CHUNK as u64);
    }
    context.detail(format!(
        "{} MiB written with {} MiB to have, in {} ms; the limit was met {hits} times",
        (ROUNDS * BYTES) >> 20,
        LIMIT >> 20,
        took.as_millis()
    ));
    Ok(())
}

/// What lies at a place after a round.
fn fill(bytes: &mut [u8], seed: Seed, round: u64, at: u64) {
    for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
        let place = at + index as u64 * 8;
        // Any mixture will do in which each place of each round differs (the multiplier is 2^64 by the golden ratio).
        let mixed = (place ^ (round << 56) ^ seed.get()).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        word.copy_from_slice(&(mixed ^ (mixed >> 29)).to_le_bytes());
    }
}

/// The process that writes.
struct Load(Child);

impl Load {
    fn start(device: &Path, procs: &Path, seed: Seed) -> Result<Self, Failure> {
        let child = Command::new("/proc/self/exe")
            .arg(ARGUMENT)
            .arg(device)
            .arg(procs)
            .arg(seed.get().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .map_err(|error| Failure::Environment(format!("failed to start the load: {error}")))?;
        // If nothing moves any more, it is killed with the servers.
        server::adopt(child.id());
        Ok(Self(child))
    }

    fn wait(&mut self, context: &Context) -> Result<(), Failure> {
        let until = Instant::now() + context.at_most(DEADLINE);
        loop {
            match self.0.try_wait() {
                Ok(Some(status)) if status.success() => return Ok(()),
                Ok(Some(status)) => {
                    return Err(Failure::broke("memory", format!("the process that writes ended with {status}")));
                }
                Ok(None) if Instant::now() < until => std::thread::sleep(LOOK),
                Ok(None) => return Err(Failure::Hang("buffered writes do not end while memory is short".to_owned())),
                Err(error) => return Err(Failure::Internal(format!("failed to wait for the load: {error}"))),
            }
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ended_already = self.0.kill();
        let _ended_already = self.0.wait();
        server::forget(self.0.id());
    }
}

/// The process that writes: device, control group, seed.
pub(crate) fn main(args: &[OsString]) -> u8 {
    match write(args) {
        Ok(()) => 0,
        Err(error) => {
            crate::cli::complain(&format!("failed to write under memory pressure: {error}"));
            1
        }
    }
}

fn write(args: &[OsString]) -> std::io::Result<()> {
    let [device, procs, seed] = args else { return Err(std::io::ErrorKind::InvalidInput.into()) };
    let seed = seed.to_str().and_then(|seed| seed.parse().ok()).ok_or(std::io::ErrorKind::InvalidInput)?;
    cgroup::enter(Path::new(procs), std::process::id())?;
    let file: File = OpenOptions::new().write(true).open(device)?;
    let mut bytes = vec![0; CHUNK];
    for round in 0..ROUNDS {
        for at in (0..BYTES).step_by(CHUNK) {
            fill(&mut bytes, Seed::new(seed), round, at);
            file.write_all_at(&bytes, at)?;
        }
    }
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_and_round_differs() {
        let (mut one, mut other) = (vec![0; 4096], vec![0; 4096]);
        fill(&mut one, Seed::new(1), 0, 0);
        for (seed, round, at) in [(1, 1, 0), (1, 0, 4096), (2, 0, 0)] {
            fill(&mut other, Seed::new(seed), round, at);
            assert!(one.chunks(8).zip(other.chunks(8)).all(|(one, other)| one != other));
        }
    }
}
