//! Every process of this run, and every device of theirs, for the case that all has to end at once.

use std::path::Path;
use std::sync::mpsc;
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ublkit::{Controller, ErrorKind};
use ublkit_harness::threads::Stat;

/// How long killed processes may take to vanish.
const KILL_DEADLINE: Duration = Duration::from_millis(1500);
/// How long their devices may take to be deleted, all together.
const DELETE_DEADLINE: Duration = Duration::from_millis(1200);
/// How long to try for a lock that is held for moments only.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);

/// A process that runs, and the ids of its devices.
#[derive(Clone, Debug)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    /// It leads a process group, and all of that is to end.
    group: bool,
    ids: Vec<u32>,
}

/// All that runs.
#[derive(Clone, Debug)]
pub(crate) struct Running {
    pub(crate) processes: Vec<Process>,
    /// Devices that go through the hands of several processes.
    devices: Vec<u32>,
}

impl Running {
    const NOTHING: Self = Self { processes: Vec::new(), devices: Vec::new() };

    /// The ids of all devices, each once.
    pub(crate) fn ids(&self) -> Vec<u32> {
        let mut ids = self.devices.clone();
        ids.extend(self.processes.iter().flat_map(|process| &process.ids));
        ids.sort_unstable();
        ids.dedup();
        ids
    }
}

static RUNNING: Mutex<Running> = Mutex::new(Running::NOTHING);

fn running() -> MutexGuard<'static, Running> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A child of this process runs: it is watched, and it ends with the others when all has to.
pub(crate) fn adopt(pid: u32) {
    running().processes.push(Process { pid, group: false, ids: Vec::new() });
}

/// As [`adopt`], of a child that leads a process group.
pub(crate) fn adopt_group(pid: u32) {
    running().processes.push(Process { pid, group: true, ids: Vec::new() });
}

/// Such a process has a device of this id.
pub(crate) fn note_made(pid: u32, id: u32) {
    if let Some(own) = running().processes.iter_mut().find(|one| one.pid == pid) {
        own.ids.push(id);
    }
}

/// It has it no more.
pub(crate) fn note_gone(pid: u32, id: u32) {
    if let Some(own) = running().processes.iter_mut().find(|one| one.pid == pid) {
        own.ids.retain(|other| *other != id);
    }
}

/// Such a process has ended and was waited for: its number may be anybody's from here on.
pub(crate) fn forget(pid: u32) {
    running().processes.retain(|one| one.pid != pid);
}

/// Has a device deleted when all has to end at once, whoever serves it then; or no longer.
pub(crate) fn watch_over_device(id: u32, on: bool) {
    let mut running = running();
    running.devices.retain(|other| *other != id);
    if on {
        running.devices.push(id);
    }
}

/// The processes that run. To be asked while anything may hang.
pub(crate) fn pids() -> Vec<u32> {
    now().processes.iter().map(|process| process.pid).collect()
}

/// All that runs, with the devices that the processes have open, whether or not they have told of them. To be asked while
/// anything may hang.
pub(crate) fn running_now() -> Running {
    let mut running = now();
    for process in &mut running.processes {
        process.ids.extend(open_devices(process.pid));
    }
    running
}

fn now() -> Running {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match RUNNING.try_lock() {
            Ok(running) => return running.clone(),
            Err(TryLockError::Poisoned(poisoned)) => return poisoned.into_inner().clone(),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(TryLockError::WouldBlock) => return Running::NOTHING,
        }
    }
}

/// The ids of the devices whose character devices process `pid` has open: those that it serves, or is about to.
fn open_devices(pid: u32) -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    let links = entries.flatten().filter_map(|entry| std::fs::read_link(entry.path()).ok());
    links.filter_map(|link| link.to_str()?.strip_prefix("/dev/ublkc")?.parse().ok()).collect()
}

