//! `torture --sim`: the same torture on the simulated device, without root and without a kernel that has ublk.
//!
//! One [trial](ublkit_harness::trial) after another, each with a device, a workload and faults of its own, until the time or
//! the operations are used up. What fails is made small and kept as a [bundle](ublkit_harness::bundle), to be
//! [replayed](crate::replay).

mod failed;
mod trials;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args as _, Command, FromArgMatches, value_parser};
use serde_json::{Value, json};
use ublkit_harness::Planted;
use ublkit_harness::script::Workload;

use self::failed::Found;
use self::trials::{Limits, Trials};
use crate::cli::CommonArgs;
use crate::context::Context;
use crate::kept;
use crate::scenario::{Entry, Failure, Needs, Plant, Scenario};
use crate::target::parse_planted;
use crate::torture;

/// How long a run goes on when nobody says.
const DEFAULT_DURATION: Duration = Duration::from_secs(30);
/// How long the last trials may take once they were told to end.
const DRAIN: Duration = Duration::from_secs(300);
/// How long the failure may be made smaller, and all that is done about it.
const SHRINK: Duration = Duration::from_secs(30);
const AFTERMATH: Duration = Duration::from_secs(300);

/// What `torture` takes on the simulator; the rest is drawn.
const TAKEN: [&str; 8] = ["sim", "threads", "mutant", "seed", "duration", "ops", "report", "junit"];

/// `torture`, on a device or on the simulator.
pub(crate) const TORTURE: Entry = Entry {
    name: "torture",
    about: "seeded random I/O of any size and place, every byte verified",
    short: &[
        &["--duration", "8s", "--size", "64M"],
        // Small, so that much is done between two cuts, however slow the machine.
        &[
            "--duration",
            "8s",
            "--size",
            "16M",
            "--region",
            "1M",
            "--max-io",
            "64k",
            "--backend",
            "medium",
            "--cut-every",
            "1s",
            "--faults",
            "draw",
        ],
    ],
    plants: PLANTS,
    augment,
    parse,
};

/// What no other scenario looks for: content, byte by byte.
const PLANTS: &[Plant] = &[
    Plant {
        name: "misdirected-write",
        about: "a write lands on the wrong blocks",
        arguments: &["--mutant", "misdirected-write:50", "--shrink", "0s"],
    },
    Plant {
        name: "bitflip-read",
        about: "a read returns one flipped bit, once",
        arguments: &["--mutant", "bitflip-read:50", "--shrink", "0s"],
    },
    Plant {
        name: "stale-cache",
        about: "a read cache keeps a block that was written since",
        arguments: &["--mutant", "stale-cache", "--shrink", "0s"],
    },
];

/// What is tried on the simulated device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tried {
    /// Everything that may happen.
    Torture,
    /// Power cuts, and nothing else that goes wrong.
    Crash,
}

impl Tried {
    /// The name of the scenario.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Torture => "torture",
            Self::Crash => "crash",
        }
    }

    const fn workload(self, ops: u64) -> Workload {
        match self {
            Self::Torture => Workload::everything(ops),
            Self::Crash => Workload { cuts: true, ..Workload::ops(ops) },
        }
    }
}

/// The arguments of `torture --sim` and `crash --sim`, and so the scenario.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: CommonArgs,
    /// The bug that is planted.
    #[arg(long)]
    mutant: Option<Planted>,
    /// How many trials run at once.
    #[arg(long)]
    threads: Option<u64>,
    #[arg(skip = Tried::Torture)]
    tried: Tried,
}

fn augment(command: Command) -> Command {
    with_simulator(torture::Args::augment_args(command))
}

/// A command that takes a device, with the arguments for a simulated one.
pub(crate) fn with_simulator(command: Command) -> Command {
    command
        // Which bugs can be planted depends on where; that is looked at when it is known.
        .mut_arg("mutant", |arg| arg.value_parser(str::parse::<Planted>))
        .next_help_heading("Simulator")
        .arg(
            Arg::new("sim")
                .long("sim")
                .action(ArgAction::SetTrue)
                .help("Take the simulated device: no root, no kernel with ublk. What --mutant does not say is drawn"),
        )
        .arg(
            Arg::new("threads")
                .long("threads")
                .value_name("N")
                .value_parser(value_parser!(u64).range(1..=1024))
                .requires("sim")
                .help("How many threads run; as many as there are processors without it"),
        )
}

fn parse(matches: &ArgMatches) -> Result<Box<dyn Scenario>, clap::Error> {
    let is_given = |id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
    parse_either(matches, Tried::Torture, |args: torture::Args| args.drawn(is_given))
}

