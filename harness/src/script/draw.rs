//! Drawing what a run is: the device and how it is driven, and then what is done.
//!
//! A harness that always runs the same configuration finds the bugs of that configuration. Every option is drawn, and so
//! are the habits of the workload: how often each kind of operation comes, how closely workers follow each other, how
//! often the power goes. One run leaves out flushes altogether, another does little else.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::{Act, Action, Recovery, Setup};
use crate::plan::{Capabilities, Mix, Op, OpKind, Plan, PlanError, PlanOptions, WorkerPlan};
use crate::range::SectorRange;
use crate::sector::{COMPRESSIBILITY_MAX, Pattern};
use crate::seed::{Seed, SeededRng};

/// The smallest device that is drawn, in bytes.
const BYTES_MIN: u64 = 64 << 10;

/// The largest device that is drawn is the smallest times this power of two.
const BYTES_POWER: u64 = 7;

/// How many of the last ranges, anyone's, are returned to.
const RECENT: usize = 8;

/// What a run may do besides operations, and how many of those.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "each may happen or not on its own")]
pub struct Workload {
    /// How many operations there are; without a number there is no end.
    pub ops: Option<u64>,
    /// The power may be cut.
    pub cuts: bool,
    /// The server may die, if the device recovers from that.
    pub kills: bool,
    /// The device may be closed and opened again.
    pub reopens: bool,
    /// Faults may be switched off and on again. They are on when a run begins, and off before the last sweep.
    pub faults: bool,
}

impl Workload {
    /// Operations and nothing else.
    #[must_use]
    pub const fn ops(ops: u64) -> Self {
        Self { ops: Some(ops), cuts: false, kills: false, reopens: false, faults: false }
    }

    /// Everything that may happen, with so many operations.
    #[must_use]
    pub const fn everything(ops: u64) -> Self {
        Self { ops: Some(ops), cuts: true, kills: true, reopens: true, faults: true }
    }
}

impl Setup {
    /// Draws every option. Devices are mostly small, so that operations meet.
    #[must_use]
    pub fn draw(rng: &mut SeededRng) -> Self {
        // A stream for each option: one that is added later leaves the others as they were.
        let seed = Seed::new(rng.next_u64());
        let of = |name: &str| seed.derive(name, 0).rng();
        let yes = |name: &str, hits: u64, out_of: u64| of(name).chance(hits, out_of);
        let logical_block = if yes("logical block", 1, 2) { 512 } else { 4096 };
        let bytes = draw_bytes(&mut of("bytes"), logical_block);
        let volatile_cache = yes("volatile cache", 3, 4);
        let discard = yes("discard", 3, 4);
        Self {
            bytes,
            logical_block: logical_block as u32,
            max_io_bytes: draw_max_io(&mut of("max io"), bytes) as u32,
            queues: of("queues").within(1..=4) as u16,
            queue_depth: up_to_power(&mut of("queue depth"), 7) as u16,
            workers: of("workers").within(1..=8) as u32,
            io_depth: up_to_power(&mut of("io depth"), 6) as u32,
            volatile_cache,
            // The block layer offers FUA only where there is a cache to write through.
            fua: volatile_cache && yes("fua", 1, 2),
            discard,
            discard_zeroes: discard && yes("discard zeroes", 1, 2),
            write_zeroes: yes("write zeroes", 3, 4),
            read_only: yes("read only", 1, 64),
            recovery: match of("recovery").below(7) {
                0 => Recovery::None,
                1..3 => Recovery::Wait,
                3..5 => Recovery::Reissue,
                _ => Recovery::FailIo,
            },
            merges: yes("merges", 1, 2),
            reorder: draw_reorder(&mut of("reorder")),
            memory_pressure: yes("memory pressure", 1, 8),
            compressible: draw_compressible(&mut of("compressible")),
        }
    }

    /// The operations that the device offers. Flushes and FUA writes can be asked of any device; the block layer makes do.
    #[must_use]
    pub const fn capabilities(&self) -> Capabilities {
        Capabilities { flush: true, fua: true, discard: self.discard, write_zeroes: self.write_zeroes }
    }

