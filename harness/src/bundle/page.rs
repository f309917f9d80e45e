//! The page that someone reads who was not there: what broke, the shortest way to see it, and then everything else.

use super::{Bundle, Failure};
use crate::event::Event;
use crate::mismatch::Mismatch;
use crate::plan::OpKind;
use crate::script::{Act, Script};
use crate::sector::SECTOR;

/// A line is no longer than this, where that can be helped.
const COLUMNS: usize = 110;

/// How many actions are listed at most.
const ACTIONS: usize = 24;

/// How many of the last operations on the sector are listed at most.
const HISTORY: usize = 8;

/// How many lines of the kernel's log, and of anything that a finding says, are shown at most.
const LINES: usize = 20;

pub(super) fn page(bundle: &Bundle) -> String {
    // What breaks in the smallest script is the easiest to follow.
    let (script, failure) = match &bundle.shrunk {
        Some(shrunk) => (&shrunk.script, &shrunk.failure),
        None => (&bundle.script, &bundle.failure),
    };
    let mut page = Page::default();
    page.line(&format!("{}: {}", bundle.scenario, headline(&failure.event)));
    page.line("");
    page.body(&summary(bundle, failure));
    let title = "Show it again (the script alone: ublk-torture replay DIRECTORY, the one that this page is in)";
    page.section(title, std::slice::from_ref(&bundle.repro));
    page.section(&actions_title(bundle), &actions(script, failure, bundle.shrunk.is_some()));
    if let Event::Mismatch(mismatch) = &failure.event {
        let history: Vec<String> = mismatch.history.iter().map(ToString::to_string).collect();
        let history = last(&history, HISTORY, "earlier ones");
        let title = "the oldest first (#: which operation of its worker)";
        page.section(&format!("What was done to sector {}, {title}", mismatch.sector), &history);
        let pattern = script.setup.pattern(script.seed, bundle.device);
        let title = format!("Words of sector {} that differ (8 bytes each, as they lie there)", mismatch.sector);
        page.section(&title, &super::dump::lines(mismatch, &pattern, script.setup.device().sectors));
    }
    page.section("Faults", &faults(script));
    page.section("Setup", &wrap(&format!("seed={} {}", script.seed, script.setup)));
    if bundle.shrunk.is_some() {
        page.section("The run that it was found in", &found_in(bundle));
    }
    page.section("Machine", &machine(bundle));
    let hung = match &failure.event {
        Event::Hang(hang) => hang.threads.as_slice(),
        _ => &[],
    };
    let threads = if bundle.threads.is_empty() { hung } else { &bundle.threads };
    let threads: Vec<String> = threads.iter().map(ToString::to_string).collect();
    page.section("Threads", &threads);
    page.section("Kernel log", &last(&bundle.kernel_log, LINES, "lines before, in kernel.log"));
    page.text
}

#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn line(&mut self, line: &str) {
        self.text += line;
        self.text.push('\n');
    }

    fn body(&mut self, lines: &[String]) {
        for line in lines.iter().flat_map(|lines| lines.lines()) {
            self.line(format!("  {line}").trim_end());
        }
    }

    /// A title with lines below it; nothing when there are none.
    fn section(&mut self, title: &str, lines: &[String]) {
        if !lines.is_empty() {
            self.line("");
            self.line(title);
            self.body(lines);
        }
    }
}

fn headline(event: &Event) -> String {
    match event {
        Event::Mismatch(mismatch) => mismatch.class.to_string(),
        Event::Finding(finding) => finding.what.clone(),
        Event::Hang(hang) => {
            format!("{} did not end within {:.1} s", hang.what, hang.deadline_ms as f64 / 1000.0)
        }
        Event::Note(note) => note.text.clone(),
        _ => "failed".to_owned(),
    }
}

/// Where, what should be there, what is there, and how often.
fn summary(bundle: &Bundle, failure: &Failure) -> Vec<String> {
    let mut lines = match &failure.event {
        Event::Mismatch(mismatch) => about_mismatch(mismatch),
        Event::Finding(finding) => first(&finding.detail, LINES),
        Event::Hang(hang) => first(&hang.notes, LINES),
        _ => Vec::new(),
    };
    lines.push(format!("oracle    {}", failure.oracle));
    if let Some(shrunk) = &bundle.shrunk {
        lines.push(format!("fails     with {} seeds", shrunk.rate));
    }
    lines
}

