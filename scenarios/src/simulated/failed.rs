//! What is done about a trial that failed: it is made small, told, and kept.

use std::path::{Path, PathBuf};

use ublkit_harness::bundle::{self, Bundle, Smaller};
use ublkit_harness::script::Script;
use ublkit_harness::shrink::{ShrinkOptions, Stop};
use ublkit_harness::sim::{RunOptions, SimFailure};
use ublkit_harness::trial::{Trial, replay, shrink_on_simulator};

use super::Tried;
use crate::environment::Host;
use crate::scenario::Failure;

/// How many actions are told at most; the rest is in the script.
const ACTIONS_TOLD: usize = 24;
/// The name of a bundle in the directory of a report, which has files of the run beside it.
pub(crate) const BUNDLE: &str = "bundle";

/// A trial that failed.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) number: u64,
    /// How many operations the trials before it did.
    pub(super) before: u64,
    pub(super) trial: Trial,
    pub(super) failure: SimFailure,
}

impl Found {
    pub(super) fn failure(&self) -> Failure {
        self.failure.event.clone().into()
    }

    /// How many operations there are, from the first trial up to the failure.
    pub(super) fn ops_until(&self) -> u64 {
        self.before + self.failure.after_ops.max(1)
    }

    /// The run up to the failure.
    fn script(&self) -> Script {
        self.trial.script(self.failure.after_ops).unwrap_or_else(|_ran| self.trial.header().clone())
    }

    /// A script that is as small as can be in the time there is, and fails in the same way.
    pub(super) fn shrink(&self, keep_going: &mut dyn FnMut() -> bool) -> Smaller {
        let options = RunOptions::default();
        let shrunk = shrink_on_simulator(self.script(), &options, &ShrinkOptions::default(), keep_going);
        let failure = replay(&shrunk.script, &options).ran.failure.unwrap_or_else(|| self.failure.clone());
        Smaller::new(shrunk, kept(failure))
    }

    /// Writes the bundle below `dir`, and says where.
    pub(super) fn save(&self, smaller: Smaller, dir: &Path, tried: Tried, repro: String) -> Result<PathBuf, Failure> {
        let script = self.script();
        let again = replay(&script, &RunOptions { record: true, ..RunOptions::default() });
        let Host { kernel, versions, .. } = Host::here();
        let found = Bundle {
            scenario: format!("{} --sim", tried.name()),
            device: 0,
            failure: kept(again.ran.failure.unwrap_or_else(|| self.failure.clone())),
            script,
            shrunk: (smaller.stop != Stop::NeverFailed).then_some(smaller),
            repro,
            versions,
            kernel,
            events: again.ran.events,
            threads: Vec::new(),
            kernel_log: Vec::new(),
        };
        found.write(&dir.join(BUNDLE)).map_err(|error| Failure::Environment(error.to_string()))
    }
}

fn kept(failure: SimFailure) -> bundle::Failure {
    let SimFailure { oracle, event, after_ops, .. } = failure;
    bundle::Failure { oracle, event, after_ops }
}

/// What a reader wants to know first: the actions of the small script, one a line.
pub(super) fn in_words(smaller: &Smaller) -> String {
    let Smaller { script, rate, runs, stop, .. } = smaller;
    if *stop == Stop::NeverFailed {
        return "it did not fail again, so that it could not be made smaller".to_owned();
    }
    let count = script.actions.len();
    let plural = if count == 1 { "" } else { "s" };
    let text = format!("smallest script, {count} action{plural}, fails with {rate} seeds ({runs} runs; {stop}):");
    text + &listed(script)
}

/// The actions of a script, in words.
pub(crate) fn listed(script: &Script) -> String {
    let actions = script.actions.iter().take(ACTIONS_TOLD).map(ToString::to_string);
    let more = script.actions.len().saturating_sub(ACTIONS_TOLD);
    let more = (more > 0).then(|| format!("… and {more} more"));
    actions.chain(more).fold(String::new(), |text, line| text + "\n  " + &line)
}
