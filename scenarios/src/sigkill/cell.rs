//! One cell of the grid: a server that is killed at one point, in one mode, and what comes after.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::libc;
use serde::Serialize;
use ublkit::ctrl::{State, block_path, character_path};
use ublkit::{Controller, ErrorKind};
use ublkit_harness::{Seed, SeededRng};

use super::book::Book;
use super::load::{self, Load};
use super::mode::Mode;
use super::point::{Point, Reached};
use super::process::{Killed, Process};
use super::protocol::{Command, Hold, Order, What};
use super::timeline::Death;
use super::{Plant, Shape, name};
use crate::clock::nanoseconds;
use crate::context::Context;
use crate::gates;
use crate::scenario::Failure;
use crate::server;

/// How long the driver may take to bring a device into the state that a death leads to.
const STATE_LIMIT: Duration = Duration::from_secs(20);
/// How long STOP and DEL may take.
pub(super) const CONTROL_LIMIT: Duration = Duration::from_secs(20);
/// Operations before a server is killed, and after another has taken over.
const WARM_UP: u64 = 24;

/// What is known of a cell when it is over.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    pub(super) point: Point,
    pub(super) mode: Mode,
    pub(super) round: u64,
    pub(super) verdict: String,
    /// Servers that were killed.
    pub(super) kills: u64,
    /// Kills that fell where they were meant to, as the server's last words prove.
    pub(super) in_place: u64,
    pub(super) done: u64,
    pub(super) survived: u64,
    pub(super) failed: u64,
    pub(super) refused: u64,
    /// Requests that were held in the server's hands when it was killed.
    pub(super) held: u64,
    pub(super) verified_bytes: u64,
    /// The longest time from a kill until process and device were where they belong.
    pub(super) death_ms: u64,
    /// The longest time from the start of a next server until it served.
    pub(super) recovery_ms: u64,
    pub(super) elapsed_ms: u64,
    /// Where exactly, where that was drawn.
    pub(super) where_drawn: Option<String>,
}

impl Report {
    /// Of a cell that is to be done.
    pub(super) const fn new(point: Point, mode: Mode, round: u64) -> Self {
        Self {
            point,
            mode,
            round,
            verdict: String::new(),
            kills: 0,
            in_place: 0,
            done: 0,
            survived: 0,
            failed: 0,
            refused: 0,
            held: 0,
            verified_bytes: 0,
            death_ms: 0,
            recovery_ms: 0,
            elapsed_ms: 0,
            where_drawn: None,
        }
    }
}

/// What there is of the device that has the id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// Nothing
    Gone,
    /// It is there, served or dead
    There,
    /// It waits for another server
    Waits,
}

/// A cell that is under way.
pub(super) struct Cell<'a> {
    pub(super) context: &'a Context,
    pub(super) controller: &'a Controller,
    pub(super) shape: Shape,
    pub(super) plant: Option<Plant>,
    pub(super) point: Point,
    pub(super) mode: Mode,
    pub(super) rng: SeededRng,
    pub(super) seed: Seed,
    pub(super) id: u32,
    pub(super) book: Arc<Book>,
    pub(super) report: Report,
    storage: File,
    older: Option<File>,
    lives: u32,
    /// The device that has the id was made here.
    made: bool,
    standing: Standing,
    /// This cell has had the id already, and deleted the device: whoever starts another has used it again.
    pub(super) deleted: bool,
    pub(super) granted: Option<(u16, u16)>,
    /// How far a server comes that is killed while it takes over, if that is not to be drawn.
    pub(super) reached: Option<Reached>,
}

/// A file that is in no directory and outlives every server: in memory, where that is to be had.
fn nameless(bytes: u64) -> Result<File, Failure> {
    let file = tempfile::tempfile_in("/dev/shm").or_else(|_| tempfile::tempfile());
    file.and_then(|file| file.set_len(bytes).map(|()| file))
        .map_err(|error| Failure::Environment(format!("failed to make a file for the storage: {error}")))
}

/// Where another process finds a file of this one.
fn path_of(file: &File) -> PathBuf {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into()
}

