//! What is done about a failure on a real device: what was done until then is written out, made small, told, and kept.
//!
//! It is made small on the device itself: candidates are done one after another, each on a new device where it is one of our
//! own, for as long as there is time. How often the result fails is counted with other seeds; what completes when is the
//! device's, so that one which needs a race fails now and then.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ublkit_harness::bundle::{FoundOn, Smaller};
use ublkit_harness::event::Event;
use ublkit_harness::fault::FaultPlan;
use ublkit_harness::mutant::Planted;
use ublkit_harness::script::{Recovery, Script, Setup, VERSION};
use ublkit_harness::shrink::{Rate, ShrinkOptions, Signature, shrink_while};
use ublkit_harness::{DiscardPromise, SECTOR, SectorRange, Seed};

use super::device::{Opened, Subject};
use super::recorder::Recorder;
use super::stage::{Last, Place, Stage, oracle_of, signature_of};
use crate::context::Context;
use crate::kept::{self, Kept};
use crate::scenario::Failure;

/// Of the time that there is, the part that is left for counting how often the result fails.
const RATE_SHARE: u32 = 5;
/// How many times it is done for that, at most, and at least if it takes longer.
const RATE_RUNS: u64 = 20;
const RATE_RUNS_LEAST: u64 = 3;
/// How many of the last failures are remembered: the one of the result is among them.
const REMEMBERED: usize = 32;

/// A run on a real device that may fail: what has to be known then.
#[derive(Clone, Debug)]
pub(super) struct Underway {
    pub(super) stage: Stage,
    pub(super) seed: Seed,
    pub(super) setup: Setup,
    pub(super) mutant: Option<Planted>,
    pub(super) faults: FaultPlan,
    pub(super) regions: Vec<SectorRange>,
    pub(super) recorder: Arc<Recorder>,
    pub(super) repro: String,
}

/// The device, and how it is driven, as a script has it.
pub(super) fn setup(subject: &Subject, opened: &Opened, workers: u32, io_depth: u16) -> Setup {
    let (queues, queue_depth, read_only) = match subject {
        Subject::Ours(target) => (target.queues(), target.depth(), target.geometry().read_only),
        // It does not say.
        Subject::SomebodyElses(_) => (1, 128, false),
    };
    let capabilities = opened.capabilities;
    Setup {
        bytes: opened.bytes,
        logical_block: opened.logical_block as u32,
        max_io_bytes: opened.max_io_bytes as u32,
        queues,
        queue_depth,
        workers,
        io_depth: io_depth.into(),
        volatile_cache: capabilities.flush,
        fua: capabilities.fua,
        discard: capabilities.discard,
        discard_zeroes: capabilities.discard && opened.discard == DiscardPromise::Zeroes,
        write_zeroes: capabilities.write_zeroes,
        read_only,
        recovery: Recovery::None,
        merges: true,
        reorder: 0,
        memory_pressure: false,
        compressible: 0,
    }
}

impl Underway {
    /// The failure with everything that is known of it.
    pub(super) fn failed(&self, event: &Event, kernel_log: Vec<String>) -> Kept {
        let Self { stage, seed, setup, mutant, faults, regions, recorder, repro } = self;
        let recorded = recorder.recorded();
        let longest = u64::from(setup.max_io_bytes) / SECTOR as u64;
        let script = Script {
            version: VERSION,
            seed: *seed,
            setup: *setup,
            mutant: *mutant,
            faults: faults.clone(),
            actions: recorded.script(regions, longest),
        };
        Kept {
            scenario: "torture".to_owned(),
            found_on: match &stage.place {
                Place::Served(served) => FoundOn::Served(served.told()),
                Place::External(_) => FoundOn::External,
            },
            device: stage.device,
            failure: kept::failure(oracle_of(event), event.clone(), recorded.ops),
            script,
            repro: repro.clone(),
            events: Vec::new(),
            threads: match event {
                Event::Hang(hang) => hang.threads.clone(),
                _ => Vec::new(),
            },
            kernel_log,
        }
    }
}

/// Makes the script of a failure small, on the device where it failed, for as long as `time`. `None` if it cannot be done
/// there.
fn make_small(context: &mut Context, stage: &Stage, kept: &Kept, time: Duration) -> Option<Smaller> {
    let script = kept.script.clone();
    if let Err(why) = stage.check(&script) {
        context.note(format!("it is not made smaller: {why}"));
        return None;
    }
    let now = Instant::now();
    let (until_rate, until) = (now + time * (RATE_SHARE - 1) / RATE_SHARE, now + time);
    let interruption = context.interruption().clone();
    // What ends the search, and is no failure of the device's.
    let in_the_way = RefCell::new(None);
    let failures = RefCell::new(VecDeque::new());
    let mut last = Last::default();
    let mut fails = |script: &Script| -> Option<Signature> {
        match stage.failure_of(context, script, &mut last) {
            Ok(None) => None,
            Ok(Some(event)) => {
                let signature = signature_of(&event);
                let mut failures = failures.borrow_mut();
                failures.truncate(REMEMBERED - 1);
                failures.push_front((script.clone(), event));
                Some(signature)
            }
            Err(failure) => {
                in_the_way.borrow_mut().get_or_insert(failure);
                None
            }
        }
    };
    let goes_on = |until: Instant| Instant::now() < until && !interruption.came() && in_the_way.borrow().is_none();
    // Seconds, not milliseconds as on the simulator: each candidate has one chance, and others come again in later rounds.
    let options = ShrinkOptions { tries: 1, rate_runs: 0, ..ShrinkOptions::default() };
    let mut shrunk = shrink_while(script, &options, &mut fails, &mut || goes_on(until_rate));
    if let Some(wanted) = shrunk.signature.clone() {
        let mut rate = Rate::default();
        let mut again = shrunk.script.clone();
        while rate.of < RATE_RUNS
            && (rate.of < RATE_RUNS_LEAST || goes_on(until))
            && !interruption.came()
            && in_the_way.borrow().is_none()
        {
            again.seed = Seed::new(shrunk.script.seed.derive("rate", rate.of).get() >> 11);
            rate.of += 1;
            rate.failed += u64::from(fails(&again).is_some_and(|found| found == wanted));
        }
        shrunk.rate = rate;
    }
    if let Some(failure) = in_the_way.into_inner() {
        context.note(format!("making it smaller ended early: {failure}"));
    }
    let found = failures.into_inner().into_iter().find(|(failed, _)| *failed == shrunk.script);
    let failure = found.map_or_else(
        || kept.failure.clone(),
        |(_, event)| kept::failure(oracle_of(&event), event, shrunk.script.actions.len() as u64),
    );
    Some(Smaller::new(shrunk, failure))
}

/// Tells of a failure and keeps it, if there is a place: first as it is, so that it is there whatever comes, then made small.
pub(super) fn keep(context: &mut Context, stage: &Stage, kept: &Kept, time: Duration) -> Result<(), Failure> {
    let Some(report) = context.report_dir().map(ToOwned::to_owned) else {
        context.note(kept::NOT_KEPT);
        return Ok(());
    };
    let dir = kept.clone().write(None, &report)?;
    if !time.is_zero()
        && let Some(smaller) = make_small(context, stage, kept, time)
    {
        context.note(kept::in_words(&smaller));
        kept.clone().rewrite(smaller, &dir)?;
    }
    context.note(kept::to_replay(&dir));
    context.detail(dir.display().to_string());
    Ok(())
}
