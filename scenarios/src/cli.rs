//! The command line of `ublk-torture`.
//!
//! Exit statuses: 0 the device kept every promise; 1 the command line asks for something that cannot be; 2 the device broke a
//! promise; 3 something hung; 4 the environment lacks something; 5 too little was done to say anything; 70 a bug of
//! this program. A run that is interrupted before it found anything is judged by the work it did: 0 or 5.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ArgMatches, Command, ValueEnum, value_parser};
use serde_json::json;
use ublkit_harness::Seed;
use ublkit_harness::verdict::EXIT_USAGE;

use crate::backtrace;
use crate::matrix;
use crate::runner;
use crate::scenario::{Failure, SCENARIOS, Scenario};
use crate::units::parse_duration;
use crate::{server, sigkill, stress};

/// Sets the duration of a run where `--duration` does not.
pub const DURATION_VARIABLE: &str = "UBLK_TORTURE_DURATION";

/// The subcommand that makes a table of many kernels.
const MATRIX: &str = "matrix-table";

pub(crate) const EXIT_INTERNAL: u8 = 70;

const AFTER_HELP: &str = "\
Exit status:
  0   pass: work was done and checked
  1   the command line asks for something that cannot be
  2   the device broke a promise
  3   something did not end within its deadline
  4   the environment lacks something; the message says how to get it
  5   too little was done to say anything
  70  a bug of this program

An interrupted run (Ctrl-C) removes its devices and is judged by the work it did: 0 or 5, unless it had found something.";

/// The arguments that every scenario has.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Run")]
pub struct CommonArgs {
    /// Everything random is drawn from this; without it, a new one is drawn
    #[arg(long, value_name = "N", value_parser = parse_seed)]
    pub seed: Option<Seed>,
    /// How long to go on, such as 30s or 10m [env: `UBLK_TORTURE_DURATION`]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub duration: Option<Duration>,
    /// How many operations to do
    #[arg(long, value_name = "N")]
    pub ops: Option<u64>,
    /// Write events.jsonl here, and report.txt if the run fails
    #[arg(long, value_name = "DIR")]
    pub report: Option<PathBuf>,
    /// Write a JUnit report to this file: a case for each step, and the verdict
    #[arg(long, value_name = "FILE")]
    pub junit: Option<PathBuf>,
    /// End the run as hung, with status 3, when any step of it takes longer than this
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub deadline: Option<Duration>,
    /// Print JSON lines, and nothing else, on standard output
    #[arg(long)]
    pub json: bool,
}

impl CommonArgs {
    /// Fails if `--ops` was given to a scenario that does not count operations: it would be taken, and do nothing.
    pub(crate) fn refuse_ops(&self, scenario: &str, instead: &str) -> Result<(), Failure> {
        match self.ops {
            Some(_) => Err(Failure::Usage(format!("--ops says nothing to {scenario}: {instead}"))),
            None => Ok(()),
        }
    }
}

