//! `crash --sim`: the raw part on the simulated device, and how the scenario is registered.

use clap::{ArgMatches, Args as _, Command};

use super::Args;
use crate::scenario::{Entry, Plant, Scenario};
use crate::simulated::{Tried, parse_either, with_simulator};

/// `crash`, on a device.
pub(crate) const CRASH: Entry = Entry {
    name: "crash",
    about: "power cuts: what was flushed and fsynced is there, on the raw device, on ext4 and on XFS",
    short: &[&["--size", "1M", "--cuts", "1", "--images", "2", "--on", "raw,ext4,xfs"]],
    plants: PLANTS,
    augment,
    parse,
};

/// Bugs that show only when the power goes. Those on ext4 are hidden from whoever asks the raw device alone.
const PLANTS: &[Plant] = &[
    Plant { name: "flush-noop", about: "a flush persists nothing", arguments: &["--mutant", "flush-noop"] },
    Plant {
        name: "fua-ignored",
        about: "a FUA write is lost at a power cut",
        arguments: &["--mutant", "fua-ignored"],
    },
    Plant {
        name: "torn-below-atomic",
        about: "a power cut tears a logical block",
        arguments: &["--mutant", "torn-below-atomic"],
    },
    Plant {
        name: "no-volatile-cache",
        about: "a device does not say that it has a volatile cache",
        arguments: &["--mutant", "no-volatile-cache"],
    },
    Plant {
        name: "flush-noop-ext4",
        about: "a flush under a file system persists nothing",
        arguments: &["--on", "ext4", "--cuts", "3", "--images", "3", "--mutant", "flush-noop"],
    },
    Plant {
        name: "fua-ignored-ext4",
        about: "the block that commits a journal's transaction is lost at a power cut",
        arguments: &["--on", "ext4", "--cuts", "6", "--images", "3", "--mutant", "fua-ignored"],
    },
    Plant {
        name: "reorder-across-flush-ext4",
        about: "what came after a flush of a file system's is durable and what came before it is not",
        arguments: &["--on", "ext4", "--cuts", "3", "--images", "3", "--mutant", "reorder-across-flush"],
    },
    Plant {
        name: "metadata-not-flushed-xfs",
        about: "a flush under XFS persists data but not the map to it",
        arguments: &["--on", "xfs", "--cuts", "3", "--images", "3", "--mutant", "metadata-not-flushed"],
    },
];

fn augment(command: Command) -> Command {
    with_simulator(Args::augment_args(command))
        .mut_arg("backend", |arg| arg.default_value("medium"))
        .mut_arg("size", |arg| arg.default_value("2M"))
}

fn parse(matches: &ArgMatches) -> Result<Box<dyn Scenario>, clap::Error> {
    parse_either(matches, Tried::Crash, |args: Args| args)
}
