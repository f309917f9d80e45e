use std::collections::VecDeque;
use std::path::PathBuf;

use super::*;
use crate::context::testing::{Testing, context};
use crate::scenario::Entry;

pub(crate) const ENTRIES: &[Entry] = &[
    Entry::new::<crate::probe::Args>("one", "").short(&[&["--size", "64M"]]),
    Entry::new::<crate::probe::Args>("two", "").short(&[&["--a"], &["--b", "c"]]),
    Entry::new::<crate::probe::Args>("none", ""),
];

/// Parts that end as they are told, in their order.
pub(crate) struct Fake(pub(crate) VecDeque<Result<Verdict, Failure>>, pub(crate) Vec<Order>);

impl Fake {
    pub(crate) fn new(verdicts: impl IntoIterator<Item = Verdict>) -> Self {
        Self(verdicts.into_iter().map(Ok).collect(), Vec::new())
    }
}

impl Launch for Fake {
    fn launch(&mut self, order: &Order, _: &mut Context) -> Result<Part, Failure> {
        self.1.push(order.clone());
        let verdict = self.0.pop_front().unwrap_or(Ok(Verdict::Pass))?;
        Ok(Part {
            name: order.name.clone(),
            verdict,
            exit_code: Some(verdict.exit_code().into()),
            elapsed_ms: 1500,
            what: "42 ops".to_owned(),
            evidence: BTreeMap::new(),
            gates: Vec::new(),
            steps: Vec::new(),
            report: None,
            repro: order.repro(),
        })
    }
}

fn run(verdicts: impl IntoIterator<Item = Verdict>) -> (Result<(), Failure>, Report, Testing) {
    run_fake(Fake::new(verdicts))
}

fn run_fake(mut fake: Fake) -> (Result<(), Failure>, Report, Testing) {
    let mut testing = context();
    let entries: Vec<_> = ENTRIES.iter().collect();
    let orders = orders(&entries, Seed::new(7), None, Duration::from_secs(9));
    let mut report = Report::new(&testing.context, orders.len(), &["left"]);
    let result = run_all(&orders, &mut fake, &mut report, &mut testing.context);
    (result, report, testing)
}

#[test]
fn every_short_run_has_a_name_a_seed_and_a_directory_of_its_own() {
    let entries: Vec<_> = ENTRIES.iter().collect();
    let orders = orders(&entries, Seed::new(7), Some(Path::new("/r")), Duration::from_secs(9));
    let names: Vec<_> = orders.iter().map(|order| order.name.as_str()).collect();
    assert_eq!(names, ["one", "two", "two-2"]);
    assert_eq!(orders[2].report, Some(PathBuf::from("/r/two-2")));
    assert_eq!(orders[0].words[..4], ["one", "--size", "64M", "--seed"]);
    assert_eq!(orders[2].words[..4], ["two", "--b", "c", "--seed"]);
    let seeds: std::collections::BTreeSet<_> = orders.iter().map(|order| order.words.last()).collect();
    assert_eq!(seeds.len(), 3, "{seeds:?}");
}

#[test]
fn all_pass() {
    use Verdict::Pass;
    let (result, report, testing) = run([Pass, Pass, Pass]);
    result.expect("a pass");
    assert!(report.whole);
    assert_eq!(testing.context.evidence().snapshot().judge(), Ok(()));
    let table = report.table();
    assert!(table.contains("two-2     pass      1.5 s  42 ops") && table.contains("left out"), "{table}");
}

#[test]
fn it_ends_as_the_worst_part_and_runs_the_others_all_the_same() {
    use Verdict::{Environment, Fail, Hang, Internal, Pass, Vacuous};
    for (verdicts, worst) in [
        ([Hang, Fail, Internal], Some(Fail)),
        ([Pass, Hang, Internal], Some(Hang)),
        ([Environment, Internal, Vacuous], Some(Internal)),
        ([Pass, Environment, Pass], Some(Environment)),
    ] {
        let (result, report, _testing) = run(verdicts);
        assert_eq!(result.expect_err("not a pass").verdict(), worst, "{verdicts:?}");
        assert_eq!(report.parts.len(), 3);
    }
}

#[test]
fn too_little_work_in_a_part_is_too_little_of_the_whole() {
    let (result, _report, testing) = run([Verdict::Pass, Verdict::Vacuous, Verdict::Environment]);
    result.expect("left to the evidence");
    testing.context.evidence().snapshot().judge().expect_err("not every part passed");
}

#[test]
fn what_ends_it_early_is_told_with_what_was_not_run() {
    let mut fake = Fake::new([Verdict::Pass]);
    fake.0.push_back(Err(Failure::Environment("two: no room".to_owned())));
    let (result, report, _testing) = run_fake(fake);
    assert_eq!(result.expect_err("an end").verdict(), Some(Verdict::Environment));
    assert!(!report.whole);
    assert!(report.table().contains("2 more: two: no room"), "{}", report.table());
}
