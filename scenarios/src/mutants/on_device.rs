//! Each mutant in a server of a real device: this program is started once for each, as `torture`.

use std::time::{Duration, Instant};

use ublkit_harness::event::{DeviceRow, Event, VerdictLine};
use ublkit_harness::mutant::OnDevice;
use ublkit_harness::{Mutant, Verdict};

use crate::context::Context;
use crate::parts::{AFTERMATH, Child, End, Followed, WIND_DOWN};
use crate::scenario::Failure;
use crate::torture::mutants::arguments;

/// How long a mutant is tortured unless it is found, or another time is given.
const DURATION: Duration = Duration::from_secs(60);
/// How long a run may take to start, to wind down, to notice a hang and to say so.
const AROUND: Duration = Duration::from_secs(300);

pub(super) fn run(mutants: &[Mutant], context: &mut Context) -> Result<(), Failure> {
    context.evidence().require("tried", mutants.iter().filter(|mutant| can_be(**mutant).is_ok()).count() as u64);
    let mut rows = Vec::new();
    let mut outcome = Ok(());
    for &mutant in mutants {
        let row = match can_be(mutant) {
            Err(why) => Ok(row_of(mutant, None, why)),
            Ok(()) => try_one(mutant, context),
        };
        match row {
            Ok(row) => {
                context.sink().send(Event::DeviceRow(Box::new(row.clone())));
                rows.push(row);
            }
            Err(failure) => {
                outcome = Err(failure);
                break;
            }
        }
    }
    count(&rows, context);
    context.note(summary(&rows));
    super::save(&rows, context.report_dir())?;
    outcome?;
    judge(&rows)
}

fn can_be(mutant: Mutant) -> Result<(), &'static str> {
    match mutant.spec().device {
        OnDevice::Yes => Ok(()),
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
        ("found", of(|row| row.found() && !row.control)),
        ("flagged", of(|row| row.found() && row.control)),
    ] {
        context.evidence().add(name, count);
    }
}

fn summary(rows: &[DeviceRow]) -> String {
    let tried = |control: bool| rows.iter().filter(move |row| row.control == control && row.verdict.is_some());
    format!(
        "{} of {} mutants found, {} of {} controls flagged, {} cannot be on a device",
        tried(false).filter(|row| row.found()).count(),
        tried(false).count(),
        tried(true).filter(|row| row.found()).count(),
        tried(true).count(),
        rows.iter().filter(|row| row.verdict.is_none()).count(),
    )
}

fn judge(rows: &[DeviceRow]) -> Result<(), Failure> {
    let named = |is: fn(&DeviceRow) -> bool| {
        rows.iter().filter(|row| is(row)).map(|row| row.mutant.as_str()).collect::<Vec<_>>().join(", ")
    };
    let mut wrong = Vec::new();
    for (what, names) in [
        ("nobody finds", named(|row| !row.control && row.verdict == Some(Verdict::Pass))),
        ("taken for bugs, and they are none:", named(|row| row.control && row.found())),
        ("too little was done to say anything of", named(|row| row.verdict == Some(Verdict::Vacuous))),
    ] {
        if !names.is_empty() {
            wrong.push(format!("{what} {names}"));
        }
    }
    super::broke(wrong)
}

fn try_one(mutant: Mutant, context: &mut Context) -> Result<DeviceRow, Failure> {
    let duration = context.duration().unwrap_or(DURATION);
    let ours = duration + AROUND + WIND_DOWN + AFTERMATH;
    context.step(mutant.name(), ours, |context| {
        let mut words = vec!["torture".to_owned()];
        words.extend(arguments(mutant.into()));
        let seed = context.seed().derive(mutant.name(), 0).get() >> 11;
        words.extend(["--seed".to_owned(), seed.to_string()]);
        words.extend(["--duration".to_owned(), format!("{}ms", duration.as_millis())]);
        words.extend(context.ops().iter().flat_map(|ops| ["--ops".to_owned(), ops.to_string()]));
        words.push("--json".to_owned());
        let child = Child::start(&words)?;
        let mut row = row_of(mutant, None, "nothing was wrong");
        row.repro = format!("ublk-torture {}", words[..words.len() - 1].join(" "));
        let followed = follow(&child, &mut row, Instant::now() + duration + AROUND, context);
        // It is waited for whatever came of it: no device is left behind.
        let End { status, stderr, .. } = child.end()?;
        match (followed?, status) {
            (Followed::Verdict(verdict), Some(_)) => conclude(row, &verdict, &stderr),
            // A hang is to be seen and told by the run itself.
            (_, None) | (Followed::Late(_), _) => Err(Failure::Hang(format!("{} had to be ended", row.repro))),
            (Followed::Mute, Some(status)) => {
                Err(Failure::Internal(format!("{} ended without a verdict, with {status}: {stderr}", row.repro)))
            }
        }
    })
}

/// Follows the events of a run until its end, and keeps what they say in the row.
fn follow(child: &Child, row: &mut DeviceRow, deadline: Instant, context: &mut Context) -> Result<Followed, Failure> {
    let mut began = Instant::now();
    let mut wrong = false;
    let interruption = context.interruption().clone();
    let followed = child.follow(deadline, &interruption, &mut |event| {
        let what = match event {
            Event::StepStarted(step) if step.name == "torture" => {
                began = Instant::now();
                return;
            }
            Event::Progress(progress) => {
                row.ops = progress.ops;
                return;
            }
            Event::Mismatch(mismatch) => mismatch.class.to_string(),
            Event::Finding(finding) => format!("{}: {}", finding.oracle, finding.what),
            Event::Hang(hang) => format!("{} did not end", hang.what),
            _ => return,
        };
        if !wrong {
            wrong = true;
            row.elapsed_ms = began.elapsed().as_millis() as u64;
            context.detail(&what);
            row.what = what;
        }
    });
    if !wrong {
        row.elapsed_ms = began.elapsed().as_millis() as u64;
    }
    followed
}

/// The row of a run that ended with a verdict.
fn conclude(mut row: DeviceRow, line: &VerdictLine, stderr: &str) -> Result<DeviceRow, Failure> {
    match line.verdict {
        Verdict::Environment => return Err(Failure::Environment(format!("{}: {stderr}", row.repro))),
        Verdict::Internal => return Err(Failure::Internal(format!("{}: {stderr}", row.repro))),
        _ => {}
    }
    let counted = |name: &str| line.evidence.get(name).copied();
    row.verdict = Some(line.verdict);
    row.hits = counted("mutant_hits").unwrap_or(0);
    row.ops = counted("ops").unwrap_or(row.ops);
    Ok(row)
}
