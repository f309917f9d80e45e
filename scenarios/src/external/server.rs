//! A server that is started by a command, and its device.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use ublkit::{Controller, orphan};

use crate::context::Context;
use crate::scenario::Failure;
use crate::server;
use crate::sysfs::CharDir;

/// How long a server may take until its device is there.
const START_DEADLINE: Duration = Duration::from_secs(60);
/// How long it may take to end after SIGTERM.
const STOP_DEADLINE: Duration = Duration::from_secs(30);
/// How long its device may take to go.
const GONE_DEADLINE: Duration = Duration::from_secs(15);
const LOOK: Duration = Duration::from_millis(20);
/// How many of the last lines that it said are kept.
const LINES: usize = 20;
/// Ends the process group that it is given when its standard input ends: when we have died.
const GUARD: &str = "read -r _; kill -TERM -$0 2>/dev/null && sleep 10 && kill -KILL -$0 2>/dev/null";

/// What a server said last.
type Said = Arc<Mutex<VecDeque<String>>>;

/// A server that was started by a command. Ended when dropped.
#[derive(Debug)]
pub(super) struct ForeignServer {
    child: Child,
    guard: Child,
    said: Said,
    /// Its status was taken: its number may be anybody's.
    reaped: bool,
    /// The ids of ublk devices that came with it.
    ublk: Option<u32>,
}

impl ForeignServer {
    /// Runs `command`, and waits for its device: the one at `device`, or the one whose path it prints first.
    pub(super) fn start(context: &Context, command: &str, device: Option<&Path>) -> Result<(Self, PathBuf), Failure> {
        if let Some(device) = device.filter(|device| device_bytes(device) > 0) {
            return Err(Failure::Usage(format!(
                "{} is there already, so it is not what --server serves: leave --server out, or end whoever serves it",
                device.display()
            )));
        }
        let command = device.map_or_else(|| command.to_owned(), |device| filled_in(command, device));
        let cannot = |error: io::Error| Failure::Environment(format!("failed to start a shell: {error}"));
        let mut child = Command::new("/bin/sh")
            .args(["-c", &command])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // To be ended with everything that it starts; Ctrl-C is for us to deal with.
            .process_group(0)
            .spawn()
            .map_err(cannot)?;
        server::adopt_group(child.id());
        let said = Said::default();
        let first_line = child.stdout.take().map(|out| listen(out, &said));
        let _errors = child.stderr.take().map(|err| listen(err, &said));
        let guard = Command::new("/bin/sh")
            .args(["-c", GUARD, &child.id().to_string()])
            .stdin(Stdio::piped())
            .process_group(0)
            .spawn();
        let guard = match guard {
            Ok(guard) => guard,
            Err(error) => {
                let _ = end_group(&mut child);
                return Err(cannot(error));
            }
        };
        let mut this = Self { child, guard, said, reaped: false, ublk: None };
        let path = this.wait_for_device(context, device, first_line.as_ref())?;
        this.ublk = ublk_id(&path);
        if let Some(id) = this.ublk {
            context.record.made(id);
            server::note_made(this.child.id(), id);
        }
        Ok((this, path))
    }

    fn wait_for_device(
        &mut self,
        context: &Context,
        device: Option<&Path>,
        first_line: Option<&Receiver<String>>,
    ) -> Result<PathBuf, Failure> {
        let deadline = Instant::now() + START_DEADLINE;
        let mut path = device.map(Path::to_owned);
        loop {
            if context.interruption().came() {
                return Err(Failure::Interrupted);
            }
            if path.is_none()
                && let Some(line) = first_line.and_then(|lines| lines.try_recv().ok())
            {
                let line = line.trim();
                if !line.starts_with('/') {
                    return Err(self.wrong(format!(
                        "the first line that --server prints must be the path of its device, and is '{line}'; or add \
                         --device PATH"
                    )));
                }
                path = Some(PathBuf::from(line));
            }
            if let Some(path) = path.as_ref().filter(|path| device_bytes(path) > 0) {
                return Ok(path.clone());
            }
            self.alive()?;
            if Instant::now() > deadline {
                let waited = match &path {
                    Some(path) => format!("{} was not there", path.display()),
                    None => "it had not printed the path of its device".to_owned(),
                };
                let lines = self.last_lines().join(" | ");
                return Err(Failure::Hang(format!(
                    "{START_DEADLINE:?} after --server was started {waited}: {lines}"
                )));
            }
            std::thread::sleep(LOOK);
        }
    }

