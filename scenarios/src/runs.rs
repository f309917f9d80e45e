//! Which devices each run made and what else it changed, kept where the next run finds it after a `SIGKILL`.
//!
//! Each run that makes devices, mounts something or changes a setting of the machine has a file
//! `/run/ublk-torture/PID-STARTTIME.json` for as long as that lasts. What was changed the next run puts back. A file
//! whose process is gone tells the next run what it may clean: devices that this program made, that are still the
//! same ones (by their inode in sysfs, whose numbers are not used again), and that nobody serves. A device that is killed
//! between its creation and its entry in the file, a matter of milliseconds, is not found this way.

mod undo;

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::fcntl::{Flock, FlockArg};
use nix::unistd::Uid;
use serde::{Deserialize, Serialize};
use ublkit::{Controller, orphan};
use ublkit_harness::threads::Stat;

use crate::sysfs::CharDir;

pub(crate) use self::undo::{Change, Undo};

/// Where the files are.
const STATE_DIR: &str = "/run/ublk-torture";

/// A device of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Made {
    id: u32,
    /// Its directory's inode in sysfs; `None` if it could not be read.
    inode: Option<u64>,
}

/// What a run's file holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Run {
    boot_id: String,
    pid: u32,
    /// In clock ticks since boot: tells a process from a later one with the same number.
    start_time: u64,
    devices: Vec<Made>,
    /// What puts back what it changed, in the order of the changes.
    #[serde(default)]
    undo: Vec<Undo>,
}

/// The record of this run. Clones are the same record.
#[derive(Clone, Debug)]
pub(crate) struct RunRecord(Arc<Mutex<Kept>>);

#[derive(Debug)]
struct Kept {
    state: StateDir,
    run: Run,
    /// The first failure to write; told once, at the end.
    failure: Option<String>,
}

/// Where the records are, and the kernel's file systems that tell whether they still hold.
#[derive(Clone, Debug)]
pub(crate) struct StateDir {
    dir: PathBuf,
    proc: PathBuf,
    sys: PathBuf,
}

impl Default for StateDir {
    fn default() -> Self {
        Self { dir: STATE_DIR.into(), proc: "/proc".into(), sys: "/sys".into() }
    }
}

/// What is needed of the driver: deletes those of the devices that are dead, and says what became of each.
trait Cleaner {
    fn clean(&self, ids: &[u32]) -> Result<Vec<(u32, Cleaned)>, String>;
}

enum Cleaned {
    Gone(String),
    Left(String),
}

impl Cleaner for Controller {
    fn clean(&self, ids: &[u32]) -> Result<Vec<(u32, Cleaned)>, String> {
        // A device that waits for another server waits for nobody: the record says that it was a run's own.
        let cleaned = orphan::clean_ids(self, ids, orphan::GRACE).map_err(|error| format!("failed to {error}"))?;
        let outcomes = cleaned
            .into_iter()
            .map(|cleaned| {
                let gone = matches!(cleaned.outcome, orphan::Outcome::Deleted | orphan::Outcome::Deleting);
                let told = cleaned.to_string();
                (cleaned.id, if gone { Cleaned::Gone(told) } else { Cleaned::Left(told) })
            })
            .collect();
        Ok(outcomes)
    }
}

impl StateDir {
    /// Cleans the devices of runs that are gone, and no others. Returns what there is to tell.
    pub(crate) fn clean_gone_runs(&self) -> Vec<String> {
        match Controller::open() {
            Ok(controller) => self.clean_with(&controller),
            Err(error) => vec![format!("failed to look for devices of earlier runs: {error}")],
        }
    }

    fn clean_with(&self, cleaner: &dyn Cleaner) -> Vec<String> {
        self.try_clean(cleaner).unwrap_or_else(|error| {
            vec![format!("failed to look into {} for devices of earlier runs: {error}", self.dir.display())]
        })
    }

