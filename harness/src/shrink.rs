//! Making a failing script small.
//!
//! What is left of thousands of actions when everything that does not matter is gone is mostly a handful that a reader
//! understands. Each pass offers candidates that are smaller in one respect; the first that still fails takes the
//! script's place. In this order: whole workers and kinds, the tail, actions by delta debugging, faults, lengths,
//! addresses, kinds, everything that happens at once, and the size of the device; again from the beginning until nothing
//! can be taken away.
//!
//! * The order of events is drawn from the script's seed, and every action that goes makes it another one. What needs two
//!   operations to cross would seem to be gone with the first candidate. So each candidate is run with its own seed and
//!   then with others, and keeps the one that failed.
//! * A bug that strikes once in 500 operations cannot be shown by five. How often a planted bug or a fault strikes is
//!   made more often where the failure stays the same; that makes the script simpler, not only shorter.
//! * A smaller script may fail in another way, and the bug that was to be shown would be lost. A candidate has to fail
//!   [the same way](Same).
//!
//! Whoever calls says what failing is. Nothing here looks at a clock.

mod actions;
mod ranges;
mod search;
mod setup;
#[cfg(test)]
mod tests;

use std::fmt;

use serde::{Deserialize, Serialize};

use self::search::Search;
use crate::event::Event;
use crate::oracle::Oracle;
use crate::script::Script;
use crate::seed::Seed;

/// What tells one failure from another.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Signature {
    /// The oracle that says so.
    pub oracle: Oracle,
    /// What is wrong, without numbers: the name of the corruption, for one.
    pub class: String,
}

/// Which failures count as the same one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Same {
    /// Those of the same oracle and the same class.
    #[default]
    Class,
    /// Those of the same oracle.
    Oracle,
    /// All.
    Any,
}

/// How a script is made small.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShrinkOptions {
    /// How many runs there are at most, those for the rate not counted.
    pub max_runs: u64,
    /// With how many seeds each candidate is run before it counts as right: more of them when it is short, fewer while
    /// the script fails with every seed.
    pub tries: u32,
    /// Which failures count as the one that is to be kept.
    pub same: Same,
    /// How many seeds the result is run with, to say how often it fails.
    pub rate_runs: u64,
}

/// How often a script fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// In so many runs…
    pub failed: u64,
    /// …of so many, each with another seed.
    pub of: u64,
}

/// Why there was no further shrinking.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stop {
    /// Nothing more can be taken away.
    Smallest,
    /// The runs are used up.
    Runs,
    /// The caller said so.
    Caller,
    /// The script did not fail, whatever the seed.
    NeverFailed,
}

/// What became of a script.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shrunk {
    /// The smallest script that failed, with the seed that it failed with.
    pub script: Script,
    /// How it fails; `None` if it never did.
    pub signature: Option<Signature>,
    /// How many runs it took, those for the rate not counted.
    pub runs: u64,
    /// Why there was no further shrinking.
    pub stop: Stop,
    /// How often the result fails.
    pub rate: Rate,
}

impl Default for ShrinkOptions {
    fn default() -> Self {
        Self { max_runs: 2000, tries: 4, same: Same::Class, rate_runs: 100 }
    }
}

impl Signature {
    /// What tells `event` from other failures that `oracle` finds.
    #[must_use]
    pub fn of(oracle: Oracle, event: &Event) -> Self {
        let class = match event {
            Event::Mismatch(mismatch) => mismatch.class.name().to_owned(),
            Event::Finding(finding) => without_numbers(&finding.what),
            Event::Hang(hang) => format!("hang: {}", without_numbers(&hang.what)),
            _ => "other".to_owned(),
        };
        Self { oracle, class }
    }

    fn is_same(&self, other: &Self, same: Same) -> bool {
        match same {
            Same::Class => self == other,
            Same::Oracle => self.oracle == other.oracle,
            Same::Any => true,
        }
    }
}

/// `text` with `#` in place of each number: sectors and counts differ between runs that fail in the same way.
fn without_numbers(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for char in text.chars() {
        if !char.is_ascii_digit() {
            out.push(char);
        } else if !out.ends_with('#') {
            out.push('#');
        }
    }
    out
}

/// Makes `script` small. `fails` runs a script and says how it failed, if it did.
#[must_use]
pub fn shrink(
    script: Script,
    options: &ShrinkOptions,
    fails: &mut dyn FnMut(&Script) -> Option<Signature>,
) -> Shrunk {
    shrink_while(script, options, fails, &mut || true)
}

/// Makes `script` small for as long as `keep_going`, which is asked before each run but the first.
#[must_use]
pub fn shrink_while(
    script: Script,
    options: &ShrinkOptions,
    fails: &mut dyn FnMut(&Script) -> Option<Signature>,
    keep_going: &mut dyn FnMut() -> bool,
) -> Shrunk {
    let mut search = Search::new(script, options, fails, keep_going);
    if search.confirm() {
        // With everything one after another, what is found from then on does not depend on the order of events.
        setup::serialise_at_once(&mut search);
        while round(&mut search) {}
    }
    search.finish()
}

/// Every pass once. Whether the script is smaller now and there may be more to take away.
fn round(search: &mut Search<'_>) -> bool {
    let before = search.accepted();
    search.look_how_steady();
    setup::strike_more_often(search);
    actions::drop_workers(search);
    actions::drop_kinds(search);
    actions::cut_tail(search);
    actions::drop_actions(search);
    actions::drop_pairs(search);
    setup::drop_faults(search);
    ranges::shorten(search);
    ranges::move_down(search);
    actions::simplify_kinds(search);
    setup::serialise(search);
    setup::shrink_device(search);
    search.accepted() > before && search.goes_on()
}

/// The seeds that a script is run with besides its own. Readers of JSON that keep numbers as doubles see them exactly.
fn other_seed(seed: Seed, name: &str, index: u64) -> Seed {
    Seed::new(seed.derive(name, index).get() >> 11)
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.oracle, self.class)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.failed, self.of)
    }
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Smallest => "nothing more can be taken away",
            Self::Runs => "the runs were used up",
            Self::Caller => "there was no more time",
            Self::NeverFailed => "it did not fail again",
        })
    }
}