/// The scenario on a simulated device, or what `finish` makes of `S`.
pub(crate) fn parse_either<S: Scenario + FromArgMatches + 'static>(
    matches: &ArgMatches,
    tried: Tried,
    finish: impl FnOnce(S) -> S,
) -> Result<Box<dyn Scenario>, clap::Error> {
    if matches.get_flag("sim") {
        let given = |id: &&str| matches.value_source(id) == Some(ValueSource::CommandLine);
        let ids: Vec<&str> = matches.ids().map(clap::Id::as_str).collect();
        let other = ids.into_iter().filter(|id| matches.try_contains_id(id).is_ok()).filter(given);
        let other = other.filter(|id| !TAKEN.contains(id) && *id != "json").find(|id| !is_group(id));
        return match other {
            Some(id) => Err(wrong(
                ErrorKind::ArgumentConflict,
                format!("--{} is not for --sim, where the device and the workload are drawn", id.replace('_', "-")),
            )),
            None => Ok(Box::new(Args { tried, ..Args::from_arg_matches(matches)? })),
        };
    }
    let args = S::from_arg_matches(matches)?;
    if let Some(planted) = matches.get_one::<Planted>("mutant") {
        parse_planted(&planted.to_string()).map_err(|why| {
            wrong(ErrorKind::ValueValidation, format!("invalid value '{planted}' for --mutant: {why}; or use --sim"))
        })?;
    }
    Ok(Box::new(finish(args)))
}

/// Arguments that are flattened come with a group of the name of their type.
fn is_group(id: &str) -> bool {
    id.starts_with(char::is_uppercase)
}

fn wrong(kind: ErrorKind, message: String) -> clap::Error {
    clap::Error::raw(kind, message + "\n")
}

/// How many threads there are to run on.
pub(crate) fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

impl Scenario for Args {
    fn common(&self) -> &CommonArgs {
        &self.common
    }

    fn options(&self) -> BTreeMap<String, Value> {
        [
            ("sim", json!(true)),
            ("mutant", json!(self.mutant.map(|planted| planted.to_string()))),
            ("threads", json!(self.threads())),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    fn needs(&self) -> Needs {
        Needs::default()
    }

    fn validate(&self) -> Result<(), Failure> {
        if self.common.ops == Some(0) {
            return Err(Failure::Usage("no operations: --ops is a number from 1".to_owned()));
        }
        Ok(())
    }

    fn run(&self, context: &mut Context) -> Result<(), Failure> {
        self.require(context);
        // A number of operations alone means no limit of time.
        let duration = context.duration().or_else(|| context.ops().is_none().then_some(DEFAULT_DURATION));
        let limits = Limits { until: duration.map(|duration| Instant::now() + duration), ops: context.ops() };
        let trials = Trials::new(context.seed(), self.mutant, limits, self.tried);
        let deadline = duration.map_or(Duration::from_secs(24 * 3600), |duration| duration + DRAIN);
        let mut found = None;
        let tortured = context.step(self.tried.name(), deadline, |context| {
            found = trials.run(self.threads(), context)?;
            match &found {
                Some(found) => Err(found.failure()),
                None => Ok(()),
            }
        });
        if let Some(found) = found {
            // It is over and lost; an interruption ends the shrinking.
            context.always("make it small", SHRINK + AFTERMATH, |context| self.keep(&found, context))?;
        }
        tortured?;
        if context.interruption().came() { Err(Failure::Interrupted) } else { Ok(()) }
    }
}

impl Args {
    fn threads(&self) -> usize {
        self.threads.map_or_else(processors, |threads| threads as usize)
    }

    /// What a run must have done to be one.
    fn require(&self, context: &Context) {
        for (name, minimum) in [
            ("ops", 1000),
            ("verified_bytes", 64 << 10),
            ("overlaps", 1),
            ("power_cuts_in_flight", 1),
            ("changes_lost", u64::from(self.tried == Tried::Crash)),
            ("kills", u64::from(self.tried == Tried::Torture)),
            ("injections", u64::from(self.tried == Tried::Torture)),
            ("mutant_hits", u64::from(self.mutant.is_some())),
        ] {
            context.evidence().require(name, minimum);
        }
    }

    fn keep(&self, found: &Found, context: &mut Context) -> Result<(), Failure> {
        let until = Instant::now() + SHRINK;
        let smaller = found.shrink(&mut || Instant::now() < until && !context.interruption().came());
        context.note(kept::in_words(&smaller));
        let ops = found.ops_until();
        let planted = self.mutant.map_or(String::new(), |planted| format!("--mutant {planted} "));
        let repro =
            format!("ublk-torture {} --sim {planted}--seed {} --ops {ops}", self.tried.name(), context.seed());
        let Some(dir) = context.report_dir() else {
            context.note(kept::NOT_KEPT);
            return Ok(());
        };
        let dir = found.save(smaller, dir, self.tried, repro)?;
        context.note(kept::to_replay(&dir));
        context.detail(dir.display().to_string());
        Ok(())
    }
}