impl<'a> Cell<'a> {
    #[expect(clippy::too_many_arguments, reason = "one caller; what a cell is")]
    pub(super) fn new(
        context: &'a Context,
        controller: &'a Controller,
        shape: Shape,
        plant: Option<Plant>,
        reached: Option<Reached>,
        report: Report,
        seed: Seed,
        id: u32,
    ) -> Result<Self, Failure> {
        let storage = nameless(shape.bytes)?;
        let (point, mode) = (report.point, report.mode);
        let book = Arc::new(Book::new(mode, shape.bytes, seed));
        book.fill(&storage)?;
        let older = if plant == Some(Plant::StaleStorage) { Some(nameless(shape.bytes)?) } else { None };
        let rng = seed.derive("cell", 0).rng();
        Ok(Self {
            context,
            controller,
            shape,
            plant,
            point,
            mode,
            rng,
            seed,
            id,
            book,
            report,
            storage,
            older,
            lives: 0,
            made: false,
            standing: Standing::Gone,
            deleted: false,
            granted: None,
            reached,
        })
    }

    /// Whether the device waits for another server.
    pub(super) fn waits(&self) -> bool {
        self.standing == Standing::Waits
    }

    pub(super) fn run(&mut self) -> Result<(), Failure> {
        let begun = Instant::now();
        let result = self.kill_and_look();
        let tally = &self.book.tally;
        let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        self.report.done = count(&tally.done);
        self.report.survived = count(&tally.survived);
        self.report.failed = count(&tally.failed);
        self.report.refused = count(&tally.refused);
        self.report.verified_bytes = count(&tally.verified_bytes);
        self.report.elapsed_ms = begun.elapsed().as_millis() as u64;
        if result.is_err() {
            self.give_up();
        }
        result
    }

    fn kill_and_look(&mut self) -> Result<(), Failure> {
        self.visit()?;
        self.take_leave()
    }

    /// Begins a server: of a new device, or of the one that waits for another server.
    pub(super) fn serve(&mut self, hold: Option<Hold>) -> Result<Process, Failure> {
        let order = Order {
            id: self.id,
            recover: self.waits(),
            mode: self.mode,
            storage: path_of(&self.storage),
            older: self.older.as_ref().map(path_of),
            lives: self.lives,
            bytes: self.shape.bytes,
            queues: self.shape.queues,
            depth: self.shape.depth,
            hold,
            plant: self.plant,
        };
        if self.waits()
            && let Some(death) = self.book.timeline().open_mut()
        {
            death.recovering.get_or_insert_with(nanoseconds);
        }
        let mut process = Process::start(self.context, &order)?;
        self.lives += 1;
        if !self.waits() {
            let added = |what: &What| matches!(what, What::Phase(phase) if phase == "added").then_some(());
            process.wait_for("ADD", added)?;
            (self.made, self.standing) = (true, Standing::There);
            self.context.record.made(self.id);
            server::watch_over_device(self.id, true);
        }
        Ok(process)
    }

    /// Begins a server and waits until it serves.
    pub(super) fn serving(&mut self) -> Result<Process, Failure> {
        let begun = Instant::now();
        let mut process = self.serve(None)?;
        self.await_serving(&mut process)?;
        self.report.recovery_ms = self.report.recovery_ms.max(begun.elapsed().as_millis() as u64);
        Ok(process)
    }

    pub(super) fn await_serving(&mut self, process: &mut Process) -> Result<(), Failure> {
        let granted = process.wait_for("its device being served", |what| match what {
            What::Serving { queues, depth } => Some((*queues, *depth)),
            _ => None,
        })?;
        self.granted = Some(granted);
        self.served();
        let state = self.state()?;
        if state != Some(State::Live) {
            return Err(Failure::broke("state", format!("a device that is served is {state:?} and not LIVE")));
        }
        Ok(())
    }

    /// A server serves.
    fn served(&mut self) {
        let mut timeline = self.book.timeline();
        if !self.waits() {
            // Another device: what the one before went through is over.
            timeline.deaths.clear();
        } else if let Some(death) = timeline.open_mut() {
            death.recovered = Some(nanoseconds());
        }
        drop(timeline);
        self.standing = Standing::There;
    }

