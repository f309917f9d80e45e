//! Failing scripts of 5,000 operations, one for each mutant, made small.
//!
//! `cargo run --release -p ublkit-harness --example shrinking [MUTANT…]` prints a line for each: how many actions are
//! left, after how many runs, and how often what is left fails when the order of events is drawn anew. Ends with status 1
//! if fewer than 20 come down to at most 5 actions, or one of those does not fail again.

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ublkit_harness::mutant::Mutant;
use ublkit_harness::script::Workload;
use ublkit_harness::shrink::ShrinkOptions;
use ublkit_harness::sim::RunOptions;
use ublkit_harness::trial::{Trial, failure_of, shrink_on_simulator};
use ublkit_harness::{Oracles, Seed};

/// Operations of a script before it is made small.
const OPS: u64 = 5_000;
/// Seeds that are tried until one fails.
const SEEDS: u64 = 8;
/// At most so many actions are a handful.
const HANDFUL: usize = 5;
/// So many mutants have to come down to a handful.
const WANTED: usize = 20;
/// How long one script may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// What is left of a mutant's script: whether it is a handful that fails again, and a line that says so.
fn shrink(mutant: Mutant) -> (bool, String) {
    let options = RunOptions { oracles: Oracles::ALL, ..RunOptions::default() };
    let failing = (1..=SEEDS).find_map(|seed| {
        let trial = Trial::draw(Seed::new(seed), Some(mutant.into()), Workload::everything(OPS));
        let script = trial.script(OPS).ok()?;
        failure_of(&script, &options).map(|_| script)
    });
    let name = mutant.name();
    let Some(script) = failing else { return (false, format!("{name:<22} does not fail in {SEEDS} scripts")) };
    let from = script.actions.len();
    let begun = Instant::now();
    let mut keep_going = || begun.elapsed() < PATIENCE;
    let shrunk = shrink_on_simulator(script, &options, &ShrinkOptions::default(), &mut keep_going);
    let left = shrunk.script.actions.len();
    let again = failure_of(&shrunk.script, &options);
    let class =
        again.as_ref().map_or_else(|| "nothing".to_owned(), |same| format!("{}: {}", same.oracle, same.class));
    let line = format!(
        "{name:<22} {from} -> {left:>3} actions in {:>4} runs, {:>5} ms; fails with {} of {} seeds; {class}",
        shrunk.runs,
        begun.elapsed().as_millis(),
        shrunk.rate.failed,
        shrunk.rate.of,
    );
    (left <= HANDFUL && again.is_some() && again == shrunk.signature, line)
}

fn main() -> ExitCode {
    let names: Vec<String> = std::env::args().skip(1).collect();
    let wanted = |mutant: &Mutant| {
        !mutant.is_control() && (names.is_empty() || names.iter().any(|name| name == mutant.name()))
    };
    let mutants: Vec<Mutant> = Mutant::ALL.into_iter().filter(wanted).collect();
    let (next, small) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let turn = Mutex::new(());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(&mutant) = mutants.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let (handful, line) = shrink(mutant);
                    small.fetch_add(usize::from(handful), Ordering::Relaxed);
                    let _turn = turn.lock();
                    println!("{line}");
                }
            });
        }
    });
    let small = small.into_inner();
    println!("{small} of {} scripts come down to at most {HANDFUL} actions and fail again", mutants.len());
    if small >= WANTED.min(mutants.len()) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
