//! The kill matrix: every planted bug has to be found, nothing that is merely odd may be called a bug, and no oracle may be
//! there for nothing.
//!
//! A mutant is run with one seed after another, a few thousand operations each, until an oracle finds it or the operations
//! are used up. It is then run once more without the oracle that found it: if nobody else does, that oracle is
//! the *only killer* of the mutant. A control runs with many seeds and has to pass with each.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::mutant::{Mutant, Planted};
use crate::oracle::{Oracle, Oracles};
use crate::script::Workload;
use crate::seed::Seed;
use crate::shrink::Signature;
use crate::sim::RunOptions;
use crate::threads::CoreClock;
use crate::trial::Trial;

/// What is run, and how much of it.
#[derive(Clone, Debug)]
pub struct MatrixOptions {
    /// Everything is drawn from this.
    pub seed: Seed,
    /// Which mutants and controls.
    pub mutants: Vec<Mutant>,
    /// How many operations there are at most to find a mutant in.
    pub ops: u64,
    /// How many operations of them are run with one seed.
    pub ops_per_seed: u64,
    /// With how many seeds a control is run.
    pub control_seeds: u64,
    /// How many operations of a control are run with one seed.
    pub control_ops: u64,
    /// Who judges.
    pub oracles: Oracles,
    /// Whether it is looked who else finds a mutant.
    pub only_killers: bool,
    /// How many threads run.
    pub threads: usize,
}

impl Default for MatrixOptions {
    /// All of it.
    fn default() -> Self {
        Self {
            seed: Seed::new(1),
            mutants: Mutant::ALL.to_vec(),
            ops: 10_000,
            ops_per_seed: 1_000,
            control_seeds: 1_000,
            control_ops: 500,
            oracles: Oracles::ALL,
            only_killers: true,
            threads: 2,
        }
    }
}

/// What became of one mutant or control.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// Its name.
    pub mutant: String,
    /// Its number in the list of known bugs, its letter in that of oddities, or `+`.
    pub number: String,
    /// What it stands for.
    pub stands_for: String,
    /// It is odd but right.
    pub control: bool,
    /// Who found it, if anyone did.
    pub found: Option<Found>,
    /// Nobody else finds it.
    pub only_killer: bool,
    /// How often it struck.
    pub hits: u64,
    /// How many operations were run in all.
    pub ops: u64,
    /// With how many seeds.
    pub seeds: u64,
    /// How long that took, in milliseconds.
    pub elapsed_ms: u64,
}

/// How a mutant was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// Who says so, and what.
    pub signature: Signature,
    /// The seed of the run.
    pub seed: Seed,
    /// After how many operations of all the runs.
    pub after_ops: u64,
}

/// All rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Matrix {
    /// One for each mutant and control, in the order of the list.
    pub rows: Vec<Row>,
    /// How many mutants each oracle found first, and is the only one to find.
    pub oracles: BTreeMap<Oracle, Kills>,
    /// How long the mutants took, in milliseconds.
    pub mutants_ms: u64,
    /// How long the controls took, in milliseconds.
    pub controls_ms: u64,
    /// What each thread took of its core for the mutants, in milliseconds; others on the machine do not count.
    pub mutants_core_ms: Vec<u64>,
    /// The same for the controls.
    pub controls_core_ms: Vec<u64>,
}

/// What an oracle found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kills {
    /// So many mutants, before others did.
    pub first: u64,
    /// So many that nobody else finds.
    pub only: u64,
}

impl Matrix {
    /// Runs all of it; `tell` hears of each row as it comes.
    #[must_use]
    pub fn run(options: &MatrixOptions, tell: &(dyn Fn(&Row) + Sync)) -> Self {
        Self::run_while(options, tell, &|| true)
    }

