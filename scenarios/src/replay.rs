//! `replay`: runs what a failure left behind once more: where it was found, or elsewhere.
//!
//! It reproduces what it says or it does not: status 2 when it fails, 5 when it does not. On the simulator the order of
//! events is drawn from a seed, and a script may fail with some and pass with others; on a real device what completes when is
//! the device's. `--times` says how often it fails.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use ublkit_harness::Seed;
use ublkit_harness::bundle::{Bundle, FoundOn};
use ublkit_harness::event::Event;
use ublkit_harness::script::Script;
use ublkit_harness::shrink::Signature;
use ublkit_harness::sim::RunOptions;
use ublkit_harness::trial::replay;

use crate::cli::CommonArgs;
use crate::context::Context;
use crate::external::{ExternalArgs, SERVER_HELP};
use crate::kept::{BUNDLE, listed};
use crate::scenario::{Broken, Failure, Needs, Scenario};
use crate::target::{BackendKind, Mode};
use crate::torture::stage::{Last, Place, ServedBy, Stage, signature_of};
use crate::units::parse_duration;

/// What tells a bundle from other directories.
const ABOUT: &str = "bundle.json";
/// Every event of the first run that fails, in words, in the directory of the report.
const TRACE: &str = "trace.txt";
/// How long all runs may take.
const DEADLINE: Duration = Duration::from_secs(24 * 3600);
/// The heading of what says where a script is replayed.
const WHERE: &str = "Where";

/// The arguments of `replay`, and so the scenario.
#[expect(clippy::struct_excessive_bools, reason = "flags of a command line")]
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: CommonArgs,
    /// The bundle, or the directory of the report that it is in; or the file of a script
    #[arg(value_name = "BUNDLE")]
    path: PathBuf,
    /// The script of the whole run, not the small one
    #[arg(long, help_heading = "Replay")]
    full: bool,
    /// How many times: with its own seed (or `--seed`), then with others
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..), help_heading = "Replay")]
    times: u64,
    /// How long an operation may take on a real device before that is a hang
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_duration, help_heading = "Replay")]
    stall: Duration,
    /// On the simulated device: the default for what was found there, and for a script alone
    #[arg(long, conflicts_with_all = ["device_mode", "device", "server"], help_heading = WHERE)]
    sim: bool,
    /// On a real device that is served for it, as the script wants it: the default for what was found on one
    #[arg(long, conflicts_with_all = ["device", "server"], help_heading = WHERE)]
    device_mode: bool,
    /// Where the bytes of that device are kept, if not as when it was found
    #[arg(long, value_enum, value_name = "KIND", conflicts_with_all = ["sim", "device", "server"], help_heading = WHERE)]
    backend: Option<BackendKind>,
    /// How data moves between kernel and server, if not as when it was found
    #[arg(long, value_enum, value_name = "MODE", conflicts_with_all = ["sim", "device", "server"], help_heading = WHERE)]
    mode: Option<Mode>,
    /// Threads that run the backend, if not as many as when it was found; 0 for the queue threads themselves
    #[arg(long, value_name = "N", conflicts_with_all = ["sim", "device", "server"], help_heading = WHERE)]
    workers_backend: Option<usize>,
    /// On this block device, whoever serves it. What the script is for of its content is destroyed
    #[arg(long, value_name = "PATH", requires = "yes_destroy_data", help_heading = WHERE)]
    device: Option<PathBuf>,
    #[arg(long, value_name = "COMMAND", requires = "yes_destroy_data", help = SERVER_HELP, help_heading = WHERE)]
    server: Option<String>,
    /// Yes, destroy what is on it
    #[arg(long, help_heading = WHERE)]
    yes_destroy_data: bool,
}

/// What is replayed.
struct Loaded {
    script: Script,
    /// How it failed; a script alone does not say.
    signature: Option<Signature>,
    found_on: FoundOn,
    /// The number of the device in its patterns.
    device: u32,
}

/// Where it is replayed.
enum Where {
    Simulator,
    Device(Box<Stage>),
}

impl fmt::Display for Where {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Simulator => "the simulated device",
            Self::Device(stage) => match stage.place {
                Place::Served(_) => "a real device",
                Place::External(_) => "somebody else's device",
            },
        })
    }
}

