//! Power cuts: the storage as it is at one moment, served as another device.
//!
//! The moment is a real one: no request is half done in the copy, and what the file system had under way is missing from it,
//! just as after a power cut of a device without a volatile cache. So the journal has to be replayed, and everything that
//! `fsync` had acknowledged before has to be there.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use ublkit::{Backend, Geometry, WriteFlags, ZeroFlags, backends};

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
/// How much is copied at a time.
const COPY_BYTES: usize = 1 << 20;

/// Storage that can be stopped between two requests.
pub(super) struct Freezer {
    inner: Storage,
    geometry: Geometry,
    gate: RwLock<()>,
}

impl Freezer {
    pub(super) fn new(inner: Storage) -> Self {
        Self { geometry: inner.backend().geometry(), inner, gate: RwLock::new(()) }
    }

    /// Copies the storage as it is at one moment. `before` is called first, with requests already stopped.
    fn copy<T>(&self, before: impl FnOnce() -> T) -> io::Result<(T, backends::Memory)> {
        let _stopped = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let before = before();
        let copy = backends::Memory::with_geometry(self.geometry);
        let mut buf = vec![0; COPY_BYTES];
        let mut offset = 0;
        while offset < self.geometry.size {
            let len = (self.geometry.size - offset).min(COPY_BYTES as u64);
            let part = &mut buf[..len as usize];
            self.inner.read_at(part, offset)?;
            // Pages of zeroes take no memory.
            copy.write_at(part, offset, WriteFlags::NONE)?;
            offset += len;
        }
        Ok((before, copy))
    }

    fn pass<T>(&self, request: impl FnOnce(&dyn Backend) -> io::Result<T>) -> io::Result<T> {
        let _open = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        request(self.inner.backend().as_ref())
    }
}

impl Backend for Freezer {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.pass(|inner| inner.read_at(buf, offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        self.pass(|inner| inner.write_at(buf, offset, flags))
    }

    fn flush(&self) -> io::Result<()> {
        self.pass(|inner| inner.flush())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.pass(|inner| inner.discard(offset, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.pass(|inner| inner.write_zeroes(offset, len, flags))
    }
}

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
    freezer: &Freezer,
    round: u32,
    made: &mut Vec<u32>,
) -> Result<(), Failure> {
    let (synced, copy) = under_load(context, mounted, freezer, round)?;
    let replay =
        needs_replay(&copy).map_err(|error| Failure::Internal(format!("the copy cannot be read: {error}")))?;
    if !replay {
        return Err(Failure::broke(
            "power-cut",
            "the file system in the copy is clean, though it is mounted and in use",
        ));
    }
    context.evidence().add("journals_replayed", 1);
    let args = TargetArgs { backend: BackendKind::Memory, mutant: None, ..args.clone() };
    let target = args.serve(context, Storage::new(Arc::new(copy)))?;
    made.push(target.device().id());
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
    freezer: &Freezer,
    round: u32,
) -> Result<(Vec<Synced>, backends::Memory), Failure> {
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
        let copied = freezer.copy(|| lock(&synced));
        stop.store(true, Ordering::Relaxed);
        copied
    });
    if let Some((what, error)) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(Failure::io(what, &error));
    }
    if context.interruption().came() {
        return Err(Failure::Interrupted);
    }
    copied.map_err(|error| Failure::Environment(format!("failed to copy the storage: {error}")))
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
    let mounted = Mounted::mount(&target.path())?;
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

/// Whether the ext4 in the storage says that its journal has to be replayed: bit 2 of the incompatible features in the
/// superblock (`EXT4_FEATURE_INCOMPAT_RECOVER`, `fs/ext4/ext4.h`).
fn needs_replay(storage: &dyn Backend) -> io::Result<bool> {
    let mut superblock = vec![0; 4096];
    storage.read_at(&mut superblock, 0)?;
    Ok(superblock[1024 + 0x60] & 4 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_what_was_there_and_stays_so() {
        let storage = Storage::new(Arc::new(backends::Memory::new(3 << 20)));
        let freezer = Freezer::new(storage);
        freezer.write_at(&[7; 512], (2 << 20) + 512, WriteFlags::NONE).expect("writes");
        let ((), copy) = freezer.copy(|| ()).expect("copies");
        freezer.write_at(&[8; 512], (2 << 20) + 512, WriteFlags::NONE).expect("writes");
        let mut found = [0; 512];
        copy.read_at(&mut found, (2 << 20) + 512).expect("reads");
        assert_eq!(found, [7; 512]);
        assert_eq!(copy.geometry(), freezer.geometry());
    }

    #[test]
    fn the_flag_for_a_replay_is_read_from_the_superblock() {
        let disk = backends::Memory::new(1 << 20);
        assert!(!needs_replay(&disk).expect("reads"));
        let mut superblock = [0; 1024];
        superblock[0x60] = 0x46;
        disk.write_at(&superblock, 1024, WriteFlags::NONE).expect("writes");
        assert!(needs_replay(&disk).expect("reads"));
    }
}
