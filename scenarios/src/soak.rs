//! `soak`: every scenario, round after round, with other seeds each time; and in each round a planted bug that has to be
//! caught, so that a long quiet run proves that somebody was looking.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use ublkit_harness::event::Part;
use ublkit_harness::{Seed, Verdict};

use crate::cli::CommonArgs;
use crate::context::Context;
use crate::mutants::scenarios::{catch, is_caught, orders as canary_orders};
use crate::parts::{Launch, Order, Pick, Processes};
use crate::scenario::{Entry, Failure, Needs, Plant, SCENARIOS, Scenario};
use crate::suite::{orders, outcome, run_one, run_part};
use crate::units::parse_duration;

/// How many rounds a soak should have: scenarios run longer when there is time for more.
const ROUNDS_WANTED: u32 = 8;
/// What a short run takes, for that.
const SHORT_RUN: Duration = Duration::from_secs(20);
/// Runs are not made longer than so many times.
const STRETCH_MAX: u32 = 60;

/// The arguments of `soak`, and so the scenario.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    pick: Pick,
    /// How long a run may take, beside its own duration, before it is ended, and a hang
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = parse_duration, help_heading = "Scenarios")]
    part_deadline: Duration,
    /// Run so many times longer than shortly; by default such that the time is enough for some eight rounds
    #[arg(
        long,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=1000),
        help_heading = "Scenarios"
    )]
    stretch: Option<u32>,
    /// Go on after a run that did not pass
    #[arg(long, help_heading = "Scenarios")]
    keep_going: bool,
}

impl Scenario for Args {
    fn common(&self) -> &CommonArgs {
        &self.common
    }

    fn options(&self) -> BTreeMap<String, Value> {
        let own = [
            ("part_deadline_ms", json!(self.part_deadline.as_millis() as u64)),
            ("stretch", json!(self.stretch)),
            ("keep_going", json!(self.keep_going)),
        ];
        self.pick.options().chain(own.map(|(name, value)| (name.to_owned(), value))).collect()
    }

    fn needs(&self) -> Needs {
        Needs { ublk: true, tools: &[] }
    }

    fn validate(&self) -> Result<(), Failure> {
        if self.common.ops.is_some() {
            return Err(Failure::Usage(
                "--ops is for single scenarios; --duration says how long to go on".to_owned(),
            ));
        }
        if self.pick.from(SCENARIOS).0.is_empty() {
            return Err(Failure::Usage("nothing would be run: --skip leaves no scenario".to_owned()));
        }
        Ok(())
    }

    fn run(&self, context: &mut Context) -> Result<(), Failure> {
        let (entries, left_out) = self.pick.from(SCENARIOS);
        if !left_out.is_empty() {
            context.note(format!("left out by request: {}", left_out.join(", ")));
        }
        let stretch = self.stretch.unwrap_or_else(|| stretch(context.duration(), &entries));
        let soak = Soak { entries, stretch, deadline: self.part_deadline, keep_going: self.keep_going };
        soak.run(&mut Processes, context)
    }
}

/// How many times longer than shortly the scenarios run, so that some rounds fit into the time.
fn stretch(duration: Option<Duration>, entries: &[&Entry]) -> u32 {
    let runs: usize = entries.iter().map(|entry| entry.short.len()).sum();
    let short_round = SHORT_RUN * runs.max(1) as u32;
    let Some(duration) = duration else { return 1 };
    let times = duration.as_secs() / (short_round * ROUNDS_WANTED).as_secs().max(1);
    u32::try_from(times).unwrap_or(STRETCH_MAX).clamp(1, STRETCH_MAX)
}

/// The order with its `--duration` so many times as long; runs without one stay as they are.
fn stretched(mut order: Order, times: u32) -> Result<Order, Failure> {
    if let Some(at) = order.words.iter().position(|word| word == "--duration")
        && let Some(value) = order.words.get_mut(at + 1)
    {
        let short = parse_duration(value).map_err(Failure::Internal)?;
        *value = format!("{}ms", (short * times).as_millis());
        order.deadline += short * times;
    }
    Ok(order)
}

