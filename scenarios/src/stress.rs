//! `stress`: devices that come and go by the thousand, under load, from all sides at once; and nothing of them is left.
//!
//! Each kind of it runs a process whose devices are stressed (`worker`) beside this one, which looks on, loads the
//! devices where that is asked for, and judges. Every kind ends with an account of ids, descriptors,
//! maps, threads and memory of that process, and of the kernel's memory.

mod churn;
mod closing;
mod concurrent;
mod crowd;
mod cycle;
mod disk;
mod held;
mod load;
mod protocol;
mod stressed;
mod worker;

use std::collections::BTreeMap;
use std::time::Duration;

use clap::ValueEnum;
use serde_json::{Value, json};

use self::protocol::Plant as Bug;
pub(crate) use self::worker::{ARGUMENT, main as worker_main};
use crate::cli::CommonArgs;
use crate::context::Context;
use crate::inventory::Inventory;
use crate::scenario::{Entry, Failure, Needs, Plant, Scenario};
use crate::units::parse_duration;

/// What `stress` is in the registry.
pub(crate) const ENTRY: Entry = Entry::new::<Args>(
    "stress",
    "devices by the thousand: churn, closing under load and from many sides, many at once, held ones; nothing is left",
)
.short(&[
    &["churn", "--cycles", "60"],
    &["io-while-close", "--rounds", "3"],
    &["concurrent-close", "--rounds", "2"],
    &["many", "--devices", "16"],
    &["held"],
])
.plants(PLANTS);

const fn plant(name: &'static str, about: &'static str, arguments: &'static [&'static str]) -> Plant {
    Plant { name, about, arguments }
}

/// What each kind has to catch. The kind is given by name, which wins over that of the short run it is planted in.
const PLANTS: &[Plant] = &[
    plant("leaked-fd", "one descriptor is left in each cycle", &["--kind", "churn", "--plant", "leaked-fd"]),
    plant("leaked-map", "one memory map is left in each cycle", &["--kind", "churn", "--plant", "leaked-map"]),
    plant("leaked-thread", "one thread is left in each cycle", &["--kind", "churn", "--plant", "leaked-thread"]),
    plant("leaked-memory", "4 KiB are left in each cycle", &["--kind", "churn", "--plant", "leaked-memory"]),
    plant("skipped-delete", "an id is never given back", &["--kind", "churn", "--plant", "skipped-delete"]),
    plant(
        "kill-instead-of-stop",
        "the server ends before the device is stopped, and dirty pages are lost",
        &["--kind", "churn", "--plant", "kill-instead-of-stop"],
    ),
    plant(
        "lost-in-flight",
        "what is in flight at the close is acknowledged and not stored",
        &["--kind", "io-while-close", "--plant", "lost-in-flight"],
    ),
    plant(
        "forgotten-request",
        "a request that is in flight at the close is never answered",
        &["--kind", "io-while-close", "--plant", "forgotten-request"],
    ),
    plant(
        "early-answer",
        "a second caller of close is told that all is done before it is",
        &["--kind", "concurrent-close", "--plant", "early-answer"],
    ),
    plant(
        "split-answer",
        "two callers of one close are told different things",
        &["--kind", "concurrent-close", "--plant", "split-answer"],
    ),
    plant("cross-talk", "two devices share one storage", &["--kind", "many", "--plant", "cross-talk"]),
    plant(
        "double-served",
        "a device is served under another one's id",
        &["--kind", "many", "--plant", "double-served"],
    ),
    plant(
        "closed-neighbour",
        "closing one device closes another",
        &["--kind", "many", "--plant", "closed-neighbour"],
    ),
    plant(
        "unnamed-holder",
        "who holds a closed device is not named",
        &["--kind", "held", "--plant", "unnamed-holder"],
    ),
    plant(
        "never-deleted",
        "a device that was held at its close is never deleted",
        &["--kind", "held", "--plant", "never-deleted"],
    ),
    plant(
        "dropped-pages",
        "the pages of a mounted file system are dropped by the close",
        &["--kind", "held", "--plant", "dropped-pages"],
    ),
];

/// What is done to the devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Start, write, read back, close, again and again
    Churn,
    /// Close with requests in flight and pages dirty
    IoWhileClose,
    /// Close from many threads at once, while others start
    ConcurrentClose,
    /// Many devices at once
    Many,
    /// Close while somebody holds the device open, or has it mounted
    Held,
    /// All of these
    All,
}

/// The arguments of `stress`, and so the scenario.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: CommonArgs,
    /// What is done to the devices [default: all]
    #[arg(value_enum, value_name = "KIND")]
    what: Option<Kind>,
    /// The same, by name; it wins
    #[arg(long, value_enum, value_name = "KIND", hide = true)]
    kind: Option<Kind>,
    /// How many cycles to churn
    #[arg(long, value_name = "N", default_value_t = 300, overrides_with = "cycles")]
    cycles: u64,
    /// How many devices at once, for `many`; 500 take some 100 MiB
    #[arg(long, value_name = "N", default_value_t = 64, overrides_with = "devices")]
    devices: u32,
    /// How often to close, for `io-while-close`, `concurrent-close` and `held`
    #[arg(long, value_name = "N", default_value_t = 5, overrides_with = "rounds")]
    rounds: u32,
    /// Fail if our own code takes more than a tenth of a cycle: for a run in which times mean something
    #[arg(long)]
    measure: bool,
    /// Fail if a cycle takes longer than this on average, such as 31ms
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    cycle_limit: Option<Duration>,
    /// Plant a bug in the process whose devices are stressed
    #[arg(long, value_enum, value_name = "NAME", hide_possible_values = true)]
    plant: Option<Bug>,
}

