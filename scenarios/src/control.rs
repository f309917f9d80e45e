//! `control`: every command to the driver, in every state of a device, legal and illegal, and what it gives.
//!
//! The outcomes stand in a table by state, command, variant and kernel; each is exact, and none may take longer than its
//! deadline. Then a seeded walk through the states, with commands of the table strewn in, looks for what only a history shows.
//!
//! The devices are held by processes of their own, which are killed when something hangs: this one never waits for I/O.

mod cells;
mod expect;
mod fuzz;
mod io_table;
mod lab;
mod peer;
mod protocol;
mod role;
mod shapes;
mod state;
mod steps;
mod table;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cli::{CommonArgs, name_of};
use crate::context::Context;
use crate::gates::GATES;
use crate::scenario::{Entry, Failure, Needs, Scenario};
use cells::Found;
use expect::Probe;
use fuzz::Counts;
use lab::Lab;
pub(crate) use role::main as role;
use state::State;

/// The argument with which this program becomes a process that holds a device.
pub(crate) const ARGUMENT: &str = "hold-for-parent";

/// The scenario in the registry.
pub(crate) const ENTRY: Entry = Entry::new::<Args>(
    "control",
    "send every control and I/O command in every state of a device, legal and illegal, and look what it gives",
)
.short(&[
    &["--states", "absent,added,configured,deleted"],
    &["--states", "opened,partly-fetched,ready"],
    &["--states", "live,live-recoverable"],
    &["--states", "held,dead"],
    &["--states", "stopped,stopped-open"],
    &["--states", "quiesced"],
    &["--states", "recovering"],
    // Not every kernel has the first.
    &["--states", "fail-io,deleting"],
    &["--fuzz", "--ops", "400"],
])
.plants(PLANTS);

const PLANTS: &[crate::scenario::Plant] = &[
    crate::scenario::Plant {
        name: "double-fetch",
        about: "a driver that takes a tag that it has already",
        arguments: &["--plant", "double-fetch", "--states", "partly-fetched"],
    },
    crate::scenario::Plant {
        name: "einval-for-ebusy",
        about: "a driver, or a library, that tells the wrong errno",
        arguments: &["--plant", "einval-for-ebusy", "--states", "live-recoverable"],
    },
    crate::scenario::Plant {
        name: "stale-state",
        about: "a driver that calls a stopped device live",
        arguments: &["--plant", "stale-state", "--states", "stopped"],
    },
    crate::scenario::Plant {
        name: "stop-hangs",
        about: "a STOP that waits for a request which nobody completes",
        arguments: &["--plant", "stop-hangs", "--states", "live"],
    },
    crate::scenario::Plant {
        name: "id-leak",
        about: "a DEL that does not free the id: somebody holds the block device",
        arguments: &["--plant", "id-leak", "--states", "live"],
    },
    crate::scenario::Plant {
        name: "echoed-flags",
        about: "a driver that says it has a feature that it does not know",
        arguments: &["--plant", "echoed-flags", "--states", "absent"],
    },
    crate::scenario::Plant {
        name: "lost-params",
        about: "a driver that loses a parameter between SET and GET",
        arguments: &["--plant", "lost-params", "--states", "configured"],
    },
];

/// Steps of the fuzzer unless a number or a time is given.
const FUZZ_STEPS: u64 = 2_000;

/// How long one state's commands may take.
const STATE_DEADLINE: Duration = Duration::from_secs(300);
/// How long the fuzzer may take beside the time it is given.
const FUZZ_DEADLINE: Duration = Duration::from_secs(1200);

/// A bug of the driver's, as the scenario would see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Plant {
    /// A tag that is fetched can be fetched again
    DoubleFetch,
    /// What is busy is called invalid
    EinvalForEbusy,
    /// A stopped device is said to be live
    StaleState,
    /// STOP does not end: a request is never completed
    StopHangs,
    /// DEL does not free the id: somebody holds the block device
    IdLeak,
    /// ADD_DEV says that it has every flag that was asked for
    EchoedFlags,
    /// What was set is not what is told: the alignment
    LostParams,
}

/// The arguments of `control`, and so the scenario.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: CommonArgs,
    /// Only the commands of these states
    #[arg(
        long,
        value_name = "STATE,…",
        value_delimiter = ',',
        action = clap::ArgAction::Set,
        overrides_with = "states",
        help_heading = "Table"
    )]
    states: Vec<String>,
    /// Only the fuzzer (and the states that are given): --ops steps, or for --duration
    #[arg(long, help_heading = "Fuzzer")]
    fuzz: bool,
    /// Do these steps, as a failure of the fuzzer prints them
    #[arg(long, value_name = "STEP; …", help_heading = "Fuzzer")]
    script: Option<String>,
    /// List what differs from the table, and take what does not end within 2 s for an outcome: for a new kernel
    #[arg(long, help_heading = "Table")]
    survey: bool,
    /// Plant a bug
    #[arg(long, value_enum, hide = true)]
    plant: Option<Plant>,
}

impl Scenario for Args {
    fn common(&self) -> &CommonArgs {
        &self.common
    }

    fn options(&self) -> BTreeMap<String, Value> {
        BTreeMap::from([
            ("states".to_owned(), json!(self.states)),
            ("fuzz".to_owned(), json!(self.fuzz)),
            ("script".to_owned(), json!(self.script)),
            ("survey".to_owned(), json!(self.survey)),
            ("plant".to_owned(), json!(self.plant.as_ref().map(name_of))),
        ])
    }

