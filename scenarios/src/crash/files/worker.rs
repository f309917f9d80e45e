//! What keeps a file system busy: writes of all kinds, renames and syncs, each told to the model before it begins, and each
//! promise when it was given.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::libc;
use ublkit_harness::SeededRng;

use super::content::{CELL, Content};
use super::model::Directory;

/// How many files a directory has at most.
const FILES_MAX: usize = 12;
/// How long a file is at most, in cells.
const CELLS_MAX: u32 = 256;
/// How long a write is at most, in cells.
const WRITE_MAX: u64 = 64;
/// What is never synced would be remembered for ever.
const UNSYNCED_MAX: usize = 48;

/// One worker's directory, and what is known of it.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) directory: Mutex<Directory>,
    pub(super) path: PathBuf,
    content: Content,
}

/// The name of a file.
pub(super) fn file_name(name: u32) -> String {
    format!("f{name}")
}

impl Place {
    /// A new directory below `root`, which is durable when `root` is synced.
    pub(super) fn make(root: &Path, worker: u32, content: Content) -> io::Result<Self> {
        let path = root.join(Self::name(worker));
        std::fs::create_dir(&path)?;
        Ok(Self { directory: Mutex::new(Directory::new(worker)), path, content })
    }

    /// The name of a worker's directory.
    pub(super) fn name(worker: u32) -> String {
        format!("w{worker}")
    }

    pub(super) fn model(&self) -> MutexGuard<'_, Directory> {
        self.directory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works until it is told to stop. Returns how many steps it did.
    pub(super) fn work(&self, rng: &mut SeededRng, stop: &AtomicBool) -> io::Result<u64> {
        let mut steps = 0;
        while !stop.load(Ordering::Relaxed) {
            self.step(rng)?;
            steps += 1;
        }
        Ok(steps)
    }

    fn step(&self, rng: &mut SeededRng) -> io::Result<()> {
        let (count, behind) = {
            let model = self.model();
            (model.names.len(), model.unsynced() > UNSYNCED_MAX)
        };
        if behind {
            return self.sync_names();
        }
        let Some((name, id)) = self.pick(rng).filter(|_| count > 2) else {
            return self.create(rng).map(drop);
        };
        if self.model().file(id).is_some_and(|file| file.unsynced() > UNSYNCED_MAX) {
            return self.sync(name, id, true);
        }
        match rng.below(100) {
            0..10 if count < FILES_MAX => self.create(rng).map(drop),
            0..22 => self.append(rng, name, id),
            22..40 => self.overwrite(rng, name, id, false),
            40..48 => self.overwrite(rng, name, id, true),
            48..54 => self.resize(rng, name, id),
            54..66 => self.sync(name, id, true),
            66..74 => self.sync(name, id, false),
            74..82 => self.replace(rng, name),
            82..86 => self.rename(name),
            86..90 => self.unlink(name),
            90..96 => self.sync_names(),
            _ => self.kick(name),
        }
    }

    /// Some file that is there.
    fn pick(&self, rng: &mut SeededRng) -> Option<(u32, u32)> {
        let model = self.model();
        let files: Vec<_> = model.names.iter().map(|(name, id)| (*name, *id)).collect();
        rng.pick(&files).copied()
    }

    fn file(&self, name: u32) -> PathBuf {
        self.path.join(file_name(name))
    }

    fn open(&self, name: u32, flags: i32) -> io::Result<File> {
        OpenOptions::new().write(true).custom_flags(flags).open(self.file(name))
    }

    /// A new file, mostly with something in it. Returns its name and id.
    fn create(&self, rng: &mut SeededRng) -> io::Result<(u32, u32)> {
        let (name, id) = {
            let mut model = self.model();
            let name = model.new_name();
            (name, model.create(name))
        };
        drop(File::create_new(self.file(name))?);
        if rng.chance(7, 8) {
            self.write(name, id, 0, rng.within(1..=WRITE_MAX) as u32, false)?;
        }
        Ok((name, id))
    }

    fn append(&self, rng: &mut SeededRng, name: u32, id: u32) -> io::Result<()> {
        let cells = rng.within(1..=WRITE_MAX) as u32;
        let end = self.model().file(id).map_or(0, super::model::File::cells);
        if end + cells > CELLS_MAX {
            return self.resize(rng, name, id);
        }
        self.write(name, id, end, cells, false)
    }