    /// A CPU of each queue.
    fn cpus(&self) -> Result<Vec<usize>, Failure> {
        let (queues, _) = self.granted.unwrap_or((1, 1));
        (0..queues)
            .map(|queue| Ok(self.controller.get_queue_affinity(self.id, queue)?.first().copied().unwrap_or(0)))
            .collect()
    }

    /// Begins the load on a device that is served, and lets it get under way.
    pub(super) fn load(&mut self) -> Result<Load, Failure> {
        let (path, cpus) = (block_path(self.id), self.cpus()?);
        let (queues, depth) = self.granted.unwrap_or((1, 1));
        let name = format!("{} × {}: more requests than a queue has tags", name(&self.point), name(&self.mode));
        let io_depth = if self.context.gated(&gates::FULL_QUEUE, &name) {
            // All workers together leave a tag free, wherever their requests are issued.
            (depth.saturating_sub(1) / queues).max(1)
        } else {
            // More than a queue has tags, so that all of them are taken.
            depth + 4
        };
        let seed = self.seed.derive("load", u64::from(self.lives));
        let load = Load::start(&path, &self.book, &cpus, io_depth, seed)?;
        load.warm_up(WARM_UP)?;
        Ok(load)
    }

    /// Has a load go on for a while after another server took over, and ends it.
    pub(super) fn wind_up(load: Load) -> Result<(), Failure> {
        load.warm_up(WARM_UP)?;
        load.stop()
    }

    /// Kills a server that served, and waits until process and device are where they belong. Returns its last words.
    pub(super) fn kill(&mut self, process: Process) -> Result<Killed, Failure> {
        self.dies();
        let killed = process.kill()?;
        self.report.kills += 1;
        self.context.evidence().add("kills", 1);
        self.mourn(killed.took)?;
        Ok(killed)
    }

    /// From here on the server may be dead.
    pub(super) fn dies(&mut self) {
        let killed = nanoseconds();
        let mut timeline = self.book.timeline();
        if timeline.open().is_none() {
            timeline.deaths.push(Death { killed, ..Death::default() });
        } else if let Some(death) = timeline.open_mut() {
            // The next server did not come to serve; what it may have done in between is part of the same death.
            death.gone = None;
            death.recovering = None;
        }
    }

    /// Waits for the state that the mode promises.
    pub(super) fn mourn(&mut self, took: Duration) -> Result<(), Failure> {
        let begun = Instant::now();
        self.await_state(self.mode.state())?;
        self.await_release()?;
        self.has_died(took + begun.elapsed());
        Ok(())
    }

