//! `replay`: runs what a failure left behind once more, on the simulator.
//!
//! It reproduces what it says or it does not: status 2 when it fails, 5 when it does not. The order of events is drawn from a
//! seed, and a script may fail with some and pass with others; `--times` says with how many.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use ublkit_harness::Seed;
use ublkit_harness::bundle::Bundle;
use ublkit_harness::event::Event;
use ublkit_harness::script::Script;
use ublkit_harness::shrink::Signature;
use ublkit_harness::sim::RunOptions;
use ublkit_harness::trial::replay;

use crate::cli::CommonArgs;
use crate::context::Context;
use crate::scenario::{Failure, Needs, Scenario};
use crate::simulated::{BUNDLE, listed};

/// What tells a bundle from other directories.
const ABOUT: &str = "bundle.json";
/// Every event of the first run that fails, in words, in the directory of the report.
const TRACE: &str = "trace.txt";
/// How long all runs may take.
const DEADLINE: Duration = Duration::from_secs(24 * 3600);

/// The arguments of `replay`, and so the scenario.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: CommonArgs,
    /// The bundle, or the directory of the report that it is in; or the file of a script
    #[arg(value_name = "BUNDLE")]
    path: PathBuf,
    /// Replay it on the simulated device (the default, and so far the only one)
    #[arg(long, help_heading = "Replay")]
    sim: bool,
    /// The script of the whole run, not the small one
    #[arg(long, help_heading = "Replay")]
    full: bool,
    /// How many times: with its own seed (or `--seed`), then with others
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..), help_heading = "Replay")]
    times: u64,
}

/// What is replayed.
struct Loaded {
    script: Script,
    /// How it failed; a script alone does not say.
    signature: Option<Signature>,
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
        [("path", json!(self.path)), ("sim", json!(true)), ("full", json!(self.full)), ("times", json!(self.times))]
            .map(|(name, value)| (name.to_owned(), value))
            .into()
    }

    fn needs(&self) -> Needs {
        Needs::default()
    }

    fn validate(&self) -> Result<(), Failure> {
        if self.common.duration.is_some() || self.common.ops.is_some() {
            return Err(Failure::Usage("a script says how much is done: leave out --duration and --ops".to_owned()));
        }
        self.load().map(|_| ())
    }

    fn run(&self, context: &mut Context) -> Result<(), Failure> {
        let Loaded { script, signature } = self.load()?;
        let planted = script.mutant.map_or(String::new(), |planted| format!(", with {planted} planted"));
        context.note(format!("{} actions{planted}:{}", script.actions.len(), listed(&script)));
        if let Some(signature) = &signature {
            context.note(format!("it failed by {signature}"));
        }
        context.evidence().require("failed", 1);
        context.step("replay", DEADLINE, |context| self.replay(&script, signature.as_ref(), context))
    }
}

impl Args {
    fn load(&self) -> Result<Loaded, Failure> {
        let wrong = |error: &dyn std::fmt::Display| Failure::Usage(error.to_string());
        if !self.path.is_dir() {
            let script = Script::load(&self.path).map_err(|error| wrong(&error))?;
            return Ok(Loaded { script, signature: None });
        }
        let below = self.path.join(BUNDLE);
        let dir = if !self.path.join(ABOUT).exists() && below.join(ABOUT).exists() { &below } else { &self.path };
        let bundle = Bundle::load(dir).map_err(|error| wrong(&error))?;
        let (script, failure) = match bundle.shrunk {
            Some(shrunk) if !self.full => (shrunk.script, shrunk.failure),
            _ => (bundle.script, bundle.failure),
        };
        Ok(Loaded { script, signature: Some(Signature::of(failure.oracle, &failure.event)) })
    }

    fn replay(&self, script: &Script, signature: Option<&Signature>, context: &mut Context) -> Result<(), Failure> {
        let mut first: Option<(Script, Signature, Event)> = None;
        let (mut done, mut failed, mut same) = (0, 0, 0);
        for number in 0..self.times {
            if context.interruption().came() {
                break;
            }
            let script = Script { seed: seed(context.seed(), number), ..script.clone() };
            let tried = replay(&script, &RunOptions::default());
            done += 1;
            context.evidence().merge(&tried.ran.evidence);
            context.evidence().add("mutant_hits", tried.hits.unwrap_or(0));
            let Some(failure) = tried.ran.failure else { continue };
            failed += 1;
            let own = Signature::of(failure.oracle, &failure.event);
            let is_same = signature.is_none_or(|signature| *signature == own);
            same += u64::from(is_same);
            // The failure that was asked for is the one to tell.
            if first.is_none() || (is_same && same == 1) {
                first = Some((script, own, failure.event));
            }
        }
        for (name, count) in [("runs", done), ("failed", failed), ("failed_in_the_same_way", same)] {
            context.evidence().add(name, count);
        }
        let Some((script, own, event)) = first else {
            context.detail(format!("it fails in none of {done} runs"));
            return if context.interruption().came() { Err(Failure::Interrupted) } else { Ok(()) };
        };
        let way = match signature {
            Some(_) if same == failed => "each time in the way it did before".to_owned(),
            Some(_) => format!("{same} times in the way it did before"),
            None => "a script alone does not say how it did before".to_owned(),
        };
        context.note(format!("fails by {own}, seed {}; in {failed} of {done} runs, {way}", script.seed));
        if let Some(dir) = context.report_dir() {
            trace(&script, &dir.join(TRACE))?;
        }
        Err(event.into())
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