/// One run that failed.
struct Failed {
    script: Script,
    signature: Signature,
    event: Event,
}

impl Scenario for Args {
    fn common(&self) -> &CommonArgs {
        &self.common
    }

    fn seed(&self) -> Option<Seed> {
        // What cannot be loaded has been refused by then.
        self.common.seed.or_else(|| Some(self.load().ok()?.script.seed))
    }

    fn options(&self) -> BTreeMap<String, Value> {
        [
            ("path", json!(self.path)),
            ("full", json!(self.full)),
            ("times", json!(self.times)),
            ("stall_ms", json!(self.stall.as_millis() as u64)),
            ("sim", json!(self.is_simulated())),
            ("device_mode", json!(self.device_mode)),
            ("backend", json!(self.backend)),
            ("mode", json!(self.mode)),
            ("workers_backend", json!(self.workers_backend)),
            ("device", json!(self.device)),
            ("server", json!(self.server)),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    fn needs(&self) -> Needs {
        Needs { ublk: !self.is_simulated() && !self.external().is_asked_for(), tools: &[] }
    }

    fn meets_kernel_device(&self) -> bool {
        !self.is_simulated()
    }

    fn validate(&self) -> Result<(), Failure> {
        if self.common.duration.is_some() || self.common.ops.is_some() {
            return Err(Failure::Usage("a script says how much is done: leave out --duration and --ops".to_owned()));
        }
        if self.stall < Duration::from_secs(1) {
            return Err(Failure::Usage("a stall of less than 1s: busy machines pause for longer".to_owned()));
        }
        self.external().validate()?;
        let loaded = self.load()?;
        match self.place(&loaded)? {
            Where::Simulator => Ok(()),
            Where::Device(stage) => stage.check(&loaded.script),
        }
    }

    fn run(&self, context: &mut Context) -> Result<(), Failure> {
        let loaded = self.load()?;
        let place = self.place(&loaded)?;
        let Loaded { script, signature, .. } = loaded;
        let planted = script.mutant.map_or(String::new(), |planted| format!(", with {planted} planted"));
        context.note(format!("on {place}: {} actions{planted}:{}", script.actions.len(), listed(&script)));
        if let Some(signature) = &signature {
            context.note(format!("it failed by {signature}"));
        }
        context.evidence().require("failed", 1);
        context.step("replay", DEADLINE, |context| self.replay(&place, &script, signature.as_ref(), context))
    }
}

impl Args {
    fn load(&self) -> Result<Loaded, Failure> {
        let wrong = |error: &dyn fmt::Display| Failure::Usage(error.to_string());
        if !self.path.is_dir() {
            let script = Script::load(&self.path).map_err(|error| wrong(&error))?;
            return Ok(Loaded { script, signature: None, found_on: FoundOn::Simulator, device: 0 });
        }
        let below = self.path.join(BUNDLE);
        let dir = if !self.path.join(ABOUT).exists() && below.join(ABOUT).exists() { &below } else { &self.path };
        let Bundle { script, failure, shrunk, found_on, device, .. } =
            Bundle::load(dir).map_err(|error| wrong(&error))?;
        let (script, failure) = match shrunk {
            Some(shrunk) if !self.full => (shrunk.script, shrunk.failure),
            _ => (script, failure),
        };
        let signature = Some(Signature::of(failure.oracle, &failure.event));
        Ok(Loaded { script, signature, found_on, device })
    }

    fn external(&self) -> ExternalArgs {
        ExternalArgs::new(self.device.clone(), self.server.clone(), self.yes_destroy_data)
    }

    fn is_simulated(&self) -> bool {
        // What cannot be loaded is refused.
        self.load().and_then(|loaded| self.place(&loaded)).is_ok_and(|place| matches!(place, Where::Simulator))
    }

    /// Where it is asked for, or else where it was found.
    fn place(&self, loaded: &Loaded) -> Result<Where, Failure> {
        let external = self.external();
        let of_served = self.backend.is_some() || self.mode.is_some() || self.workers_backend.is_some();
        let place = if self.sim {
            return Ok(Where::Simulator);
        } else if external.is_asked_for() {
            Place::External(external)
        } else {
            let found = match &loaded.found_on {
                FoundOn::Served(told) => ServedBy::of(told)?,
                _ if self.device_mode || of_served => ServedBy::default(),
                FoundOn::Simulator => return Ok(Where::Simulator),
                FoundOn::External => {
                    return Err(Failure::Usage(
                        "it was found on somebody else's device: name one with --device PATH or --server COMMAND, and \
                         --yes-destroy-data; or ask for one of our own with --device-mode, or for --sim"
                            .to_owned(),
                    ));
                }
            };
            Place::Served(ServedBy {
                backend: self.backend.unwrap_or(found.backend),
                mode: self.mode.unwrap_or(found.mode),
                workers_backend: self.workers_backend.unwrap_or(found.workers_backend),
            })
        };
        Ok(Where::Device(Box::new(Stage { place, device: loaded.device, stall: self.stall })))
    }

    fn replay(
        &self,
        place: &Where,
        script: &Script,
        signature: Option<&Signature>,
        context: &mut Context,
    ) -> Result<(), Failure> {
        let mut first: Option<Failed> = None;
        let mut last = Last::default();
        let (mut done, mut failed, mut same) = (0, 0, 0);
        for number in 0..self.times {
            if context.interruption().came() {
                break;
            }
            let script = Script { seed: seed(context.seed(), number), ..script.clone() };
            let event = match place.run(&script, &mut last, context) {
                Err(Failure::Interrupted) => break,
                other => other?,
            };
            done += 1;
            let Some(event) = event else { continue };
            failed += 1;
            let signature_of = signature_of(&event);
            let is_same = signature.is_none_or(|signature| *signature == signature_of);
            same += u64::from(is_same);
            // The failure that was asked for is the one to tell.
            if first.is_none() || (is_same && same == 1) {
                first = Some(Failed { script, signature: signature_of, event });
            }
        }
        for (name, count) in [("runs", done), ("failed", failed), ("failed_in_the_same_way", same)] {
            context.evidence().add(name, count);
        }
        let Some(Failed { script, signature: own, event }) = first else {
            context.detail(format!("it fails in none of {done} runs"));
            return if context.interruption().came() { Err(Failure::Interrupted) } else { Ok(()) };
        };
        let way = match signature {
            Some(_) if same == failed => "each time in the way it did before".to_owned(),
            Some(_) => format!("{same} times in the way it did before"),
            None => "a script alone does not say how it did before".to_owned(),
        };
        context.note(format!("fails by {own}, seed {}; in {failed} of {done} runs, {way}", script.seed));
        if let (Where::Simulator, Some(dir)) = (place, context.report_dir()) {
            trace(&script, &dir.join(TRACE))?;
        }
        Err(event.into())
    }
}

impl Where {
    /// One run, and how it failed. What it did is added to the evidence.
    fn run(&self, script: &Script, last: &mut Last, context: &mut Context) -> Result<Option<Event>, Failure> {
        match self {
            Self::Simulator => {
                let tried = replay(script, &RunOptions::default());
                context.evidence().merge(&tried.ran.evidence);
                context.evidence().add("mutant_hits", tried.hits.unwrap_or(0));
                Ok(tried.ran.failure.map(|failure| failure.event))
            }
            Self::Device(stage) => match stage.perform(context, script, last) {
                Ok(()) => Ok(None),
                Err(Failure::DeviceBroke(Broken { event, .. })) => Ok(Some(*event)),
                Err(other) => Err(other),
            },
        }
    }
}

/// The seed of a run: the first has that of the script.
fn seed(of: Seed, number: u64) -> Seed {
    // Readers of JSON that keep numbers as doubles see them exactly.
    if number == 0 { of } else { Seed::new(of.derive("replay", number).get() >> 11) }
}

fn trace(script: &Script, path: &Path) -> Result<(), Failure> {
    let events = replay(script, &RunOptions { record: true, ..RunOptions::default() }).ran.events;
    fs::write(path, events.join("\n") + "\n")
        .map_err(|error| Failure::Environment(format!("cannot write {}: {error}; is there room?", path.display())))
}