    fn try_clean(&self, cleaner: &dyn Cleaner) -> io::Result<Vec<String>> {
        let records = match fs::read_dir(&self.dir) {
            Ok(records) => records,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let records: Vec<PathBuf> = records
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
            .collect();
        if records.is_empty() {
            return Ok(Vec::new());
        }
        self.check_private()?;
        let Ok(_lock) = Flock::lock(File::create(self.dir.join("lock"))?, FlockArg::LockExclusiveNonblock) else {
            return Ok(vec!["another run is cleaning up after earlier ones".to_owned()]);
        };
        let boot_id = self.boot_id()?;
        Ok(records.iter().flat_map(|path| self.clean_run(path, &boot_id, cleaner)).collect())
    }

    fn clean_run(&self, path: &Path, boot_id: &str, cleaner: &dyn Cleaner) -> Vec<String> {
        let run: Run = match fs::read(path).map(|bytes| serde_json::from_slice(&bytes)) {
            Ok(Ok(run)) => run,
            // Ended meanwhile.
            Err(error) if error.kind() == ErrorKind::NotFound => return Vec::new(),
            Ok(Err(error)) => return vec![format!("failed to understand {}: {error}", path.display())],
            Err(error) => return vec![format!("failed to read {}: {error}", path.display())],
        };
        let this_boot = run.boot_id == boot_id;
        if this_boot && self.start_time(run.pid) == Some(run.start_time) {
            return Vec::new();
        }
        let ours: Vec<u32> =
            run.devices.iter().filter(|made| this_boot && self.is_still(made)).map(|made| made.id).collect();
        let mut told = Vec::new();
        let mut left = false;
        // Before the devices: what is mounted on one of them holds it.
        for undo in run.undo.iter().rev().filter(|_| this_boot) {
            if let Err(error) = undo.run(undo::PATIENCE) {
                told.push(format!("left behind by an earlier run (pid {}): {error}", run.pid));
                left = true;
            }
        }
        if !ours.is_empty() {
            match cleaner.clean(&ours) {
                Ok(outcomes) => {
                    for (_, outcome) in outcomes {
                        let (text, is_left) = match outcome {
                            Cleaned::Gone(text) => (text, false),
                            Cleaned::Left(text) => (text, true),
                        };
                        told.push(format!("left behind by an earlier run (pid {}): {text}", run.pid));
                        left |= is_left;
                    }
                }
                Err(error) => {
                    told.push(format!("failed to clean up after pid {}: {error}", run.pid));
                    left = true;
                }
            }
        }
        if !left && let Err(error) = fs::remove_file(path) {
            told.push(format!("failed to remove {}: {error}", path.display()));
        }
        told
    }

    /// Begins the record of this process.
    pub(crate) fn record(&self) -> RunRecord {
        let pid = std::process::id();
        let run = Run {
            boot_id: self.boot_id().unwrap_or_default(),
            pid,
            start_time: self.start_time(pid).unwrap_or_default(),
            devices: Vec::new(),
            undo: Vec::new(),
        };
        RunRecord(Arc::new(Mutex::new(Kept { state: self.clone(), run, failure: None })))
    }

    fn write(&self, run: &Run) -> io::Result<()> {
        let name = format!("{}-{}", run.pid, run.start_time);
        let path = self.dir.join(format!("{name}.json"));
        if run.devices.is_empty() && run.undo.is_empty() {
            return match fs::remove_file(path) {
                Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            };
        }
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        self.check_private()?;
        let partial = self.dir.join(format!("{name}.partial"));
        File::create(&partial)?.write_all(&serde_json::to_vec(run)?)?;
        fs::rename(partial, path)
    }

    /// Who else could write here could have us delete their choice of devices.
    fn check_private(&self) -> io::Result<()> {
        let meta = fs::symlink_metadata(&self.dir)?;
        if meta.is_dir() && meta.uid() == Uid::effective().as_raw() && meta.mode() & 0o022 == 0 {
            return Ok(());
        }
        Err(io::Error::other("it is not a directory that only this user can write to; remove it"))
    }

    fn boot_id(&self) -> io::Result<String> {
        fs::read_to_string(self.proc.join("sys/kernel/random/boot_id")).map(|id| id.trim().to_owned())
    }

    /// When process `pid` began; `None` if there is none, or only its corpse.
    fn start_time(&self, pid: u32) -> Option<u64> {
        let stat = Stat::read(&self.proc.join(pid.to_string()))?;
        (!stat.is_gone()).then_some(stat.start_time)
    }

    fn inode(&self, id: u32) -> Option<u64> {
        CharDir::under(&self.sys, id).inode()
    }

    fn is_still(&self, made: &Made) -> bool {
        made.inode.is_some() && self.inode(made.id) == made.inode
    }
}

impl RunRecord {
    /// This run made device `id`.
    pub(crate) fn made(&self, id: u32) {
        let mut kept = self.lock();
        let made = Made { id, inode: kept.state.inode(id) };
        // Told twice where the server tells it before it serves the device.
        if !kept.run.devices.contains(&made) {
            kept.run.devices.push(made);
        }
        kept.write();
    }

