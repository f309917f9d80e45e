//! What `torture` has to be told so that a planted bug can occur, and is looked for by whoever can find it.

use ublkit_harness::mutant::Planted;
use ublkit_harness::script::{Act, Recovery, Setup};
use ublkit_harness::{Mutant, Oracle};

/// Where every mutant begins: small, so that places are met again and again.
const SETUP: Setup = Setup {
    bytes: 16 << 20,
    logical_block: 512,
    max_io_bytes: 64 << 10,
    queues: 1,
    queue_depth: 64,
    workers: 4,
    io_depth: 8,
    volatile_cache: true,
    fua: true,
    discard: true,
    discard_zeroes: true,
    write_zeroes: true,
    read_only: false,
    recovery: Recovery::None,
    merges: true,
    reorder: 0,
    memory_pressure: false,
    compressible: 0,
};

/// The arguments of `torture` for a mutant, without a seed and without a limit.
#[must_use]
pub fn arguments(planted: Planted) -> Vec<String> {
    let mut setup = SETUP;
    planted.mutant.needs(&mut setup);
    if planted.mutant == Mutant::FlushSubmitted {
        // It is late by one call, which is told from being in time where that call comes after the answer was seen.
        (setup.workers, setup.io_depth) = (1, 1);
    }
    let oracles = planted.mutant.spec().oracles;
    let capabilities: Vec<_> = [
        ("flush", setup.volatile_cache),
        ("fua", setup.fua),
        ("discard", setup.discard),
        ("zeroes", setup.write_zeroes),
    ]
    .into_iter()
    .filter_map(|(name, has)| has.then_some(name))
    .collect();
    let capabilities = if capabilities.is_empty() { "none".to_owned() } else { capabilities.join(",") };
    let mut options = vec![
        ("--mutant", planted.to_string()),
        ("--size", setup.bytes.to_string()),
        ("--region", (1 << 20).to_string()),
        ("--logical-block", setup.logical_block.to_string()),
        ("--max-io", setup.max_io_bytes.to_string()),
        ("--queues", setup.queues.to_string()),
        ("--depth", setup.queue_depth.to_string()),
        ("--workers", setup.workers.to_string()),
        ("--io-depth", setup.io_depth.to_string()),
        ("--capabilities", capabilities),
    ];
    let shows_at = planted.mutant.shows_at();
    // What needs no outage to show is found sooner without one, even if it would show after a cut too.
    let durable = oracles.contains(&Oracle::Durable) && shows_at.is_some();
    if durable || shows_at == Some(Act::PowerCut) || planted.mutant.is_control() {
        options.extend([("--backend", "medium".to_owned()), ("--cut-every", "1s".to_owned())]);
    }
    if setup.recovery != Recovery::None || shows_at == Some(Act::Kill) {
        options.push(("--restart-every", "1s".to_owned()));
    }
    if matches!(planted.mutant, Mutant::UserCopyOffset | Mutant::SglContiguity) {
        options.push(("--mode", "user-copy".to_owned()));
    }
    if oracles.contains(&Oracle::Errors) {
        options.push(("--faults", "draw".to_owned()));
    }
    if oracles.contains(&Oracle::Watchdog) {
        options.push(("--stall", "8s".to_owned()));
    }
    let mut arguments: Vec<_> = options.into_iter().flat_map(|(name, value)| [name.to_owned(), value]).collect();
    if setup.read_only {
        arguments.push("--read-only".to_owned());
    }
    if !setup.discard_zeroes {
        arguments.push("--discard-promises-nothing".to_owned());
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;
    use ublkit_harness::mutant::OnDevice;

    #[derive(clap::Parser)]
    struct Program {
        #[command(flatten)]
        torture: crate::torture::Args,
    }

    #[test]
    fn all_but_two_can_be_on_a_device() {
        let cannot = |mutant: &Mutant| matches!(mutant.spec().device, OnDevice::No(_));
        let cannot: Vec<_> = Mutant::ALL.into_iter().filter(cannot).collect();
        assert_eq!(cannot, [Mutant::ZcEarlyUnregister, Mutant::AutobufFallback]);
    }

    #[test]
    fn the_arguments_of_every_mutant_are_right() {
        use crate::Scenario;
        use clap::Parser;
        for mutant in Mutant::ALL.into_iter().filter(|mutant| !matches!(mutant.spec().device, OnDevice::No(_))) {
            let arguments = arguments(mutant.into());
            let parsed = Program::try_parse_from([vec!["torture".to_owned()], arguments].concat());
            let parsed = parsed.unwrap_or_else(|error| panic!("{mutant}: {error}"));
            parsed.torture.validate().unwrap_or_else(|error| panic!("{mutant}: {error}"));
        }
    }
}