/// The value of an option as it is written on the command line.
pub(crate) fn name_of(value: &impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

fn parse_seed(text: &str) -> Result<Seed, String> {
    text.parse().map_err(|_| format!("'{text}' is not a seed: write a number below 2^64, decimal or 0x…"))
}

/// Runs the program, and returns its exit status.
pub fn main(args: impl IntoIterator<Item = OsString>) -> u8 {
    let args: Vec<OsString> = args.into_iter().collect();
    std::panic::catch_unwind(|| dispatch(&args)).unwrap_or_else(|_panic| {
        complain("this is a bug of ublk-torture; the message above says where");
        EXIT_INTERNAL
    })
}

fn dispatch(args: &[OsString]) -> u8 {
    if args.get(1).is_some_and(|arg| arg == server::ARGUMENT) {
        return server::main();
    }
    if args.get(1).is_some_and(|arg| arg == server::STOP_ARGUMENT) {
        return server::stop(&args[2..]);
    }
    if args.get(1).is_some_and(|arg| arg == backtrace::ARGUMENT) {
        return backtrace::main(&args[2..]);
    }
    if args.get(1).is_some_and(|arg| arg == stress::ARGUMENT) {
        return stress::worker_main();
    }
    if args.get(1).is_some_and(|arg| arg == sigkill::ARGUMENT) {
        return sigkill::serve();
    }
    if args.get(1).is_some_and(|arg| arg == crate::control::ARGUMENT) {
        return crate::control::role();
    }
    if args.get(1).is_some_and(|arg| arg == crate::chain::ARGUMENT) {
        return crate::chain::load(&args[2..]);
    }
    let matches = match command().try_get_matches_from(args) {
        Ok(matches) => matches,
        Err(error) => return explain(&error),
    };
    match matches.subcommand() {
        Some(("list", matches)) => list(matches.get_flag("json")),
        Some((MATRIX, matches)) => {
            let dirs: Vec<PathBuf> = matches.get_many("dirs").into_iter().flatten().cloned().collect();
            matrix::main(&dirs, matches.get_one::<PathBuf>("markdown").map(PathBuf::as_path))
        }
        Some((name, matches)) => start(name, matches, args),
        None => EXIT_USAGE,
    }
}

fn command() -> Command {
    let list = Command::new("list")
        .about("List the scenarios")
        .arg(Arg::new("json").long("json").action(ArgAction::SetTrue).help("One JSON object per line"));
    Command::new("ublk-torture")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Breaks a block device, and proves what it found")
        .after_help(AFTER_HELP)
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(list)
        .subcommand(matrix_table())
        .subcommands(
            SCENARIOS
                .iter()
                .map(|entry| (entry.augment)(Command::new(entry.name)).about(entry.about).long_about(None)),
        )
}

/// For `ci/matrix`.
fn matrix_table() -> Command {
    let path = value_parser!(PathBuf);
    Command::new(MATRIX)
        .hide(true)
        .about("One table of what ci/matrix found on each kernel")
        .arg(Arg::new("dirs").value_name("DIR").num_args(1..).required(true).value_parser(path.clone()))
        .arg(
            Arg::new("markdown")
                .long("markdown")
                .value_name("FILE")
                .value_parser(path)
                .help("Write it as Markdown too"),
        )
}

fn start(name: &str, matches: &ArgMatches, args: &[OsString]) -> u8 {
    let Some(entry) = SCENARIOS.iter().find(|entry| entry.name == name) else { return EXIT_USAGE };
    let scenario: Box<dyn Scenario> = match (entry.parse)(matches) {
        Ok(scenario) => scenario,
        Err(error) => return explain(&error),
    };
    let variable = std::env::var(DURATION_VARIABLE).ok();
    match duration(scenario.common().duration, variable.as_deref()) {
        Ok(duration) => runner::run(entry.name, scenario.as_ref(), duration, args),
        Err(message) => {
            complain(&message);
            EXIT_USAGE
        }
    }
}

/// The flag wins over the variable.
fn duration(flag: Option<Duration>, variable: Option<&str>) -> Result<Option<Duration>, String> {
    match (flag, variable) {
        (Some(flag), _) => Ok(Some(flag)),
        (None, None | Some("")) => Ok(None),
        (None, Some(text)) => {
            parse_duration(text).map(Some).map_err(|message| format!("{DURATION_VARIABLE}: {message}"))
        }
    }
}

/// Help and version are what was asked for; everything else is a usage error.
fn explain(error: &clap::Error) -> u8 {
    let _reader_gone = error.print();
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => 0,
        _ => EXIT_USAGE,
    }
}

fn list(as_json: bool) -> u8 {
    let mut out = io::stdout().lock();
    for entry in SCENARIOS {
        let line = if as_json {
            json!({"name": entry.name, "about": entry.about}).to_string()
        } else {
            format!("{:<12} {}", entry.name, entry.about)
        };
        // A reader that left has seen enough.
        if writeln!(out, "{line}").is_err() {
            break;
        }
    }
    0
}

/// A message for a person, on standard error.
pub(crate) fn complain(message: &str) {
    let _reader_gone = writeln!(io::stderr(), "ublk-torture: {message}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn the_flag_wins_over_the_variable() {
        let s = Duration::from_secs;
        assert_eq!(duration(Some(s(3)), Some("9s")), Ok(Some(s(3))));
        assert_eq!(duration(None, Some("9s")), Ok(Some(s(9))));
        assert_eq!(duration(None, Some("")), Ok(None));
        assert_eq!(duration(None, None), Ok(None));
        assert!(duration(None, Some("soon")).expect_err("nonsense").contains(DURATION_VARIABLE));
    }
}
