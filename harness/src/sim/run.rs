//! A run on the simulated device: actions are begun in order, the device goes its way, and oracles look on.

mod acts;
#[cfg(test)]
pub(in crate::sim) mod tests;

use std::iter::Peekable;
use std::sync::Arc;

use crate::event::Event;
use crate::ledger::OpId;
use crate::oracle::{Oracle, Oracles};
use crate::plan::OpKind;
use crate::range::SectorRange;
use crate::script::{Act, Action, Setup};
use crate::sector::Pattern;
use crate::seed::{Seed, SeededRng};
use crate::sim::driver::Driver;
use crate::sim::ids::Ids;
use crate::sim::medium::Medium;
use crate::sim::oracles::{Ended, Failure, Judges, Watched};
use crate::sim::subject::{Open, Subject};
use crate::sim::trace::{Trace, What};
use crate::vacuity::Evidence;

/// How many reads of a sweep are in flight.
const SWEEP_DEPTH: usize = 4;

/// How often it is looked whether something is stuck, in steps.
const LOOK_EVERY: u64 = 4096;

/// How a run is judged and told.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// Which oracles judge.
    pub oracles: Oracles,
    /// Every event in words.
    pub record: bool,
    /// How many steps an operation may take without coming closer to its end, where nothing else is in flight.
    pub patience: u64,
    /// What other devices hold, for naming bytes that come from there.
    pub foreign: Arc<[Pattern]>,
    /// What sweeps read, in order and apart from each other; the whole device if empty.
    pub areas: Arc<[SectorRange]>,
}

impl Default for RunOptions {
    /// Every oracle, and no events.
    fn default() -> Self {
        Self { oracles: Oracles::ALL, record: false, patience: 50_000, foreign: Arc::new([]), areas: Arc::new([]) }
    }
}

/// A run that is over.
#[derive(Clone, Debug)]
pub struct Ran {
    /// Operations that were begun, those of sweeps left out.
    pub ops: u64,
    /// What was done.
    pub evidence: Evidence,
    /// A hash over every event, in order.
    pub digest: u64,
    /// Every event in words, where that was asked for.
    pub events: Vec<String>,
    /// What broke a promise.
    pub failure: Option<SimFailure>,
}

/// A broken promise.
#[derive(Clone, Debug)]
pub struct SimFailure {
    /// Who says so.
    pub oracle: Oracle,
    /// What is wrong.
    pub event: Event,
    /// The operation that showed it.
    pub op: Option<OpId>,
    /// How many operations had been begun.
    pub after_ops: u64,
}

/// Why a run ends before its actions do.
enum Stop {
    Failed(Failure),
    /// Something hangs, and nobody is to judge that.
    Stuck,
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// How likely each thing is to be what happens next. Drawn once for a run: where everything is as likely as everything
/// else, queues are never full and never empty.
#[derive(Clone, Copy, Debug)]
struct Weights {
    issue: u64,
    dispatch: u64,
    step: u64,
    deliver: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    ops: u64,
    of_kind: [u64; OpKind::ALL.len()],
    failed: u64,
    refused: u64,
    verified_bytes: u64,
    unknown_bytes: u64,
    overlaps: u64,
    power_cuts: u64,
    power_cuts_in_flight: u64,
    kills: u64,
    kills_in_flight: u64,
    reopens: u64,
    sweeps: u64,
    changes_kept: u64,
    changes_lost: u64,
    changes_torn: u64,
}

struct Run<'a> {
    setup: Setup,
    options: RunOptions,
    subject: &'a mut dyn Subject,
    medium: Option<Medium>,
    driver: Driver,
    judges: Judges,
    trace: Trace,
    ids: Ids,
    rng: SeededRng,
    weights: Weights,
    /// What the oracles know of each slot's operation.
    watched: Vec<Option<Watched>>,
    /// Operations in flight, and begun so far, of each worker; the last is whoever sweeps.
    depth: Vec<u32>,
    index: Vec<u64>,
    /// The next sector that is to be swept, while one is.
    sweep: Option<u64>,
    /// The subject knows that it is about to be closed.
    stopping: bool,
    counts: Counts,
}