impl Args {
    fn kind(&self) -> Kind {
        self.kind.or(self.what).unwrap_or(Kind::All)
    }

    fn does(&self, kind: Kind) -> bool {
        self.kind() == kind || self.kind() == Kind::All
    }
}

impl Scenario for Args {
    fn common(&self) -> &CommonArgs {
        &self.common
    }

    fn options(&self) -> BTreeMap<String, Value> {
        let name = |value: Option<clap::builder::PossibleValue>| value.map(|value| value.get_name().to_owned());
        [
            ("kind", json!(name(self.kind().to_possible_value()))),
            ("cycles", json!(self.cycles)),
            ("devices", json!(self.devices)),
            ("rounds", json!(self.rounds)),
            ("measure", json!(self.measure)),
            ("cycle_limit_us", json!(self.cycle_limit.map(|limit| limit.as_micros() as u64))),
            ("plant", json!(self.plant.and_then(|plant| name(plant.to_possible_value())))),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
    }

    fn needs(&self) -> Needs {
        Needs { ublk: true, tools: if self.does(Kind::Held) { &["mkfs.ext4"] } else { &[] } }
    }

    fn validate(&self) -> Result<(), Failure> {
        if self.cycles == 0 || self.rounds == 0 {
            return Err(Failure::Usage("--cycles and --rounds are at least 1".to_owned()));
        }
        if !(2..=4096).contains(&self.devices) {
            return Err(Failure::Usage(format!("--devices {}: choose 2 to 4096", self.devices)));
        }
        if self.common.ops.is_some() {
            return Err(Failure::Usage(
                "--ops says nothing to stress: use --cycles, --rounds or --devices".to_owned(),
            ));
        }
        Ok(())
    }

    fn run(&self, context: &mut Context) -> Result<(), Failure> {
        let before = Inventory::take();
        if self.does(Kind::Churn) {
            churn::run(self, context)?;
        }
        if self.does(Kind::IoWhileClose) {
            closing::run(self, context)?;
        }
        if self.does(Kind::ConcurrentClose) {
            run_concurrent(self, context)?;
        }
        if self.does(Kind::Many) {
            crowd::run(self, context)?;
        }
        if self.does(Kind::Held) {
            held::run(self, context)?;
        }
        context.step("nothing-left", Duration::from_secs(20), |context| before.compare(context))
    }
}

/// Closes from many threads at once, while others start; all of that in the other process.
fn run_concurrent(args: &Args, context: &mut Context) -> Result<(), Failure> {
    const DEVICES: u32 = 4;
    const CALLERS: u32 = 4;
    let rounds = u64::from(args.rounds);
    for (name, minimum) in [
        ("concurrent_closes", rounds * u64::from(DEVICES)),
        ("concurrent_callers", rounds * u64::from(DEVICES * CALLERS)),
        ("started_meanwhile", rounds),
    ] {
        context.evidence().require(name, minimum);
    }
    let limit = Duration::from_secs(120 + 60 * rounds);
    context.step("close from many threads", limit, |context| {
        let mut stressed = stressed::Stressed::start("close from many threads")?;
        let first = stressed.sample(context, 0)?;
        stressed.order(&protocol::Order::Concurrently(protocol::ConcurrentOrder {
            rounds: args.rounds,
            devices: DEVICES,
            callers: CALLERS,
            seed: context.seed().derive("concurrent", 0),
            plant: args.plant,
        }))?;
        let done = match stressed.hear(context)? {
            protocol::Report::Concurred(done) => done,
            other => return Err(stressed::unexpected(&other)),
        };
        let evidence = context.evidence();
        evidence.add("concurrent_closes", done.closes);
        evidence.add("concurrent_callers", done.callers);
        evidence.add("started_meanwhile", done.started_meanwhile);
        evidence.add("bytes_verified", done.bytes_verified);
        account(context, stressed, &first)?;
        context.detail(format!(
            "{} closes by {} callers, {} devices started meanwhile",
            done.closes, done.callers, done.started_meanwhile
        ));
        Ok(())
    })
}

/// The account at the end of a kind: what the process holds that it did not hold at the beginning, and the ids.
fn account(
    context: &mut Context,
    mut stressed: stressed::Stressed,
    first: &crate::footprint::Sample,
) -> Result<(), Failure> {
    use crate::footprint::Measure;
    let left = stressed.left(context)?;
    if !left.is_empty() {
        let what = format!("{} things are left in the process whose devices were stressed", left.len());
        return Err(Failure::broke_with("leak", what, left));
    }
    let last = stressed.sample(context, 1)?;
    // Memory is kept for later use, in amounts that do not depend on how much was done; a device's buffers alone are more.
    let mut kept = Vec::new();
    for (measure, most) in [(Measure::LockedBytes, 0), (Measure::ResidentBytes, 64 << 20), (Measure::Maps, 200)] {
        let more = last.of(measure).saturating_sub(first.of(measure));
        if more > most {
            kept.push(format!("{more} more {} than at the beginning (at most {most})", measure.name()));
        }
    }
    if !kept.is_empty() {
        return Err(Failure::broke_with("leak", kept[0].clone(), kept));
    }
    let ids = stressed.end(context)?;
    context.evidence().add("ids_free_again", ids);
    Ok(())
}
