//! This program as a server that can be killed, put into namespaces, or told to end.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdout, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use ublkit::{Device, Geometry};

use super::disk::{Disk, Op};

/// The environment's word for what to be, instead of the trials.
pub(crate) const ROLE: &str = "UBLKIT_TRIAL_ROLE";

fn say(text: &str) {
    let mut out = io::stdout();
    writeln!(out, "{text}").and_then(|()| out.flush()).expect("somebody listens");
}

/// Serves a small disk, prints its id, and ends well when its input ends.
///
/// In the role `stuck`, a write never returns from the backend, and the device is closed as soon as there is one.
pub(crate) fn run(role: &OsStr) -> ExitCode {
    if role == super::keeper::KEEPER {
        return super::keeper::run();
    }
    let stuck = role == "stuck";
    let disk = Disk::new(Geometry::bytes(1 << 20));
    let (entered, written) = std::sync::mpsc::channel();
    disk.hook(move |call| {
        if stuck && call.op == Op::Write {
            let _ = entered.send(());
            loop {
                std::thread::park();
            }
        }
        Ok(())
    });
    let builder = Device::builder(disk).depth(8);
    let device = match builder.stop_deadline(Duration::from_secs(if stuck { 1 } else { 30 })).start() {
        Ok(device) => device,
        Err(error) => {
            eprintln!("failed to {error}");
            return ExitCode::FAILURE;
        }
    };
    say(&device.id().to_string());
    if stuck {
        written.recv().expect("a write");
        device.close().expect_err("a write is stuck");
        say("closing has failed");
    }
    let waited = io::stdin().read_to_end(&mut Vec::new());
    let closed = device.close();
    if waited.is_ok() && closed.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Such a server, as a child of the trial. It is killed if the trial fails.
pub(crate) struct Server {
    child: RefCell<Child>,
    out: RefCell<BufReader<ChildStdout>>,
    pub(crate) id: u32,
}

impl Server {
    /// Started by a command in front of it, such as `unshare`.
    pub(crate) fn start(prefix: &[&str]) -> Self {
        Self::spawn("serve", prefix)
    }

    pub(crate) fn stuck() -> Self {
        Self::spawn("stuck", &[])
    }

    fn spawn(role: &str, prefix: &[&str]) -> Self {
        let program = std::env::current_exe().expect("this program");
        let mut command = match prefix {
            [] => Command::new(program),
            [first, rest @ ..] => {
                let mut command = Command::new(first);
                command.args(rest).arg(program);
                command
            }
        };
        let mut child =
            command.env(ROLE, role).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("start a server");
        let mut out = BufReader::new(child.stdout.take().expect("piped"));
        let mut id = String::new();
        out.read_line(&mut id).expect("read its id");
        let id = id.trim().parse().unwrap_or_else(|error| panic!("the server said {id:?}: {error}"));
        Self { child: RefCell::new(child), out: RefCell::new(out), id }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.borrow().id()
    }

    pub(crate) fn wait_for_word(&self, word: &str) {
        let mut line = String::new();
        self.out.borrow_mut().read_line(&mut line).expect("read");
        assert_eq!(line.trim(), word);
    }

    /// Tells it to end, and waits until it has ended well.
    pub(crate) fn end(self) {
        let mut child = self.child.borrow_mut();
        drop(child.stdin.take());
        let status = child.wait().expect("wait");
        assert!(status.success(), "the server ended with {status}");
    }

    /// SIGKILL, and waits until it is gone.
    pub(crate) fn kill(&self) {
        self.kill_within(Duration::from_secs(20));
    }

    pub(crate) fn kill_within(&self, limit: Duration) {
        let mut child = self.child.borrow_mut();
        child.kill().expect("kill");
        let deadline = Instant::now() + limit;
        while child.try_wait().expect("wait").is_none() {
            assert!(Instant::now() < deadline, "the server was killed {limit:?} ago and has not ended");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let mut child = self.child.borrow_mut();
        if matches!(child.try_wait(), Ok(None)) {
            // Not waited for: this may be the trial of a server that does not end.
            let _ = child.kill();
        }
    }
}
