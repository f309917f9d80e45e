//! The raw part: operations of every kind at depth, the power cut in the middle of them or behind a flush, and every
//! sector held against what may be there.
//!
//! A cut is looked at twice. First as a copy: the disk and its cache at one moment, of which several states are drawn that a
//! cut could leave, each judged by a copy of the ledger. Then the power really goes: requests fail, the server begins anew,
//! and what the device holds from then on is what the next operations work on.

mod driver;

use std::thread;
use std::time::Duration;

use ublkit_harness::script::{Act, Action, Actions, Recovery, Script, Setup, VERSION, Workload};
use ublkit_harness::sim::medium::CutReport;
use ublkit_harness::{OpKind, Seed, SeededRng};

use self::driver::{CHUNK, Driver};
use super::cut::{self, PATIENCE};
use super::{PART_DEADLINE, Plan};
use crate::context::Context;
use crate::scenario::Failure;
use crate::server::Moment;
use crate::target::{Target, TargetArgs};
use crate::torture::outage::Outage;

/// Workers in name; they share the device and one ring.
const WORKERS: u32 = 4;
/// Operations of each worker in flight.
const IO_DEPTH: u32 = 8;
/// Operations between two cuts, at most.
const OPS_MAX: u64 = 240;

/// How many operations before a cut in the middle of an epoch are no flushes.
const QUIET: u64 = 2 * (WORKERS * IO_DEPTH) as u64;

/// How a cut comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// While operations are under way.
    Inside,
    /// While a flush is under way.
    InFlush,
    /// When a flush has ended, and nothing is under way: there is nothing to lose.
    Between,
}

/// Cuts the power so many times.
pub(super) fn check(context: &mut Context, args: &TargetArgs, plan: &Plan) -> Result<(), Failure> {
    let s = Duration::from_secs;
    let target = context.step("raw: start", s(60), |context| args.start(context))?;
    let limit = PART_DEADLINE + s(60) * (plan.cuts as u32).saturating_mul(1 + plan.images as u32);
    let mut script = Vec::new();
    let checked = context.step("raw: cuts", limit, |context| {
        // By a thread of its own: what the kernel keeps of its ring goes when it ends, and not some time after.
        let checked = thread::scope(|scope| {
            let cuts = scope.spawn(|| cuts(context, args, plan, &target, &mut script));
            cuts.join().unwrap_or_else(|_panic| Err(Failure::Internal("the raw part panicked".to_owned())))
        });
        context.detail(format!("{} operations and cuts", script.len()));
        checked
    });
    if let Err(Failure::DeviceBroke(_)) = &checked {
        keep(context, args, plan, script);
    }
    let closed = context.always("raw: close", s(120), |context| target.close(context));
    checked.and(closed)
}

fn cuts(
    context: &Context,
    args: &TargetArgs,
    plan: &Plan,
    target: &Target,
    script: &mut Vec<Action>,
) -> Result<(), Failure> {
    let seed = plan.seed.derive("raw", 0);
    let mut rng = seed.derive("cuts", 0).rng();
    let mut driver = Driver::new(context, target, WORKERS * IO_DEPTH)?;
    for number in 0..plan.cuts {
        if context.interruption().came() {
            return driver.drain().and(Err(Failure::Interrupted));
        }
        let way = match rng.below(6) {
            0 => Way::Between,
            1 => Way::InFlush,
            _ => Way::Inside,
        };
        let ops = rng.within(8..=OPS_MAX);
        let actions = Actions::new(seed.derive("actions", number), &setup(args), Workload::ops(ops))
            .map_err(|error| Failure::Internal(format!("operations cannot be drawn: {error}")))?;
        for (action, done) in actions.zip(0_u64..) {
            if let Act::Op { kind, range } = action.act {
                // What is under way when the power goes is not to be flushed away behind it.
                if way == Way::Inside && kind == OpKind::Flush && ops - done.min(ops) < QUIET {
                    continue;
                }
                script.push(action);
                driver.begin(action.worker, kind, range)?;
            }
        }
        if way != Way::Inside {
            if way == Way::Between {
                driver.drain()?;
            }
            let flush = Act::Op { kind: OpKind::Flush, range: ublkit_harness::SectorRange::default() };
            script.push(Action { worker: 0, act: flush });
            driver.begin(0, OpKind::Flush, ublkit_harness::SectorRange::default())?;
            if way == Way::Between {
                driver.drain()?;
            }
        }
        script.push(Action { worker: 0, act: Act::PowerCut });
        one(context, &mut driver, target, plan, seed.derive("images", number), way, &mut rng)?;
        script.push(Action { worker: 0, act: Act::Sweep });
    }
    driver.drain()
}

