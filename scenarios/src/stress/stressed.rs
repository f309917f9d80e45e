//! The side of the process that looks on: starts the one whose devices are stressed, talks to it, and sees to it that nothing
//! of it is left.

use std::collections::BTreeSet;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use ublkit::{Controller, orphan};
use ublkit_harness::Event;
use ublkit_harness::event::Progress;

use super::protocol::{Order, Report, Shape};
use super::worker::ARGUMENT;
use crate::context::Context;
use crate::footprint::Sample;
use crate::scenario::Failure;
use crate::server;

/// How long the process may say nothing: longer than its own bounds for starting and closing a device.
const SILENCE: Duration = Duration::from_secs(150);
/// How long it may take to end once nobody tells it anything any more.
const END_DEADLINE: Duration = Duration::from_secs(90);
/// How often an interruption is looked for.
const SLICE: Duration = Duration::from_millis(100);
/// How long ids may take to become free once their devices are closed and the process that did it has ended, its commands
/// with it: none is under way that could still delete one.
const IDS_DEADLINE: Duration = Duration::from_secs(3);

enum Heard {
    Report(Report),
    Bytes(Vec<u8>),
}

/// The process, and what it has said.
pub(super) struct Stressed {
    child: Child,
    pid: u32,
    orders: Option<ChildStdin>,
    heard: Receiver<Heard>,
    told_enough: bool,
    begun: Instant,
    what: &'static str,
    /// Every id that it ever had a device of.
    made: BTreeSet<u32>,
    samples: Vec<Sample>,
}

