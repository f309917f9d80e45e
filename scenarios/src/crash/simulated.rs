//! `crash --sim`: the raw part on the simulated device, and how the scenario is registered.

use clap::{ArgMatches, Args as _, Command, FromArgMatches};

use super::Args;
use crate::scenario::{Entry, Plant, Scenario};

/// `crash`, on a device.
pub(crate) const CRASH: Entry = Entry {
    name: "crash",
    about: "power cuts: what was flushed and fsynced is there, on the raw device, on ext4 and on XFS",
    short: &[&["--cuts", "1", "--images", "2", "--on", "raw,ext4,xfs"]],
    plants: PLANTS,
    augment,
    parse,
};

const PLANTS: &[Plant] = &[
    Plant { name: "flush-noop", about: "a flush persists nothing", arguments: &["--mutant", "flush-noop"] },
];

fn augment(command: Command) -> Command {
    Args::augment_args(command)
        .mut_arg("backend", |arg| arg.default_value("medium"))
        .mut_arg("size", |arg| arg.default_value("4M"))
}

fn parse(matches: &ArgMatches) -> Result<Box<dyn Scenario>, clap::Error> {
    Ok(Box::new(Args::from_arg_matches(matches)?))
}