/// The bug that is planted in a round.
fn canary(seed: Seed, entries: &[&'static Entry]) -> Option<(&'static Entry, &'static Plant)> {
    let plants: Vec<_> =
        entries.iter().flat_map(|entry| entry.plants.iter().map(move |plant| (*entry, plant))).collect();
    seed.derive("canary", 0).rng().pick(&plants).copied()
}

/// What is done in each round.
struct Soak {
    entries: Vec<&'static Entry>,
    stretch: u32,
    deadline: Duration,
    keep_going: bool,
}

impl Soak {
    fn run(&self, launch: &mut dyn Launch, context: &mut Context) -> Result<(), Failure> {
        for name in ["rounds", "runs", "canaries_caught"] {
            context.evidence().require(name, 1);
        }
        let mut bad = Vec::new();
        let result = self.rounds(launch, &mut bad, context);
        // A part that did too little is no failure, and yet none that passed.
        let runs = context.evidence().snapshot().count("runs");
        context.evidence().require("passed", runs);
        match result {
            // What did not pass before the end counts, whoever asked for that.
            Ok(()) | Err(Failure::Interrupted) => outcome(&bad).and(result),
            Err(failure) => Err(failure),
        }
    }

    /// Round after round, until the time is over or a part did not pass.
    fn rounds(&self, launch: &mut dyn Launch, bad: &mut Vec<Part>, context: &mut Context) -> Result<(), Failure> {
        let until = context.duration().map(|duration| Instant::now() + duration);
        let began = Instant::now();
        for round in 1.. {
            let seed = context.seed().derive("round", round);
            let dir = context.report_dir().map(|dir| dir.join(format!("round-{round}")));
            if self.round(round, seed, dir.as_deref(), launch, bad, context)?.is_break() {
                break;
            }
            context.evidence().add("rounds", 1);
            context.note(format!(
                "round {round} is over after {} s: {} runs, {} that did not pass, {} canaries caught",
                began.elapsed().as_secs(),
                context.evidence().snapshot().count("runs"),
                bad.len(),
                context.evidence().snapshot().count("canaries_caught"),
            ));
            if until.is_none_or(|until| Instant::now() >= until) {
                break;
            }
        }
        Ok(())
    }

    /// Every run and a canary. It breaks off at a part that did not pass, unless that is to be gone on after.
    fn round(
        &self,
        round: u64,
        seed: Seed,
        dir: Option<&Path>,
        launch: &mut dyn Launch,
        bad: &mut Vec<Part>,
        context: &mut Context,
    ) -> Result<ControlFlow<()>, Failure> {
        for order in orders(&self.entries, seed, dir, self.deadline) {
            let mut order = stretched(order, self.stretch)?;
            order.name = format!("round {round}: {}", order.name);
            let part = run_one(&order, launch, context)?;
            if part.verdict == Verdict::Pass {
                // What failed is kept; what did not would fill the disk.
                forget(order.report.as_deref());
            } else {
                bad.push(part);
                if !self.keep_going {
                    return Ok(ControlFlow::Break(()));
                }
            }
        }
        let Some((entry, plant)) = canary(seed, &self.entries) else {
            context.note("no scenario of this soak has a bug to plant: nothing proves that it would see one");
            return Ok(ControlFlow::Continue(()));
        };
        let tries = canary_orders(entry, plant, seed, dir);
        let whole = tries.iter().map(Order::whole_deadline).sum();
        let name = format!("round {round}: canary {}/{}", entry.name, plant.name);
        let caught = run_part(&name, whole, context, |context| {
            let part = catch(&tries, launch, context)?;
            Ok((is_caught(part.verdict), part))
        })?;
        if caught {
            context.evidence().add("canaries_caught", 1);
            for order in &tries {
                forget(order.report.as_deref());
            }
            return Ok(ControlFlow::Continue(()));
        }
        let what = format!("{}/{} was planted in round {round} and not caught", entry.name, plant.name);
        Err(Failure::broke("canary", what))
    }
}

fn forget(dir: Option<&Path>) {
    // It is only about room.
    let _left = dir.map(std::fs::remove_dir_all);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::testing::context;
    use crate::suite::tests::Fake;

    const PLANTS: &[Plant] = &[Plant { name: "lost", about: "", arguments: &["--mutant", "lost-write"] }];
    const ENTRIES: &[Entry] = &[
        Entry::new::<crate::probe::Args>("one", "").short(&[&["--duration", "8s"]]).plants(PLANTS),
        Entry::new::<crate::probe::Args>("two", "").short(&[&["--x"]]),
    ];

    fn soak(keep_going: bool) -> Soak {
        Soak { entries: ENTRIES.iter().collect(), stretch: 3, deadline: Duration::from_secs(60), keep_going }
    }

    fn run(keep_going: bool, verdicts: &[Verdict]) -> (Result<(), Failure>, Fake, crate::context::testing::Testing) {
        let mut testing = context();
        let mut fake = Fake::new(verdicts.iter().copied());
        let result = soak(keep_going).run(&mut fake, &mut testing.context);
        (result, fake, testing)
    }

    #[test]
    fn one_round_is_every_run_and_a_canary() {
        use Verdict::{Fail, Pass};
        let (result, fake, testing) = run(false, &[Pass, Pass, Fail]);
        result.expect("a pass");
        let evidence = testing.context.evidence().snapshot();
        assert_eq!((evidence.count("rounds"), evidence.count("runs"), evidence.count("canaries_caught")), (1, 2, 1));
        assert_eq!(evidence.judge(), Ok(()));
        assert_eq!(fake.1[0].words[..3], ["one", "--duration", "24000ms"]);
        assert_eq!(fake.1[0].deadline, Duration::from_secs(84));
        assert_eq!(fake.1[2].words[..5], ["one", "--duration", "8s", "--mutant", "lost-write"]);
    }

    #[test]
    fn a_canary_that_is_not_caught_is_a_failure() {
        use Verdict::Pass;
        let (result, _, testing) = run(true, &[Pass, Pass, Pass]);
        assert!(result.expect_err("nobody looks").to_string().contains("one/lost was planted in round 1"));
        testing.context.evidence().snapshot().judge().expect_err("no canary was caught");
    }

    #[test]
    fn a_failure_ends_the_soak_unless_it_is_to_go_on() {
        use Verdict::{Fail, Pass};
        let (result, fake, _testing) = run(false, &[Fail, Pass, Fail]);
        assert_eq!(result.expect_err("a failure").verdict(), Some(Fail));
        assert_eq!(fake.1.len(), 1);
        let (result, fake, _testing) = run(true, &[Fail, Pass, Fail]);
        assert_eq!(result.expect_err("a failure").verdict(), Some(Fail));
        assert_eq!(fake.1.len(), 3);
    }

    #[test]
    fn a_part_that_did_too_little_keeps_the_soak_from_passing() {
        use Verdict::{Environment, Fail, Pass, Vacuous};
        for (keep_going, runs) in [(true, 3), (false, 1)] {
            let (result, fake, testing) = run(keep_going, &[Vacuous, Pass, Fail]);
            result.expect("left to the evidence");
            let evidence = testing.context.evidence().snapshot();
            evidence.judge().expect_err("one of its parts said nothing");
            assert_eq!((fake.1.len(), evidence.count("rounds")), (runs, u64::from(keep_going)));
        }
        let (result, _, testing) = run(true, &[Vacuous, Environment, Fail]);
        result.expect("left to the evidence");
        testing.context.evidence().snapshot().judge().expect_err("no part passed");
    }

    #[test]
    fn what_failed_before_an_interruption_is_a_failure() {
        use Verdict::{Fail, Pass};
        let mut testing = context();
        let mut fake = Fake::new([Fail, Pass, Fail]);
        fake.0.push_back(Err(Failure::Interrupted));
        testing.context.duration = Some(Duration::from_secs(3600));
        let result = soak(true).run(&mut fake, &mut testing.context);
        assert_eq!(result.expect_err("a failure").verdict(), Some(Fail));
    }

    #[test]
    fn an_interrupted_round_is_not_one() {
        let mut testing = context();
        testing.context.interruption().set();
        let result = soak(false).run(&mut Fake::new([]), &mut testing.context);
        assert!(matches!(result, Err(Failure::Interrupted)), "{result:?}");
        testing.context.evidence().snapshot().judge().expect_err("no round");
    }

    #[test]
    fn canaries_change_with_the_round() {
        let entries: Vec<_> = SCENARIOS.iter().filter(|entry| !entry.short.is_empty()).collect();
        let drawn = |round| canary(Seed::new(1).derive("round", round), &entries).expect("one").1.name;
        let names: std::collections::BTreeSet<_> = (0..40).map(drawn).collect();
        assert!(names.len() > 4, "{names:?}");
    }

    #[test]
    fn longer_soaks_have_longer_runs() {
        let entries: Vec<_> = ENTRIES.iter().collect();
        let hours = |hours: u64| Some(Duration::from_secs(hours * 3600));
        assert_eq!(stretch(None, &entries), 1);
        assert_eq!(stretch(Some(Duration::from_secs(30)), &entries), 1);
        assert_eq!(stretch(hours(1), &entries), 11);
        assert_eq!(stretch(hours(1000), &entries), STRETCH_MAX);
    }
}
