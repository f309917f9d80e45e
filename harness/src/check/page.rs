//! The page that a failing test prints: which promise was broken, in which few steps, and how to see it again.

use std::fmt::Write;

use super::Found;
use super::found::Smallest;
use crate::bundle::Failure;
use crate::classify::{Class, Content};
use crate::event::Event;
use crate::fault::Rule;
use crate::mismatch::Mismatch;
use crate::oracle::Oracle;
use crate::plan::OpKind;
use crate::script::{Act, Script};
use crate::sector::{Generation, SECTOR};
use crate::shrink::Rate;

/// How many steps, calls or notes are listed at most.
const LINES: usize = 24;

pub(super) fn page(found: &Found) -> String {
    let script = found.script();
    let mut page = format!("a promise is broken: {}\n", promise(&found.failure, script));
    section(&mut page, "", &what(&found.failure, script));
    if let Some(smallest) = &found.smallest {
        section(&mut page, &title(smallest), &steps(&found.failure, &smallest.script));
        section(&mut page, "", &[seldom(smallest.rate, "runs in other orders")]);
    }
    if let Some(race) = &found.race {
        section(&mut page, "The simplest race that fails", &[race.field.to_string(), seldom(race.rate, "races")]);
        let title = "The last calls on that sector, the oldest first (thread # its call)";
        section(&mut page, title, &last(&race.calls));
        if race.torn {
            let hint = "If reads may see half of a write that is under way, as through the page cache, say `.torn_by_races()`.";
            section(&mut page, "", &[hint.to_owned()]);
        }
    }
    section(&mut page, "What the backend said", &found.remarks.backend);
    section(&mut page, "Calls to its medium that were made to fail, the last of them", &found.remarks.medium);
    if !found.remarks.medium.is_empty() {
        let hint = "Because of that an operation may fail. One that is acknowledged has to be right all the same.";
        section(&mut page, "", &[hint.to_owned()]);
    }
    if let Some(script) = script {
        let faults = faults(script).into_iter();
        let setup = script.setup.to_string();
        let lines: Vec<String> = wrapped(&setup).into_iter().chain(faults).collect();
        section(&mut page, "The device, and how it is driven", &lines);
    }
    let seed = found.seed;
    let again =
        [format!("put `.seed({seed})` into the test in place of `.seeds(…)`, or set UBLKIT_CHECK_SEED={seed}")];
    section(&mut page, "To see it again", &again);
    page
}

/// What is made to happen besides operations.
fn faults(script: &Script) -> Vec<String> {
    let line = |rule: &Rule| {
        let whose = if rule.effect.is_timing() { "" } else { "in calls to the medium: " };
        format!("fault: {whose}{rule}")
    };
    match &script.faults.rules[..] {
        [] => vec![format!("fault: {}", script.faults)],
        rules => rules.iter().map(line).collect(),
    }
}

/// A title with lines below it; nothing when there are none.
fn section(page: &mut String, title: &str, lines: &[String]) {
    if lines.is_empty() {
        return;
    }
    page.push('\n');
    if !title.is_empty() {
        let _infallible = writeln!(page, "{title}:");
    }
    for line in lines.iter().flat_map(|lines| lines.lines()) {
        let _infallible = writeln!(page, "  {line}");
    }
}

/// What was promised.
fn promise(failure: &Failure, script: Option<&Script>) -> &'static str {
    let did = |act: Act| script.is_some_and(|script| script.actions.iter().any(|action| action.act == act));
    let volatile = script.is_some_and(|script| script.setup.volatile_cache);
    let Event::Mismatch(mismatch) = &failure.event else {
        return match failure.oracle {
            Oracle::Errors => "nothing fails that was not made to fail",
            Oracle::Flush => "a flush that is acknowledged reaches the storage",
            Oracle::Watchdog => "everything that is begun ends",
            _ => "the device opens, as what it is",
        };
    };
    match (failure.oracle, &mismatch.class) {
        (Oracle::Durable, _) if volatile => "what was flushed is there after a power cut, and nothing comes back",
        (Oracle::Durable, _) => {
            "without a volatile cache, what was acknowledged is there after a power cut, and nothing comes back"
        }
        (_, Class::Lost { .. } | Class::Stale { .. } | Class::Zero) if did(Act::Kill) || did(Act::Reopen) => {
            "what was acknowledged is there when the device is opened again"
        }
        (_, Class::Torn { .. }) => "a logical block is never half old and half new",
        (_, Class::Misdirected { .. } | Class::Shifted { .. }) => {
            "a sector holds what was written to it, and not to another"
        }
        (Oracle::CrossDevice, _) => "a device shows what was written to it, and not to another",
        (_, Class::Lost { .. } | Class::Stale { .. }) => "a read returns what was written last",
        _ if mismatch.expected.allowed == [Content::Zero] => "what was zeroed, or never written, reads as zeroes",
        _ => "a read returns what was written",
    }
}