fn about_mismatch(mismatch: &Mismatch) -> Vec<String> {
    let Mismatch { worker, op, range, sector, class, expected, wrong_sectors, .. } = mismatch;
    let reader = match op {
        Some(op) => format!("worker {worker} (its #{op})"),
        None => "a sweep".to_owned(),
    };
    let mut lines = vec![
        format!("where     sector {sector} (byte {}), in sectors {range} read by {reader}", sector * SECTOR as u64),
        format!("expected  {expected}"),
        format!("found     {class}"),
    ];
    if wrong_sectors.values().sum::<u64>() > 1 {
        let counts: Vec<String> = wrong_sectors.iter().map(|(class, count)| format!("{count} {class}")).collect();
        lines.push(format!("in all    {} of {} sectors", counts.join(", "), range.sectors));
    }
    lines
}

fn actions_title(bundle: &Bundle) -> String {
    match &bundle.shrunk {
        Some(shrunk) => format!(
            "The smallest script that fails: {} of {} actions (shrunk.json; {} runs, {})",
            shrunk.script.actions.len(),
            bundle.script.actions.len(),
            shrunk.runs,
            shrunk.stop
        ),
        None => format!("The script: {} actions (script.json; not shrunk)", bundle.script.actions.len()),
    }
}

/// The actions, numbered; which operation of its worker each is; and which one finds the failure.
fn actions(script: &Script, failure: &Failure, from_start: bool) -> Vec<String> {
    let reader = match &failure.event {
        Event::Mismatch(mismatch) => mismatch.op.map(|op| (mismatch.worker, op)),
        _ => None,
    };
    let mut counts: Vec<u64> = vec![0; script.setup.workers as usize];
    let mut lines = Vec::with_capacity(script.actions.len());
    for (number, action) in (1..).zip(&script.actions) {
        let mut line = format!("{number:>3}. {action}");
        if let (Act::Op { kind, .. }, Some(count)) = (action.act, counts.get_mut(action.worker as usize)) {
            let finds = reader == Some((action.worker, *count)) && kind == OpKind::Read;
            line = format!("{line:<48} #{count}{}", if finds { "  <- finds it" } else { "" });
            *count += 1;
        }
        lines.push(line);
    }
    if lines.is_empty() {
        lines.push("none: it fails without any".to_owned());
    }
    if from_start && lines.len() > ACTIONS {
        let more = lines.len() - ACTIONS;
        lines.truncate(ACTIONS);
        lines.push(format!("     … and {more} more"));
    }
    last(&lines, ACTIONS + 1, "before")
}

fn faults(script: &Script) -> Vec<String> {
    let planted = script.mutant.map(|planted| format!("planted bug {planted}"));
    let rules = script.faults.to_string();
    let rules = rules.lines().filter(|rule| !rule.is_empty()).map(str::to_owned);
    let lines: Vec<String> = planted.into_iter().chain(rules).collect();
    if lines.is_empty() { vec!["none".to_owned()] } else { first(&lines, LINES) }
}

fn found_in(bundle: &Bundle) -> Vec<String> {
    let Failure { oracle, event, after_ops } = &bundle.failure;
    let mut lines = vec![format!("after {after_ops} operations: {} ({oracle})", headline(event))];
    lines.extend(wrap(&format!("seed={} {}", bundle.script.seed, bundle.script.setup)));
    lines
}

fn machine(bundle: &Bundle) -> Vec<String> {
    let kernel = (!bundle.kernel.is_empty()).then(|| format!("kernel {}", bundle.kernel));
    let versions = bundle.versions.iter().map(|(name, version)| format!("{name} {version}"));
    let all: Vec<String> = kernel.into_iter().chain(versions).collect();
    if all.is_empty() { Vec::new() } else { wrap(&all.join(", ")) }
}

/// The first `most` lines, and a word on the others.
fn first(lines: &[String], most: usize) -> Vec<String> {
    let mut shown: Vec<String> = lines.iter().take(most).cloned().collect();
    if lines.len() > most {
        shown.push(format!("… and {} more", lines.len() - most));
    }
    shown
}

/// The last `most` lines, and a word on the others.
fn last(lines: &[String], most: usize, others: &str) -> Vec<String> {
    let skipped = lines.len().saturating_sub(most);
    let head = (skipped > 0).then(|| format!("… {skipped} {others}"));
    head.into_iter().chain(lines[skipped..].iter().cloned()).collect()
}

/// Lines of whole words.
fn wrap(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.len() + 1 + word.len() <= COLUMNS => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}