    fn needs(&self) -> Needs {
        Needs { ublk: true, tools: &[] }
    }

    fn validate(&self) -> Result<(), Failure> {
        if let Some(script) = &self.script {
            fuzz::read(script, &probes()).map_err(|what| Failure::Usage(format!("--script: {what}")))?;
        }
        match self.states.iter().find(|name| State::ALL.iter().all(|state| state.name() != **name)) {
            None => Ok(()),
            Some(name) => {
                let all: Vec<_> = State::ALL.iter().map(|state| state.name()).collect();
                Err(Failure::Usage(format!("--states {name}: there are {}", all.join(", "))))
            }
        }
    }

    fn run(&self, context: &mut Context) -> Result<(), Failure> {
        let mut lab = Lab::new(context, self.plant)?;
        if self.survey {
            lab.survey = true;
            lab.deadline = Duration::from_secs(2);
        }
        let probes = probes();
        if let Some(script) = &self.script {
            return replay(context, &mut lab, &probes, script);
        }
        let mut done = Ok(());
        if !self.fuzz || !self.states.is_empty() {
            done = self.table(context, &mut lab, &probes);
        }
        if done.is_ok() && (self.fuzz || self.states.is_empty()) {
            done = walks(context, &mut lab, &probes);
        }
        for (command, count) in &lab.sent {
            let name: String = command.to_lowercase().replace(['/', ' '], "_");
            context.evidence().add(&format!("sent_{name}"), *count);
        }
        done
    }
}

/// Every command of both tables.
fn probes() -> Vec<Probe> {
    let mut probes = table::all();
    probes.extend(shapes::all());
    probes.extend(io_table::all());
    probes
}

/// Walks until there is enough.
fn walks(context: &mut Context, lab: &mut Lab, probes: &[Probe]) -> Result<(), Failure> {
    let until = context.duration().map(|duration| Instant::now() + duration);
    let steps = context.ops().unwrap_or(if until.is_some() { u64::MAX } else { FUZZ_STEPS });
    let limit = context.duration().unwrap_or_default() + FUZZ_DEADLINE;
    context.evidence().require("fuzz_steps", 100);
    context.evidence().require("fuzz_walks", 2);
    let seed = context.seed().derive("control", 0);
    context.step("fuzz", limit, |context| {
        let mut counts = Counts::default();
        let over = |counts: &Counts| counts.steps >= steps || until.is_some_and(|until| Instant::now() >= until);
        let mut wrong = None;
        while wrong.is_none() && !over(&counts) {
            if context.interruption().came() {
                return Err(Failure::Interrupted);
            }
            wrong = lab.walk(seed.derive("walk", counts.walks), probes, &mut counts)?;
        }
        for (name, count) in
            [("fuzz_steps", counts.steps), ("fuzz_walks", counts.walks), ("fuzz_transitions", counts.moves)]
        {
            context.evidence().add(name, count);
        }
        context.detail(format!("{} steps, {} walks", counts.steps, counts.walks));
        let Some(wrong) = wrong else { return Ok(()) };
        context.note(format!("{}; leaving out what it does not need", wrong.what));
        let wrong = lab.shrink(wrong, probes)?;
        let script = fuzz::write(&wrong.script, probes);
        let again = format!("again: ublk-torture control --script '{script}'");
        Err(Failure::broke_with("fuzz", wrong.what, vec![again]))
    })
}

fn replay(context: &mut Context, lab: &mut Lab, probes: &[Probe], script: &str) -> Result<(), Failure> {
    let script = fuzz::read(script, probes).map_err(Failure::Usage)?;
    context.evidence().require("fuzz_steps", 1);
    context.step("script", FUZZ_DEADLINE, |context| {
        let mut counts = Counts::default();
        let wrong = lab.replay(&script, probes, &mut counts)?;
        context.evidence().add("fuzz_steps", counts.steps);
        wrong.map_or(Ok(()), |what| Err(Failure::broke("fuzz", what)))
    })
}

impl Args {
    fn table(&self, context: &mut Context, lab: &mut Lab, probes: &[Probe]) -> Result<(), Failure> {
        let mut wrong = Vec::new();
        let mut planned = 0;
        for &state in State::ALL {
            let chosen = self.states.is_empty() || self.states.iter().any(|name| name == state.name());
            if !chosen {
                continue;
            }
            if !state.is_of(lab.kernel) {
                context.note(format!("{state}: Linux {} has no such state", lab.kernel));
                continue;
            }
            let mut found = Found::default();
            let done = context.step(state.name(), STATE_DEADLINE, |context| {
                let done = lab.cells(state, probes, &mut found);
                context.detail(format!("{} cells", found.cells));
                done
            });
            context.evidence().add("cells", found.cells);
            planned += found.planned;
            // Every cell of every state that was asked for, or it says nothing.
            context.evidence().require("cells", planned);
            for (name, what) in &found.gated {
                if let Some(gate) = GATES.iter().find(|gate| gate.name == *name) {
                    let _shut = context.gated(gate, what);
                }
            }
            wrong.extend(found.wrong);
            if let Err(failure) = done {
                for line in wrong {
                    context.note(line);
                }
                return Err(failure);
            }
        }
        if wrong.is_empty() {
            return Ok(());
        }
        Err(Failure::broke_with("table", format!("{} of the commands gave what they should not", wrong.len()), wrong))
    }
}