    /// Device `id` is gone.
    pub(crate) fn gone(&self, id: u32) {
        let mut kept = self.lock();
        kept.run.devices.retain(|made| made.id != id);
        kept.write();
    }

    /// The server of device `id` says that it is gone: one that exists all the same stays in the record, and so is left.
    pub(crate) fn said_to_be_gone(&self, id: u32) {
        let mut kept = self.lock();
        let Kept { state, run, .. } = &mut *kept;
        run.devices.retain(|made| made.id != id || state.is_still(made));
        kept.write();
    }

    /// The devices of this run that still exist.
    pub(crate) fn left(&self) -> Vec<u32> {
        let kept = self.lock();
        kept.run.devices.iter().filter(|made| kept.state.is_still(made)).map(|made| made.id).collect()
    }

    /// Ends the record; it stays if a device of this run still exists. Returns what there is to tell.
    pub(crate) fn finish(&self) -> Option<String> {
        let mut kept = self.lock();
        let Kept { state, run, .. } = &mut *kept;
        run.devices.retain(|made| state.is_still(made));
        kept.write();
        let failure = kept.failure.take()?;
        Some(format!(
            "failed to keep {}: {failure}; had this run been killed, the next one would not have cleaned up after it",
            kept.state.dir.display()
        ))
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn write(&mut self) {
        if let Err(error) = self.state.write(&self.run) {
            self.failure.get_or_insert(error.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// A machine of files: `/proc`, `/sys` and `/run` under one temporary directory.
    pub(super) struct Machine {
        state: StateDir,
        root: tempfile::TempDir,
    }

    impl Machine {
        pub(super) fn new() -> Self {
            let root = tempfile::tempdir().expect("temp dir");
            let state = StateDir {
                dir: root.path().join("run"),
                proc: root.path().join("proc"),
                sys: root.path().join("sys"),
            };
            fs::create_dir_all(state.proc.join("sys/kernel/random")).expect("mkdir");
            fs::create_dir_all(state.sys.join("class/ublk-char")).expect("mkdir");
            let machine = Self { state, root };
            machine.boot("first");
            machine.process(std::process::id(), 'R', 77);
            machine
        }

        pub(super) fn state(&self) -> &StateDir {
            &self.state
        }

        pub(super) fn root(&self) -> &Path {
            self.root.path()
        }

        fn boot(&self, id: &str) {
            fs::write(self.state.proc.join("sys/kernel/random/boot_id"), format!("{id}\n")).expect("write");
        }

        fn process(&self, pid: u32, state: char, start_time: u64) {
            let dir = self.state.proc.join(pid.to_string());
            fs::create_dir_all(&dir).expect("mkdir");
            let between = "1 ".repeat(18);
            fs::write(dir.join("stat"), format!("{pid} (a) b) c) {state} {between}{start_time} 0")).expect("write");
        }

        fn device(&self, id: u32) {
            fs::write(self.state.sys.join(format!("class/ublk-char/ublkc{id}")), "").expect("write");
        }

        fn no_device(&self, id: u32) {
            fs::remove_file(self.state.sys.join(format!("class/ublk-char/ublkc{id}"))).expect("remove");
        }

        pub(super) fn records(&self) -> usize {
            fs::read_dir(&self.state.dir).map_or(0, |dir| {
                dir.filter(|entry| entry.as_ref().expect("entry").path().extension().is_some_and(|it| it == "json"))
                    .count()
            })
        }

        /// The ids that a new run cleans, all of which are dead but `alive`.
        pub(super) fn clean(&self, alive: &[u32]) -> Vec<u32> {
            let cleaner = FakeCleaner { alive, asked: RefCell::default() };
            self.state.clean_with(&cleaner);
            cleaner.asked.into_inner()
        }

        /// The same process number, another process.
        pub(super) fn kill_this_process(&self) {
            self.process(std::process::id(), 'R', 78);
        }
    }

    struct FakeCleaner<'a> {
        alive: &'a [u32],
        asked: RefCell<Vec<u32>>,
    }

    impl Cleaner for FakeCleaner<'_> {
        fn clean(&self, ids: &[u32]) -> Result<Vec<(u32, Cleaned)>, String> {
            self.asked.borrow_mut().extend(ids);
            let outcome = |id: &u32| {
                let outcome = if self.alive.contains(id) { Cleaned::Left } else { Cleaned::Gone };
                (*id, outcome(String::new()))
            };
            Ok(ids.iter().map(outcome).collect())
        }
    }

    #[test]
    fn devices_of_a_run_that_is_gone_are_cleaned_and_no_others() {
        let machine = Machine::new();
        machine.device(0);
        machine.device(3);
        machine.state.record().made(3);
        assert_eq!(machine.clean(&[]), [0; 0], "its run is alive");
        machine.kill_this_process();
        assert_eq!(machine.clean(&[]), [3]);
        assert_eq!(machine.records(), 0);
    }

    #[test]
    fn a_zombie_is_gone() {
        let machine = Machine::new();
        machine.device(1);
        machine.state.record().made(1);
        machine.process(std::process::id(), 'Z', 77);
        assert_eq!(machine.clean(&[]), [1]);
    }

    #[test]
    fn an_id_that_was_used_again_is_somebody_elses() {
        let machine = Machine::new();
        machine.device(4);
        machine.state.record().made(4);
        machine.kill_this_process();
        // The new one exists before the old one goes, so that the inode differs for sure.
        machine.device(5);
        let dir = machine.state.sys.join("class/ublk-char");
        fs::rename(dir.join("ublkc5"), dir.join("ublkc4")).expect("rename");
        assert_eq!(machine.clean(&[]), [0; 0]);
        assert_eq!(machine.records(), 0);
    }

    #[test]
    fn what_another_boot_left_is_forgotten() {
        let machine = Machine::new();
        machine.device(2);
        machine.state.record().made(2);
        machine.boot("second");
        assert_eq!(machine.clean(&[]), [0; 0]);
        assert_eq!(machine.records(), 0);
    }

    #[test]
    fn what_could_not_be_cleaned_is_tried_again() {
        let machine = Machine::new();
        machine.device(6);
        machine.state.record().made(6);
        machine.kill_this_process();
        assert_eq!(machine.clean(&[6]), [6]);
        assert_eq!(machine.records(), 1);
        assert_eq!(machine.clean(&[]), [6]);
        assert_eq!(machine.records(), 0);
    }

    #[test]
    fn a_run_leaves_a_record_only_of_devices_that_exist() {
        let machine = Machine::new();
        machine.device(7);
        machine.device(8);
        let record = machine.state.record();
        record.made(7);
        record.made(8);
        record.gone(7);
        assert_eq!(record.finish(), None);
        assert_eq!(machine.records(), 1, "device 8 exists");
        machine.no_device(8);
        assert_eq!(record.finish(), None);
        assert_eq!(machine.records(), 0);
    }

    #[test]
    fn what_is_left_is_what_was_made_and_still_exists() {
        let machine = Machine::new();
        let record = machine.state.record();
        for id in [1, 2, 3] {
            machine.device(id);
            record.made(id);
        }
        record.gone(1);
        machine.no_device(2);
        // Another run's.
        machine.device(4);
        assert_eq!(record.left(), [3]);
    }

    #[test]
    fn what_is_said_to_be_gone_and_is_there_is_left() {
        let machine = Machine::new();
        let record = machine.state.record();
        for id in [1, 2] {
            machine.device(id);
            record.made(id);
        }
        machine.no_device(1);
        record.said_to_be_gone(1);
        record.said_to_be_gone(2);
        assert_eq!(record.left(), [2]);
        machine.kill_this_process();
        assert_eq!(machine.clean(&[]), [2]);
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_not_believed() {
        use std::os::unix::fs::PermissionsExt;
        let machine = Machine::new();
        machine.device(9);
        machine.state.record().made(9);
        machine.kill_this_process();
        fs::set_permissions(&machine.state.dir, fs::Permissions::from_mode(0o777)).expect("chmod");
        assert_eq!(machine.clean(&[]), [0; 0]);
        assert_eq!(machine.records(), 1);
    }
}
