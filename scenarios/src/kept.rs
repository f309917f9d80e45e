//! What is kept of a failure: a [bundle] with the script of it, made small, to be [replayed](crate::replay).

use std::path::{Path, PathBuf};

use ublkit_harness::Oracle;
use ublkit_harness::bundle::{self, Bundle, FoundOn, Smaller};
use ublkit_harness::event::Event;
use ublkit_harness::script::Script;
use ublkit_harness::shrink::Stop;
use ublkit_harness::threads::ThreadDump;

use crate::environment::Host;
use crate::scenario::Failure;

/// The name of a bundle in the directory of a report, which has files of the run beside it.
pub(crate) const BUNDLE: &str = "bundle";

/// How many actions are told at most; the rest is in the script.
const ACTIONS_TOLD: usize = 24;

/// A failure that is to be kept.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    /// The scenario, with what it was tried on.
    pub(crate) scenario: String,
    pub(crate) found_on: FoundOn,
    /// The number of the device in its patterns.
    pub(crate) device: u32,
    pub(crate) failure: bundle::Failure,
    /// What was done until then.
    pub(crate) script: Script,
    /// The command that does it again from the beginning.
    pub(crate) repro: String,
    pub(crate) events: Vec<String>,
    pub(crate) threads: Vec<ThreadDump>,
    pub(crate) kernel_log: Vec<String>,
}

impl Kept {
    /// Writes the bundle into the directory of the report, beside those that are there already, and says where.
    pub(crate) fn write(self, smaller: Option<Smaller>, report: &Path) -> Result<PathBuf, Failure> {
        self.bundle(smaller).write(&report.join(BUNDLE)).map_err(|error| Failure::Environment(error.to_string()))
    }

    /// Writes the bundle once more, now that there is a smaller script.
    pub(crate) fn rewrite(self, smaller: Smaller, dir: &Path) -> Result<(), Failure> {
        self.bundle(Some(smaller)).rewrite(dir).map_err(|error| Failure::Environment(error.to_string()))
    }

    fn bundle(self, smaller: Option<Smaller>) -> Bundle {
        let Self { scenario, found_on, device, failure, script, repro, events, threads, kernel_log } = self;
        let Host { kernel, versions, .. } = Host::here();
        Bundle {
            scenario,
            found_on,
            device,
            failure,
            script,
            shrunk: smaller.filter(|smaller| smaller.stop != Stop::NeverFailed),
            repro,
            versions,
            kernel,
            events,
            threads,
            kernel_log,
        }
    }
}

/// A failure, as a bundle has it.
pub(crate) fn failure(oracle: Oracle, event: Event, after_ops: u64) -> bundle::Failure {
    bundle::Failure { oracle, event, after_ops }
}

/// What is said where nothing is kept.
pub(crate) const NOT_KEPT: &str = "give --report DIR, and the script is kept there as a bundle that can be replayed";

/// How a bundle is seen again.
pub(crate) fn to_replay(dir: &Path) -> String {
    format!("kept as a bundle; to see it again: ublk-torture replay {}", dir.display())
}

/// What a reader wants to know first: the actions of the small script, one a line.
pub(crate) fn in_words(smaller: &Smaller) -> String {
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
