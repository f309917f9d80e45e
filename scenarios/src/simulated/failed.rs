//! What is done about a trial that failed: it is made small, told, and kept.

use std::path::{Path, PathBuf};

use ublkit_harness::bundle::{self, FoundOn, Smaller};
use ublkit_harness::script::Script;
use ublkit_harness::shrink::ShrinkOptions;
use ublkit_harness::sim::{RunOptions, SimFailure};
use ublkit_harness::trial::{Trial, replay, shrink_on_simulator};

use super::Tried;
use crate::kept::{self, Kept};
use crate::scenario::Failure;

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
        let found = Kept {
            scenario: format!("{} --sim", tried.name()),
            found_on: FoundOn::Simulator,
            device: 0,
            failure: kept(again.ran.failure.unwrap_or_else(|| self.failure.clone())),
            script,
            repro,
            events: again.ran.events,
            threads: Vec::new(),
            kernel_log: Vec::new(),
        };
        found.write(Some(smaller), dir)
    }
}

fn kept(failure: SimFailure) -> bundle::Failure {
    let SimFailure { oracle, event, after_ops, .. } = failure;
    kept::failure(oracle, event, after_ops)
}
