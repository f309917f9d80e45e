//! The smallest script so far, and whether a candidate takes its place.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::{Rate, ShrinkOptions, Shrunk, Signature, Stop, other_seed};
use crate::script::Script;

/// Scripts of at most so many actions are run with more seeds: they are quick, and have fewer chances to fail.
const SHORT: usize = 32;

/// How many times more.
const MORE: u32 = 4;

/// With how many seeds candidates are run at most while the script fails with any.
const STEADY: u32 = 2;

/// How many times more seeds there are for finding out whether the script fails at all.
const CONFIRM: u32 = 8;

pub(super) struct Search<'a> {
    options: &'a ShrinkOptions,
    fails: &'a mut dyn FnMut(&Script) -> Option<Signature>,
    keep_going: &'a mut dyn FnMut() -> bool,
    best: Script,
    signature: Option<Signature>,
    runs: u64,
    accepted: u64,
    stop: Option<Stop>,
    /// It failed with every seed that was tried, so that the order of events does not seem to matter.
    steady: bool,
    /// How many actions it had when that was found out.
    looked_at: usize,
    /// Short scripts that did not fail, by hash. They are not run once more in the next round.
    right: HashSet<u64>,
}

impl<'a> Search<'a> {
    pub(super) fn new(
        script: Script,
        options: &'a ShrinkOptions,
        fails: &'a mut dyn FnMut(&Script) -> Option<Signature>,
        keep_going: &'a mut dyn FnMut() -> bool,
    ) -> Self {
        Self {
            options,
            fails,
            keep_going,
            best: script,
            signature: None,
            runs: 0,
            accepted: 0,
            stop: None,
            steady: false,
            looked_at: usize::MAX,
            right: HashSet::new(),
        }
    }

    /// The smallest script so far.
    pub(super) fn best(&self) -> &Script {
        &self.best
    }

    /// How many candidates have taken its place.
    pub(super) fn accepted(&self) -> u64 {
        self.accepted
    }

    /// Whether there can be more runs.
    pub(super) fn goes_on(&self) -> bool {
        self.stop.is_none()
    }

    /// Whether the script fails at all; says from then on which failure is meant.
    pub(super) fn confirm(&mut self) -> bool {
        let mut script = self.best.clone();
        for attempt in 0..self.options.tries.max(1) * CONFIRM {
            script.seed = self.seed(attempt);
            // The first run is free, or nothing at all would be known.
            if self.runs > 0 && !self.may_run() {
                return false;
            }
            self.runs += 1;
            self.signature = (self.fails)(&script);
            if self.signature.is_some() {
                self.best = script;
                return true;
            }
        }
        self.stop = Some(Stop::NeverFailed);
        false
    }

    /// Offers what `change` makes of the script. True when it still fails, and is the script from now on.
    pub(super) fn offer(&mut self, change: impl FnOnce(&mut Script)) -> bool {
        if !self.goes_on() {
            return false;
        }
        let mut candidate = self.best.clone();
        change(&mut candidate);
        if candidate == self.best || candidate.validate().is_err() || self.is_known(&candidate) {
            return false;
        }
        for attempt in 0..self.tries(&candidate) {
            candidate.seed = self.seed(attempt);
            if !self.may_run() {
                return false;
            }
            if self.fails_the_same_way(&candidate) {
                self.best = candidate;
                self.accepted += 1;
                if self.best.actions.len() <= self.looked_at / 4 {
                    self.look_how_steady();
                }
                return true;
            }
        }
        false
    }

    /// Finds out whether the script fails whatever the seed. Then few seeds are enough for each candidate, and the runs
    /// last longer.
    pub(super) fn look_how_steady(&mut self) {
        self.looked_at = self.best.actions.len();
        let mut script = self.best.clone();
        self.steady = (1..=self.options.tries.max(1) * 2).all(|attempt| {
            script.seed = other_seed(self.best.seed, "steady", attempt.into());
            self.may_run() && self.fails_the_same_way(&script)
        });
    }

    /// With how many seeds a candidate is run.
    fn tries(&self, candidate: &Script) -> u32 {
        let tries = self.options.tries.max(1);
        match (self.steady, candidate.actions.len() <= SHORT) {
            (true, _) => tries.min(STEADY),
            (false, true) => tries * MORE,
            (false, false) => tries,
        }
    }

    fn seed(&self, attempt: u32) -> crate::seed::Seed {
        if attempt == 0 { self.best.seed } else { other_seed(self.best.seed, "schedule", attempt.into()) }
    }

    fn is_known(&mut self, candidate: &Script) -> bool {
        if candidate.actions.len() > SHORT {
            return false;
        }
        let mut hasher = DefaultHasher::new();
        candidate.to_json().hash(&mut hasher);
        !self.right.insert(hasher.finish())
    }

    fn may_run(&mut self) -> bool {
        if self.runs >= self.options.max_runs {
            self.stop = Some(Stop::Runs);
        } else if !(self.keep_going)() {
            self.stop = Some(Stop::Caller);
        }
        self.goes_on()
    }

    fn fails_the_same_way(&mut self, script: &Script) -> bool {
        self.runs += 1;
        let (Some(found), Some(wanted)) = ((self.fails)(script), &self.signature) else { return false };
        let same = found.is_same(wanted, self.options.same);
        if same {
            self.signature = Some(found);
        }
        same
    }

    /// The result, with how often it fails.
    pub(super) fn finish(self) -> Shrunk {
        let mut rate = Rate::default();
        let mut script = self.best.clone();
        for index in 0..self.options.rate_runs {
            if self.signature.is_none() || !(self.keep_going)() {
                break;
            }
            script.seed = other_seed(self.best.seed, "rate", index);
            rate.of += 1;
            let found = (self.fails)(&script);
            let same = |found: Signature| {
                self.signature.as_ref().is_some_and(|wanted| found.is_same(wanted, self.options.same))
            };
            rate.failed += u64::from(found.is_some_and(same));
        }
        let stop = self.stop.unwrap_or(Stop::Smallest);
        Shrunk { script: self.best, signature: self.signature, runs: self.runs, stop, rate }
    }
}
