//! Runs of this program that are parts of another one: each in a process and a process group of its own, with its events read
//! as they come, bounded from outside, and with nothing left of it when it is over.

mod child;
mod pick;
mod process;

use std::path::PathBuf;
use std::time::Duration;

use ublkit_harness::Seed;
use ublkit_harness::event::Part;

use self::child::{Child, End, Followed};
pub(crate) use self::pick::{Pick, runnable};
pub(crate) use self::process::Processes;
use crate::context::Context;
use crate::scenario::Failure;

/// How long a part may take to end once it was asked to.
const WIND_DOWN: Duration = Duration::from_secs(60);
/// How long all that is done after a part that did not end may take, beside that.
const AFTERMATH: Duration = Duration::from_secs(120);

/// A part to be run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Order {
    /// What it is called.
    pub(crate) name: String,
    /// The command line after the program's name: the scenario and its options, the seed among them.
    pub(crate) words: Vec<String>,
    /// Where it reports to.
    pub(crate) report: Option<PathBuf>,
    /// How long it may take.
    pub(crate) deadline: Duration,
}

impl Order {
    /// The command that runs it again.
    pub(crate) fn repro(&self) -> String {
        format!("ublk-torture {}", self.words.join(" "))
    }

    /// How long everything about it may take.
    pub(crate) fn whole_deadline(&self) -> Duration {
        self.deadline + WIND_DOWN + AFTERMATH
    }
}

/// Runs parts: by starting processes, or, in tests, without.
pub(crate) trait Launch {
    /// Runs it and waits for its end.
    ///
    /// # Errors
    /// [`Failure::Interrupted`], or what keeps it from being run at all. How the part ended is no error.
    fn launch(&mut self, order: &Order, context: &mut Context) -> Result<Part, Failure>;
}

/// The seed of a part, drawn from that of the whole. It stays exact in JSON, whoever reads it.
pub(crate) fn seed_of(whole: Seed, name: &str, index: u64) -> u64 {
    whole.derive(name, index).get() >> 11
}

/// What keeps a whole from passing: the worst verdict of its parts. A broken promise says more than a hang, a hang more
/// than a bug of this program, and each of these more than that too little was done, or that something is lacking.
pub(crate) fn severity(verdict: ublkit_harness::Verdict) -> u8 {
    use ublkit_harness::Verdict;
    match verdict {
        Verdict::Fail => 5,
        Verdict::Hang => 4,
        Verdict::Internal => 3,
        Verdict::Vacuous => 2,
        Verdict::Environment => 1,
        Verdict::Pass => 0,
    }
}