/// One cut: what it could leave, and what it leaves.
fn one(
    context: &Context,
    driver: &mut Driver<'_>,
    target: &Target,
    plan: &Plan,
    seed: Seed,
    way: Way,
    rng: &mut SeededRng,
) -> Result<(), Failure> {
    driver.submit()?;
    let under_way = u64::from(driver.in_flight());
    // As many as there are may be one fewer than are asked for: some are merged.
    let moment = if under_way > 1 { Moment::Requests(rng.within(1..=under_way / 2)) } else { Moment::Now };
    let patience = if moment == Moment::Now { Duration::ZERO } else { PATIENCE.min(Duration::from_millis(100)) };
    let (crashed, disk) = target.storage().fork(moment, patience, || driver.crashed())?;
    let crashed = crashed?;
    for image in 0..plan.images.saturating_sub(1) {
        let (left, report) = disk.crash(seed.derive("image", image))?;
        took(context, way, &report)?;
        let read = |buf: &mut [u8], offset| left.read_at(buf, offset);
        let bytes = driver::judge(crashed.clone(), read).map_err(|failure| told(context, failure, &report))?;
        context.evidence().add("bytes_judged_raw", bytes);
        left.forget()?;
    }
    disk.forget()?;
    driver.goes_out();
    let report = target.kill(Outage::PowerCut)?.unwrap_or_default();
    let ended = driver.drain();
    target.revive()?;
    ended?;
    took(context, way, &report)?;
    let bytes = driver.power_cut().map_err(|failure| told(context, failure, &report))?;
    context.evidence().add("bytes_judged_raw", bytes);
    Ok(())
}

/// Counts a cut. Behind a flush that has ended with nothing under way there is nothing to lose, or a flush is none.
fn took(context: &Context, way: Way, report: &CutReport) -> Result<(), Failure> {
    cut::count(context, "raw", report);
    if way == Way::Between && report.lost_sectors > 0 {
        return Err(Failure::broke_with(
            "durable",
            format!("{} sectors were lost that a flush had made durable", report.lost_sectors),
            cut::in_lines(report),
        ));
    }
    Ok(())
}

fn told(context: &Context, failure: Failure, report: &CutReport) -> Failure {
    context.note(cut::in_lines(report).join("\n  "));
    failure
}

/// The device as a script describes it.
fn setup(args: &TargetArgs) -> Setup {
    let geometry = args.geometry();
    Setup {
        bytes: args.size,
        logical_block: args.logical_block,
        max_io_bytes: args.max_io.min(CHUNK as u32 / 4),
        queues: args.queues,
        queue_depth: args.depth,
        workers: WORKERS,
        io_depth: IO_DEPTH,
        volatile_cache: geometry.volatile_cache,
        fua: geometry.fua,
        discard: geometry.discard.is_some(),
        discard_zeroes: !args.discard_promises_nothing,
        write_zeroes: geometry.write_zeroes.is_some(),
        read_only: false,
        recovery: Recovery::None,
        merges: true,
        reorder: 30,
        memory_pressure: false,
        compressible: 0,
    }
}

/// Keeps what was done as a script, which the simulator can run.
fn keep(context: &Context, args: &TargetArgs, plan: &Plan, mut actions: Vec<Action>) {
    let Some(dir) = context.report_dir() else { return };
    if !matches!(actions.last(), Some(Action { act: Act::Sweep, .. })) {
        actions.push(Action { worker: 0, act: Act::Sweep });
    }
    let faults = ublkit_harness::fault::FaultPlan::NONE;
    let script =
        Script { version: VERSION, seed: plan.seed, setup: setup(args), mutant: args.mutant, faults, actions };
    let path = dir.join("crash-raw.json");
    match script.save(&path) {
        Ok(()) => context.note(format!(
            "what was done is kept as a script; on the simulated device: ublk-torture replay {}",
            path.display()
        )),
        Err(error) => context.note(error.to_string()),
    }
}