    fn overwrite(&self, rng: &mut SeededRng, name: u32, id: u32, through: bool) -> io::Result<()> {
        let length = self.model().file(id).map_or(0, super::model::File::cells);
        // Now and then beyond the end, with a hole before it.
        let first = rng.below(u64::from(length) + 8).min(u64::from(CELLS_MAX) - 1);
        let cells = rng.within(1..=(WRITE_MAX / 2).min(u64::from(CELLS_MAX) - first));
        self.write(name, id, first as u32, cells as u32, through)
    }

    fn write(&self, name: u32, id: u32, first: u32, cells: u32, through: bool) -> io::Result<()> {
        let file = self.open(name, if through { libc::O_DSYNC } else { 0 })?;
        let generation = self.model().write(id, first, cells);
        let offset = u64::from(first) * CELL as u64;
        let mut bytes = vec![0; cells as usize * CELL];
        self.content.fill(id, generation, offset, &mut bytes);
        file.write_all_at(&bytes, offset)?;
        if through {
            self.model().written_through(id);
        }
        Ok(())
    }

    fn resize(&self, rng: &mut SeededRng, name: u32, id: u32) -> io::Result<()> {
        let length = self.model().file(id).map_or(0, super::model::File::cells);
        let cells = rng.below(u64::from((length + 16).min(CELLS_MAX)) + 1) as u32;
        let file = self.open(name, 0)?;
        self.model().resize(id, cells);
        file.set_len(u64::from(cells) * CELL as u64)
    }

    fn sync(&self, name: u32, id: u32, whole: bool) -> io::Result<()> {
        let file = self.open(name, 0)?;
        let call = if whole {
            file.sync_all()?;
            "fsync"
        } else {
            file.sync_data()?;
            "fdatasync"
        };
        self.model().synced(id, call);
        Ok(())
    }

    /// What careful programs do: a new file is written and synced, and then given the name of the old one.
    fn replace(&self, rng: &mut SeededRng, name: u32) -> io::Result<()> {
        let (new, id) = self.create(rng)?;
        self.sync(new, id, true)?;
        self.model().rename(new, name);
        std::fs::rename(self.file(new), self.file(name))?;
        if rng.chance(1, 2) { self.sync_names() } else { Ok(()) }
    }

    fn rename(&self, name: u32) -> io::Result<()> {
        let new = {
            let mut model = self.model();
            let new = model.new_name();
            model.rename(name, new);
            new
        };
        std::fs::rename(self.file(name), self.file(new))
    }

    fn unlink(&self, name: u32) -> io::Result<()> {
        self.model().unlink(name);
        std::fs::remove_file(self.file(name))
    }

    fn sync_names(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()?;
        self.model().names_synced();
        Ok(())
    }

    /// Has the kernel begin to write a file back, so that the disk has much that nobody has flushed.
    fn kick(&self, name: u32) -> io::Result<()> {
        let file = self.open(name, 0)?;
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).map_err(io::Error::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ublkit_harness::Seed;

    /// On a file system that does not crash, what is there is what the model has in the end, and nothing else is right.
    #[test]
    fn the_model_follows_the_work() {
        let root = tempfile::tempdir().expect("a directory");
        let content = Content::new(3);
        let place = Place::make(root.path(), 0, content).expect("made");
        let mut rng = Seed::new(5).rng();
        for step in 0..600 {
            place.step(&mut rng).unwrap_or_else(|error| panic!("step {step}: {error}"));
        }
        place.sync_names().expect("syncs");
        let files: Vec<_> = place.model().names.clone().into_iter().collect();
        assert!(files.len() > 2);
        for (name, id) in &files {
            place.sync(*name, *id, true).expect("syncs");
            let bytes = std::fs::read(place.file(*name)).expect("reads");
            let judged = place.model().file(*id).expect("known").judge(content, &bytes).expect("right");
            assert_eq!(judged.bytes, bytes.len() as u64);
        }
        let mut found: Vec<String> = std::fs::read_dir(&place.path)
            .expect("reads")
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("text"))
            .collect();
        found.sort();
        let mut known: Vec<_> = files.iter().map(|(name, _)| file_name(*name)).collect();
        known.sort();
        assert_eq!(found, known);
    }
}
