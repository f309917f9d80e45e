//! How a server is brought to each point of its life, and killed there.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::thread::{Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use ublkit::Controller;
use ublkit::ctrl::{State, block_path};
use ublkit_harness::threads::stacks;
use ublkit_harness::{OpKind, SectorRange};

use super::book::BLOCK_SECTORS;
use super::cell::{CONTROL_LIMIT, Cell};
use super::load::Load;
use super::mode::Mode;
use super::name;
use super::point::{Point, Reached};
use super::process::{Killed, Process};
use super::protocol::{Command, Hold, Kind, Stage, What};
use super::timeline::Ended;
use crate::clock::nanoseconds;
use crate::gates;
use crate::runner::no_thread;
use crate::scenario::Failure;
use crate::sysfs::CharDir;

/// How often START is tried to be hit from within, in one cell.
const START_ATTEMPTS: u32 = 16;
/// What START takes, as long as nobody has measured it.
const START_GUESS: Duration = Duration::from_millis(4);
/// Kills at a drawn time come within this much of what they follow.
const DRAWN_MAX: Duration = Duration::from_millis(30);
/// Where a server is held that is to be killed while one queue has fetched and another has not.
const MID_FETCH: Hold = Hold::Open(0);
/// Blocks that are left dirty in the page cache, for STOP to write back.
const DIRTY_BLOCKS: u64 = 48;