    /// Runs it for as long as `keep_going`; what is under way then has no row.
    #[must_use]
    pub fn run_while(
        options: &MatrixOptions,
        tell: &(dyn Fn(&Row) + Sync),
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> Self {
        let running = Running { options, keep_going };
        let (controls, mutants): (Vec<Mutant>, Vec<Mutant>) =
            options.mutants.iter().copied().partition(|mutant| mutant.is_control());
        let begun = Instant::now();
        let (mut rows, mutants_core_ms) = each(&mutants, &running, tell, &kill);
        let mutants_ms = millis(begun.elapsed());
        let begun = Instant::now();
        let (tolerated, controls_core_ms) = each(&controls, &running, tell, &tolerate);
        rows.extend(tolerated);
        let controls_ms = millis(begun.elapsed());
        let mut oracles: BTreeMap<Oracle, Kills> = Oracle::ALL.map(|oracle| (oracle, Kills::default())).into();
        for row in &rows {
            if let (Some(found), false) = (&row.found, row.control) {
                let kills = oracles.entry(found.signature.oracle).or_default();
                kills.first += 1;
                kills.only += u64::from(row.only_killer);
            }
        }
        Self { rows, oracles, mutants_ms, controls_ms, mutants_core_ms, controls_core_ms }
    }

    /// Mutants that nobody found.
    pub fn survivors(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(|row| !row.control && row.found.is_none())
    }

    /// Controls that were called bugs.
    pub fn flagged(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(|row| row.control && row.found.is_some())
    }

    /// Mutants that were found, and by whom, where that is [nobody who is expected to](crate::mutant::Spec::oracles).
    pub fn unexpected(&self) -> impl Iterator<Item = (&Row, Oracle)> {
        let expected = |row: &Row, oracle| {
            row.mutant.parse().is_ok_and(|mutant: Mutant| mutant.spec().oracles.contains(&oracle))
        };
        let kills = self.rows.iter().filter(|row| !row.control);
        let kills = kills.filter_map(|row| Some((row, row.found.as_ref()?.signature.oracle)));
        kills.filter(move |(row, oracle)| !expected(row, *oracle))
    }

    /// Mutants and controls that never struck, so that nothing is known of them.
    pub fn idle(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(|row| row.hits == 0)
    }
}

/// What is run, and for how long.
struct Running<'a> {
    options: &'a MatrixOptions,
    keep_going: &'a (dyn Fn() -> bool + Sync),
}

/// Runs `one` for each mutant, on so many threads; the rows come back in order, and what each thread took of its core, in
/// milliseconds.
fn each(
    mutants: &[Mutant],
    running: &Running<'_>,
    tell: &(dyn Fn(&Row) + Sync),
    one: &(dyn Fn(Mutant, &Running<'_>) -> Row + Sync),
) -> (Vec<Row>, Vec<u64>) {
    let next = AtomicUsize::new(0);
    let rows = Mutex::new(Vec::with_capacity(mutants.len()));
    let cores = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..running.options.threads.max(1) {
            scope.spawn(|| {
                let clock = CoreClock::start();
                while let Some(&mutant) = mutants.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let row = one(mutant, running);
                    if !(running.keep_going)() {
                        break;
                    }
                    tell(&row);
                    rows.lock().unwrap_or_else(PoisonError::into_inner).push((mutant as usize, row));
                }
                cores.lock().unwrap_or_else(PoisonError::into_inner).push(millis(clock.elapsed()));
            });
        }
    });
    let mut rows = rows.into_inner().unwrap_or_else(PoisonError::into_inner);
    rows.sort_by_key(|(at, _)| *at);
    let cores = cores.into_inner().unwrap_or_else(PoisonError::into_inner);
    (rows.into_iter().map(|(_, row)| row).collect(), cores)
}

fn empty_row(mutant: Mutant) -> Row {
    let spec = mutant.spec();
    Row {
        mutant: spec.name.to_owned(),
        number: spec.number.to_owned(),
        stands_for: spec.stands_for.to_owned(),
        control: mutant.is_control(),
        found: None,
        only_killer: false,
        hits: 0,
        ops: 0,
        seeds: 0,
        elapsed_ms: 0,
    }
}

/// One run of a mutant; adds what it did to the row. Whether it was found.
fn run_once(row: &mut Row, planted: Planted, seed: Seed, ops: u64, oracles: Oracles) -> bool {
    let trial = Trial::draw(seed, Some(planted), Workload::everything(ops));
    let options = RunOptions { oracles, ..RunOptions::default() };
    row.seeds += 1;
    let Ok(tried) = trial.run(&options) else { return false };
    row.hits += tried.hits.unwrap_or(0);
    if let Some(failure) = &tried.ran.failure {
        row.found = Some(Found {
            signature: Signature::of(failure.oracle, &failure.event),
            seed,
            after_ops: row.ops + failure.after_ops,
        });
    }
    row.ops += tried.ran.ops;
    row.found.is_some()
}

