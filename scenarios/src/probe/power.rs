//! Power cuts: the storage as it is at one moment, served as another device.
//!
//! The moment is a real one: no request is half done in the copy, and what the file system had under way is missing from it,
//! just as after a power cut of a device without a volatile cache. So the journal has to be replayed, and everything that
//! `fsync` had acknowledged before has to be there.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::filesystem::{Mounted, content, difference, fsck};
use crate::context::Context;
use crate::scenario::Failure;
use crate::target::{BackendKind, Storage, Target, TargetArgs};

/// How many power cuts there are.
pub(super) const CUTS: u32 = 3;
/// Threads that create files meanwhile.
const WRITERS: u32 = 4;
/// How many files must have been acknowledged before the power is cut.
const FILES_MIN: usize = 12;
/// A file that `fsync` has acknowledged, its directory entry included.
#[derive(Clone, Debug)]
struct Synced {
    name: String,
    len: usize,
}

/// Cuts the power while files are created, and looks for every file that was acknowledged.
pub(super) fn cut(
    context: &mut Context,
    args: &TargetArgs,
    mounted: &Mounted,
    served: &Target,
    round: u32,
    made: &mut Vec<u32>,
) -> Result<(), Failure> {
    let (synced, copy) = under_load(context, mounted, served, round)?;
    let mut superblock = vec![0; 4096];
    copy.read_at(&mut superblock, 0)?;
    if !needs_replay(&superblock) {
        return Err(Failure::broke(
            "power-cut",
            "the file system in the copy is clean, though it is mounted and in use",
        ));
    }
    context.evidence().add("journals_replayed", 1);
    let args = TargetArgs { backend: BackendKind::Memory, mutant: None, ..args.clone() };
    let target = args.serve(context, &copy)?;
    made.push(target.id());
    let checked = look(context, &target, &synced);
    let closed = target.close(context);
    checked.and(closed)?;
    context.evidence().add("synced_files_after_power_cuts", synced.len() as u64);
    context.detail(format!("journal replayed, {} acknowledged files there and whole, fsck clean", synced.len()));
    Ok(())
}

/// The storage at a moment when several threads create files, and what had been acknowledged by then.
fn under_load(
    context: &Context,
    mounted: &Mounted,
    served: &Target,
    round: u32,
) -> Result<(Vec<Synced>, Storage), Failure> {
    let synced = Mutex::new(Vec::new());
    let failed = Mutex::new(None);
    let stop = AtomicBool::new(false);
    let seed = context.seed();
    let dir = mounted.path();
    let lock = |list: &Mutex<Vec<Synced>>| list.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let copied = thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (synced, failed, stop) = (&synced, &failed, &stop);
            scope.spawn(move || {
                let mut rng = seed.derive("power-cut", u64::from(round << 8 | writer)).rng();
                for number in 0_u64.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let name = format!("cut-{round}-{writer}-{number}");
                    let len = rng.within(1..=64 << 10) as usize;
                    match create(dir, &name, &content(seed, &name, len)) {
                        Ok(()) => {
                            synced.lock().unwrap_or_else(PoisonError::into_inner).push(Synced { name, len });
                        }
                        Err(error) => {
                            let what = format!("create {name} and fsync it");
                            failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert((what, error));
                            return;
                        }
                    }
                }
            });
        }
        let patience = Instant::now() + Duration::from_secs(30);
        let mut rng = seed.derive("power-cut moment", u64::from(round)).rng();
        let ready = || {
            let broken = failed.lock().unwrap_or_else(PoisonError::into_inner).is_some();
            lock(&synced).len() >= FILES_MIN || broken || context.interruption().came() || Instant::now() > patience
        };
        while !ready() {
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(Duration::from_micros(rng.below(20_000)));
        let copied = served.storage().copy(|| lock(&synced));
        stop.store(true, Ordering::Relaxed);
        copied
    });
    if let Some((what, error)) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(Failure::io(what, &error));
    }
    if context.interruption().came() {
        return Err(Failure::Interrupted);
    }
    copied
}

/// Returns when the file and its name are durable.
fn create(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create_new(dir.join(name))?;
    file.write_all(bytes)?;
    file.sync_all()?;
    File::open(dir)?.sync_all()
}

/// Mounts the copy, which replays the journal, and compares.
fn look(context: &Context, target: &Target, synced: &[Synced]) -> Result<(), Failure> {
    let mounted = Mounted::mount(context, &target.path())?;
    for Synced { name, len } in synced {
        let found = fs::read(mounted.path().join(name)).map_err(|error| {
            Failure::broke(
                "power-cut",
                format!("{name} was acknowledged by fsync and cannot be read afterwards: {error}"),
            )
        })?;
        if let Some(difference) = difference(&found, &content(context.seed(), name, *len)) {
            return Err(Failure::broke(
                "power-cut",
                format!("{name} was acknowledged by fsync; afterwards {difference}"),
            ));
        }
    }
    mounted.unmount()?;
    fsck(&target.path())
}

/// Whether an ext4, of which this is the first block, says that its journal has to be replayed: bit 2 of the incompatible
/// features in the superblock (`EXT4_FEATURE_INCOMPAT_RECOVER`, `fs/ext4/ext4.h`).
pub(crate) fn needs_replay(block: &[u8]) -> bool {
    block.get(1024 + 0x60).is_some_and(|features| features & 4 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_for_a_replay_is_read_from_the_superblock() {
        let mut block = vec![0; 4096];
        assert!(!needs_replay(&block));
        block[1024 + 0x60] = 0x46;
        assert!(needs_replay(&block));
    }
}