/// Does `actions` to the device that `setup` describes, as `subject` makes it. The same arguments and a subject that is
/// deterministic give the same run, event for event.
pub fn run(
    setup: &Setup,
    seed: Seed,
    subject: &mut dyn Subject,
    actions: &mut dyn Iterator<Item = Action>,
    options: &RunOptions,
) -> Ran {
    let mut run = Run::new(setup, seed, subject, options);
    let failure = match run.all(&mut actions.peekable()) {
        Err(Stop::Failed(failure)) => {
            let (oracle, event, op) = *failure;
            Some(SimFailure { oracle, event, op, after_ops: run.counts.ops })
        }
        Err(Stop::Stuck) | Ok(()) => None,
    };
    run.ended(failure)
}

impl<'a> Run<'a> {
    fn new(setup: &Setup, seed: Seed, subject: &'a mut dyn Subject, options: &RunOptions) -> Self {
        let mut setup = *setup;
        (setup.queues, setup.queue_depth) = (setup.queues.max(1), setup.queue_depth.max(1));
        (setup.workers, setup.io_depth) = (setup.workers.max(1), setup.io_depth.max(1));
        let medium = subject.uses_medium().then(|| Medium::new(subject.medium_options(&setup)));
        let slots = setup.workers as usize * setup.io_depth as usize + SWEEP_DEPTH;
        let mut rng = seed.derive("simulator", 0).rng();
        let mut weight = || 1 << rng.below(5);
        let weights = Weights { issue: weight(), dispatch: weight(), step: weight(), deliver: weight() };
        let (clock, faults) = (subject.calls().cloned(), subject.faults().cloned());
        let zero = subject.initially_zero();
        let mut judges =
            Judges::new(&setup, seed, options.oracles, options.foreign.clone(), zero, clock, faults.clone());
        if subject.fails_below() {
            judges.expect_errors_below();
        }
        Self {
            setup,
            options: options.clone(),
            driver: Driver::new(&setup, subject.geometry(), seed, slots, faults),
            subject,
            medium,
            judges,
            trace: Trace::new(options.record),
            ids: Ids::default(),
            rng,
            weights,
            watched: (0..slots).map(|_| None).collect(),
            depth: vec![0; setup.workers as usize + 1],
            index: vec![0; setup.workers as usize + 1],
            sweep: None,
            stopping: false,
            counts: Counts::default(),
        }
    }

    fn all(&mut self, actions: &mut Peekable<&mut dyn Iterator<Item = Action>>) -> Result<(), Stop> {
        self.open(Open::First)?;
        while self.tick(actions)? {}
        self.judges.observe_finish()?;
        self.subject.stopping();
        self.driver.stop();
        self.close();
        let left = self.ids.taken();
        if left > 0 {
            self.judges.resources(&format!("{left} device ids were not given back"), Vec::new())?;
        }
        Ok(())
    }

