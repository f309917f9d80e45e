//! A process of this program: its events, and its end.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child as Process, ChildStderr, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use ublkit_harness::event::{Event, VerdictLine};
use ublkit_harness::threads::{Stat, ThreadDump, dump_threads};

use super::WIND_DOWN;
use crate::context::Interruption;
use crate::scenario::Failure;
use crate::server;

/// How often it is looked whether somebody wants an end.
const LOOK: Duration = Duration::from_millis(100);
/// How long a process may take to vanish after SIGKILL. One that does not is stuck in the kernel.
const VANISH: Duration = Duration::from_secs(15);
/// How long the servers of a run that was killed may take to close their devices by themselves.
const ORPHANED: Duration = Duration::from_secs(20);
/// How many lines of what a run says to people are kept.
const LAST_LINES: usize = 20;

/// A process of this program that runs.
pub(crate) struct Child {
    process: Process,
    events: Receiver<Event>,
    stderr: Receiver<String>,
}

/// How far the events of a child were followed.
pub(crate) enum Followed {
    /// To the verdict.
    Verdict(VerdictLine),
    /// It ended without one.
    Mute,
    /// It did not end in its time; where its threads stood then.
    Late(Vec<ThreadDump>),
}

/// How a child ended.
pub(crate) struct End {
    /// `None` if it had to be killed.
    pub(crate) status: Option<ExitStatus>,
    /// Its last words to people.
    pub(crate) stderr: String,
    /// Where its threads stand, if not even SIGKILL ended it.
    pub(crate) stuck: Vec<ThreadDump>,
}

impl Child {
    /// Starts this program with `words`.
    pub(crate) fn start(words: &[String]) -> Result<Self, Failure> {
        let cannot = |error| Failure::Environment(format!("cannot start this program once more: {error}"));
        let mut process = Command::new("/proc/self/exe")
            .args(words)
            .env_remove(crate::cli::DURATION_VARIABLE)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Ctrl-C is for the process that decides what becomes of it.
            .process_group(0)
            .spawn()
            .map_err(cannot)?;
        let (Some(stdout), Some(stderr)) = (process.stdout.take(), process.stderr.take()) else {
            return Err(Failure::Internal("a child without pipes".to_owned()));
        };
        let child = Self { process, events: read(stdout), stderr: last_words(stderr) };
        // Where this process is lost, so is its part; that one's servers see that it is gone.
        server::adopt(child.process.id());
        Ok(child)
    }

