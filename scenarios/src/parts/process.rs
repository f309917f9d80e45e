//! Parts as processes.

use std::fmt::Display;
use std::fs;
use std::path::Path;
use std::process::ExitStatus;
use std::time::Instant;

use ublkit_harness::Verdict;
use ublkit_harness::event::{Event, Part, Progress};
use ublkit_harness::kernel_log::{Complaint, complaints};

use super::{Child, End, Followed, Launch, Order};
use crate::context::Context;
use crate::kernel_log::KernelLog;
use crate::runs::StateDir;
use crate::scenario::Failure;
use crate::suite::telling;

/// Starts a process for each part.
#[derive(Debug, Default)]
pub(crate) struct Processes;

impl Launch for Processes {
    fn launch(&mut self, order: &Order, context: &mut Context) -> Result<Part, Failure> {
        let mut log = KernelLog::from_here().ok();
        let began = Instant::now();
        let child = Child::start(&words(order)?)?;
        let mut part = Part {
            name: order.name.clone(),
            verdict: Verdict::Internal,
            exit_code: None,
            elapsed_ms: 0,
            what: String::new(),
            evidence: std::collections::BTreeMap::new(),
            gates: Vec::new(),
            steps: Vec::new(),
            report: order.report.as_ref().map(|dir| dir.display().to_string()),
            repro: order.repro(),
        };
        let mut wrong = None;
        let mut ops = 0;
        let (sink, interruption) = (context.sink().clone(), context.interruption().clone());
        let followed = child.follow(began + order.deadline, &interruption, &mut |event| {
            if let Event::Progress(progress) = event {
                ops = progress.ops;
                sink.send(Event::Progress(Progress { what: order.name.clone(), ..progress }));
            } else if let Some(what) = keep(&mut part, event) {
                wrong.get_or_insert(what);
            }
        });
        // It is waited for whatever came of it.
        let end = child.end()?;
        part.elapsed_ms = began.elapsed().as_millis() as u64;
        part.exit_code = end.status.and_then(|status| status.code());
        let late = match followed? {
            Followed::Verdict(line) => {
                part.verdict = line.verdict;
                part.evidence = line.evidence;
                part.repro = line.repro;
                if let Some(contradiction) = end.status.and_then(|status| contradicts(line.verdict, status)) {
                    part.verdict = worse(part.verdict, Verdict::Internal);
                    let also = format!("{contradiction}: {}", end.stderr);
                    wrong =
                        Some(wrong.map_or_else(String::new, |wrong| first_line(&wrong).to_owned() + "; ") + &also);
                }
                Vec::new()
            }
            Followed::Mute => {
                let status = end.status.map_or_else(|| "a kill".to_owned(), |status| status.to_string());
                wrong.get_or_insert(format!("ended without a verdict, with {status}: {}", end.stderr));
                Vec::new()
            }
            Followed::Late(threads) => {
                part.verdict = Verdict::Hang;
                wrong = Some(format!("was not over after {} s and was ended", order.deadline.as_secs()));
                threads
            }
        };
        if part.verdict == Verdict::Hang {
            // Who hangs has not added up what was done.
            let told = part.evidence.entry("ops".to_owned()).or_default();
            *told = ops.max(*told);
        }
        if end.status.is_none() {
            part.verdict = worse(part.verdict, Verdict::Hang);
            wrong.get_or_insert("did not end after its verdict, and was killed".to_owned());
            for remark in StateDir::default().clean_gone_runs() {
                context.note(remark);
            }
        }
        let said = log.as_mut().map(KernelLog::read).unwrap_or_default();
        // The run itself says what it thinks of I/O errors.
        if let Some(Complaint { what: alarm, .. }) = complaints(&said, false).first() {
            part.verdict = worse(part.verdict, Verdict::Fail);
            let said = wrong.map_or_else(String::new, |wrong| first_line(&wrong).to_owned() + "; ");
            wrong = Some(said + "the kernel complained: " + alarm);
        }
        part.what = match (part.verdict, wrong) {
            (Verdict::Pass, _) => telling(&part.evidence),
            (_, Some(wrong)) => wrong,
            // The last note says what is lacking.
            (_, None) => part.what,
        };
        // Its report has the rest.
        part.what.truncate(part.what.find('\n').unwrap_or(part.what.len()));
        if part.verdict != Verdict::Pass
            && let Some(dir) = &order.report
        {
            let mut said: Vec<_> = said.iter().map(ToString::to_string).collect();
            // The last line ends too.
            said.push(String::new());
            let said = said.join("\n");
            keep_failure(dir, &part, &end, &late, &said)?;
        }
        if end.stuck.is_empty() {
            return Ok(part);
        }
        // Whatever came next would only wait for the same.
        context.sink().send(Event::Part(Box::new(part)));
        let threads = end.stuck.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n  ");
        Err(Failure::Hang(format!("{}: stuck in the kernel, SIGKILL does not end it:\n  {threads}", order.name)))
    }
}