    /// Something happens. Returns whether there is more to come.
    fn tick(&mut self, actions: &mut Peekable<&mut dyn Iterator<Item = Action>>) -> Result<bool, Stop> {
        self.driver.now += 1;
        if self.driver.now.is_multiple_of(LOOK_EVERY) && self.driver.in_flight() > 0 {
            self.look_for_hangs()?;
        }
        if self.driver.is_down() && self.driver.wants_server() {
            self.open(Open::AfterKill)?;
        }
        if self.driver.holds() {
            self.driver.release(false, &mut self.trace);
        }
        if let Some(Action { act: Act::Reopen, .. }) = actions.peek()
            && !self.stopping
            && !self.driver.is_down()
            && self.sweep.is_none()
        {
            // While requests are on their way.
            self.stopping = true;
            self.subject.stopping();
        }
        let Weights { issue, dispatch, step, deliver } = self.weights;
        let enabled = |weight: u64, enabled: bool| if enabled { weight } else { 0 };
        let issue = enabled(issue, self.may_issue(actions.peek()));
        let dispatch = issue + enabled(dispatch, self.driver.can_dispatch());
        let step = dispatch + enabled(step, self.driver.can_step());
        let all = step + enabled(deliver, self.driver.can_deliver());
        if all == 0 {
            return self.nothing_to_do(actions.peek().is_some());
        }
        let drawn = self.rng.below(all);
        if drawn < issue {
            self.issue(actions)?;
        } else if drawn < dispatch {
            self.driver.dispatch(&mut self.trace);
        } else if drawn < step {
            self.driver.step(&mut self.trace);
            self.judges.observe_calls();
        } else if let Some(slot) = self.driver.deliver() {
            self.deliver(slot)?;
        }
        Ok(true)
    }

    /// Nothing can happen by itself.
    fn nothing_to_do(&mut self, more: bool) -> Result<bool, Stop> {
        if self.driver.holds() {
            self.driver.release(true, &mut self.trace);
        } else if self.driver.is_down() {
            self.driver.skip_gap();
        } else if self.driver.in_flight() > 0 {
            let stuck = self.driver.bios_in_flight().min_by_key(|(_, bio)| bio.began).map(|(slot, _)| slot);
            self.hang(stuck)?;
        } else {
            return Ok(more);
        }
        Ok(true)
    }

    fn look_for_hangs(&mut self) -> Result<(), Stop> {
        match self.driver.stuck(self.options.patience) {
            // What is held may keep others waiting.
            Some(_) if self.driver.holds() => self.driver.release(true, &mut self.trace),
            Some(slot) => self.hang(Some(slot))?,
            None => {}
        }
        Ok(())
    }

    fn hang(&self, slot: Option<u32>) -> Result<(), Stop> {
        let bio = slot.map(|slot| self.driver.bio(slot));
        let what = bio.map_or_else(
            || "the device".to_owned(),
            |bio| {
                let age = self.driver.now - bio.began;
                format!("{} of worker {} ({}) after {age} steps", bio.kind, bio.id.worker, bio.range)
            },
        );
        self.hangs(what, self.driver.dump(), bio.map(|bio| bio.id))
    }

    fn hangs(&self, what: String, notes: Vec<String>, op: Option<OpId>) -> Result<(), Stop> {
        Err(self.judges.hang(what, notes, op).map_or(Stop::Stuck, Stop::Failed))
    }

    fn may_issue(&self, head: Option<&Action>) -> bool {
        if self.sweep.is_some() {
            return self.driver.in_flight() < SWEEP_DEPTH;
        }
        match head {
            None => false,
            Some(Action { worker, act: Act::Op { .. } }) => self.depth[self.worker(*worker)] < self.setup.io_depth,
            Some(Action { act: Act::Reopen | Act::Sweep, .. }) => {
                self.driver.in_flight() == 0 && !self.driver.is_down()
            }
            Some(_) => true,
        }
    }

    /// A worker that is not there has its actions done by one that is.
    fn worker(&self, worker: u32) -> usize {
        (worker % self.setup.workers) as usize
    }

    fn begin(&mut self, worker: usize, kind: OpKind, range: SectorRange) {
        let Some(slot) = self.driver.slot() else { return };
        let id = OpId { worker: worker as u32, index: self.index[worker] };
        self.index[worker] += 1;
        self.depth[worker] += 1;
        self.counts.overlaps += u64::from(self.driver.overlaps(kind, range));
        let refusal = self.driver.refusal(kind, range);
        if refusal == 0 {
            let payload = match kind {
                OpKind::Flush | OpKind::Discard | OpKind::WriteZeroes => &mut [],
                // A read's buffer holds what was there before.
                OpKind::Read | OpKind::Write | OpKind::WriteFua => {
                    self.driver.data_mut(slot, range.len_bytes() as usize)
                }
            };
            self.watched[slot as usize] = Some(self.judges.observe_begin(id, kind, range, payload));
        } else {
            // Nothing of it reaches anyone: what it is for is as it was.
            self.counts.refused += 1;
        }
        self.driver.submit(slot, id, kind, range, &mut self.trace);
    }

