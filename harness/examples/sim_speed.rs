//! How fast the simulator is with every oracle on, and whether a seed is always the same run.
//!
//! `cargo run --release -p ublkit-harness --example sim_speed` runs ten million operations of 4 KiB, half of them on each of
//! two threads: reads and writes, flushes, FUA writes, discards, zeroes, with faults and power cuts. It ends with 1 when
//! the slower thread takes a minute or more of its core, or when two runs of a seed differ.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use ublkit_harness::fault::FaultPlan;
use ublkit_harness::script::{Act, Action, Recovery, Setup};
use ublkit_harness::sim::{MediumSubject, Ran, RunOptions, run};
use ublkit_harness::threads::CoreClock;
use ublkit_harness::{OpKind, Pattern, SectorRange, Seed, SeededRng};

const THREADS: u64 = 2;
const OPS: u64 = 5_000_000;
const SECONDS: f64 = 60.0;

/// Of the runs that are done twice: one with every event in words, and a longer one without.
const TOLD_OPS: u64 = 20_000;
const SAME_OPS: u64 = 500_000;

const BLOCK: u64 = 4096;

fn setup() -> Setup {
    Setup {
        bytes: 16 << 20,
        logical_block: BLOCK as u32,
        max_io_bytes: 64 << 10,
        queues: 2,
        queue_depth: 32,
        workers: 4,
        io_depth: 8,
        volatile_cache: true,
        fua: true,
        discard: true,
        discard_zeroes: true,
        write_zeroes: true,
        read_only: false,
        recovery: Recovery::Wait,
        merges: true,
        reorder: 30,
        memory_pressure: false,
        compressible: 0,
    }
}

/// Operations of one block each, anywhere, and now and then a power cut.
struct Actions {
    rng: SeededRng,
    left: u64,
}

impl Iterator for Actions {
    type Item = Action;

    fn next(&mut self) -> Option<Action> {
        self.left = self.left.checked_sub(1)?;
        let worker = self.rng.below(4) as u32;
        if self.rng.chance(1, 50_000) {
            return Some(Action { worker, act: Act::PowerCut });
        }
        let kind = match self.rng.below(100) {
            0..45 => OpKind::Read,
            45..88 => OpKind::Write,
            88..93 => OpKind::WriteFua,
            93..96 => OpKind::Flush,
            96..98 => OpKind::Discard,
            _ => OpKind::WriteZeroes,
        };
        let blocks = setup().bytes / BLOCK;
        let range = match kind {
            OpKind::Flush => SectorRange::default(),
            _ => SectorRange::new(self.rng.below(blocks) * BLOCK / 512, BLOCK / 512),
        };
        Some(Action { worker, act: Act::Op { kind, range } })
    }
}

fn simulate(seed: u64, ops: u64, record: bool) -> Ran {
    let seed = Seed::new(seed);
    let setup = setup();
    let plan = FaultPlan::draw(&mut seed.derive("faults", 0).rng(), setup.device().sectors);
    let mut subject = MediumSubject::new(&setup).with_faults(plan, seed);
    let mut actions = Actions { rng: seed.derive("speed", 0).rng(), left: ops };
    let foreign: Arc<[Pattern]> = Arc::new([Pattern::new(seed, 77)]);
    let options = RunOptions { record, foreign, ..RunOptions::default() };
    run(&setup, seed, &mut subject, &mut actions, &options)
}

/// Whether two runs of a seed are the same, event for event.
fn is_the_same_again() -> bool {
    let (told, again) = (simulate(3, TOLD_OPS, true), simulate(3, TOLD_OPS, true));
    for (number, (first, second)) in told.events.iter().zip(&again.events).enumerate() {
        if first != second {
            println!("event {number} differs:\n  {first}\n  {second}");
            return false;
        }
    }
    let (longer, longer_again) = (simulate(4, SAME_OPS, false), simulate(4, SAME_OPS, false));
    let events = told.events.len();
    println!("{TOLD_OPS} operations twice: {events} events, digest {:016x}", told.digest);
    println!("{SAME_OPS} operations twice: digest {:016x}", longer.digest);
    events == again.events.len() && told.digest == again.digest && longer.digest == longer_again.digest
}

fn main() -> ExitCode {
    if !is_the_same_again() {
        println!("two runs of one seed differ");
        return ExitCode::FAILURE;
    }
    let clock = Instant::now();
    let runs: Vec<_> = std::thread::scope(|scope| {
        let measured = |seed| {
            let clock = CoreClock::start();
            let ran = simulate(seed, OPS, false);
            (clock.elapsed().as_secs_f64(), ran)
        };
        let threads: Vec<_> = (1..=THREADS).map(|seed| scope.spawn(move || measured(seed))).collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
    });
    let elapsed = clock.elapsed().as_secs_f64();
    let mut right = runs.len() == THREADS as usize;
    let mut slowest: f64 = 0.0;
    for (seconds, ran) in &runs {
        if let Some(failure) = &ran.failure {
            println!("what is right was called wrong: {failure:?}");
            right = false;
        }
        slowest = slowest.max(*seconds);
        let each = seconds * 1e6 / ran.ops as f64;
        println!("{} operations: {seconds:.1} s of a core, {each:.2} µs each, digest {:016x}", ran.ops, ran.digest);
        let counts = ["flushes", "fua_writes", "discards", "zeroes", "injections", "power_cuts", "loose_reads"];
        println!("  {}", counts.map(|name| format!("{name} {}", ran.evidence.count(name))).join(", "));
    }
    println!("{elapsed:.1} s in all");
    if slowest >= SECONDS {
        println!("too slow: less than {SECONDS} s of a core are wanted");
    }
    if right && slowest < SECONDS { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
