//! `--swarm`: whatever is not given is drawn from the seed, as on the simulator. A bug that one device never shows,
//! another one may.

use std::time::Duration;

use ublkit_harness::script::Setup;
use ublkit_harness::{IoSize, SeededRng};

use super::Args;
use super::sharing::Sharing;
use crate::target::{BackendKind, Capabilities, Mode};

/// What a page is on every machine that matters: the driver takes no shorter requests.
const MAX_IO_LEAST: u32 = 4096;
/// Mixes beside the one that there is without a swarm: much to be made durable, much to be zeroed, little to be read.
const MIXES: [&str; 3] = [
    "read=40,write=30,fua=10,flush=15,discard=2,zeroes=3",
    "read=40,write=20,fua=2,flush=3,discard=15,zeroes=20",
    "read=15,write=70,fua=5,flush=2,discard=4,zeroes=4",
];

/// Draws from `rng` every option of `args` of which `is_given` does not say that it was given.
pub(super) fn draw(args: &mut Args, is_given: impl Fn(&str) -> bool, rng: &mut SeededRng) {
    // One stream for all: what is given changes nothing of the rest.
    let setup = Setup::draw(rng);
    let backend = pick(rng, &[BackendKind::Memory, BackendKind::File, BackendKind::Medium, BackendKind::Medium]);
    let mode = pick(rng, &[Mode::Copy, Mode::UserCopy]);
    let workers_backend = pick(rng, &[0, 0, 1, 4]);
    let sharing = pick(rng, &[Sharing::Both, Sharing::Both, Sharing::Overlapping, Sharing::Disjoint]);
    let mix = pick(rng, &[None, Some(MIXES[0]), Some(MIXES[1]), Some(MIXES[2])]);
    let region = 64 << 10 << rng.within(0..=8);
    let io_size = if rng.chance(1, 8) { IoSize::Fixed(setup.logical_block.into()) } else { IoSize::Any };
    let prefill = rng.chance(1, 4);
    let cut_every = rng.chance(1, 2).then(|| Duration::from_millis(rng.within(700..=3000)));
    let restart_every = rng.chance(1, 4).then(|| Duration::from_millis(rng.within(700..=3000)));
    macro_rules! set {
        ($($name:literal $place:expr => $value:expr;)*) => { $(if !is_given($name) { $place = $value; })* };
    }
    set! {
        "size" args.target.size => setup.bytes;
        "logical_block" args.target.logical_block => setup.logical_block;
        "max_io" args.target.max_io => setup.max_io_bytes.max(MAX_IO_LEAST);
        "queues" args.target.queues => setup.queues;
        "depth" args.target.depth => setup.queue_depth;
        "capabilities" args.target.capabilities => Capabilities::of(&setup);
        "discard_promises_nothing" args.target.discard_promises_nothing => setup.discard && !setup.discard_zeroes;
        "backend" args.target.backend => backend;
        "mode" args.target.mode => mode;
        "workers_backend" args.target.workers_backend => workers_backend;
        "workers" args.workers => setup.workers;
        "io_depth" args.io_depth => setup.io_depth as u16;
        "compressible" args.compressible => setup.compressible;
        "sharing" args.sharing => sharing;
        "mix" args.mix => mix.and_then(|mix| mix.parse().ok()).unwrap_or_default();
        "io_size" args.io_size => io_size;
        "region" args.region => region;
        "prefill" args.prefill => prefill && !args.target.read_only;
        "restart_every" args.restart_every => restart_every;
    }
    if !is_given("cut_every") && args.target.backend == BackendKind::Medium {
        args.cut_every = cut_every;
    }
}

fn pick<T: Copy>(rng: &mut SeededRng, of: &[T]) -> T {
    of[rng.below(of.len() as u64) as usize]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::Parser;
    use ublkit_harness::Seed;

    use super::*;
    use crate::Scenario;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        torture: Args,
    }

    fn drawn(seed: u64, given: &[&str]) -> Args {
        let mut args = Program::parse_from(["torture"]).torture;
        draw(&mut args, |name| given.contains(&name), &mut Seed::new(seed).rng());
        args
    }

    #[test]
    fn whatever_is_drawn_is_right_and_comes_again() {
        let mut seen = BTreeSet::new();
        for seed in 0..300 {
            let args = drawn(seed, &[]);
            args.validate().unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            assert_eq!(args.options(), drawn(seed, &[]).options());
            seen.extend(args.options().into_iter().map(|(name, value)| format!("{name} {value}")));
        }
        for name in
            ["backend", "mode", "sharing", "mix", "queues", "capabilities", "cut_every_ms", "restart_every_ms"]
        {
            let values = seen.iter().filter(|value| value.starts_with(&format!("{name} "))).count();
            assert!(values >= 2, "{name} has {values} values");
        }
    }

    #[test]
    fn what_is_given_stays_and_changes_nothing_else() {
        for seed in 0..50 {
            let (all, some) = (drawn(seed, &[]).options(), drawn(seed, &["queues", "mix"]).options());
            let plain = Program::parse_from(["torture"]).torture.options();
            for (name, value) in &some {
                let from = if name == "queues" || name == "mix" { &plain } else { &all };
                assert_eq!(Some(value), from.get(name), "seed {seed}: {name}");
            }
        }
    }
}