impl Cell<'_> {
    pub(super) fn visit(&mut self) -> Result<(), Failure> {
        match self.point {
            Point::Added => self.before_start(&Hold::Phase("added".to_owned())),
            Point::MidFetch => self.before_start(&MID_FETCH),
            Point::Fetched => self.before_start(&Hold::Phase("fetched".to_owned())),
            Point::Starting => self.starting(),
            Point::Started => self.started(&Hold::Phase("started".to_owned())),
            Point::Scanning => self.started(&Hold::Requests(Kind::Any, Stage::Before)),
            Point::Idle => self.idle(),
            Point::Working | Point::AllTags | Point::Uncommitted | Point::Flushing => self.at_work(),
            Point::QueueThread => self.queue_thread(),
            Point::Stopping => self.stopping(),
            Point::Deleting => self.deleting(),
            Point::Recovering => self.recovering(),
            Point::Twice => self.twice(),
            Point::Abandoned => self.abandoned(),
        }
    }

    fn in_place(&mut self, killed: bool) {
        self.report.in_place += u64::from(killed);
    }

    fn drawn(&mut self, max: Duration) -> Duration {
        Duration::from_micros(self.rng.within(0..=max.as_micros() as u64))
    }

    /// Waits until a server holds where it was told to.
    fn held(process: &mut Process, held: u32, changes: u32) -> Result<u32, Failure> {
        process.wait_for(&format!("{held} requests, {changes} of them changes, being held"), |what| match what {
            What::Holding { held: now, changes: of_them } if *now >= held && *of_them >= changes => Some(*of_them),
            _ => None,
        })
    }

    /// Begins a server that stops before START, and waits until it has.
    fn stopped_before_start(&mut self, hold: &Hold) -> Result<Process, Failure> {
        let mut process = self.serve(Some(hold.clone()))?;
        Self::held(&mut process, 1, 0)?;
        if *hold == MID_FETCH {
            // The library has every queue set up before the first one fetches. So the first is held in its handler's opening
            // until the second is ready; that one is stopped where it waits for the word to fetch; and the first goes on.
            let thread = self.await_thread(&process, 1, "futex_wait")?;
            process.stop_thread(thread)?;
            process.tell(&Command::Release)?;
            self.await_thread(&process, 0, "io_cqring_wait")?;
        }
        Ok(process)
    }

    /// Waits until the thread of a queue stays in a function of the kernel's. Returns its id.
    fn await_thread(&self, process: &Process, queue: u16, function: &str) -> Result<i32, Failure> {
        const LOOKS: u32 = 4;
        let name = format!("ublk{}-q{queue}", self.id);
        let begun = Instant::now();
        let (mut looks, mut last) = (0, String::new());
        while begun.elapsed() < CONTROL_LIMIT {
            let tasks = std::fs::read_dir(format!("/proc/{}/task", process.pid()));
            let read = |task: &Path, file: &str| std::fs::read_to_string(task.join(file)).unwrap_or_default();
            let task = tasks.ok().and_then(|tasks| {
                tasks.flatten().map(|task| task.path()).find(|task| read(task, "comm").trim() == name)
            });
            if let Some(task) = task {
                let status = read(&task, "status");
                let switches: String = status.lines().filter(|line| line.contains("ctxt_switches")).collect();
                let there = read(&task, "stack").contains(function);
                looks = if there && switches == last { looks + 1 } else { 0 };
                last = switches;
                let id = task.file_name().and_then(|id| id.to_string_lossy().parse().ok());
                if let Some(id) = id.filter(|_| looks >= LOOKS) {
                    return Ok(id);
                }
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Err(Failure::Hang(format!(
            "queue {queue} did not come to {function} within {CONTROL_LIMIT:?}:\n{}",
            stacks(process.pid())
        )))
    }

    fn before_start(&mut self, hold: &Hold) -> Result<(), Failure> {
        let process = self.stopped_before_start(hold)?;
        let killed = self.kill_unstarted(process)?;
        self.in_place(was_held_at(&killed, hold));
        self.delete()
    }

    /// START is short, and nothing stops it on the way: a drawn time within what it took before, until one fits.
    fn starting(&mut self) -> Result<(), Failure> {
        let mut took = START_GUESS;
        for _ in 0..START_ATTEMPTS {
            let mut process = self.serve(None)?;
            let fetched = |what: &What| matches!(what, What::Phase(phase) if phase == "fetched").then_some(());
            process.wait_for("START", fetched)?;
            let wait = self.drawn(took);
            std::thread::sleep(wait);
            self.dies();
            let killed = process.kill()?;
            self.report.kills += 1;
            self.context.evidence().add("kills", 1);
            let time = |name: &str| {
                killed.words.iter().find(|word| word.what == What::Phase(name.to_owned())).map(|word| word.at)
            };
            let within = time("started").is_none();
            self.context.evidence().add("starts_killed_within", u64::from(within));
            self.context.evidence().add("starts_killed_after", u64::from(!within));
            if let (Some(fetched), Some(started)) = (time("fetched"), time("started")) {
                took = Duration::from_nanos(started - fetched);
            }
            self.settle_after_start(&killed)?;
            if within {
                self.report.where_drawn = Some(format!("{} us after it was sent", wait.as_micros()));
                self.in_place(true);
                break;
            }
        }
        Ok(())
    }

    /// START had come through or not: the device is dead, or as one whose server died.
    fn settle_after_start(&mut self, killed: &Killed) -> Result<(), Failure> {
        let begun = Instant::now();
        let mut dead_since = None;
        let state = loop {
            let state = self.state()?;
            if state == Some(self.mode.state()) && self.mode.recovers() {
                break state;
            }
            let dead = state == Some(State::Dead) && !block_path(self.id).exists();
            let since = *dead_since.get_or_insert_with(Instant::now);
            if !dead {
                dead_since = None;
            } else if since.elapsed() >= Duration::from_millis(200) {
                break state;
            }
            if begun.elapsed() >= CONTROL_LIMIT {
                return Err(Failure::broke(
                    "state",
                    format!("{CONTROL_LIMIT:?} after its server died in START the device is {state:?}"),
                ));
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        if state == Some(State::Dead) {
            self.report.death_ms = self.report.death_ms.max(killed.took.as_millis() as u64);
            self.context.evidence().add("starts_undone", 1);
            self.book.timeline().deaths.clear();
            return self.delete();
        }
        self.context.evidence().add("starts_done", 1);
        self.has_died(killed.took + begun.elapsed());
        let process = self.serving()?;
        self.verify_and_close(process)
    }

    /// There is a disk, and nobody but the kernel has looked at it.
    fn started(&mut self, hold: &Hold) -> Result<(), Failure> {
        let mut process = self.serve(Some(hold.clone()))?;
        Self::held(&mut process, 1, 0)?;
        let killed = self.kill(process)?;
        self.in_place(was_held_at(&killed, hold));
        self.bring_back().map(drop)
    }

    /// What comes after a death: the device is deleted if it is dead. Says whether it waits for another server.
    fn bring_back(&mut self) -> Result<bool, Failure> {
        if !self.waits() {
            self.delete()?;
        }
        Ok(self.waits())
    }

    fn idle(&mut self) -> Result<(), Failure> {
        let process = self.serving()?;
        self.load()?.stop()?;
        self.kill(process)?;
        self.in_place(true);
        if self.mode == Mode::None {
            self.book.pulled()?;
        }
        self.bring_back().map(drop)
    }

    fn at_work(&mut self) -> Result<(), Failure> {
        let mut process = self.serving()?;
        let load = self.load()?;
        let (queues, depth) = self.granted.unwrap_or((1, 1));
        let wanted = match self.point {
            Point::AllTags => Some((Hold::Requests(Kind::Any, Stage::Before), u32::from(queues * depth), 0)),
            Point::Uncommitted => Some((Hold::Requests(Kind::Writes, Stage::After), 1, 1)),
            Point::Flushing => Some((Hold::Requests(Kind::Flushes, Stage::Before), 1, 1)),
            _ => None,
        };
        if let Some((hold, requests, changes)) = wanted {
            process.tell(&Command::Hold(hold))?;
            Self::held(&mut process, requests, changes)?;
        } else {
            let wait = self.drawn(DRAWN_MAX);
            std::thread::sleep(wait);
            self.report.where_drawn = Some(format!("{} us under load", wait.as_micros()));
        }
        let busy = load.in_flight() > 0;
        let killed = self.kill(process)?;
        self.in_place(busy);
        let (held, changes) = Self::last_held(&killed);
        self.report.held += u64::from(held);
        self.after_a_death_at_work(load, changes)
    }

    /// What a server held when it was killed: everything, and of these what changes the storage or makes it last.
    fn last_held(killed: &Killed) -> (u32, u32) {
        let last = killed.words.iter().rev().find_map(|word| match word.what {
            What::Holding { held, changes } => Some((held, changes)),
            _ => None,
        });
        last.unwrap_or_default()
    }

    /// The server is dead, with so many writes and flushes in its hands; the load looks what becomes of them.
    fn after_a_death_at_work(&mut self, load: Load, in_hand: u32) -> Result<(), Failure> {
        match self.mode {
            Mode::None => {
                load.join()?;
                self.all_fail(in_hand)?;
                self.book.pulled()?;
                self.bring_back().map(drop)
            }
            Mode::Reissue => self.go_on(load),
            Mode::Wait => {
                self.all_fail(in_hand)?;
                self.go_on(load)
            }
            Mode::FailIo => {
                let refused = || self.book.tally.refused.load(Ordering::Relaxed);
                let already = refused();
                load.wait_until("I/O was turned away while there is no server", || refused() > already)?;
                self.all_fail(in_hand)?;
                self.go_on(load)
            }
        }
    }

    /// What the server had in its hands fails, each of it.
    fn all_fail(&self, in_hand: u32) -> Result<(), Failure> {
        let failed = || self.book.tally.failed_changes.load(Ordering::Relaxed);
        let begun = Instant::now();
        while failed() < u64::from(in_hand) {
            if begun.elapsed() >= CONTROL_LIMIT {
                let failed = failed();
                let what =
                    format!("the server died with {in_hand} writes and flushes in its hands, and {failed} failed");
                return Err(Failure::broke("sigkill", what));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Another server takes over, under the same load; the cell's end verifies and closes what it serves.
    fn go_on(&mut self, load: Load) -> Result<(), Failure> {
        let wait = self.drawn(DRAWN_MAX);
        std::thread::sleep(wait);
        let process = self.serving()?;
        Self::wind_up(load)?;
        self.verify_and_close(process)
    }

    /// The next server dies as well, at once.
    fn twice(&mut self) -> Result<(), Failure> {
        let process = self.serving()?;
        let load = self.load()?;
        self.kill(process)?;
        if self.mode == Mode::None {
            load.join()?;
            self.book.pulled()?;
            self.delete()?;
            let process = self.serving()?;
            let load = self.load()?;
            let busy = load.in_flight() > 0;
            self.kill(process)?;
            self.in_place(busy);
            return self.after_a_death_at_work(load, 0);
        }
        let process = self.serving()?;
        let wait = self.drawn(DRAWN_MAX / 3);
        std::thread::sleep(wait);
        self.report.where_drawn = Some(format!("{} us after the recovery", wait.as_micros()));
        let busy = load.in_flight() > 0;
        self.kill(process)?;
        self.in_place(busy);
        self.after_a_death_at_work(load, 0)
    }

    /// The next server dies before it serves.
    fn recovering(&mut self) -> Result<(), Failure> {
        let process = self.serving()?;
        let load = self.load()?;
        self.kill(process)?;
        let reached = self.draw_reached();
        self.report.where_drawn = Some(format!("{reached:?}"));
        let hold = match reached {
            Reached::Added => Hold::Phase("added".to_owned()),
            Reached::Configured => Hold::Phase("configured".to_owned()),
            Reached::MidFetch => MID_FETCH,
            Reached::Fetched => Hold::Phase("fetched".to_owned()),
        };
        if self.mode == Mode::None {
            load.join()?;
            self.book.pulled()?;
            self.delete()?;
            let process = self.stopped_before_start(&hold)?;
            let killed = self.kill_unstarted(process)?;
            self.in_place(was_held_at(&killed, &hold));
            return self.delete();
        }
        let process = self.stopped_before_start(&hold)?;
        let killed = self.kill(process)?;
        self.in_place(was_held_at(&killed, &hold));
        self.after_a_death_at_work(load, 0)
    }

    /// How far the next server comes: drawn among what this kernel survives, or as was asked for, whatever it survives.
    fn draw_reached(&mut self) -> Reached {
        if let Some(reached) = self.reached {
            return reached;
        }
        let open: Vec<_> = Reached::value_variants()
            .iter()
            .copied()
            .filter(|reached| {
                let what = format!("recovering × {}: killed when {reached:?}", name(&self.mode));
                !reached.gates(self.mode).iter().any(|gate| self.context.gated(gate, &what))
            })
            .collect();
        self.rng.pick(&open).copied().unwrap_or(Reached::Added)
    }

    /// The thread of one queue ends: the library ends the others with it, and lets go of the device, in a process that lives.
    fn queue_thread(&mut self) -> Result<(), Failure> {
        let mut process = self.serving()?;
        let load = self.load()?;
        self.dies();
        let begun = Instant::now();
        process.tell(&Command::EndQueue)?;
        process.wait_for("the end of a queue's thread", |what| matches!(what, What::QueueEnded(_)).then_some(()))?;
        self.await_state(self.mode.state())?;
        self.await_release()?;
        // What its workers were at is not decided while they live.
        process.kill()?;
        self.report.kills += 1;
        self.context.evidence().add("kills", 1);
        self.context.evidence().add("queue_threads_ended", 1);
        self.in_place(true);
        self.has_died(begun.elapsed());
        self.after_a_death_at_work(load, 0)
    }

    /// Nobody takes over.
    fn abandoned(&mut self) -> Result<(), Failure> {
        let process = self.serving()?;
        let load = self.load()?;
        let busy = load.in_flight() > 0;
        self.kill(process)?;
        self.in_place(busy);
        self.book.timeline().ending = Some(nanoseconds());
        // With its disk open, the device is deleted when those who have it open let go: which they do when their I/O has failed.
        self.delete()?;
        load.join()?;
        if self.mode == Mode::None {
            self.book.pulled()?;
        }
        self.book.timeline().ending = None;
        Ok(())
    }

    /// STOP from elsewhere, and the server dies while that waits for what it has in its hands.
    ///
    /// Where I/O waits for a server, the kernel fails dirty pages in STOP instead of writing them back; there, the server has
    /// writes past the page cache in its hands.
    fn stopping(&mut self) -> Result<(), Failure> {
        if matches!(self.mode, Mode::Wait | Mode::Reissue) { self.stopping_at_work() } else { self.stopping_dirty() }
    }

    fn stopping_at_work(&mut self) -> Result<(), Failure> {
        let mut process = self.serving()?;
        let load = self.load()?;
        process.tell(&Command::Hold(Hold::Requests(Kind::Writes, Stage::Before)))?;
        Self::held(&mut process, 1, 1)?;
        let wait = self.drawn(DRAWN_MAX) + DRAWN_MAX;
        self.dies();
        self.book.timeline().ending = Some(nanoseconds());
        let (controller, id) = (self.controller, self.id);
        let (within, killed, stopped) = std::thread::scope(|scope| {
            let stopping = stop_beside(scope, controller, id)?;
            std::thread::sleep(wait);
            let within = !stopping.is_finished();
            Ok::<_, Failure>((within, process.kill(), stopping.join()))
        })?;
        let killed = killed?;
        stopped.map_err(|_panic| Failure::Internal("a STOP panicked".to_owned()))??;
        self.killed_in_stop(&killed, within)?;
        load.join()?;
        self.book.timeline().ending = None;
        self.book.timeline().deaths.clear();
        self.book.settle();
        self.delete()
    }

    fn killed_in_stop(&mut self, killed: &Killed, within: bool) -> Result<(), Failure> {
        self.report.kills += 1;
        self.context.evidence().add("kills", 1);
        self.context.evidence().add("stops_killed_within", u64::from(within));
        self.in_place(within);
        self.report.held += u64::from(Self::last_held(killed).0);
        self.report.death_ms = self.report.death_ms.max(killed.took.as_millis() as u64);
        self.await_state(State::Dead)
    }

    fn stopping_dirty(&mut self) -> Result<(), Failure> {
        let mut process = self.serving()?;
        self.load()?.stop()?;
        let dirty = self.make_dirty()?;
        process.tell(&Command::Hold(Hold::Requests(Kind::Writes, Stage::Before)))?;
        let (controller, id) = (self.controller, self.id);
        let (killed, stopped) = std::thread::scope(|scope| {
            let stopping = stop_beside(scope, controller, id)?;
            let killed = Self::held(&mut process, 1, 1).and_then(|_| process.kill());
            Ok::<_, Failure>((killed, stopping.join()))
        })?;
        let killed = killed?;
        stopped.map_err(|_panic| Failure::Internal("a STOP panicked".to_owned()))??;
        self.killed_in_stop(&killed, true)?;
        let (file, tickets) = dirty;
        // The pages are lost with the disk; that is what an application is told by fsync, and by nothing else.
        drop(file);
        self.dies();
        for (ticket, began) in tickets {
            self.book.timeline().ending = Some(began);
            self.book.end(ticket, OpKind::Write, began, Ended::Failed(nix::libc::EIO), &[])?;
        }
        self.book.timeline().ending = None;
        self.book.timeline().deaths.clear();
        self.book.settle();
        if self.mode == Mode::None {
            self.book.pulled()?;
        }
        self.delete()
    }

    /// How many blocks to leave dirty: more than the device has tags, where a server may die with all of them in hand.
    fn dirty_blocks(&mut self) -> u64 {
        let (_, depth) = self.granted.unwrap_or((1, 1));
        let name = format!("{} × {}: more dirty pages than a queue has tags", name(&self.point), name(&self.mode));
        if self.context.gated(&gates::FULL_QUEUE, &name) {
            u64::from(depth.saturating_sub(1).max(1))
        } else {
            DIRTY_BLOCKS
        }
    }

    /// Writes through the page cache, where it stays.
    fn make_dirty(&mut self) -> Result<(File, Vec<(ublkit_harness::ledger::Ticket, u64)>), Failure> {
        let path = block_path(self.id);
        let file = File::options().read(true).write(true).open(path);
        let file = file.map_err(|error| Failure::io("open the device", &error))?;
        let mut tickets = Vec::new();
        let mut buf = vec![0; super::store::BLOCK];
        for index in 0..self.dirty_blocks() {
            let block = self.rng.below(self.book.bytes / super::store::BLOCK as u64);
            let range = SectorRange::new(block * BLOCK_SECTORS, BLOCK_SECTORS);
            let began = nanoseconds();
            let ticket = self.book.begin(u32::MAX, index, OpKind::Write, range, &mut buf);
            tickets.push((ticket, began));
            file.write_all_at(&buf, range.offset_bytes())
                .map_err(|error| Failure::io("write through the page cache", &error))?;
        }
        Ok((file, tickets))
    }

    /// The server's own DEL waits for somebody who has the device open.
    fn deleting(&mut self) -> Result<(), Failure> {
        let mut process = self.serving()?;
        self.load()?.stop()?;
        let device = super::load::open(&block_path(self.id));
        let device = device.map_err(|error| Failure::io("open the device", &error))?;
        process.tell(&Command::Close)?;
        let joined = |what: &What| matches!(what, What::Phase(phase) if phase == "joined").then_some(());
        process.wait_for("DEL", joined)?;
        // DEL takes the node away before it waits.
        let node = CharDir::of(self.id);
        let begun = Instant::now();
        while node.exists() {
            if begun.elapsed() >= CONTROL_LIMIT {
                return Err(Failure::Hang(format!("DEL has not removed the node within {CONTROL_LIMIT:?}")));
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        let killed = process.kill()?;
        self.report.kills += 1;
        self.context.evidence().add("kills", 1);
        self.report.death_ms = self.report.death_ms.max(killed.took.as_millis() as u64);
        let within = !killed.words.iter().any(|word| word.what == What::Phase("deleted".to_owned()));
        self.context.evidence().add("deletes_killed_within", u64::from(within));
        self.in_place(within);
        drop(device);
        if self.mode == Mode::None {
            // What a server writes out when it ends it had no time to.
            self.book.pulled()?;
        }
        // DEL was as good as done: the id is free when nobody has the device open, without anybody's doing.
        self.no_more()
    }
}

/// STOP, sent by a thread of its own.
fn stop_beside<'scope>(
    scope: &'scope Scope<'scope, '_>,
    controller: &'scope Controller,
    id: u32,
) -> Result<ScopedJoinHandle<'scope, ublkit::Result<()>>, Failure> {
    let thread = std::thread::Builder::new().name("stop".to_owned());
    thread.spawn_scoped(scope, move || controller.stop(id, CONTROL_LIMIT)).map_err(|error| no_thread(&error))
}

/// Whether a server that was told to stop at one place has gone no further, by its last words.
fn was_held_at(killed: &Killed, hold: &Hold) -> bool {
    let last = killed.words.iter().rev().find_map(|word| match &word.what {
        What::Phase(phase) => Some(phase.as_str()),
        _ => None,
    });
    match hold {
        Hold::Phase(phase) => last == Some(phase),
        Hold::Open(_) => last == Some("configured"),
        Hold::Requests(..) => killed.words.iter().any(|word| matches!(word.what, What::Holding { .. })),
    }
}