    fn wrong(&self, what: String) -> Failure {
        let lines = self.last_lines();
        Failure::Usage(if lines.is_empty() { what } else { format!("{what} (it said: {})", lines.join(" | ")) })
    }

    fn last_lines(&self) -> Vec<String> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// Fails if it has ended.
    pub(super) fn alive(&self) -> Result<(), Failure> {
        // Its status stays where it is: as long as nobody takes that, its number is that of its group, and of no other.
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        match waitid(Id::Pid(self.pid()), flags) {
            Ok(WaitStatus::Exited(_, code)) => Err(self.ended(ExitStatus::from_raw(code << 8))),
            Ok(WaitStatus::Signaled(_, signal, _)) => Err(self.ended(ExitStatus::from_raw(signal as i32))),
            Ok(_) => Ok(()),
            Err(error) => Err(Failure::Internal(format!("failed to ask after the server: {error}"))),
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    fn ended(&self, status: ExitStatus) -> Failure {
        // What it said last may still be on its way.
        std::thread::sleep(LOOK);
        Failure::broke_with(
            "server",
            format!("the server ended by itself, in the middle of the run: {status}"),
            self.last_lines(),
        )
    }

    /// Ends it, and sees to it that its device goes.
    pub(super) fn stop(mut self, context: &Context, device: &Path) -> Result<(), Failure> {
        let by_itself = self.alive();
        let ended = by_itself.and_then(|()| self.terminate());
        self.reap();
        let gone = self.device_gone(context, device);
        ended.and(gone)
    }

    /// SIGTERM to all of it, and then time to end.
    fn terminate(&self) -> Result<(), Failure> {
        // What has ended by now is what is wanted.
        let _ = kill(Pid::from_raw(-self.pid().as_raw()), Signal::SIGTERM);
        let deadline = Instant::now() + STOP_DEADLINE;
        while server::lives(self.child.id(), true) {
            if Instant::now() > deadline {
                let lines = self.last_lines().join(" | ");
                return Err(Failure::Hang(format!(
                    "the server had not ended {STOP_DEADLINE:?} after SIGTERM and was killed: {lines}"
                )));
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Kills what is left, once.
    fn reap(&mut self) {
        if self.reaped {
            return;
        }
        self.reaped = end_group(&mut self.child);
        let _ = self.guard.kill();
        let _ = self.guard.wait();
    }

    /// Waits until nothing more can be read there. A ublk device that the server has left behind is deleted.
    fn device_gone(&mut self, context: &Context, device: &Path) -> Result<(), Failure> {
        let deadline = Instant::now() + GONE_DEADLINE;
        while Instant::now() < deadline {
            if self.ublk.is_none() && device_bytes(device) == 0 {
                return Ok(());
            }
            if let Some(id) = self.ublk {
                if !CharDir::of(id).exists() {
                    context.record.gone(id);
                    self.ublk = None;
                    continue;
                }
                if let Some(told) = delete_orphan(id)? {
                    context.note(format!("the server left its device behind: {told}"));
                    context.evidence().add("devices_left_by_their_server", 1);
                }
            }
            std::thread::sleep(LOOK);
        }
        let what = format!("{} is still there {GONE_DEADLINE:?} after its server ended", device.display());
        Err(Failure::broke_with("close", what, self.last_lines()))
    }
}

impl Drop for ForeignServer {
    fn drop(&mut self) {
        // Everything has ended where it was stopped.
        if !self.reaped && self.alive().is_ok() {
            let _ = self.terminate();
        }
        self.reap();
    }
}

/// Kills what there is of a process group, and takes the leader's status; says whether that could be done in time.
fn end_group(leader: &mut Child) -> bool {
    // Its number is its own until it was waited for, and as long as one of its group lives.
    let _ = kill(Pid::from_raw(-leader.id().cast_signed()), Signal::SIGKILL);
    let deadline = Instant::now() + GONE_DEADLINE;
    while Instant::now() < deadline {
        if let Ok(Some(_)) = leader.try_wait() {
            server::forget(leader.id());
            return true;
        }
        std::thread::sleep(LOOK);
    }
    // It stays among those that are killed when all has to end.
    false
}

/// Deletes a device that is dead, or that only its server could have continued. Returns what came of it, once it is over.
fn delete_orphan(id: u32) -> Result<Option<String>, Failure> {
    let controller = Controller::open()?;
    let cleaned = orphan::clean_ids(&controller, &[id], Duration::from_secs(1))?;
    let gone = |one: &&orphan::Cleaned| matches!(one.outcome, orphan::Outcome::Deleted | orphan::Outcome::Deleting);
    Ok(cleaned.iter().find(gone).map(ToString::to_string))
}

/// The id in the path of a ublk device.
fn ublk_id(path: &Path) -> Option<u32> {
    let real = fs::canonicalize(path).ok()?;
    real.file_name()?.to_str()?.strip_prefix("ublkb")?.parse().ok()
}

/// The size of the block device at `path`; 0 where there is none.
fn device_bytes(path: &Path) -> u64 {
    if !fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device()) {
        return 0;
    }
    File::open(path).and_then(|file| ublkit::blkdev::size(&file)).unwrap_or(0)
}

/// The command with the path in place of `{}`, as one word of the shell's.
fn filled_in(command: &str, device: &Path) -> String {
    let quoted = format!("'{}'", device.display().to_string().replace('\'', r"'\''"));
    command.replace("{}", &quoted)
}

/// Keeps the last lines of what is said, for as long as anything is. The first one is sent.
fn listen(said_by: impl Read + Send + 'static, said: &Said) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    let said = Arc::clone(said);
    // Ends with the server. Without a thread, nothing is heard and the server may block, which its deadlines tell.
    let _ = std::thread::Builder::new().name("server-output".to_owned()).spawn(move || {
        for (number, line) in BufReader::new(said_by).split(b'\n').map_while(Result::ok).enumerate() {
            let line = String::from_utf8_lossy(&line).into_owned();
            if number == 0 {
                // Nobody listens where the path is known.
                let _ = sender.send(line.clone());
            }
            let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
            said.push_back(line);
            if said.len() > LINES {
                said.pop_front();
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_one_word_of_the_command() {
        assert_eq!(filled_in("nbd-client sock {}", Path::new("/dev/nbd0")), "nbd-client sock '/dev/nbd0'");
        assert_eq!(filled_in("x {} {}", Path::new("/dev/a b'c")), r"x '/dev/a b'\''c' '/dev/a b'\''c'");
    }

    #[test]
    fn the_last_lines_are_kept_and_the_first_is_told() {
        let said = Said::default();
        let lines: Vec<String> = (0..100).map(|line| format!("line {line}")).collect();
        let text = lines.join("\n");
        let first = listen(io::Cursor::new(text), &said);
        assert_eq!(first.recv_timeout(Duration::from_secs(10)).as_deref(), Ok("line 0"));
        // The thread ends when all is read, and with it the channel.
        assert!(first.recv_timeout(Duration::from_secs(10)).is_err());
        let said = said.lock().expect("not poisoned");
        assert_eq!((said.len(), said.back().map(String::as_str)), (LINES, Some("line 99")));
    }

    #[test]
    fn what_is_no_device_has_no_size() {
        assert_eq!(device_bytes(Path::new("/dev/null")), 0);
        assert_eq!(device_bytes(Path::new("/nonexistent")), 0);
    }
}