impl Stressed {
    /// Starts it; `what` it is for is shown with its progress.
    pub(super) fn start(context: &Context, what: &'static str) -> Result<Self, Failure> {
        let cannot = |error: io::Error| Failure::Environment(format!("failed to start a process: {error}"));
        let mut child = Command::new("/proc/self/exe")
            .arg(ARGUMENT)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Ctrl-C is for the process that decides what becomes of it.
            .process_group(0)
            .spawn()
            .map_err(cannot)?;
        let pid = child.id();
        let (Some(orders), Some(reports)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Failure::Internal("a process has no pipes".to_owned()));
        };
        server::adopt(pid);
        context.watchdog().watch_process(pid);
        let (tell, heard) = mpsc::channel();
        let listener = std::thread::Builder::new().name("reports".to_owned());
        listener.spawn(move || listen(BufReader::new(reports), &tell)).map_err(cannot)?;
        let begun = Instant::now();
        let (made, samples) = (BTreeSet::new(), Vec::new());
        Ok(Self { child, pid, orders: Some(orders), heard, told_enough: false, begun, what, made, samples })
    }

    /// Gives an order; what comes of it is heard by [`hear`](Self::hear).
    pub(super) fn order(&mut self, order: &Order) -> Result<(), Failure> {
        let mut line = serde_json::to_vec(order)
            .map_err(|error| Failure::Internal(format!("an order cannot be written: {error}")))?;
        line.push(b'\n');
        let orders =
            self.orders.as_mut().ok_or_else(|| Failure::Internal("the process was told to end".to_owned()))?;
        orders.write_all(&line).map_err(|error| self.gone(&error.to_string()))
    }

    /// The next report that is an answer to an order. The others are seen to here.
    pub(super) fn hear(&mut self, context: &Context) -> Result<Report, Failure> {
        loop {
            match self.next(context)? {
                Heard::Bytes(_) => return Err(Failure::Internal("bytes that nobody asked for".to_owned())),
                Heard::Report(Report::Made { id }) => {
                    self.made.insert(id);
                    server::note_made(self.pid, id);
                    context.record.made(id);
                }
                Heard::Report(Report::Gone { id }) => {
                    server::note_gone(self.pid, id);
                    context.record.gone(id);
                }
                Heard::Report(Report::Note(text)) => context.note(text),
                Heard::Report(Report::Progress { done, of }) => self.show(context, done, of),
                Heard::Report(Report::Failed(trouble)) => return Err(trouble.into()),
                Heard::Report(Report::Sample(sample)) => self.samples.push(sample),
                Heard::Report(report) => return Ok(report),
            }
        }
    }

    /// Has it serve a device. Returns the id.
    pub(super) fn start_device(&mut self, context: &Context, slot: u32, shape: Shape) -> Result<u32, Failure> {
        self.order(&Order::Start { slot, shape })?;
        match self.hear(context)? {
            Report::Served { slot: served, id } if served == slot => Ok(id),
            other => Err(unexpected(&other)),
        }
    }

    /// Reads the storage of a device, past the device.
    pub(super) fn read(&mut self, context: &Context, slot: u32, offset: u64, buf: &mut [u8]) -> Result<(), Failure> {
        self.order(&Order::Read { slot, offset, len: buf.len() })?;
        match self.hear(context)? {
            Report::Bytes { len } if len == buf.len() => {}
            other => return Err(unexpected(&other)),
        }
        match self.next(context)? {
            Heard::Bytes(bytes) if bytes.len() == buf.len() => {
                buf.copy_from_slice(&bytes);
                Ok(())
            }
            _ => Err(Failure::Internal("fewer bytes than announced".to_owned())),
        }
    }

    /// How the process stands now.
    pub(super) fn sample(&mut self, context: &Context, cycles: u64) -> Result<Sample, Failure> {
        self.order(&Order::Footprint { cycles })?;
        // It is kept aside when it is heard.
        self.done(context)?;
        self.samples.last().cloned().ok_or_else(|| Failure::Internal("no sample came".to_owned()))
    }

    /// Has it forget the storages of closed devices.
    pub(super) fn forget(&mut self, context: &Context) -> Result<(), Failure> {
        self.order(&Order::Forget)?;
        self.done(context)
    }

    fn done(&mut self, context: &Context) -> Result<(), Failure> {
        match self.hear(context)? {
            Report::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Samples that were heard.
    pub(super) fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// What the process has that it did not have at the beginning.
    pub(super) fn left(&mut self, context: &Context) -> Result<Vec<String>, Failure> {
        self.order(&Order::Left)?;
        match self.hear(context)? {
            Report::Left(left) => Ok(left),
            other => Err(unexpected(&other)),
        }
    }

    pub(super) fn show(&self, context: &Context, done: u64, of: u64) {
        let elapsed = self.begun.elapsed();
        context.sink().send(Event::Progress(Progress {
            what: self.what.to_owned(),
            ops: done,
            elapsed_ms: elapsed.as_millis() as u64,
            ops_per_s: done as f64 / elapsed.as_secs_f64().max(1e-3),
            fraction: (of > 0).then(|| done as f64 / of as f64),
            ..Progress::default()
        }));
    }

    fn next(&mut self, context: &Context) -> Result<Heard, Failure> {
        let _guard = context.watchdog().guard("hear from the process whose devices are stressed", SILENCE);
        loop {
            match self.heard.recv_timeout(SLICE) {
                Ok(heard) => return Ok(heard),
                Err(RecvTimeoutError::Timeout) => {
                    if context.interruption().came() && !self.told_enough {
                        self.told_enough = true;
                        self.order(&Order::Enough)?;
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return Err(self.gone("its output ended")),
            }
        }
    }

    /// The process has ended, which it is not to do by itself.
    fn gone(&mut self, why: &str) -> Failure {
        let deadline = Instant::now() + Duration::from_secs(1);
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => {
                    return Failure::broke(
                        "server",
                        format!("the process whose devices are stressed ended: {status}"),
                    );
                }
                Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                _ => {
                    return Failure::broke(
                        "server",
                        format!("the process whose devices are stressed is lost: {why}"),
                    );
                }
            }
        }
    }

    /// Ends the process, and looks whether every id that it had is free. What it left is deleted, and told.
    pub(super) fn end(mut self, context: &Context) -> Result<u64, Failure> {
        self.end_process();
        let made = std::mem::take(&mut self.made);
        let until = Instant::now() + IDS_DEADLINE;
        let mut left: Vec<u32> = made.iter().copied().filter(|id| exists(*id)).collect();
        while !left.is_empty() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
            left.retain(|id| exists(*id));
        }
        if left.is_empty() {
            return Ok(made.len() as u64);
        }
        let mut detail: Vec<String> = left.iter().map(|id| format!("/dev/ublkc{id}")).collect();
        if let Ok(controller) = Controller::open() {
            match orphan::clean_ids(&controller, &left, Duration::from_millis(500)) {
                Ok(cleaned) => detail.extend(cleaned.iter().map(ToString::to_string)),
                Err(error) => detail.push(format!("failed to {error}")),
            }
        }
        for id in &left {
            if !exists(*id) {
                context.record.gone(*id);
            }
        }
        let what =
            format!("{} ids are still taken after their devices were closed and their server ended", left.len());
        Err(Failure::broke_with("leak", what, detail))
    }

    fn end_process(&mut self) {
        self.orders = None;
        let deadline = Instant::now() + END_DEADLINE;
        while let Ok(None) = self.child.try_wait() {
            if Instant::now() >= deadline {
                // What it leaves behind is in this run's record, for the next one to clean.
                let _ = self.child.kill();
                let _ = self.child.wait();
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        server::forget(self.pid);
    }
}

impl Drop for Stressed {
    fn drop(&mut self) {
        self.end_process();
    }
}

pub(super) fn exists(id: u32) -> bool {
    std::path::Path::new("/sys/class/ublk-char").join(format!("ublkc{id}")).exists()
}

pub(super) fn unexpected(report: &Report) -> Failure {
    Failure::Internal(format!("the stressed process answered another question: {report:?}"))
}

fn listen(mut reports: BufReader<ChildStdout>, tell: &Sender<Heard>) {
    let mut line = String::new();
    loop {
        line.clear();
        if reports.read_line(&mut line).is_ok_and(|read| read == 0) || line.is_empty() {
            return;
        }
        let Ok(report) = serde_json::from_str::<Report>(&line) else { return };
        let len = if let Report::Bytes { len } = &report { Some(*len) } else { None };
        if tell.send(Heard::Report(report)).is_err() {
            return;
        }
        if let Some(len) = len {
            let mut bytes = vec![0; len];
            if reports.read_exact(&mut bytes).is_err() || tell.send(Heard::Bytes(bytes)).is_err() {
                return;
            }
        }
    }
}
