//! Each mutant in a server of a real device: this program is started once for each, as `torture`.
//!
//! That something was wrong is not enough: the bug has to have struck before it was found, and to be found in time. A control
//! has to have been odd, or its pass says nothing. A lie in what a device declares counts as a strike.

use std::time::Duration;

use ublkit_harness::event::{DeviceRow, Event, Part, StepFinished};
use ublkit_harness::mutant::OnDevice;
use ublkit_harness::script::Act;
use ublkit_harness::{Mutant, Verdict};

use crate::context::Context;
use crate::parts::{Launch, Order, seed_of};
use crate::scenario::Failure;
use crate::torture::mutants::arguments;

/// How long a mutant is tortured unless it is found, or another time is given.
const DURATION: Duration = Duration::from_secs(60);
/// How long one is that shows only when the device is closed.
const BEFORE_CLOSING: Duration = Duration::from_secs(5);
/// How long a run may take to start, to wind down, to notice a hang and to say so.
const AROUND: Duration = Duration::from_secs(300);
/// How long after the first operation a bug has to be found at the latest.
const FOUND_WITHIN: Duration = Duration::from_secs(60);

pub(super) fn run(mutants: &[Mutant], launch: &mut dyn Launch, context: &mut Context) -> Result<(), Failure> {
    context.evidence().require("tried", mutants.iter().filter(|mutant| can_be(**mutant).is_ok()).count() as u64);
    let mut rows = Vec::new();
    let mut outcome = Ok(());
    for &mutant in mutants {
        let row = match can_be(mutant) {
            Err(why) => Ok(row_of(mutant, None, why)),
            Ok(()) => try_one(mutant, launch, context),
        };
        match row {
            Ok(row) => {
                context.sink().send(Event::DeviceRow(Box::new(row.clone())));
                rows.push(row);
                // Each time: what is killed halfway has the first half.
                super::save(&rows, context.report_dir())?;
            }
            Err(failure) => {
                outcome = Err(failure);
                break;
            }
        }
    }
    count(&rows, context);
    context.note(summary(&rows));
    outcome?;
    judge(&rows)
}

fn can_be(mutant: Mutant) -> Result<(), &'static str> {
    match mutant.spec().device {
        OnDevice::Yes | OnDevice::Raw => Ok(()),
        OnDevice::No(why) => Err(why),
    }
}

fn row_of(mutant: Mutant, verdict: Option<Verdict>, what: impl Into<String>) -> DeviceRow {
    let spec = mutant.spec();
    DeviceRow {
        mutant: spec.name.to_owned(),
        number: spec.number.to_owned(),
        control: mutant.is_control(),
        verdict,
        what: what.into(),
        hits: 0,
        ops: 0,
        elapsed_ms: 0,
        repro: String::new(),
    }
}

fn count(rows: &[DeviceRow], context: &Context) {
    let of = |is: fn(&DeviceRow) -> bool| rows.iter().filter(|row| is(row)).count() as u64;
    for (name, count) in [
        ("tried", of(|row| row.verdict.is_some())),
        ("not_on_a_device", of(|row| row.verdict.is_none())),
        ("found", of(is_kill)),
        ("flagged", of(|row| row.found() && row.control)),
    ] {
        context.evidence().add(name, count);
    }
}

fn summary(rows: &[DeviceRow]) -> String {
    let tried = |control: bool| rows.iter().filter(move |row| row.control == control && row.verdict.is_some());
    format!(
        "{} of {} mutants found, {} of {} controls flagged, {} cannot be on a device",
        tried(false).filter(|row| is_kill(row)).count(),
        tried(false).count(),
        tried(true).filter(|row| row.found()).count(),
        tried(true).count(),
        rows.iter().filter(|row| row.verdict.is_none()).count(),
    )
}

/// A bug was found, and that it is the one that was planted stands to reason.
fn is_kill(row: &DeviceRow) -> bool {
    !row.control && row.found() && row.hits > 0 && !is_late(row)
}

fn is_late(row: &DeviceRow) -> bool {
    row.elapsed_ms > FOUND_WITHIN.as_millis() as u64
}

fn judge(rows: &[DeviceRow]) -> Result<(), Failure> {
    let named = |is: fn(&DeviceRow) -> bool| {
        rows.iter().filter(|row| is(row)).map(|row| row.mutant.as_str()).collect::<Vec<_>>().join(", ")
    };
    let mut wrong = Vec::new();
    let late = format!("found later than {} s after the first operation:", FOUND_WITHIN.as_secs());
    for (what, names) in [
        ("nobody finds", named(|row| !row.control && row.verdict == Some(Verdict::Pass))),
        ("taken for bugs, and they are none:", named(|row| row.control && row.found())),
        (
            "something was wrong before the bug struck, so that nothing is known of",
            named(|row| !row.control && row.found() && row.hits == 0),
        ),
        (&late, named(|row| !row.control && row.found() && is_late(row))),
        (
            "never odd, so that nothing is known of",
            named(|row| row.control && row.verdict == Some(Verdict::Pass) && row.hits == 0),
        ),
        ("too little was done to say anything of", named(|row| row.verdict == Some(Verdict::Vacuous))),
    ] {
        if !names.is_empty() {
            wrong.push(format!("{what} {names}"));
        }
    }
    super::broke(wrong)?;
    let fell_apart = named(|row| row.verdict == Some(Verdict::Internal));
    if fell_apart.is_empty() {
        return Ok(());
    }
    Err(Failure::Internal(format!("these did not come to an end of their own: {fell_apart}")))
}