    /// The whole device.
    #[must_use]
    pub const fn device(&self) -> SectorRange {
        SectorRange::device(self.bytes)
    }

    /// What the run of `seed` writes to its device number `device`.
    #[must_use]
    pub fn pattern(&self, seed: Seed, device: u32) -> Pattern {
        Pattern::with_compressibility(seed, device, self.compressible)
    }

    /// Sectors of a logical block.
    #[must_use]
    pub const fn block_sectors(&self) -> u64 {
        self.logical_block as u64 / crate::sector::SECTOR as u64
    }
}

fn draw_bytes(rng: &mut SeededRng, logical_block: u64) -> u64 {
    let power = rng.within(0..=BYTES_POWER).min(rng.within(0..=BYTES_POWER));
    let even = BYTES_MIN << power;
    // Sizes that are no power of two end where nobody looks.
    let ragged = if rng.chance(1, 3) { rng.within(1..=15) * logical_block } else { 0 };
    (even + ragged).min(BYTES_MIN << BYTES_POWER)
}

fn draw_max_io(rng: &mut SeededRng, bytes: u64) -> u64 {
    let drawn = if rng.chance(1, 16) { 2 << 20 } else { 4096 << rng.within(0..=7) };
    // Where a request can be the whole device, nearly all would be.
    let most = if rng.chance(7, 8) { bytes / 8 } else { u64::MAX };
    let most = 1 << most.ilog2();
    drawn.min(most)
}

fn draw_reorder(rng: &mut SeededRng) -> u8 {
    match rng.below(4) {
        0 => 0,
        1 => 100,
        _ => rng.within(1..=99) as u8,
    }
}

/// Mostly not at all, as a device that does not compress never sees a difference.
fn draw_compressible(rng: &mut SeededRng) -> u8 {
    match rng.below(8) {
        0 => COMPRESSIBILITY_MAX,
        1 => rng.within(1..=COMPRESSIBILITY_MAX.into()) as u8,
        _ => 0,
    }
}

/// A power of two up to `1 << power`, or any number up to one.
fn up_to_power(rng: &mut SeededRng, power: u64) -> u64 {
    let most = 1 << rng.within(0..=power);
    if rng.chance(1, 2) { most } else { rng.within(1..=most) }
}

/// What the workload of one run is like.
#[derive(Clone, Copy, Debug)]
struct Habits {
    /// How long the workers stay with one hot spot, in operations.
    phase: u64,
    /// How often the worker of the last operation has the next one too, in percent.
    stay: u64,
    /// How often an operation is at, or right behind, one of the last, anyone's, in percent.
    echo: u64,
}

impl Habits {
    fn draw(rng: &mut SeededRng) -> Self {
        Self {
            phase: 1 << rng.within(5..=11),
            stay: [0, 0, 50, 90][rng.below(4) as usize],
            echo: [0, 10, 30][rng.below(3) as usize],
        }
    }
}

/// Weights for the kinds of operations; some kinds are left out of some runs.
fn draw_mix(rng: &mut SeededRng, read_only: bool) -> Mix {
    let mut often =
        |sometimes: u64, most: u64| if rng.chance(sometimes, 4) { rng.within(1..=most) as u32 } else { 0 };
    let mix = Mix {
        read: 20 + often(4, 40),
        write: 20 + often(4, 40),
        fua: often(2, 12),
        flush: often(3, 12),
        discard: often(2, 12),
        zeroes: often(2, 12),
    };
    if read_only { Mix { read: mix.read, flush: mix.flush, ..Mix::NOTHING } } else { mix }
}

/// Something that happens now and then.
#[derive(Clone, Copy, Debug)]
struct Now {
    /// On average once in so many operations; 0 for never.
    every: u64,
    left: u64,
}

impl Now {
    fn draw(rng: &mut SeededRng, happens: bool, powers: std::ops::RangeInclusive<u64>, slower: u64) -> Self {
        let every = slower << rng.within(powers);
        let left = rng.within(1..=2 * every);
        Self { every: if happens { every } else { 0 }, left }
    }

