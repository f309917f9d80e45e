//! What a scenario is, how one can fail, and the registry of them.

use std::collections::BTreeMap;
use std::fmt;
use std::io;

use clap::{ArgMatches, FromArgMatches};
use serde_json::Value;
use ublkit_harness::event::{Event, Finding};
use ublkit_harness::{Mismatch, Seed, Verdict};

use crate::cli::CommonArgs;
use crate::context::Context;

/// A way to try a device, as asked for on the command line: a scenario *is* its parsed arguments.
pub trait Scenario {
    /// The arguments that every scenario has.
    fn common(&self) -> &CommonArgs;

    /// The seed, where it is known before the run; a new one is drawn otherwise.
    fn seed(&self) -> Option<Seed> {
        self.common().seed
    }

    /// Every option of its own, given or by default, for the first event of the run.
    fn options(&self) -> BTreeMap<String, Value>;

    /// What has to be there before the run begins.
    fn needs(&self) -> Needs;

    /// Whether it meets a device of this machine's kernel, whoever serves it: what that kernel says during the run then counts.
    fn meets_kernel_device(&self) -> bool {
        self.needs().ublk
    }

    /// Checks what can be checked without touching anything.
    ///
    /// # Errors
    /// [`Failure::Usage`], with what would be right.
    fn validate(&self) -> Result<(), Failure> {
        Ok(())
    }

    /// Runs it. Devices, mounts and threads it made must be gone when it returns, however it ends.
    ///
    /// # Errors
    /// The first thing that ended the run early.
    fn run(&self, context: &mut Context) -> Result<(), Failure>;
}

/// What has to be there before a run begins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Root, and a kernel with ublk, because the scenario serves a device itself.
    pub ublk: bool,
    /// Programs that are started.
    pub tools: &'static [&'static str],
}

/// A bug that a scenario has to catch: it is run with these arguments, and must not pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plant {
    /// What it is called, in tables and, where the scenario plants it by itself, after `--plant`.
    pub name: &'static str,
    /// What real bug it stands for.
    pub about: &'static str,
    /// What the scenario is told, beside its [short](Entry::short) arguments.
    pub arguments: &'static [&'static str],
}

/// A scenario in the registry.
#[derive(Debug)]
pub struct Entry {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it does, in one line.
    pub about: &'static str,
    /// Arguments for a run that is short and says something all the same: some 20 s on an emulated machine of two
    /// processors. A list for each such run; none for what is no scenario of a real device.
    pub short: &'static [&'static [&'static str]],
    /// Bugs that it has to catch.
    pub plants: &'static [Plant],
    /// Adds its arguments to a command.
    pub(crate) augment: fn(clap::Command) -> clap::Command,
    /// Reads them.
    pub(crate) parse: fn(&ArgMatches) -> Result<Box<dyn Scenario>, clap::Error>,
}

impl Entry {
    /// The entry for the scenario whose arguments are `S`.
    #[must_use]
    pub const fn new<S: Scenario + clap::Args + 'static>(name: &'static str, about: &'static str) -> Self {
        Self { name, about, short: &[], plants: &[], augment: S::augment_args, parse: parse::<S> }
    }

    /// With arguments for short runs, one list for each.
    #[must_use]
    pub const fn short(mut self, short: &'static [&'static [&'static str]]) -> Self {
        self.short = short;
        self
    }

    /// With bugs that it has to catch.
    #[must_use]
    pub const fn plants(mut self, plants: &'static [Plant]) -> Self {
        self.plants = plants;
        self
    }
}

fn parse<S: Scenario + FromArgMatches + 'static>(matches: &ArgMatches) -> Result<Box<dyn Scenario>, clap::Error> {
    S::from_arg_matches(matches).map(|scenario| Box::new(scenario) as Box<dyn Scenario>)
}

/// Every scenario there is.
pub const SCENARIOS: &[Entry] = &[
    Entry::new::<crate::probe::Args>(
        "probe",
        "check step by step that both sides of the stack agree: device, storage, file system, remount, close",
    )
    .short(&[&["--size", "64M", "--max-io", "128k"]])
    .plants(crate::probe::PLANTS),
    crate::simulated::TORTURE,
    Entry::new::<crate::fault::Args>("fault", "errors of every kind, at every point, and what comes after them")
        .short(crate::fault::SHORT)
        .plants(crate::fault::PLANTS),
    crate::stress::ENTRY,
    Entry::new::<crate::flush_trace::Args>(
        "flush-trace",
        "trace where the time goes between fsync and the backend: a picture, a trace, and why the device was idle",
    )
    .short(&[&["--size", "64M", "--rounds", "2", "--writeback-age", "1s", "--workers-backend", "2"]])
    .plants(crate::flush_trace::PLANTS),
    crate::sigkill::ENTRY,
    crate::control::ENTRY,
    crate::crash::CRASH,
    crate::chain::ENTRY,
    Entry::new::<crate::mutants::Args>("mutants", "plant every known bug, and look whether it is found, and by whom"),
    Entry::new::<crate::suite::Args>(
        "suite",
        "the short runs of every scenario, one after the other, and a table of them",
    ),
    Entry::new::<crate::soak::Args>(
        "soak",
        "every scenario, round after round, with a planted bug to catch in each round",
    ),
    Entry::new::<crate::replay::Args>("replay", "run what a failure left behind once more: a bundle, or a script"),
];