/// The run of `torture` on a device with this bug.
fn order(mutant: Mutant, context: &Context) -> Order {
    let duration = context.duration().unwrap_or(DURATION);
    let at_the_end = mutant.shows_at() == Some(Act::Reopen);
    let duration = if at_the_end { duration.min(BEFORE_CLOSING) } else { duration };
    let mut words = vec!["torture".to_owned()];
    words.extend(arguments(mutant.into()));
    words.extend(["--seed".to_owned(), seed_of(context.seed(), mutant.name(), 0).to_string()]);
    words.extend(["--duration".to_owned(), format!("{}ms", duration.as_millis())]);
    words.extend(context.ops().iter().flat_map(|ops| ["--ops".to_owned(), ops.to_string()]));
    Order { name: mutant.name().to_owned(), words, report: None, deadline: duration + AROUND }
}

fn try_one(mutant: Mutant, launch: &mut dyn Launch, context: &mut Context) -> Result<DeviceRow, Failure> {
    let order = order(mutant, context);
    context.step(mutant.name(), order.whole_deadline(), |context| {
        let part = launch.launch(&order, context)?;
        if part.verdict == Verdict::Environment {
            return Err(Failure::Environment(format!("{}: {}", part.repro, part.what)));
        }
        let row = row_of_part(mutant, part);
        context.detail(&row.what);
        Ok(row)
    })
}

/// What became of a run. One that had to be ended from outside, or fell apart after its verdict, has found nothing: that
/// something is wrong, hangs among it, is to be seen and told by the run itself.
fn row_of_part(mutant: Mutant, part: Part) -> DeviceRow {
    let by_itself = part.exit_code == Some(part.verdict.exit_code().into());
    let counted = |name: &str| part.evidence.get(name).copied().unwrap_or(0);
    DeviceRow {
        hits: counted("mutant_hits"),
        ops: counted("ops"),
        elapsed_ms: until_wrong(&part),
        verdict: Some(if by_itself { part.verdict } else { Verdict::Internal }),
        what: if part.verdict == Verdict::Pass { "nothing was wrong".to_owned() } else { part.what },
        repro: part.repro,
        ..row_of(mutant, None, "")
    }
}