    fn deliver(&mut self, slot: u32) -> Result<(), Stop> {
        let bio = self.driver.bio(slot);
        let ended = Ended::of(bio);
        let worker = bio.id.worker as usize;
        let now = self.driver.now;
        self.trace.note(What::End, [u64::from(bio.id.worker), bio.id.index, bio.errno as u64], || {
            let result = match (ended.errno, ended.excused) {
                (0, _) => "done".to_owned(),
                (errno, false) => format!("errno {errno}"),
                (errno, true) => format!("errno {errno}, of the driver itself or of another in the same request"),
            };
            format!("{now}: worker {} #{} {}: {result}", ended.op.worker, ended.op.index, ended.kind)
        });
        self.counts.failed += u64::from(ended.errno != 0);
        self.depth[worker] -= 1;
        let watched = self.watched[slot as usize].take();
        let data = match ended.kind {
            OpKind::Read => bio.data.get(..ended.range.len_bytes() as usize).unwrap_or_default(),
            _ => &[],
        };
        let verified = match watched {
            Some(watched) => self.judges.observe_end(watched, ended, data)?,
            None => crate::shadow::Verified::default(),
        };
        self.driver.free(slot);
        self.counts.verified_bytes += verified.bytes;
        self.counts.unknown_bytes += verified.unknown_bytes;
        let unknown = verified.unknown_bytes;
        self.trace.note(What::Checked, [verified.bytes, unknown, verified.settled_sectors], || {
            format!("{now}: {} bytes right, {unknown} bytes unknown", verified.bytes)
        });
        Ok(())
    }

    fn ended(self, failure: Option<SimFailure>) -> Ran {
        let mut evidence = Evidence::new();
        let (counts, driver) = (self.counts, self.driver.counts);
        for (kind, name) in
            OpKind::ALL.into_iter().zip(["reads", "writes", "fua_writes", "flushes", "discards", "zeroes"])
        {
            evidence.add(name, counts.of_kind[kind as usize]);
        }
        for (name, count) in [
            ("ops", counts.ops),
            ("failed_ops", counts.failed),
            ("refused_ops", counts.refused),
            ("verified_bytes", counts.verified_bytes),
            ("unknown_bytes", counts.unknown_bytes),
            ("overlaps", counts.overlaps),
            ("power_cuts", counts.power_cuts),
            ("power_cuts_in_flight", counts.power_cuts_in_flight),
            ("kills", counts.kills),
            ("kills_in_flight", counts.kills_in_flight),
            ("reopens", counts.reopens),
            ("sweeps", counts.sweeps),
            ("changes_kept", counts.changes_kept),
            ("changes_lost", counts.changes_lost),
            ("changes_torn", counts.changes_torn),
            ("requests", driver.requests),
            ("splits", driver.splits),
            ("merges", driver.merges),
            ("flush_requests", driver.flush_requests),
            ("flushes_shared", driver.flushes_shared),
            ("held", driver.held),
            ("short_results", driver.short),
            ("clamped_results", driver.clamped),
            ("requeued", driver.requeued),
            ("refused_commits", driver.refused_commits),
            ("reissued", driver.reissued),
            ("steps", self.driver.now),
        ] {
            evidence.add(name, count);
        }
        self.judges.add_to(&mut evidence);
        let digest = self.trace.digest();
        Ran { ops: counts.ops, evidence, digest, events: self.trace.into_lines(), failure }
    }
}