/// Why a run ended early.
#[derive(Debug)]
pub enum Failure {
    /// The device broke a promise: a finding or a mismatch.
    DeviceBroke(Broken),
    /// Something did not end within its deadline, and was given up in an orderly way.
    Hang(String),
    /// The environment lacks something; the message says what to do.
    Environment(String),
    /// The command line asks for something that cannot be; the message says what would be right.
    Usage(String),
    /// The harness itself is at fault.
    Internal(String),
    /// SIGINT or SIGTERM came.
    Interrupted,
}

/// A broken promise, and whether it was reported already.
#[derive(Debug)]
pub struct Broken {
    pub(crate) event: Box<Event>,
    pub(crate) reported: bool,
}

impl Failure {
    /// A broken promise, found by `oracle`.
    #[must_use]
    pub fn broke(oracle: impl Into<String>, what: impl Into<String>) -> Self {
        Event::finding(oracle, what).into()
    }

    /// A broken promise, with more for a reader to understand it by, one line each.
    #[must_use]
    pub fn broke_with(oracle: impl Into<String>, what: impl Into<String>, detail: Vec<String>) -> Self {
        Event::Finding(Finding { oracle: oracle.into(), what: what.into(), detail }).into()
    }

    /// The device failed an operation that it should have done: `what` completes "failed to …".
    #[must_use]
    pub fn io(what: impl fmt::Display, error: &io::Error) -> Self {
        Self::broke("io", format!("failed to {what}: {error}"))
    }

    /// The verdict of a run that ended so; `None` for one that says nothing about the device and is left to the
    /// [evidence](crate::Context::evidence), or where no run took place.
    #[must_use]
    pub const fn verdict(&self) -> Option<Verdict> {
        match self {
            Self::DeviceBroke(_) => Some(Verdict::Fail),
            Self::Hang(_) => Some(Verdict::Hang),
            Self::Environment(_) => Some(Verdict::Environment),
            Self::Internal(_) => Some(Verdict::Internal),
            Self::Usage(_) | Self::Interrupted => None,
        }
    }
}

/// A finding or mismatch.
impl From<Event> for Failure {
    fn from(event: Event) -> Self {
        Self::DeviceBroke(Broken { event: Box::new(event), reported: false })
    }
}

impl From<Mismatch> for Failure {
    fn from(mismatch: Mismatch) -> Self {
        Event::from(mismatch).into()
    }
}

impl From<Box<Mismatch>> for Failure {
    fn from(mismatch: Box<Mismatch>) -> Self {
        Event::from(mismatch).into()
    }
}

/// What went wrong while a device was made or ended.
impl From<ublkit::Error> for Failure {
    fn from(error: ublkit::Error) -> Self {
        use ublkit::ErrorKind;
        match error.kind() {
            ErrorKind::InvalidInput => Self::Usage(error.to_string()),
            ErrorKind::TimedOut => Self::Hang(error.to_string()),
            ErrorKind::DriverMissing | ErrorKind::PermissionDenied | ErrorKind::Unsupported => {
                Self::Environment(error.to_string())
            }
            _ => Self::broke("control", error.to_string()),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DeviceBroke(broken) => match broken.event.as_ref() {
                Event::Finding(finding) => f.write_str(&finding.what),
                Event::Mismatch(mismatch) => mismatch.fmt(f),
                other => write!(f, "{other:?}"),
            },
            Self::Hang(what) | Self::Environment(what) | Self::Usage(what) | Self::Internal(what) => {
                f.write_str(what)
            }
            Self::Interrupted => f.write_str("interrupted"),
        }
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use clap::{Args as _, Command};

    use super::*;

    /// Options that are told under another name, or turned round.
    const TOLD_AS: [(&str, &str); 3] = [("points", "phases"), ("what", "kind"), ("no_passes", "passes")];
    /// What needs no telling: where it is somebody else's device, that is told in place of ours; with the simulator, it is
    /// another scenario that runs.
    const ELSEWHERE: [&str; 5] = ["device", "server", "yes_destroy_data", "sim", "threads"];

    #[test]
    fn what_a_run_was_asked_for_is_told_whole() {
        let common = CommonArgs::augment_args(Command::new("any"));
        let is_common = |id: &str| common.get_arguments().any(|argument| argument.get_id() == id);
        for entry in SCENARIOS {
            let command = (entry.augment)(Command::new(entry.name));
            let needed = command.get_arguments().filter(|argument| argument.is_required_set());
            let given = needed.map(|_| "something");
            let matches = command.clone().get_matches_from(std::iter::once(entry.name).chain(given));
            let options = (entry.parse)(&matches).expect("a scenario").options();
            for argument in command.get_arguments() {
                let id = argument.get_id().as_str();
                let told = TOLD_AS.iter().find(|(own, _)| *own == id).map_or(id, |(_, told)| told);
                let names = [told.to_owned(), format!("{told}_ms"), format!("{told}_us")];
                let is_told = names.iter().any(|name| options.contains_key(name));
                assert!(is_told || is_common(id) || ELSEWHERE.contains(&id), "{} does not tell --{id}", entry.name);
            }
        }
    }
}