    /// Follows the events until the verdict, the end or the deadline, and hands every one but the verdict to `each`.
    ///
    /// # Errors
    /// [`Failure::Interrupted`]; it is asked to end then.
    pub(crate) fn follow(
        &self,
        deadline: Instant,
        interruption: &Interruption,
        each: &mut dyn FnMut(Event),
    ) -> Result<Followed, Failure> {
        loop {
            if interruption.came() {
                self.ask_to_end();
                return Err(Failure::Interrupted);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            // However much it says: to be told of is not to be over.
            if left.is_zero() {
                let threads =
                    self.family().into_iter().flat_map(|pid| dump_threads(Path::new("/proc"), pid)).collect();
                self.ask_to_end();
                return Ok(Followed::Late(threads));
            }
            match self.events.recv_timeout(left.min(LOOK)) {
                Ok(Event::Verdict(line)) => return Ok(Followed::Verdict(line)),
                Ok(event) => each(event),
                Err(RecvTimeoutError::Disconnected) => return Ok(Followed::Mute),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// Waits for it to end, and kills it and its servers if it does not.
    pub(crate) fn end(mut self) -> Result<End, Failure> {
        let mut status = self.wait(WIND_DOWN)?;
        let mut stuck = Vec::new();
        if status.is_none() {
            // Its servers see that it is gone, and close their devices; unless they cannot.
            let servers: Vec<Known> = self.family().into_iter().skip(1).filter_map(Known::of).collect();
            let _gone = killpg(Pid::from_raw(self.process.id() as i32), Signal::SIGKILL);
            let vanished = self.wait(VANISH)?;
            let patience = Instant::now() + ORPHANED;
            while servers.iter().any(Known::is_there) && Instant::now() < patience {
                thread::sleep(LOOK);
            }
            for server in servers.iter().filter(|server| server.is_there()) {
                let _gone = kill(Pid::from_raw(server.pid as i32), Signal::SIGKILL);
            }
            // A server that is gone releases a process that waits for its device.
            if vanished.is_none() && self.wait(VANISH)?.is_none() {
                stuck = dump_threads(Path::new("/proc"), self.process.id());
            }
            status = None;
        }
        // A server that is left holds the pipe too: no wait without an end.
        let stderr = self.stderr.recv_timeout(Duration::from_secs(2)).unwrap_or_default();
        Ok(End { status, stderr, stuck })
    }

    fn wait(&mut self, patience: Duration) -> Result<Option<ExitStatus>, Failure> {
        let deadline = Instant::now() + patience;
        loop {
            let status = self.process.try_wait();
            let status = status.map_err(|error| Failure::Internal(format!("cannot wait for a child: {error}")))?;
            if status.is_some() {
                // Its number may be somebody else's from now on.
                server::forget(self.process.id());
            }
            if status.is_some() || Instant::now() >= deadline {
                return Ok(status);
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn ask_to_end(&self) {
        // It may have ended meanwhile; it was not waited for, so its id is nobody else's.
        let _gone = kill(Pid::from_raw(self.process.id() as i32), Signal::SIGTERM);
    }

    /// It, and the processes that it has started, and so on.
    fn family(&self) -> Vec<u32> {
        let mut family = vec![self.process.id()];
        let mut next = 0;
        while let Some(&pid) = family.get(next) {
            next += 1;
            let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
            for task in tasks {
                let children = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
                family.extend(children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
            }
        }
        family
    }
}

/// A process, known by more than its number.
struct Known {
    pid: u32,
    start_time: u64,
}

impl Known {
    fn of(pid: u32) -> Option<Self> {
        start_time(pid).map(|start_time| Self { pid, start_time })
    }

    fn is_there(&self) -> bool {
        start_time(self.pid) == Some(self.start_time)
    }
}

/// When a process began, in clock ticks since boot; `None` if there is none, or only its corpse.
fn start_time(pid: u32) -> Option<u64> {
    let stat = Stat::read(Path::new(&format!("/proc/{pid}")))?;
    (!stat.is_gone()).then_some(stat.start_time)
}

fn read(stdout: ChildStdout) -> Receiver<Event> {
    let (sender, events) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            // A line that is none of ours is not lost: the verdict is missing then.
            let Ok(event) = serde_json::from_str(&line) else { continue };
            if sender.send(event).is_err() {
                break;
            }
        }
    });
    events
}

/// The last lines of what a child says to people, once it has said them all.
fn last_words(mut stderr: ChildStderr) -> Receiver<String> {
    let (sender, words) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _gone = stderr.read_to_end(&mut bytes);
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().collect();
        let _nobody_waits = sender.send(lines[lines.len().saturating_sub(LAST_LINES)..].join("\n"));
    });
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_that_never_pauses_is_late_all_the_same() {
        let process = Command::new("sleep").arg("600").process_group(0).spawn().expect("sleep");
        let (sender, events) = mpsc::channel();
        let talk = thread::spawn(move || while sender.send(Event::note("still here")).is_ok() {});
        server::adopt(process.id());
        let child = Child { process, events, stderr: mpsc::channel().1 };
        let mut heard = 0_u64;
        let deadline = Instant::now() + Duration::from_millis(300);
        let followed = child.follow(deadline, &Interruption::default(), &mut |_| heard += 1);
        assert!(matches!(followed, Ok(Followed::Late(_))));
        assert!(heard > 0);
        let status = child.end().expect("an end").status.expect("it ends when asked to");
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(Signal::SIGTERM as i32));
        talk.join().expect("nobody listens any more");
    }

    #[test]
    fn a_part_is_lost_with_the_run_as_long_as_it_lives() {
        // The program of these tests lists them and ends.
        let child = Child::start(&["--list".to_owned()]).expect("a process");
        let pid = child.process.id();
        let known = || server::pids().contains(&pid);
        assert!(known());
        child.end().expect("an end");
        assert!(!known(), "its number may be somebody else's");
    }
}