/// The time from the first operation until something was wrong, or until the end.
fn until_wrong(part: &Part) -> u64 {
    let sum = |steps: &[StepFinished]| steps.iter().map(|step| step.elapsed_ms).sum::<u64>();
    let first = part.steps.iter().position(|step| step.name == "torture").unwrap_or(part.steps.len());
    let (before, from) = part.steps.split_at(first);
    match from.iter().position(|step| !step.ok) {
        Some(wrong) => sum(&from[..=wrong]),
        None if part.verdict == Verdict::Pass => sum(from),
        // A step that hung has no end.
        None => part.elapsed_ms.saturating_sub(sum(before)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::testing::{Testing, context};

    /// How a run ends, how often the bug struck in it, and how long it took from the first operation.
    #[derive(Clone, Copy, Debug)]
    struct Ending {
        verdict: Verdict,
        exit_code: Option<i32>,
        hits: u64,
        elapsed_ms: u64,
    }

    fn ends(verdict: Verdict, exit_code: impl Into<Option<i32>>) -> Ending {
        Ending { verdict, exit_code: exit_code.into(), hits: 3, elapsed_ms: 500 }
    }

    /// Runs that end so.
    struct Fake(Vec<Ending>);

    impl Launch for Fake {
        fn launch(&mut self, order: &Order, _: &mut Context) -> Result<Part, Failure> {
            let Ending { verdict, exit_code, hits, elapsed_ms } = self.0.remove(0);
            let step = |name: &str, ok, elapsed_ms| StepFinished {
                name: name.into(),
                ok,
                detail: String::new(),
                elapsed_ms,
                deadline_ms: 1,
            };
            let mut steps = vec![step("start", true, 1000)];
            if verdict != Verdict::Hang {
                steps.push(step("torture", verdict == Verdict::Pass, elapsed_ms));
            }
            Ok(Part {
                name: order.name.clone(),
                verdict,
                exit_code,
                elapsed_ms: 1000 + elapsed_ms,
                what: "something".to_owned(),
                evidence: [("ops".to_owned(), 42), ("mutant_hits".to_owned(), hits)].into(),
                gates: Vec::new(),
                steps,
                report: None,
                repro: order.repro(),
            })
        }
    }

    fn tried_as(control: bool, ends: &[Ending]) -> (Result<(), Failure>, Vec<DeviceRow>, Testing) {
        let mut testing = context();
        let dir = tempfile::tempdir().expect("a directory");
        testing.context.report_dir = Some(dir.path().to_owned());
        let mutants: Vec<_> = Mutant::ALL
            .into_iter()
            .filter(|mutant| can_be(*mutant).is_ok() && mutant.is_control() == control)
            .take(ends.len())
            .collect();
        let result = run(&mutants, &mut Fake(ends.to_vec()), &mut testing.context);
        let saved = std::fs::read(dir.path().join(super::super::FILE)).unwrap_or_default();
        (result, serde_json::from_slice(&saved).unwrap_or_default(), testing)
    }

    fn tried(ends: &[Ending]) -> (Result<(), Failure>, Vec<DeviceRow>, Testing) {
        tried_as(false, ends)
    }

    /// Why runs that end so are a failure, and how many bugs count as found.
    fn rejected(control: bool, ends: &[Ending]) -> (String, u64) {
        let (result, _, testing) = tried_as(control, ends);
        let failure = result.expect_err("not as it should be");
        assert_eq!(failure.verdict(), Some(Verdict::Fail), "{failure}");
        (failure.to_string(), testing.context.evidence().snapshot().count("found"))
    }

    #[test]
    fn what_a_run_finds_by_itself_is_found() {
        let (result, rows, testing) = tried(&[ends(Verdict::Fail, 2), ends(Verdict::Hang, 3)]);
        result.expect("both are found");
        assert!(rows.iter().all(DeviceRow::found));
        assert!(rows.iter().all(|row| (row.ops, row.hits, row.elapsed_ms) == (42, 3, 500)), "{rows:?}");
        assert_eq!(testing.context.evidence().snapshot().count("found"), 2);
        assert!(
            rows[0].to_string().ends_with("found: something, after 42 operations, 3 hits, 500 ms"),
            "{}",
            rows[0]
        );
    }

    #[test]
    fn what_goes_wrong_before_the_bug_strikes_is_not_the_bug() {
        for unrelated in [ends(Verdict::Fail, 2), ends(Verdict::Hang, 3)] {
            let (why, found) = rejected(false, &[ends(Verdict::Fail, 2), Ending { hits: 0, ..unrelated }]);
            assert!(why.contains("before the bug struck, so that nothing is known of lost-overwrite"), "{why}");
            assert_eq!(found, 1);
        }
    }

    #[test]
    fn a_bug_is_found_within_a_minute_of_the_first_operation() {
        for found in [ends(Verdict::Fail, 2), ends(Verdict::Hang, 3)] {
            tried(&[Ending { elapsed_ms: 60_000, ..found }]).0.expect("just in time");
            let (why, found) = rejected(false, &[Ending { elapsed_ms: 60_001, ..found }, ends(Verdict::Fail, 2)]);
            assert!(why.contains("later than 60 s after the first operation: lost-write"), "{why}");
            assert_eq!(found, 1);
        }
    }

    #[test]
    fn a_control_has_to_be_odd_and_to_pass() {
        let passes = Ending { elapsed_ms: 90_000, ..ends(Verdict::Pass, 0) };
        tried_as(true, &[passes, passes]).0.expect("nothing was wrong");
        let (why, _) = rejected(true, &[passes, Ending { hits: 0, ..passes }]);
        assert!(why.contains("never odd, so that nothing is known of unflushed-lost"), "{why}");
        for flagged in [ends(Verdict::Fail, 2), ends(Verdict::Hang, 3), Ending { hits: 0, ..ends(Verdict::Fail, 2) }]
        {
            let (why, _) = rejected(true, &[flagged, passes]);
            assert!(why.contains("taken for bugs, and they are none: errored-write"), "{why}");
        }
    }

    #[test]
    fn a_run_that_did_too_little_says_nothing() {
        for control in [false, true] {
            let (why, _) = rejected(control, &[ends(Verdict::Vacuous, 5)]);
            assert!(why.contains("too little was done to say anything of"), "{why}");
        }
    }

    #[test]
    fn every_reason_is_told() {
        let struck_by_nobody = Ending { hits: 0, elapsed_ms: 60_001, ..ends(Verdict::Fail, 2) };
        let (why, found) = rejected(false, &[struck_by_nobody, ends(Verdict::Pass, 0)]);
        assert!(why.contains("3 things are wrong"), "{why}");
        assert_eq!(found, 0);
    }

    #[test]
    fn a_run_that_had_to_be_ended_has_found_nothing_and_the_others_are_run() {
        for bad in [ends(Verdict::Hang, None), ends(Verdict::Hang, 5), ends(Verdict::Fail, 70)] {
            let (result, rows, _testing) = tried(&[bad, ends(Verdict::Fail, 2)]);
            assert_eq!(result.expect_err("not as it should be").verdict(), Some(Verdict::Internal), "{bad:?}");
            assert_eq!(rows.iter().map(DeviceRow::found).collect::<Vec<_>>(), [false, true], "{bad:?}");
        }
    }

    #[test]
    fn what_survives_is_a_failure() {
        let (result, _, testing) = tried(&[ends(Verdict::Pass, 0), ends(Verdict::Internal, 70)]);
        assert_eq!(result.expect_err("nobody finds it").verdict(), Some(Verdict::Fail));
        assert_eq!(testing.context.evidence().snapshot().count("tried"), 2);
    }
}
