//! Runs targets for a while, or one of them on one input.

use std::fs;
use std::io;
use std::panic;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, exit};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use ublkit_fuzz::{Failure, Mutator, TARGETS, Target, try_input};
use ublkit_harness::Seed;

const USAGE: &str = "usage: ublkit-fuzz [--duration SECONDS] [--seed SEED] [TARGET…]
       ublkit-fuzz replay TARGET FILE…";

/// A target is ended after so many failures.
const FAILURES_MAX: u64 = 10;

/// An input that is not done by then never will be.
const HANGS: Duration = Duration::from_secs(20);

/// What the thread that gives inputs to a target is at.
#[derive(Default)]
struct Work {
    executions: AtomicU64,
    failures: AtomicU64,
    input: Mutex<Vec<u8>>,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.split_first() {
        Some((first, rest)) if first == "replay" => replay(rest),
        _ => fuzz(&arguments),
    };
    outcome.unwrap_or_else(|message| {
        eprintln!("ublkit-fuzz: {message}");
        ExitCode::from(2)
    })
}

fn replay(arguments: &[String]) -> Result<ExitCode, String> {
    let [name, files @ ..] = arguments else {
        return Err(USAGE.to_owned());
    };
    let target = target_named(name)?;
    let mut failed = files.is_empty();
    for file in files {
        let bytes = fs::read(file).map_err(|error| format!("{file}: {error}"))?;
        // The panic itself says where it is.
        match try_input(target, &bytes) {
            Ok(()) => println!("{file}: passed"),
            Err(Failure { what }) => {
                println!("{file}: FAILED: {what}");
                failed = true;
            }
        }
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn fuzz(arguments: &[String]) -> Result<ExitCode, String> {
    let mut duration = Duration::from_secs(60);
    let mut seed = Seed::from_os();
    let mut targets = Vec::new();
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let mut number =
            || arguments.next().and_then(|text| text.parse::<u64>().ok()).ok_or_else(|| USAGE.to_owned());
        match argument.as_str() {
            "--duration" => duration = Duration::from_secs(number()?),
            "--seed" => seed = Seed::new(number()?),
            option if option.starts_with('-') => return Err(USAGE.to_owned()),
            name => targets.push(target_named(name)?),
        }
    }
    if targets.is_empty() {
        targets.extend(TARGETS);
    }
    // A panic is told once, with its input.
    panic::set_hook(Box::new(|_| {}));
    let mut failures = 0;
    for target in targets {
        failures += fuzz_one(target, duration, seed)?;
    }
    Ok(if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Gives a target inputs for `duration`; returns how many failed.
fn fuzz_one(target: Target, duration: Duration, seed: Seed) -> Result<u64, String> {
    let corpus = target.corpus().map_err(|error| format!("the corpus of {}: {error}", target.name))?;
    let work = Arc::new(Work::default());
    let (done, ended) = channel();
    thread::spawn({
        let work = Arc::clone(&work);
        move || {
            try_inputs(target, corpus, duration, seed, &work);
            let _waiting = done.send(());
        }
    });
    watch(target, &work, &ended);
    let [executions, failures] = [&work.executions, &work.failures].map(|count| count.load(Ordering::Relaxed));
    println!("{:<12} {executions:>10} executions, {failures} failures, seed {seed}", target.name);
    Ok(failures)
}

fn try_inputs(target: Target, corpus: Vec<Vec<u8>>, duration: Duration, seed: Seed, work: &Work) {
    let end = Instant::now() + duration;
    let mut mutator = Mutator::new(corpus.clone(), seed.derive(target.name, 0));
    let mut committed = corpus.into_iter();
    while Instant::now() < end && work.failures.load(Ordering::Relaxed) < FAILURES_MAX {
        let input = committed.next().unwrap_or_else(|| mutator.input());
        work.input.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&input);
        if let Err(failure) = try_input(target, &input) {
            work.failures.fetch_add(1, Ordering::Relaxed);
            tell(target, &input, &failure);
        }
        work.executions.fetch_add(1, Ordering::Relaxed);
    }
}

/// Waits for the end. An input that has none is told, and ends the program.
fn watch(target: Target, work: &Work, ended: &Receiver<()>) {
    let mut before = None;
    while ended.recv_timeout(HANGS) == Err(RecvTimeoutError::Timeout) {
        let now = work.executions.load(Ordering::Relaxed);
        if before == Some(now) {
            let input = work.input.lock().unwrap_or_else(PoisonError::into_inner).clone();
            tell(target, &input, &Failure { what: format!("did not end within {} s", HANGS.as_secs()) });
            exit(1);
        }
        before = Some(now);
    }
}

fn tell(target: Target, input: &[u8], failure: &Failure) {
    println!("{}: FAILED: {}", target.name, failure.what);
    match save(target, input) {
        Ok(file) => {
            println!("  cargo run --profile fuzz -p ublkit-fuzz -- replay {} {}", target.name, file.display());
        }
        Err(error) => println!("  the input could not be saved ({error}): {input:?}"),
    }
}

fn save(target: Target, input: &[u8]) -> io::Result<PathBuf> {
    let directory = Path::new("reports/fuzz").join(target.name);
    fs::create_dir_all(&directory)?;
    // The same input has the same name.
    let hash = input
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3));
    let file = directory.join(format!("{hash:016x}"));
    fs::write(&file, input)?;
    Ok(file)
}

fn target_named(name: &str) -> Result<Target, String> {
    let names = TARGETS.map(|target| target.name).join(", ");
    Target::named(name).ok_or_else(|| format!("no target is called {name:?}; there are {names}"))
}
