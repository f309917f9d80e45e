//! What a run changed of the machine beside devices, and how it is put back: by the run itself, by the end of one that is
//! lost, or by the next run if this one was killed.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::RunRecord;

/// How long it may take to put one thing back when the next run does it.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// And how long all of it may take when this run is lost, and about to end.
const HURRY: Duration = Duration::from_millis(1500);
const LOOK: Duration = Duration::from_millis(20);

/// How a change is put back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Undo {
    /// A setting of the kernel's gets the text back that it had.
    Write {
        /// The file of the setting.
        file: PathBuf,
        /// What is written to it.
        text: String,
        /// What this run set it to; who finds something else there leaves it. `None` to write in any case.
        unless_not: Option<String>,
    },
    /// What is mounted on a directory of ours is unmounted, and the directory removed.
    Unmount(PathBuf),
    /// An empty directory is removed.
    Rmdir(PathBuf),
}

impl Undo {
    /// Puts it back. Done twice, it does no harm. Returns why it could not be.
    pub(super) fn run(&self, patience: Duration) -> Result<(), String> {
        match self {
            Self::Write { file, text, unless_not } => {
                let cannot = |error| format!("failed to set {} back to {text}: {error}", file.display());
                let there = match fs::read_to_string(file) {
                    Ok(there) => there,
                    // With what it was a setting of.
                    Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                    Err(error) => return Err(cannot(error)),
                };
                if unless_not.as_ref().is_some_and(|ours| there.trim() != ours.trim()) {
                    return Ok(());
                }
                fs::write(file, text).map_err(cannot)
            }
            Self::Unmount(dir) => {
                let until = Instant::now() + patience;
                if remove(dir, Duration::ZERO).is_err() {
                    unmount(dir, patience);
                }
                remove(dir, until.saturating_duration_since(Instant::now()))
            }
            Self::Rmdir(dir) => remove(dir, patience),
        }
    }
}

/// Unmounts by another process: with a device that does not answer it may never end, and who waits for the kernel
/// then cannot end either.
fn unmount(dir: &Path, patience: Duration) {
    let started = Command::new("umount").arg("-l").arg(dir).stdin(Stdio::null()).stderr(Stdio::null()).spawn();
    // What came of it is seen by the directory.
    let Ok(mut child) = started else { return };
    let until = Instant::now() + patience;
    while let Ok(None) = child.try_wait() {
        if Instant::now() > until {
            break;
        }
        std::thread::sleep(LOOK);
    }
}

fn remove(dir: &Path, patience: Duration) -> Result<(), String> {
    let until = Instant::now() + patience;
    loop {
        match fs::remove_dir(dir) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) if Instant::now() >= until => {
                return Err(format!("failed to remove {}: {error}", dir.display()));
            }
            Err(_busy) => std::thread::sleep(LOOK),
        }
    }
}

/// A change that is in the record for as long as it lasts; it is put back when this is dropped.
#[derive(Debug)]
#[must_use = "it is put back when this is dropped"]
pub(crate) struct Change {
    record: RunRecord,
    undo: Undo,
}

impl Drop for Change {
    fn drop(&mut self) {
        // What could not be put back stays in the record, for the next run.
        if self.undo.run(PATIENCE).is_ok() {
            self.record.forget(&self.undo);
        }
    }
}

impl RunRecord {
    /// This run is about to change something that `undo` puts back. To be called before it is changed.
    pub(crate) fn changing(&self, undo: Undo) -> Change {
        let mut kept = self.lock();
        kept.run.undo.push(undo.clone());
        kept.write();
        drop(kept);
        Change { record: self.clone(), undo }
    }

    /// Puts everything back, the last change first, for this run is lost. Returns what could not be.
    pub(crate) fn put_back(&self) -> Vec<String> {
        let until = Instant::now() + HURRY;
        let all = self.lock().run.undo.clone();
        let outcome = |undo: &Undo| {
            let done = undo.run(until.saturating_duration_since(Instant::now()));
            if done.is_ok() {
                self.forget(undo);
            }
            done.err()
        };
        all.iter().rev().filter_map(outcome).collect()
    }

    fn forget(&self, undo: &Undo) {
        let mut kept = self.lock();
        let Some(at) = kept.run.undo.iter().rposition(|it| it == undo) else { return };
        kept.run.undo.remove(at);
        kept.write();
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Machine;
    use super::*;

    fn written(machine: &Machine, name: &str, text: &str) -> PathBuf {
        let file = machine.root().join(name);
        fs::write(&file, text).expect("write");
        file
    }

    fn there(file: &Path) -> String {
        fs::read_to_string(file).expect("read")
    }

    #[test]
    fn what_a_killed_run_changed_the_next_one_puts_back() {
        let machine = Machine::new();
        let file = written(&machine, "setting", "3000\n");
        let dir = machine.root().join("mounted-on");
        fs::create_dir(&dir).expect("mkdir");
        let record = machine.state().record();
        let ours = Some("20".to_owned());
        let write = Undo::Write { file: file.clone(), text: "3000\n".to_owned(), unless_not: ours };
        // A killed process drops nothing.
        std::mem::forget(record.changing(write));
        std::mem::forget(record.changing(Undo::Unmount(dir.clone())));
        fs::write(&file, "20\n").expect("write");
        machine.clean(&[]);
        assert_eq!(there(&file), "20\n", "its run is alive");
        machine.kill_this_process();
        machine.clean(&[]);
        assert_eq!((there(&file).as_str(), dir.exists(), machine.records()), ("3000\n", false, 0));
    }

    #[test]
    fn what_somebody_has_set_since_is_theirs() {
        let machine = Machine::new();
        let file = written(&machine, "setting", "20\n");
        let undo = Undo::Write { file: file.clone(), text: "3000\n".to_owned(), unless_not: Some("20".to_owned()) };
        fs::write(&file, "700\n").expect("write");
        undo.run(Duration::ZERO).expect("nothing to do");
        assert_eq!(there(&file), "700\n");
    }

    #[test]
    fn a_lost_run_puts_back_the_last_change_first() {
        let machine = Machine::new();
        let file = written(&machine, "setting", "1");
        let record = machine.state().record();
        for (before, after) in [("1", "2"), ("2", "3")] {
            let text = before.to_owned();
            let undo = Undo::Write { file: file.clone(), text, unless_not: Some(after.to_owned()) };
            std::mem::forget(record.changing(undo));
            fs::write(&file, after).expect("write");
        }
        assert_eq!(record.put_back(), [""; 0]);
        assert_eq!((there(&file).as_str(), machine.records()), ("1", 0));
    }

    #[test]
    fn what_cannot_be_put_back_stays_in_the_record() {
        let machine = Machine::new();
        let dir = machine.root().join("full");
        fs::create_dir_all(dir.join("of")).expect("mkdir");
        let record = machine.state().record();
        std::mem::forget(record.changing(Undo::Rmdir(dir.clone())));
        assert_eq!(record.put_back().len(), 1);
        assert_eq!((machine.records(), record.finish()), (1, None));
        fs::remove_dir(dir.join("of")).expect("rmdir");
        machine.kill_this_process();
        machine.clean(&[]);
        assert_eq!((machine.records(), dir.exists()), (0, false));
    }
}
