//! From a run that failed to the few steps that matter.

use std::time::{Duration, Instant};

use ublkit::Geometry;

use super::found::Smallest;
use super::watch::Remarks;
use super::{Check, Drawn, Factory, Found};
use crate::bundle::Failure;
use crate::script::{Act, Action, Script};
use crate::shrink::{Rate, ShrinkOptions, Signature, shrink_while};

/// How long a run is made smaller at most, and in how many tries.
const SHRINKING: Duration = Duration::from_secs(3);
const RUNS: u64 = 2000;

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
        let Ok(actions) = self.actions(drawn) else { return found };
        let script = Script { actions: first_ops(actions, of), ..drawn.header.clone() };
        let fails = |script: &Script| {
            // Another device is not what is there to be tested.
            if self.setup_of(script.setup, &geometry) != script.setup {
                return None;
            }
            let actions = &mut script.actions.iter().copied();
            let failure = self.simulate(script, geometry, &drawn.areas, actions, remarks).failure?;
            Some(Failure { oracle: failure.oracle, event: failure.event, after_ops: failure.after_ops })
        };
        let signature_of =
            |script: &Script| fails(script).map(|failure| Signature::of(failure.oracle, &failure.event));
        let options = ShrinkOptions { max_runs: RUNS, rate_runs: 0, ..ShrinkOptions::default() };
        let until = Instant::now() + SHRINKING;
        let shrunk =
            shrink_while(script, &options, &mut |script| signature_of(script), &mut || Instant::now() < until);
        let again = fails(&shrunk.script);
        let mut rate = Rate::default();
        if let Some(again) = &again {
            found.remarks = remarks.take();
            found.failure = again.clone();
            let signature = Signature::of(again.oracle, &again.event);
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