/// Whether a process has not ended yet, or, of one that leads a group, any of that.
pub(crate) fn lives(pid: u32, group: bool) -> bool {
    let there = |stat: &Stat| !stat.is_gone();
    if Stat::read(Path::new(&format!("/proc/{pid}"))).as_ref().is_some_and(there) {
        return true;
    }
    // A signal to the group would reach the leader's corpse too, and tell nothing.
    group
        && std::fs::read_dir("/proc").is_ok_and(|entries| {
            let processes =
                entries.flatten().filter(|entry| entry.file_name().as_encoded_bytes()[0].is_ascii_digit());
            processes.filter_map(|entry| Stat::read(&entry.path())).any(|stat| stat.group == pid && there(&stat))
        })
}

/// Kills every process and deletes its devices, because something hangs: what this process waits for then fails, and it
/// can end. Says what could not be done, within [`KILL_DEADLINE`] and [`DELETE_DEADLINE`].
pub(crate) fn kill_all() -> Vec<String> {
    let running = running_now();
    for process in &running.processes {
        let pid = process.pid.cast_signed();
        // One that has ended by itself is what is wanted.
        let _ = kill(Pid::from_raw(if process.group { -pid } else { pid }), Signal::SIGKILL);
    }
    let deadline = Instant::now() + KILL_DEADLINE;
    let mut alive: Vec<_> = running.processes.iter().collect();
    loop {
        alive.retain(|process| lives(process.pid, process.group));
        if alive.is_empty() || Instant::now() >= deadline {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut left: Vec<_> =
        alive.iter().map(|process| format!("process {} was killed and does not end", process.pid)).collect();
    // Each on a thread of its own: whoever holds the driver's lock holds up a DEL for ever.
    let deadline = Instant::now() + DELETE_DEADLINE;
    let (sender, receiver) = mpsc::channel();
    let ids = running.ids();
    for &id in &ids {
        let sender = sender.clone();
        let _ = std::thread::Builder::new().name("delete".to_owned()).spawn(move || {
            let _ = sender.send((id, delete(id)));
        });
    }
    drop(sender);
    let mut told = Vec::new();
    while let Ok((id, deleted)) = receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        told.push(id);
        if let Err(error) = deleted {
            left.push(format!("device {id} is left to the next run: failed to {error}"));
        }
    }
    let missing = ids.iter().filter(|id| !told.contains(id));
    left.extend(missing.map(|id| format!("device {id} is left to the next run: its deletion does not end")));
    left
}

fn delete(id: u32) -> Result<(), String> {
    let controller = Controller::open().map_err(|error| error.to_string())?;
    let deleted = match controller.delete(id, DELETE_DEADLINE / 2) {
        // This process still holds it open, in whatever it is that hangs: it goes when this process ends.
        Err(error) if error.kind() == ErrorKind::TimedOut => controller.delete_async(id),
        other => other,
    };
    match deleted {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error.to_string()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};

    use super::*;

    /// What a shell has started lives on in its group, and is found there, whoever has taken the shell's status.
    #[test]
    fn a_group_lives_as_long_as_one_of_it() {
        let mut shell = Command::new("/bin/sh")
            .args(["-c", "sleep 60 & echo; read -r _"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .expect("a shell");
        let pid = shell.id();
        let mut line = [0];
        std::io::Read::read_exact(&mut shell.stdout.take().expect("a pipe"), &mut line).expect("it has begun");
        assert!(lives(pid, false) && lives(pid, true));
        drop(shell.stdin.take());
        let deadline = Instant::now() + Duration::from_secs(20);
        while lives(pid, false) {
            assert!(Instant::now() < deadline, "the shell ends");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(lives(pid, true), "the sleep is still there");
        kill(Pid::from_raw(-pid.cast_signed()), Signal::SIGKILL).expect("kill");
        while lives(pid, true) {
            assert!(Instant::now() < deadline, "the sleep ends");
            std::thread::sleep(Duration::from_millis(5));
        }
        shell.wait().expect("wait");
    }

    #[test]
    fn devices_are_told_once() {
        let process = |ids: &[u32]| Process { pid: 1, group: false, ids: ids.to_vec() };
        let running = Running { processes: vec![process(&[3, 1]), process(&[2, 3])], devices: vec![7, 1] };
        assert_eq!(running.ids(), [1, 2, 3, 7]);
        assert_eq!(Running::NOTHING.ids(), [0; 0]);
    }
}
