//! What became of a check.

use std::fmt;

use super::page;
use super::racing::Race;
use super::watch::Said;
use crate::bundle::Failure;
use crate::script::{Act, Script};
use crate::seed::Seed;
use crate::shrink::{Rate, Signature};
use crate::vacuity::Evidence;

/// A check that found nothing wrong, and what it did.
#[derive(Clone, Debug, Default)]
pub struct Checked {
    pub(super) seeds: u64,
    pub(super) evidence: Evidence,
}

/// A promise that was broken. Prints as one page.
#[derive(Clone, Debug)]
pub struct Found {
    /// The seed of the test that shows it again.
    pub(super) seed: Seed,
    /// What breaks in the smallest script.
    pub(super) failure: Failure,
    pub(super) smallest: Option<Smallest>,
    pub(super) race: Option<Race>,
    /// What the backend and its medium had to say.
    pub(super) remarks: Said,
}

/// The smallest script that fails.
#[derive(Clone, Debug)]
pub(super) struct Smallest {
    pub(super) script: Script,
    /// How many operations the run had that it comes from.
    pub(super) of: u64,
    pub(super) rate: Rate,
    /// Whether it failed when it was run again.
    pub(super) again: bool,
}

impl Checked {
    /// How many seeds were run.
    #[must_use]
    pub fn seeds(&self) -> u64 {
        self.seeds
    }

    /// How many operations were done.
    #[must_use]
    pub fn ops(&self) -> u64 {
        self.evidence.count("ops")
    }

    /// How many bytes were read and known to be right.
    #[must_use]
    pub fn verified_bytes(&self) -> u64 {
        self.evidence.count("verified_bytes")
    }

    /// How often the power was cut.
    #[must_use]
    pub fn power_cuts(&self) -> u64 {
        self.evidence.count("power_cuts")
    }

    /// How many calls to the medium were made to fail.
    #[must_use]
    pub fn medium_errors(&self) -> u64 {
        self.evidence.count("storage_errors")
    }

    /// How many calls were made by several threads at once.
    #[must_use]
    pub fn thread_calls(&self) -> u64 {
        self.evidence.count("thread_calls")
    }

    /// Everything that was counted.
    #[must_use]
    pub fn evidence(&self) -> &Evidence {
        &self.evidence
    }
}

impl fmt::Display for Checked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |name: &str| self.evidence.count(name);
        write!(f, "{} seeds, {} operations, {} bytes right", self.seeds, self.ops(), self.verified_bytes())?;
        for (name, count) in [
            ("power cuts", count("power_cuts")),
            ("deaths of the server", count("kills")),
            ("reopens", count("reopens")),
            ("errors of the medium", count("storage_errors")),
            ("calls by threads", count("thread_calls")),
        ] {
            if count > 0 {
                write!(f, ", {count} {name}")?;
            }
        }
        Ok(())
    }
}

impl Found {
    pub(super) fn new(seed: Seed, failure: Failure) -> Self {
        Self { seed, failure, smallest: None, race: None, remarks: Said::default() }
    }

    /// The seed that shows it again.
    #[must_use]
    pub fn seed(&self) -> Seed {
        self.seed
    }

    /// What broke.
    #[must_use]
    pub fn failure(&self) -> &Failure {
        &self.failure
    }

    /// What tells it from other failures.
    #[must_use]
    pub fn signature(&self) -> Signature {
        Signature::of(self.failure.oracle, &self.failure.event)
    }

    /// The smallest script that shows it; none if it needs threads, or if the device did not even open.
    #[must_use]
    pub fn script(&self) -> Option<&Script> {
        self.smallest.as_ref().map(|smallest| &smallest.script)
    }

    /// How many operations it takes to show it: those of the smallest script, or the calls that met, if it needs threads.
    #[must_use]
    pub fn operations(&self) -> usize {
        if let Some(race) = &self.race {
            return race.calls.len();
        }
        let actions = self.script().map_or(&[][..], |script| &script.actions);
        actions.iter().filter(|action| matches!(action.act, Act::Op { .. })).count()
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&page::page(self))
    }
}

impl std::error::Error for Found {}
