//! From a run that failed to the few steps that matter.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ublkit::Geometry;

use super::found::Smallest;
use super::watch::Remarks;
use super::{Check, Drawn, Factory, Found};
use crate::bundle::Failure;
use crate::classify::Class;
use crate::event::Event;
use crate::oracle::Oracle;
use crate::range::SectorRange;
use crate::script::{Act, Action, Script};
use crate::shrink::{Rate, ShrinkOptions, Signature, shrink_while};

/// How long a run is made smaller at most, and in how many tries. The tests ask for how small it gets, and that must not depend
/// on how busy the machine is, nor on how slow an instrumented program.
const SHRINKING: Duration = Duration::from_secs(if cfg!(test) { 60 } else { 3 });
const RUNS: u64 = 2000;

/// In a script of at most so many actions, sweeps read what is near to its operations, so many blocks around them.
const SHORT: usize = 256;
const NEAR: u64 = 8;

/// How often the result is run to see how often it fails, and for how long at most.
const RATE_RUNS: u64 = 50;
const RATING: Duration = Duration::from_millis(500);

impl<F: Factory<M>, M> Check<F, M> {
    /// Makes the run that failed small.
    pub(super) fn shrink(
        &self,
        drawn: &Drawn,
        geometry: Geometry,
        failure: Failure,
        remarks: &Remarks,
    ) -> Box<Found> {
        let mut found = Box::new(Found { remarks: remarks.take(), ..Found::new(drawn.header.seed, failure) });
        let of = found.failure.after_ops;
        let Ok(actions) = drawn.actions() else { return found };
        let script = Script { actions: first_ops(actions, of), ..drawn.header.clone() };
        let wrong_sector = match &found.failure.event {
            Event::Mismatch(mismatch) => Some(mismatch.sector),
            _ => None,
        };
        let fails = |script: &Script| {
            // Another device is not what is there to be tested.
            if self.setup_of(script.setup, &geometry) != script.setup {
                return None;
            }
            let actions = &mut script.actions.iter().copied();
            let areas = if script.actions.len() > SHORT { drawn.areas.ranges() } else { near(script, wrong_sector) };
            let failure = self.simulate(script, geometry, areas, actions, remarks).failure?;
            Some(Failure { oracle: failure.oracle, event: failure.event, after_ops: failure.after_ops })
        };
        let signature_of = |script: &Script| fails(script).map(|failure| kind(&failure));
        let options = ShrinkOptions { max_runs: RUNS, rate_runs: 0, ..ShrinkOptions::default() };
        let until = Instant::now() + SHRINKING;
        let shrunk =
            shrink_while(script, &options, &mut |script| signature_of(script), &mut || Instant::now() < until);
        let again = fails(&shrunk.script);
        let mut rate = Rate::default();
        if let Some(again) = &again {
            found.remarks = remarks.take();
            found.failure = again.clone();
            let signature = kind(again);
            let until = Instant::now() + RATING;
            let mut other = shrunk.script.clone();
            while rate.of < RATE_RUNS && Instant::now() < until {
                other.seed = shrunk.script.seed.derive("rate", rate.of);
                rate.of += 1;
                rate.failed += u64::from(signature_of(&other).is_some_and(|found| found == signature));
            }
        }
        found.smallest = Some(Smallest { script: shrunk.script, of, rate, again: again.is_some() });
        found
    }
}

/// Which failures are the same one. Whether old data is what was there just before, or earlier, or nothing at all, depends
/// on how much was written; a smaller script may say it in another way.
fn kind(failure: &Failure) -> Signature {
    match &failure.event {
        Event::Mismatch(mismatch)
            if matches!(
                mismatch.class,
                Class::Lost { .. } | Class::Stale { .. } | Class::Future { .. } | Class::Zero
            ) =>
        {
            let oracle = if failure.oracle == Oracle::Durable { Oracle::Durable } else { Oracle::Linear };
            Signature { oracle, class: "another time's".to_owned() }
        }
        event => Signature::of(failure.oracle, event),
    }
}

/// What has to be read to see what a script did: what it is for, and the blocks around that. To read everything is most
/// of what a short run does.
fn near(script: &Script, also: Option<u64>) -> Arc<[SectorRange]> {
    let device = script.setup.device();
    let block = script.setup.block_sectors();
    let reach = NEAR * block;
    let ops = script.actions.iter().filter_map(|action| match action.act {
        Act::Op { range, .. } if !range.is_empty() => Some(range),
        _ => None,
    });
    let also = also.map(|sector| SectorRange::new(sector / block * block, block));
    let mut ranges: Vec<(u64, u64)> = ops
        .chain(also)
        .chain([SectorRange::new(0, block)])
        .map(|range| (range.first.saturating_sub(reach), (range.end() + reach).min(device.end())))
        .collect();
    ranges.sort_unstable();
    let mut areas: Vec<SectorRange> = Vec::new();
    for (first, end) in ranges {
        match areas.last_mut() {
            Some(last) if first <= last.end() => last.sectors = last.end().max(end) - last.first,
            _ => areas.push(SectorRange::new(first, end - first)),
        }
    }
    areas.into()
}

/// Actions up to so many operations, and a sweep in the end.
fn first_ops(actions: impl Iterator<Item = Action>, ops: u64) -> Vec<Action> {
    let mut left = ops;
    let mut actions: Vec<Action> = actions
        .take_while(|action| {
            let is_op = matches!(action.act, Act::Op { .. });
            let wanted = !is_op || left > 0;
            left = left.saturating_sub(u64::from(is_op));
            wanted
        })
        .collect();
    if !matches!(actions.last(), Some(Action { act: Act::Sweep, .. })) {
        actions.push(Action { worker: 0, act: Act::Sweep });
    }
    actions
}