    /// Whether it happens before the next operation.
    fn is_due(&mut self, rng: &mut SeededRng) -> bool {
        if self.every == 0 {
            return false;
        }
        self.left = self.left.saturating_sub(1);
        let due = self.left == 0;
        if due {
            self.left = rng.within(1..=2 * self.every);
        }
        due
    }
}

/// The actions of a run, drawn one after another. Endless, unless the workload has a number of operations; then they end
/// with a sweep.
///
/// Every worker has the whole device, and for a while all of them crowd in a hot spot of a few blocks.
#[derive(Clone, Debug)]
pub struct Actions {
    seed: Seed,
    rng: SeededRng,
    options: PlanOptions,
    workload: Workload,
    habits: Habits,
    /// Each worker on the whole device.
    wide: Vec<WorkerPlan>,
    /// Each worker in the hot spot.
    hot: Vec<WorkerPlan>,
    /// How many operations are in the hot spot, in percent.
    hot_share: u64,
    phase: u64,
    phase_left: u64,
    worker: u64,
    recent: [SectorRange; RECENT],
    recent_count: u64,
    sweep: Now,
    cut: Now,
    kill: Now,
    reopen: Now,
    faults: Now,
    faults_on: bool,
    ops_left: Option<u64>,
    queued: VecDeque<Act>,
    ended: bool,
}

impl Actions {
    /// The actions of `seed` on a device of this setup.
    ///
    /// # Errors
    /// When the setup contradicts itself. One that was drawn does not.
    pub fn new(seed: Seed, setup: &Setup, workload: Workload) -> Result<Self, PlanError> {
        let seed = seed.derive("actions", 0);
        let mut rng = seed.rng();
        let mut habits = seed.derive("habits", 0).rng();
        let block = u64::from(setup.logical_block);
        let options = PlanOptions {
            regions: vec![setup.device()],
            workers: setup.workers,
            depth: setup.io_depth,
            mix: draw_mix(&mut habits, setup.read_only),
            capabilities: setup.capabilities(),
            ..PlanOptions::new(setup.bytes, block.max(512), u64::from(setup.max_io_bytes), setup.workers)
        };
        let options = PlanOptions { logical_block_bytes: block, alignment_bytes: block, ..options };
        let wide = crowd(&options, seed.derive("wide", 0))?;
        // A sweep reads everything. On a large device there are fewer, or a run would do little else.
        let slower = 1 + (setup.bytes >> 20);
        Ok(Self {
            sweep: Now::draw(&mut rng, true, 8..=12, slower),
            cut: Now::draw(&mut rng, workload.cuts, 5..=11, slower),
            kill: Now::draw(&mut rng, workload.kills && setup.recovery != Recovery::None, 5..=11, slower),
            reopen: Now::draw(&mut rng, workload.reopens, 7..=12, slower),
            faults: Now::draw(&mut rng, workload.faults, 5..=9, slower),
            faults_on: workload.faults,
            seed,
            habits: Habits::draw(&mut habits),
            rng,
            options,
            workload,
            hot: wide.clone(),
            wide,
            hot_share: 0,
            phase: 0,
            phase_left: 0,
            worker: 0,
            recent: [SectorRange::default(); RECENT],
            recent_count: 0,
            ops_left: workload.ops,
            queued: VecDeque::new(),
            ended: false,
        })
    }

    /// How often each kind of operation is drawn.
    #[must_use]
    pub fn mix(&self) -> Mix {
        self.options.offered_mix()
    }

    /// A new hot spot, and how much of what is done is done there.
    fn begin_phase(&mut self) {
        self.phase_left = self.rng.within(1..=2 * self.habits.phase);
        self.phase += 1;
        self.hot_share = [0, 30, 70, 100][self.rng.below(4) as usize];
        let block = self.options.logical_block_bytes;
        let device = self.options.device_bytes / block;
        let blocks = (1 << self.rng.within(0..=5)).min(device);
        let first = match self.rng.below(4) {
            0 => 0,
            1 => device - blocks,
            _ => self.rng.within(0..=device - blocks),
        };
        let bytes = blocks * block;
        let options = PlanOptions {
            regions: vec![SectorRange::new(first * block / 512, bytes / 512)],
            // Parts of the spot, or everything that is done would be all of it.
            max_io_bytes: self.options.max_io_bytes.min((bytes / 2).max(block)),
            ..self.options.clone()
        };
        // The device's options were right and the spot is aligned and in it; if not, the workers stay where they were.
        if let Ok(hot) = crowd(&options, self.seed.derive("hot", self.phase)) {
            self.hot = hot;
        }
    }