/// What was expected, and what was found.
fn what(failure: &Failure, script: Option<&Script>) -> Vec<String> {
    match &failure.event {
        Event::Mismatch(mismatch) => mismatched(mismatch, script),
        Event::Finding(finding) => {
            let mut lines = vec![finding.what.clone()];
            lines.extend(finding.detail.iter().take(LINES).cloned());
            lines
        }
        Event::Hang(hang) => {
            let mut lines = vec![format!("this does not end: {}", hang.what)];
            lines.extend(hang.notes.iter().take(LINES).cloned());
            lines
        }
        _ => vec!["it failed".to_owned()],
    }
}

fn mismatched(mismatch: &Mismatch, script: Option<&Script>) -> Vec<String> {
    let Mismatch { sector, class, expected, .. } = mismatch;
    let wrote = |content: &Content, sector: u64| match content {
        Content::Zero => "zeroes".to_owned(),
        Content::Unknown => "anything".to_owned(),
        Content::Written(generation) => written(script, sector, *generation),
    };
    let allowed: Vec<String> = expected.allowed.iter().map(|content| wrote(content, *sector)).collect();
    let holds = match class {
        Class::Lost { found } => format!("{}: the last change left no trace", wrote(found, *sector)),
        Class::Stale { generation } => format!("{}, which is older", wrote(&Content::Written(*generation), *sector)),
        Class::Zero => "zeroes".to_owned(),
        Class::Misdirected { from, generation } => {
            format!("what belongs to sector {from}: {}", written(script, *from, *generation))
        }
        other => other.to_string(),
    };
    let byte = sector * SECTOR as u64;
    let mut lines = vec![
        format!("sector {sector}, which is byte {byte} of the device"),
        format!("should hold  {}", allowed.join(", or ")),
        format!("holds        {holds}"),
    ];
    let wrong = mismatch.wrong_sectors.values().sum::<u64>();
    if wrong > 1 {
        lines.push(format!("and so do other sectors of {}: at least {wrong} are wrong", mismatch.range));
    }
    lines
}

/// What a write left, by the step that it is in.
fn written(script: Option<&Script>, sector: u64, generation: Generation) -> String {
    let block = script.map_or(1, |script| script.setup.block_sectors()).max(1);
    let writes = |act: Act| match act {
        Act::Op { kind: OpKind::Write | OpKind::WriteFua, range } => {
            range.first / block <= sector / block && sector / block < range.end().div_ceil(block)
        }
        _ => false,
    };
    let steps = script.into_iter().flat_map(|script| (1..).zip(&script.actions));
    let step = steps.filter(|(_, action)| writes(action.act)).nth((generation as usize).wrapping_sub(1));
    match step {
        Some((number, _)) => format!("what step {number} wrote"),
        None => format!("what write {generation} to that sector wrote"),
    }
}

fn title(smallest: &Smallest) -> String {
    let Smallest { script, of, again, .. } = smallest;
    let ops = script.actions.iter().filter(|action| matches!(action.act, Act::Op { .. })).count();
    if !again {
        return format!(
            "What was done, of {of} operations (it did not fail again: does the backend do the same twice?)"
        );
    }
    let s = if ops == 1 { "" } else { "s" };
    format!("The smallest case, {ops} operation{s} of {of} (sectors: first+count)")
}

/// The steps, numbered, with the one that shows what is wrong.
fn steps(failure: &Failure, script: &Script) -> Vec<String> {
    let reader = match &failure.event {
        Event::Mismatch(mismatch) => mismatch.op.map(|op| (mismatch.worker, op)),
        _ => None,
    };
    let mut counts: Vec<u64> = vec![0; script.setup.workers as usize];
    // Whoever sweeps comes after the workers.
    let swept = reader.is_some_and(|(worker, _)| worker >= script.setup.workers);
    let last_sweep = script.actions.iter().rposition(|action| action.act == Act::Sweep).filter(|_| swept);
    let mut lines = Vec::new();
    for (number, action) in (1..).zip(&script.actions) {
        let mut line = format!("{number:>2}. {action}");
        if let (Act::Op { .. }, Some(count)) = (action.act, counts.get_mut(action.worker as usize)) {
            if reader == Some((action.worker, *count)) {
                line += "  <- shows it";
            }
            *count += 1;
        }
        if last_sweep.is_some_and(|at| at + 1 == number) {
            line += "  <- shows it";
        }
        lines.push(line);
    }
    last(&lines)
}

/// The last lines, and a word on the others.
fn last(lines: &[String]) -> Vec<String> {
    let skipped = lines.len().saturating_sub(LINES);
    let head = (skipped > 0).then(|| format!("… {skipped} before"));
    head.into_iter().chain(lines[skipped..].iter().cloned()).collect()
}

fn seldom(rate: Rate, of: &str) -> String {
    match rate {
        Rate { of: 0, .. } => "how often it fails is not known: there was no more time".to_owned(),
        Rate { failed, of: runs } => format!("fails in {failed} of {runs} {of}"),
    }
}

/// Lines of whole words.
fn wrapped(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.len() + word.len() < 100 => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}
