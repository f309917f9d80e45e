//! `stress`: devices that come and go by the thousand, under load, from all sides at once; and nothing of them is left.
//!
//! Each kind of it runs a process whose devices are stressed (`worker`) beside this one, which looks on, loads the
//! devices where that is asked for, and judges. Every kind ends with an account of ids, descriptors,
//! maps, threads and memory of that process; the kernel's own memory is judged where enough is done to tell, in `churn`.

mod churn;
mod closing;
mod concurrent;
mod crowd;
mod cycle;
mod disk;
mod extent;
mod held;
mod load;
mod protocol;
mod stressed;
mod worker;

use std::collections::BTreeMap;
use std::time::Duration;

use clap::ValueEnum;
use serde_json::{Value, json};

use self::extent::Extent;
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
    /// All of these; they share the time of --duration
    All,
}

impl Kind {
    /// What is done without being asked for anything else: cycles or rounds.
    fn usual(self) -> u64 {
        match self {
            Self::Churn => 300,
            Self::IoWhileClose | Self::ConcurrentClose => 5,
            Self::Many | Self::All => 1,
            Self::Held => 3,
        }
    }
}

/// Each by itself.
const KINDS: [Kind; 5] = [Kind::Churn, Kind::IoWhileClose, Kind::ConcurrentClose, Kind::Many, Kind::Held];

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
    /// How many cycles to churn, at most; with --duration alone, until that is over [default: 300]
    #[arg(long, value_name = "N", overrides_with = "cycles")]
    cycles: Option<u64>,
    /// How many devices at once, for `many`; 500 take some 100 MiB [default: 64]
    #[arg(long, value_name = "N", overrides_with = "devices")]
    devices: Option<u32>,
    /// How often to do it, at most, all kinds but `churn`; with --duration alone, until that is over [default: 5 for
    /// `io-while-close` and `concurrent-close`, 1 for `many`, 3 for `held`]
    #[arg(long, value_name = "N", overrides_with = "rounds")]
    rounds: Option<u32>,
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

    /// Whether options for this kind are of use. Where the kind is given by name, they may be those of the run that it replaces.
    fn takes(&self, kind: Kind) -> bool {
        self.does(kind) || self.what == Some(kind)
    }

    fn devices(&self) -> u32 {
        self.devices.unwrap_or(64)
    }

    /// How much of one kind is done: its share of the time is that of each.
    fn extent(&self, kind: Kind, duration: Option<Duration>) -> Extent {
        let asked = if kind == Kind::Churn { self.cycles } else { self.rounds.map(u64::from) };
        let kinds = KINDS.iter().filter(|kind| self.does(**kind)).count() as u32;
        Extent::new(asked, kind.usual(), duration.map(|duration| duration / kinds.max(1)))
    }

    /// Refuses an option that is given and says nothing to what is done.
    fn refuse_unused(&self) -> Result<(), Failure> {
        let name = |value: &dyn Fn() -> Option<clap::builder::PossibleValue>| {
            value().map(|value| value.get_name().to_owned()).unwrap_or_default()
        };
        let kind = name(&|| self.kind().to_possible_value());
        let unused = |option: &str, of: &[Kind]| {
            let of: Vec<String> = of.iter().map(|kind| name(&|| kind.to_possible_value())).collect();
            Err(Failure::Usage(format!("{option} says nothing to stress {kind}: it is for {}", of.join(", "))))
        };
        let churn_only = [
            ("--cycles", self.cycles.is_some()),
            ("--measure", self.measure),
            ("--cycle-limit", self.cycle_limit.is_some()),
        ];
        if let Some((option, _)) = churn_only.iter().find(|(_, given)| *given && !self.takes(Kind::Churn)) {
            return unused(option, &[Kind::Churn]);
        }
        if self.devices.is_some() && !self.takes(Kind::Many) {
            return unused("--devices", &[Kind::Many]);
        }
        if self.rounds.is_some() && !KINDS[1..].iter().any(|kind| self.takes(*kind)) {
            return unused("--rounds", &KINDS[1..]);
        }
        match self.plant {
            Some(plant) if !plant.kinds().iter().any(|kind| self.does(*kind)) => {
                unused(&format!("--plant {}", name(&|| plant.to_possible_value())), plant.kinds())
            }
            _ => Ok(()),
        }
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
        if self.cycles == Some(0) || self.rounds == Some(0) {
            return Err(Failure::Usage("--cycles and --rounds are at least 1".to_owned()));
        }
        if !(2..=4096).contains(&self.devices()) {
            return Err(Failure::Usage(format!("--devices {}: choose 2 to 4096", self.devices())));
        }
        if self.common.ops.is_some() {
            return Err(Failure::Usage(
                "--ops says nothing to stress: use --cycles, --rounds, --devices or --duration".to_owned(),
            ));
        }
        self.refuse_unused()
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
    let extent = args.extent(Kind::ConcurrentClose, context.duration());
    let rounds = extent.least(1);
    for (name, minimum) in [
        ("concurrent_closes", rounds * u64::from(DEVICES)),
        ("concurrent_callers", rounds * u64::from(DEVICES * CALLERS)),
        ("started_meanwhile", rounds),
    ] {
        context.evidence().require(name, minimum);
    }
    let limit = Duration::from_secs(120) + extent.limit(Duration::from_secs(60));
    context.step("close from many threads", limit, |context| {
        let mut stressed = stressed::Stressed::start("close from many threads")?;
        let first = stressed.sample(context, 0)?;
        stressed.order(&protocol::Order::Concurrently(protocol::ConcurrentOrder {
            extent,
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

#[cfg(test)]
mod tests {
    use clap::{Args as _, FromArgMatches as _};

    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn args(line: &str) -> Args {
        let command = Args::augment_args(clap::Command::new("stress").no_binary_name(true));
        let matches = command.try_get_matches_from(line.split_whitespace()).expect("parses");
        Args::from_arg_matches(&matches).expect("arguments")
    }

    #[test]
    fn a_duration_is_that_of_each_kind_and_shared_by_all() {
        for kind in KINDS {
            let name = kind.to_possible_value().expect("a value").get_name().to_owned();
            let alone = args(&name);
            assert_eq!(alone.extent(kind, None), Extent::new(Some(kind.usual()), 0, None), "{name}");
            let extent = alone.extent(kind, Some(10 * S));
            assert!(!extent.is_over(1_000_000, 9 * S) && extent.is_over(1, 10 * S), "{name}");
            let extent = args("").extent(kind, Some(10 * S));
            assert!(!extent.is_over(1_000_000, S) && extent.is_over(1, 2 * S), "{name}, one of five");
        }
        let both = args("held --rounds 7").extent(Kind::Held, Some(10 * S));
        assert!(both.is_over(7, S) && !both.is_over(6, S) && both.is_over(1, 10 * S));
        assert_eq!(args("churn --cycles 7").extent(Kind::Churn, None).exactly(), Some(7));
    }

    #[test]
    fn what_cannot_be_used_is_refused() {
        for wrong in [
            "--ops 7",
            "--cycles 0",
            "--rounds 0",
            "many --devices 1",
            "held --cycles 7",
            "many --measure",
            "many --cycle-limit 3s",
            "churn --devices 7",
            "churn --rounds 7",
            "churn --plant cross-talk",
            "held --plant leaked-map",
        ] {
            assert!(matches!(args(wrong).validate(), Err(Failure::Usage(_))), "{wrong}");
        }
        for right in
            ["", "--cycles 7 --rounds 7 --devices 7 --measure", "many --rounds 7", "io-while-close --rounds 7"]
        {
            assert!(args(right).validate().is_ok(), "{right}");
        }
    }

    #[test]
    fn each_bug_can_be_planted_in_each_short_run() {
        for plant in PLANTS {
            for short in ENTRY.short {
                let line = [*short, plant.arguments].concat().join(" ");
                let parsed = args(&line);
                assert!(parsed.validate().is_ok(), "{line}");
                let value = parsed.plant.and_then(|plant| plant.to_possible_value()).expect("a plant");
                assert_eq!(value.get_name(), plant.name);
            }
        }
        assert_eq!(PLANTS.len(), Bug::value_variants().len());
    }
}