    /// What happens before the next operation, if anything does.
    fn incident(&mut self) -> Option<Act> {
        let rng = &mut self.rng;
        if self.cut.is_due(rng) {
            if rng.chance(3, 4) {
                self.queued.push_back(Act::Sweep);
            } else {
                // The power goes again before everything that survived was read.
                self.cut.left = rng.within(1..=32);
            }
            return Some(Act::PowerCut);
        }
        if self.kill.is_due(rng) {
            if rng.chance(1, 4) {
                self.queued.push_back(Act::Sweep);
            }
            return Some(Act::Kill);
        }
        if self.reopen.is_due(rng) {
            if rng.chance(1, 2) {
                self.queued.push_back(Act::Sweep);
            }
            return Some(Act::Reopen);
        }
        if self.faults.is_due(rng) {
            self.faults_on = !self.faults_on;
            if self.faults_on {
                return Some(Act::FaultsOn);
            }
            if rng.chance(1, 2) {
                self.queued.push_back(Act::Sweep);
            }
            return Some(Act::FaultsOff);
        }
        self.sweep.is_due(rng).then_some(Act::Sweep)
    }

    fn op(&mut self) -> Action {
        if !self.rng.chance(self.habits.stay, 100) {
            self.worker = self.rng.below(self.wide.len() as u64);
        }
        let crowd = if self.rng.chance(self.hot_share, 100) { &mut self.hot } else { &mut self.wide };
        let op = crowd.get_mut(self.worker as usize).and_then(Iterator::next);
        let Op { kind, range, .. } =
            op.unwrap_or(Op { index: 0, kind: OpKind::Flush, range: SectorRange::default() });
        let range = if kind == OpKind::Flush { range } else { self.echo(range) };
        Action { worker: self.worker as u32, act: Act::Op { kind, range } }
    }

    /// `range`, or one of the last, or the place right behind one of them.
    fn echo(&mut self, range: SectorRange) -> SectorRange {
        let mut range = range;
        let known = self.recent_count.min(RECENT as u64);
        if known > 0 && self.rng.chance(self.habits.echo, 100) {
            let last = self.recent[self.rng.below(known) as usize];
            let behind = SectorRange::new(last.end(), last.sectors);
            let fits = SectorRange::device(self.options.device_bytes).covers(behind);
            range = if fits && self.rng.chance(1, 2) { behind } else { last };
        }
        self.recent[(self.recent_count % RECENT as u64) as usize] = range;
        self.recent_count += 1;
        range
    }

    fn ending(&mut self) -> Option<Act> {
        if self.ended {
            return None;
        }
        self.ended = true;
        if self.workload.faults && self.faults_on {
            self.queued.push_back(Act::Sweep);
            return Some(Act::FaultsOff);
        }
        Some(Act::Sweep)
    }
}

/// A plan for each worker.
fn crowd(options: &PlanOptions, seed: Seed) -> Result<Vec<WorkerPlan>, PlanError> {
    let plan = Plan::new(options.clone(), seed)?;
    Ok((0..options.workers).map(|worker| plan.worker(worker)).collect())
}

impl Iterator for Actions {
    type Item = Action;

    fn next(&mut self) -> Option<Action> {
        let nobodys = |act| Action { worker: 0, act };
        if let Some(act) = self.queued.pop_front() {
            return Some(nobodys(act));
        }
        if self.ops_left == Some(0) {
            return self.ending().map(nobodys);
        }
        if let Some(act) = self.incident() {
            return Some(nobodys(act));
        }
        if self.phase_left == 0 {
            self.begin_phase();
        }
        self.phase_left -= 1;
        self.ops_left = self.ops_left.map(|left| left - 1);
        Some(self.op())
    }
}