    /// Waits until the driver has let go of the dead server. The state is told before, and where the next server died too, it has
    /// been there all the time; until the end of the last one's rings, its queues may get requests. What tells for sure is that the
    /// character device can be opened, which changes nothing.
    pub(super) fn await_release(&self) -> Result<(), Failure> {
        let path = character_path(self.id);
        let begun = Instant::now();
        loop {
            match File::options().read(true).write(true).open(&path) {
                Ok(_) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) && begun.elapsed() < STATE_LIMIT => {}
                Err(error) => {
                    let what = format!("open {} after {:?}", path.display(), begun.elapsed());
                    return Err(Failure::io(what, &error));
                }
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The server is dead, and the device is where it belongs.
    pub(super) fn has_died(&mut self, took: Duration) {
        self.report.death_ms = self.report.death_ms.max(took.as_millis() as u64);
        if self.mode == Mode::Reissue {
            self.book.reissued();
        }
        if let Some(death) = self.book.timeline().open_mut() {
            death.gone = Some(nanoseconds());
        }
        self.book.settle();
        if self.mode.recovers() {
            self.standing = Standing::Waits;
        }
    }

    /// Kills a server that never came to START: all that is left is an id.
    pub(super) fn kill_unstarted(&mut self, process: Process) -> Result<Killed, Failure> {
        let killed = process.kill()?;
        self.report.kills += 1;
        self.context.evidence().add("kills", 1);
        self.report.death_ms = self.report.death_ms.max(killed.took.as_millis() as u64);
        self.await_state(State::Dead)?;
        self.await_release()?;
        if block_path(self.id).exists() {
            return Err(Failure::broke("state", "a device that was never started has a disk"));
        }
        Ok(killed)
    }

    /// The state of the device; `None` if there is none.
    pub(super) fn state(&self) -> Result<Option<State>, Failure> {
        match self.controller.get_dev_info(self.id) {
            Ok(info) => Ok(Some(info.state())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) fn await_state(&self, wanted: State) -> Result<(), Failure> {
        let begun = Instant::now();
        loop {
            let state = self.state()?;
            let disk = block_path(self.id).exists();
            if state == Some(wanted) && (wanted != State::Dead || !disk) {
                return Ok(());
            }
            if begun.elapsed() >= STATE_LIMIT {
                let disk = if disk { "has a disk" } else { "has no disk" };
                return Err(Failure::broke(
                    "state",
                    format!("{STATE_LIMIT:?} after its server died the device is {state:?} and {disk}, not {wanted}"),
                ));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// DEL, and nothing is left of the device.
    pub(super) fn delete(&mut self) -> Result<(), Failure> {
        if self.plant == Some(Plant::LeakedId) {
            self.standing = Standing::Gone;
            return Ok(());
        }
        self.controller.delete(self.id, CONTROL_LIMIT)?;
        self.no_more()
    }

    /// The device is gone: so must be its nodes, and the driver must not know it.
    pub(super) fn no_more(&mut self) -> Result<(), Failure> {
        let begun = Instant::now();
        loop {
            let nodes: Vec<_> =
                [block_path(self.id), character_path(self.id)].into_iter().filter(|path| path.exists()).collect();
            let state = self.state()?;
            if nodes.is_empty() && state.is_none() {
                break;
            }
            if begun.elapsed() >= CONTROL_LIMIT {
                return Err(Failure::broke("leak", format!("a deleted device is {state:?} and has left {nodes:?}")));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.standing = Standing::Gone;
        self.deleted = true;
        self.gone();
        Ok(())
    }

    /// The id is free: whoever has it from here on, it is not this cell's.
    fn gone(&mut self) {
        self.made = false;
        self.context.record.gone(self.id);
        server::watch_over_device(self.id, false);
    }

    /// Reads everything through the device, closes it, and reads everything from its storage.
    pub(super) fn verify_and_close(&mut self, mut process: Process) -> Result<(), Failure> {
        let device = load::open(&block_path(self.id)).map_err(|error| Failure::io("open the device", &error))?;
        self.book.verify("the device", &device)?;
        drop(device);
        process.tell(&Command::Close)?;
        let deferred = process.wait_for("the end of its device", |what| match what {
            What::Closed(deferred) => Some(deferred.clone()),
            _ => None,
        })?;
        process.end()?;
        if let Some(deferred) = deferred {
            // udev, above all, may look at a disk whenever it likes: it lets go.
            self.context.note(deferred);
        }
        self.no_more()?;
        self.book.verify("the storage", &self.storage)
    }

    /// The end of every cell: a device that is served is verified and closed; the id is used again, at once, by a device
    /// that serves what is in the storage.
    fn take_leave(&mut self) -> Result<(), Failure> {
        if self.standing == Standing::There {
            self.delete()?;
        }
        let again = self.deleted;
        let process = self.serving()?;
        let load = self.load()?;
        load.stop()?;
        self.verify_and_close(process)?;
        if !again {
            // That was the device that had its server killed. The id is free, and so it can be used.
            let process = self.serving()?;
            self.verify_and_close(process)?;
        }
        self.context.evidence().add("ids_reused", 1);
        Ok(())
    }

    /// After a failure: nothing is to be left, as far as that can be done.
    fn give_up(&mut self) {
        if self.made && self.controller.delete(self.id, CONTROL_LIMIT).is_ok() {
            self.gone();
        }
    }
}