fn words(order: &Order) -> Result<Vec<String>, Failure> {
    let mut words = order.words.clone();
    words.push("--json".to_owned());
    if let Some(dir) = &order.report {
        // One from an earlier run is not about this one.
        match fs::remove_dir_all(dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(cannot_write(dir, &error)),
            _ => {}
        }
        words.extend(["--report".to_owned(), dir.display().to_string()]);
    }
    Ok(words)
}

fn cannot_write(path: &Path, error: &dyn Display) -> Failure {
    Failure::Environment(format!("cannot write {}: {error}; is there room?", path.display()))
}

/// Keeps what an event says of a part. Returns what was wrong, if that is what it says.
fn keep(part: &mut Part, event: Event) -> Option<String> {
    match event {
        Event::StepFinished(step) => {
            let wrong = (!step.ok).then(|| format!("{}: {}", step.name, step.detail));
            part.steps.push(step);
            wrong
        }
        Event::Note(note) => {
            part.gates.extend(note.text.strip_prefix(crate::context::LEFT_OUT).map(str::to_owned));
            // What an environment lacks, and why too little was done, is said in a note; the last one counts.
            part.what = note.text;
            None
        }
        Event::Mismatch(mismatch) => Some(mismatch.to_string()),
        Event::Finding(finding) => Some(format!("{}: {}", finding.oracle, finding.what)),
        Event::Hang(hang) => Some(format!("{} did not end within {} ms", hang.what, hang.deadline_ms)),
        _ => None,
    }
}

/// What is wrong with an exit status that is not that of the verdict: it fell apart after it.
fn contradicts(verdict: Verdict, status: ExitStatus) -> Option<String> {
    let same = status.code() == Some(verdict.exit_code().into());
    (!same).then(|| format!("ended with {status} after the verdict {verdict}"))
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

fn worse(one: Verdict, other: Verdict) -> Verdict {
    if super::severity(one) >= super::severity(other) { one } else { other }
}

/// What is known of a failure beside the run's own report, in the directory of that report.
fn keep_failure(
    dir: &Path,
    part: &Part,
    end: &End,
    late: &[ublkit_harness::threads::ThreadDump],
    kernel_log: &str,
) -> Result<(), Failure> {
    fs::create_dir_all(dir).map_err(|error| cannot_write(dir, &error))?;
    let stacks: Vec<_> = late.iter().chain(&end.stuck).map(ToString::to_string).collect();
    for (name, content) in [
        ("repro", format!("{}\n", part.repro)),
        ("stderr.txt", end.stderr.clone()),
        ("kernel.log", kernel_log.to_owned()),
        ("stacks.txt", stacks.join("\n")),
    ] {
        if !content.is_empty() {
            let path = dir.join(name);
            fs::write(&path, content).map_err(|error| cannot_write(&path, &error))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn an_exit_status_has_to_be_that_of_the_verdict() {
        let code = |code: i32| ExitStatus::from_raw(code << 8);
        for verdict in [Verdict::Pass, Verdict::Fail, Verdict::Hang, Verdict::Environment, Verdict::Vacuous] {
            assert_eq!(contradicts(verdict, code(verdict.exit_code().into())), None);
        }
        for (verdict, status) in [
            (Verdict::Pass, code(70)),
            (Verdict::Pass, code(4)),
            (Verdict::Pass, ExitStatus::from_raw(nix::libc::SIGSEGV)),
            (Verdict::Fail, code(0)),
        ] {
            let told = contradicts(verdict, status).expect("a contradiction");
            assert!(told.contains(&status.to_string()) && told.contains(verdict.as_str()), "{told}");
        }
    }
}
