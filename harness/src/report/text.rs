//! Events as lines for a human.

use std::fmt::Display;

use indicatif::HumanBytes;

use crate::event::{Event, Progress, Run, StepFinished, VerdictLine};
use crate::verdict::Verdict;

/// Writes events as text, in colour or not.
#[derive(Clone, Copy, Debug)]
pub(super) struct Text {
    pub(super) colour: bool,
}

#[derive(Clone, Copy)]
enum Colour {
    Red = 31,
    Green = 32,
    Yellow = 33,
}

impl Text {
    /// The lines for `event`, without the newline after the last; none for what is of no interest later.
    pub(super) fn lines(self, event: &Event) -> Option<String> {
        Some(match event {
            Event::Run(run) => opening(run),
            // Of a part there is a step.
            Event::StepStarted(_) | Event::Progress(_) | Event::Part(_) => return None,
            Event::StepFinished(step) => self.step(step),
            Event::Mismatch(mismatch) => format!("{} {mismatch}", self.paint(Colour::Red, "mismatch:")),
            Event::Finding(finding) => {
                let head = self.paint(Colour::Red, &format!("{}:", finding.oracle));
                finding.detail.iter().fold(format!("{head} {}", finding.what), |text, line| text + "\n  " + line)
            }
            Event::Hang(hang) => {
                let head = self.paint(Colour::Red, "hang:");
                let seconds = hang.deadline_ms as f64 / 1000.0;
                let head = format!("{head} {} did not end within {seconds:.1} s", hang.what);
                let threads = hang.threads.iter().map(|thread| format!("\n  {thread}"));
                threads
                    .chain(hang.notes.iter().map(|note| format!("\n  {note}")))
                    .fold(head, |text, line| text + &line)
            }
            Event::MatrixRow(row) => row.to_string(),
            Event::DeviceRow(row) => row.to_string(),
            Event::Note(note) => format!("{} {}", self.paint(Colour::Yellow, "note:"), note.text),
            Event::Verdict(verdict) => self.verdict(verdict),
        })
    }

    fn step(self, step: &StepFinished) -> String {
        let StepFinished { name, ok, detail, elapsed_ms, .. } = step;
        let mark = if *ok { self.paint(Colour::Green, "  ok  ") } else { self.paint(Colour::Red, "  FAIL") };
        let detail =
            if detail.is_empty() { String::new() } else { format!(": {}", detail.replace('\n', "\n        ")) };
        format!("{mark}  {name} ({elapsed_ms} ms){detail}")
    }

    fn verdict(self, line: &VerdictLine) -> String {
        let colour = match line.verdict {
            Verdict::Pass => Colour::Green,
            Verdict::Environment | Verdict::Vacuous => Colour::Yellow,
            Verdict::Fail | Verdict::Hang | Verdict::Internal => Colour::Red,
        };
        let mut text =
            format!("{}: {}, seed {}", self.paint(colour, line.verdict.as_str()), line.scenario, line.seed);
        text += &listed("\n  evidence: ", line.evidence.iter().map(|(name, count)| format!("{name} {count}")));
        text + "\n  repro: " + &line.repro
    }

    fn paint(self, colour: Colour, text: &str) -> String {
        if self.colour { format!("\x1b[1;{}m{text}\x1b[0m", colour as u8) } else { text.to_owned() }
    }
}

/// One line that says how far the work has come.
pub(super) fn progress(progress: &Progress) -> String {
    let Progress { what, ops, verified_bytes, ops_per_s, bytes_per_s, .. } = progress;
    let verified = HumanBytes(*verified_bytes);
    let speed = HumanBytes(*bytes_per_s as u64);
    let share = progress.fraction.map_or(String::new(), |fraction| format!(", {:.0} %", fraction * 100.0));
    format!("{what}: {ops} operations, {verified} verified, {ops_per_s:.0} op/s, {speed}/s{share}")
}

fn opening(run: &Run) -> String {
    let mut text = format!("{}: seed {}", run.scenario, run.seed);
    let kernel = [("kernel", &run.kernel)].into_iter().filter(|(_, kernel)| !kernel.is_empty());
    let about = kernel.chain(run.versions.iter().map(|(name, version)| (name.as_str(), version)));
    text += &listed("\n  on: ", about.map(|(name, version)| format!("{name} {version}")));
    text += &listed("\n  features: ", run.features.iter());
    text += &listed("\n  options: ", run.options.iter().map(|(name, value)| format!("{name}={value}")));
    text
}

/// `items` with commas between them after `head`; nothing when there are none.
fn listed<T: Display>(head: &str, items: impl Iterator<Item = T>) -> String {
    let items: Vec<String> = items.map(|item| item.to_string()).collect();
    if items.is_empty() { String::new() } else { format!("{head}{}", items.join(", ")) }
}