/// Runs a mutant until it is found.
fn until_found(mutant: Mutant, running: &Running<'_>, oracles: Oracles) -> Row {
    let options = running.options;
    let mut row = empty_row(mutant);
    let seed = options.seed.derive(mutant.name(), 0);
    let begun = Instant::now();
    while row.ops < options.ops && row.seeds < options.ops && (running.keep_going)() {
        let ops = options.ops_per_seed.min(options.ops - row.ops);
        let seed = Seed::new(seed.derive("run", row.seeds).get() >> 11);
        if run_once(&mut row, mutant.into(), seed, ops, oracles) {
            break;
        }
    }
    row.elapsed_ms = millis(begun.elapsed());
    row
}

fn kill(mutant: Mutant, running: &Running<'_>) -> Row {
    let options = running.options;
    let mut row = until_found(mutant, running, options.oracles);
    if let (Some(found), true) = (&row.found, options.only_killers) {
        let others = until_found(mutant, running, options.oracles.without(found.signature.oracle));
        row.only_killer = others.found.is_none();
    }
    row
}

fn tolerate(mutant: Mutant, running: &Running<'_>) -> Row {
    let options = running.options;
    let mut row = empty_row(mutant);
    let begun = Instant::now();
    let base = options.seed.derive(mutant.name(), 0);
    for number in 0..options.control_seeds {
        if !(running.keep_going)() {
            break;
        }
        let seed = Seed::new(base.derive("run", number).get() >> 11);
        if run_once(&mut row, mutant.into(), seed, options.control_ops, options.oracles) {
            break;
        }
    }
    row.elapsed_ms = millis(begun.elapsed());
    row
}

fn millis(elapsed: Duration) -> u64 {
    elapsed.as_millis() as u64
}

/// One line: what it is, who found it, when.
impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>3} {:<22} ", self.number, self.mutant)?;
        match (&self.found, self.control) {
            (Some(Found { signature, seed, after_ops }), control) => {
                let only = if self.only_killer { " (only)" } else { "" };
                let word = if control { "FLAGGED" } else { "found" };
                write!(f, "{word} by {}{only}: {}", signature.oracle, signature.class)?;
                write!(f, ", after {after_ops} operations, seed {seed}")
            }
            (None, true) => {
                write!(f, "passes: {} seeds, {} operations, odd {} times", self.seeds, self.ops, self.hits)
            }
            (None, false) => {
                write!(f, "SURVIVES {} operations, {} seeds, {} hits", self.ops, self.seeds, self.hits)
            }
        }?;
        write!(f, ", {} ms", self.elapsed_ms)
    }
}

/// The summary: how many were found, and by whom.
impl fmt::Display for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (controls, mutants): (Vec<&Row>, Vec<&Row>) = self.rows.iter().partition(|row| row.control);
        let killed = mutants.iter().filter(|row| row.found.is_some()).count();
        let times = |elapsed: u64, cores: &[u64]| {
            let most = cores.iter().copied().max().unwrap_or_default();
            format!("{:.1} s, {:.1} s of the busiest core", elapsed as f64 / 1000.0, most as f64 / 1000.0)
        };
        let took = times(self.mutants_ms, &self.mutants_core_ms);
        writeln!(f, "{killed} of {} mutants found in {took}", mutants.len())?;
        let flagged = controls.iter().filter(|row| row.found.is_some()).count();
        let took = times(self.controls_ms, &self.controls_core_ms);
        writeln!(f, "{flagged} of {} controls flagged in {took}", controls.len())?;
        let mut most: Vec<_> = self.oracles.iter().collect();
        most.sort_by_key(|(_, kills)| std::cmp::Reverse(kills.first));
        for (at, (oracle, kills)) in most.into_iter().enumerate() {
            let line = if at == 0 { "" } else { "\n" };
            write!(f, "{line}  {oracle:<12} finds {:>2}, {:>2} of them alone", kills.first, kills.only)?;
        }
        Ok(())
    }
}
