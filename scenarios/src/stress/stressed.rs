//! The side of the process that looks on: starts the one whose devices are stressed, talks to it, and sees to it that nothing
//! of it is left.

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use ublkit::{Controller, orphan};
use ublkit_harness::Event;
use ublkit_harness::event::Progress;

use super::protocol::{Order, Report, Shape};
use super::worker::ARGUMENT;
use crate::context::Context;
use crate::footprint::Sample;
use crate::role::{self, Role};
use crate::scenario::Failure;
use crate::server;
use crate::sysfs::CharDir;

/// How long the process may say nothing: longer than its own bounds for starting and closing a device.
const SILENCE: Duration = Duration::from_secs(150);
/// How long it may take to end once nobody tells it anything any more.
const END_DEADLINE: Duration = Duration::from_secs(90);
/// How often an interruption is looked for.
const SLICE: Duration = Duration::from_millis(100);
/// How long ids may take to become free once their devices are closed and the process that did it has ended, its commands
/// with it: none is under way that could still delete one.
const IDS_DEADLINE: Duration = Duration::from_secs(3);

/// The process, and what it has said.
pub(super) struct Stressed {
    role: Role,
    heard: Receiver<(Report, Vec<u8>)>,
    told_enough: bool,
    begun: Instant,
    what: &'static str,
    /// Every id that it ever had a device of.
    made: BTreeSet<u32>,
    samples: Vec<Sample>,
}

impl Stressed {
    /// Starts it; `what` it is for is shown with its progress.
    pub(super) fn start(what: &'static str) -> Result<Self, Failure> {
        let (role, reports) = Role::start(ARGUMENT, "the process whose devices are stressed")?;
        let heard = role::listen(reports)?;
        let begun = Instant::now();
        let (made, samples) = (BTreeSet::new(), Vec::new());
        Ok(Self { role, heard, told_enough: false, begun, what, made, samples })
    }

    /// Gives an order; what comes of it is heard by [`hear`](Self::hear).
    pub(super) fn order(&mut self, order: &Order) -> Result<(), Failure> {
        self.role.tell(order)
    }

    /// The next report that is an answer to an order. The others are seen to here.
    pub(super) fn hear(&mut self, context: &Context) -> Result<Report, Failure> {
        Ok(self.hear_with_bytes(context)?.0)
    }

    fn hear_with_bytes(&mut self, context: &Context) -> Result<(Report, Vec<u8>), Failure> {
        loop {
            let (report, bytes) = self.next(context)?;
            match report {
                Report::Made { id } => {
                    self.made.insert(id);
                    server::note_made(self.role.pid(), id);
                    context.record.made(id);
                }
                Report::Gone { id } => {
                    server::note_gone(self.role.pid(), id);
                    context.record.gone(id);
                }
                Report::Note(text) => context.note(text),
                Report::Progress { done, of } => self.show(context, done, of),
                Report::Failed(trouble) => return Err(trouble.into()),
                Report::Sample(sample) => self.samples.push(sample),
                report => return Ok((report, bytes)),
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
        match self.hear_with_bytes(context)? {
            (Report::Bytes { len }, bytes) if len == buf.len() => {
                buf.copy_from_slice(&bytes);
                Ok(())
            }
            (other, _) => Err(unexpected(&other)),
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

    fn next(&mut self, context: &Context) -> Result<(Report, Vec<u8>), Failure> {
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
                Err(RecvTimeoutError::Disconnected) => return Err(self.role.lost("its output ended")),
            }
        }
    }

    /// Ends the process, and looks whether every id that it had is free. What it left is deleted, and told.
    pub(super) fn end(mut self, context: &Context) -> Result<u64, Failure> {
        let ended = self.role.end(END_DEADLINE);
        let made = std::mem::take(&mut self.made);
        let until = Instant::now() + IDS_DEADLINE;
        let mut left: Vec<u32> = made.iter().copied().filter(|id| exists(*id)).collect();
        while !left.is_empty() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
            left.retain(|id| exists(*id));
        }
        if left.is_empty() {
            return ended.map(|()| made.len() as u64);
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
        // Of a process that did not end as it should, that is no wonder.
        ended.and(Err(Failure::broke_with("leak", what, detail)))
    }
}

impl Drop for Stressed {
    fn drop(&mut self) {
        // What it leaves behind is in this run's record, for the next one to clean.
        self.role.end_unheard(END_DEADLINE);
    }
}

pub(super) fn exists(id: u32) -> bool {
    CharDir::of(id).exists()
}

pub(super) fn unexpected(report: &Report) -> Failure {
    Failure::Internal(format!("the stressed process answered another question: {report:?}"))
}
