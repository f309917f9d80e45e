//! This program as a server of a device that outlives it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ublkit::backends::File;
use ublkit::{Backend, DataMode, Device, Event, Geometry, Recovery, WriteFlags};

use super::server::ROLE;

pub(crate) const KEEPER: &str = "keeper";
/// What it is to do: words such as `mode=wait`.
const ORDERS: &str = "UBLKIT_TRIAL_ORDERS";

/// A file. Writes at and beyond an offset are carried out and never return.
struct Storage {
    file: File,
    held_from: u64,
    held: Arc<AtomicU64>,
}

impl Backend for Storage {
    fn geometry(&self) -> Geometry {
        self.file.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        self.file.write_at(buf, offset, flags)?;
        if offset >= self.held_from {
            self.held.fetch_add(1, Ordering::SeqCst);
            loop {
                std::thread::park();
            }
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.file.flush()
    }
}

fn say(text: impl std::fmt::Display) {
    let mut out = io::stdout();
    // Nobody listens when the trial has failed.
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

fn mode(word: &str) -> Recovery {
    [Recovery::None, Recovery::Wait, Recovery::Reissue, Recovery::FailIo]
        .into_iter()
        .find(|mode| mode.to_string() == word)
        .unwrap_or_else(|| panic!("a recovery mode: {word}"))
}

fn detach(device: &Device) -> String {
    match device.detach() {
        Ok(detached) => format!("detached {}", detached.state),
        Err(error) => format!("failed to {error}"),
    }
}

/// Serves as ordered, says `serving ID`, and then does what its input says.
pub(crate) fn run() -> ExitCode {
    let orders = std::env::var(ORDERS).expect("orders");
    let orders: HashMap<&str, &str> = orders.split(' ').filter_map(|word| word.split_once('=')).collect();
    let number = |key: &str, default: u64| orders.get(key).map_or(default, |word| word.parse().expect("a number"));
    let held = Arc::new(AtomicU64::new(0));
    let file = File::open(orders["file"]).expect("open its file");
    let storage = Storage { file, held_from: number("held_from", u64::MAX), held: Arc::clone(&held) };
    let hold_at = orders.get("hold_at").map(|word| (*word).to_owned());
    let builder = Device::builder(storage)
        .workers(number("workers", 4) as usize)
        .queues(number("queues", 2) as u16)
        .depth(number("depth", 16) as u16)
        .max_io_bytes(64 << 10)
        .data_mode(if number("user_copy", 0) == 1 { DataMode::UserCopy } else { DataMode::Copy })
        .stop_deadline(Duration::from_secs(number("stop_seconds", 10)))
        .on_event(move |event| {
            if let Event::Phase(phase) = event
                && hold_at.as_ref().is_some_and(|hold_at| *hold_at == phase.to_string())
            {
                say(format_args!("held {phase}"));
                loop {
                    std::thread::park();
                }
            }
        });
    let device = match orders.get("recover") {
        Some(id) => builder.recover(id.parse().expect("an id")),
        None => builder.recovery(mode(orders["mode"])).start(),
    };
    let device = match device {
        Ok(device) => device,
        Err(error) => {
            say(format_args!("failed to {error}"));
            return ExitCode::FAILURE;
        }
    };
    say(format_args!("serving {}", device.id()));
    for line in io::stdin().lines() {
        match line.as_deref() {
            Ok("held") => say(held.load(Ordering::SeqCst)),
            Ok("detach") => {
                say(detach(&device));
                // Without a look at what else the device does when it is dropped.
                return ExitCode::SUCCESS;
            }
            Ok("detach and stay") => say(detach(&device)),
            Ok("close and stay") => match device.close() {
                Ok(closed) => say(closed),
                Err(error) => say(format_args!("failed to {error}")),
            },
            other => panic!("not understood: {other:?}"),
        }
    }
    if device.close().is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Such a server, as a child of the trial. It is killed if the trial fails.
pub(crate) struct Keeper {
    child: RefCell<Child>,
    input: RefCell<Option<ChildStdin>>,
    output: RefCell<BufReader<ChildStdout>>,
}

impl Keeper {
    /// Ordered to do what `words` say, with `file` as its storage.
    pub(crate) fn ordered(file: &Path, words: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .env(ROLE, KEEPER)
            .env(ORDERS, format!("file={} {words}", file.display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start a server");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let input = child.stdin.take();
        Self { child: RefCell::new(child), input: RefCell::new(input), output: RefCell::new(output) }
    }

    /// As [`ordered`](Self::ordered), and serving: returns the device's id.
    pub(crate) fn serving(file: &Path, words: &str) -> (Self, u32) {
        let keeper = Self::ordered(file, words);
        let answer = keeper.line();
        let id = answer.strip_prefix("serving ").and_then(|id| id.parse().ok());
        let id = id.unwrap_or_else(|| panic!("it said {answer:?}"));
        (keeper, id)
    }

    pub(crate) fn line(&self) -> String {
        let mut line = String::new();
        self.output.borrow_mut().read_line(&mut line).expect("read");
        line.trim().to_owned()
    }

    pub(crate) fn ask(&self, word: &str) -> String {
        writeln!(self.input.borrow_mut().as_mut().expect("not ended"), "{word}").expect("write");
        self.line()
    }

    /// How many writes are in its hands for good.
    pub(crate) fn held(&self) -> u64 {
        self.ask("held").parse().expect("a number")
    }

    pub(crate) fn pid(&self) -> i32 {
        self.child.borrow().id() as i32
    }

    /// SIGKILL, and waits until it is gone.
    pub(crate) fn kill(&self) {
        self.child.borrow_mut().kill().expect("kill");
        self.wait();
    }

    /// Has it close its device and end.
    pub(crate) fn end(&self) {
        drop(self.input.borrow_mut().take());
        assert!(self.wait(), "the server ended well");
    }

    /// Whether it ended well.
    pub(crate) fn wait(&self) -> bool {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(status) = self.child.borrow_mut().try_wait().expect("wait") {
                return status.success();
            }
            assert!(Instant::now() < deadline, "the server is to end and has not");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let mut child = self.child.borrow_mut();
        if matches!(child.try_wait(), Ok(None)) {
            // Not waited for: this may be the trial of a server that does not end.
            let _ = child.kill();
        }
    }
}
