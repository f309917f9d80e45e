//! Buffered writes far beyond the memory that those who write may have.
//!
//! The pages that have to be written before any become free are those of the very devices that are served. Most of
//! the storage has no memory yet, so that the servers do have to ask for some. The limits are for the writer alone: a
//! server in a full group is killed by the kernel for want of memory, and that says nothing of it. The lower limit
//! keeps the writer waiting until there is less, and the upper one, beyond which it is killed, is far enough from it.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ublkit_harness::Seed;

use super::cgroup::{self, Group, Limits, Pressure};
use super::stack::Chain;
use crate::aligned::AlignedBuf;
use crate::context::Context;
use crate::scenario::Failure;
use crate::server;

/// The argument with which this program becomes the load.
pub(crate) const ARGUMENT: &str = "load-under-pressure";
/// How much is written, in bytes, and how often it is written over.
pub(super) const BYTES: u64 = 32 << 20;
const ROUNDS: u64 = 2;
/// What the process that writes may have: less than it writes, so that it does not get past without writing back.
const LIMITS: Limits = Limits { high: 12 << 20, max: 24 << 20 };
const _: () = assert!(LIMITS.max < BYTES);
const CHUNK: usize = 1 << 20;
/// How long the writes may take, on a slow machine.
const DEADLINE: Duration = Duration::from_secs(150);
/// And to compare what was written.
const VERIFY: Duration = Duration::from_secs(180);
const LOOK: Duration = Duration::from_millis(10);

pub(super) fn check(context: &mut Context, chain: &Chain) -> Result<(), Failure> {
    context.step("memory pressure", DEADLINE + VERIFY, |context| press(context, chain))
}

fn press(context: &mut Context, chain: &Chain) -> Result<(), Failure> {
    let top = chain.top()?;
    let _ours_alone = crate::torture::device::locked(top)?;
    let direct = top.open_direct()?;
    let group = Group::new(context, "load", LIMITS)?;
    let seed = context.seed().derive("pressure", 0);
    let began = Instant::now();
    let mut load = Load::start(&top.path(), &group.procs(), seed)?;
    let ended = load.wait(context);
    let took = began.elapsed();
    let Pressure { hits, scanned, killed } = group.pressure()?;
    drop(load);
    drop(group);
    if killed > 0 {
        return Err(Failure::Environment(
            "the process that writes was killed for want of memory: this machine does not write back fast enough; leave \
             the part out with --only"
                .to_owned(),
        ));
    }
    ended?;
    context.evidence().add("memory_limit_hits", hits);
    context.evidence().add("pages_scanned_for_memory", scanned);
    let mut found = AlignedBuf::zeroed(CHUNK);
    let mut stored = vec![0; CHUNK];
    let mut right = vec![0; CHUNK];
    for at in (0..BYTES).step_by(CHUNK) {
        fill(&mut right, seed, ROUNDS - 1, at);
        direct.read_exact_at(&mut found, at).map_err(|error| Failure::io("read at the top", &error))?;
        expect(&found, &right, "the top", at)?;
        // What is read at the top comes from the bottom: a look at every fourth place there is to see that it is the same.
        if (at / CHUNK as u64).is_multiple_of(4) {
            top.storage().read_at(&mut stored, at)?;
            expect(&stored, &right, "the bottom", at)?;
        }
        context.evidence().add("pressure_bytes_verified", CHUNK as u64);
    }
    context.detail(format!(
        "{} MiB written with {} MiB to have, in {} ms; the limit was met {hits} times, {scanned} pages were scanned",
        (ROUNDS * BYTES) >> 20,
        LIMITS.high >> 20,
        took.as_millis()
    ));
    Ok(())
}

fn expect(found: &[u8], right: &[u8], place: &str, at: u64) -> Result<(), Failure> {
    let Some(difference) = crate::probe::filesystem::difference(found, right) else { return Ok(()) };
    let what = format!("after writes under memory pressure, {place} is wrong from {at} on: {difference}");
    Err(Failure::broke("content", what))
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
            // In a process group of its own: what is typed at the terminal is for this program to deal with.
            .process_group(0)
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
                Ok(None) if context.interruption().came() => return Err(Failure::Interrupted),
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
        // Before its number can be another process's.
        server::forget(self.0.id());
        let _ended_already = self.0.wait();
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
