//! A run as a JUnit report: a test case for each step, and a suite for each part.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};
use ublkit_harness::event::{Part, StepFinished, VerdictLine};
use ublkit_harness::{Event, Reporter, Verdict};

/// The name of the case that has the verdict.
const VERDICT: &str = "verdict";

/// Writes the report when the verdict is there.
#[derive(Debug)]
pub(crate) struct JUnit {
    path: PathBuf,
    steps: Vec<StepFinished>,
    /// What else was wrong, one line each: a step's own line has only the first.
    wrong: Vec<String>,
    parts: Vec<TestSuite>,
}

impl JUnit {
    /// Writes to `path`. A report that is there is removed, for it is not about this run; what is no file (a device, a pipe, a
    /// link) stays.
    pub(crate) fn new(path: PathBuf) -> io::Result<Self> {
        if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
            fs::create_dir_all(dir)?;
        }
        // Whether it can be written is better known before the run than after it.
        OpenOptions::new().write(true).create(true).truncate(true).open(&path)?;
        if fs::symlink_metadata(&path)?.is_file() {
            fs::remove_file(&path)?;
        }
        Ok(Self { path, steps: Vec::new(), wrong: Vec::new(), parts: Vec::new() })
    }

    fn write(&mut self, line: &VerdictLine) -> io::Result<()> {
        let mut report = Report::new(format!("ublk-torture {}", line.scenario));
        let mut suite = suite(&line.scenario, &self.steps);
        let wrong = std::mem::take(&mut self.wrong).join("\n");
        suite.add_test_case(verdict_case(&line.scenario, line.verdict, &wrong, &line.repro));
        report.add_test_suite(suite);
        report.add_test_suites(std::mem::take(&mut self.parts));
        let text = report.to_string().map_err(io::Error::other)?;
        fs::write(&self.path, text)
    }
}

impl Reporter for JUnit {
    fn report(&mut self, event: &Event) -> io::Result<()> {
        match event {
            Event::StepFinished(step) => self.steps.push(step.clone()),
            Event::Mismatch(mismatch) => self.wrong.push(mismatch.to_string()),
            Event::Finding(finding) => {
                self.wrong.push(format!("{}: {}", finding.oracle, finding.what));
                self.wrong.extend(finding.detail.iter().cloned());
            }
            Event::Hang(hang) => {
                self.wrong.push(format!("{} did not end within {} ms", hang.what, hang.deadline_ms));
                self.wrong.extend(hang.threads.iter().map(ToString::to_string));
            }
            Event::Part(part) => self.parts.push(part_suite(part)),
            Event::Verdict(line) => return self.write(line),
            _ => {}
        }
        Ok(())
    }
}

fn part_suite(part: &Part) -> TestSuite {
    let mut all = suite(&part.name, &part.steps);
    let wrong = if part.verdict == Verdict::Pass { "" } else { &part.what };
    all.add_test_case(verdict_case(&part.name, part.verdict, wrong, &part.repro));
    for gate in &part.gates {
        let mut status = TestCaseStatus::skipped();
        status.set_message(gate.as_str());
        let what = gate.split(": ").next().unwrap_or(gate);
        let mut case = TestCase::new(what, status);
        case.set_classname(part.name.as_str());
        all.add_test_case(case);
    }
    all.set_time(Duration::from_millis(part.elapsed_ms));
    all
}

fn suite(name: &str, steps: &[StepFinished]) -> TestSuite {
    let mut suite = TestSuite::new(name);
    let mut took = 0;
    for step in steps {
        let status = if step.ok {
            TestCaseStatus::success()
        } else {
            let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
            status.set_message(step.detail.as_str());
            status
        };
        let mut case = TestCase::new(step.name.as_str(), status);
        case.set_classname(name).set_time(Duration::from_millis(step.elapsed_ms));
        if step.ok && !step.detail.is_empty() {
            case.set_system_out(step.detail.as_str());
        }
        took += step.elapsed_ms;
        suite.add_test_case(case);
    }
    suite.set_time(Duration::from_millis(took));
    suite
}

fn verdict_case(name: &str, verdict: Verdict, wrong: &str, repro: &str) -> TestCase {
    let status = match verdict {
        Verdict::Pass => TestCaseStatus::success(),
        verdict => {
            // Only a broken promise and a hang are failures of what is tested.
            let is_failure = matches!(verdict, Verdict::Fail | Verdict::Hang);
            let kind = if is_failure { NonSuccessKind::Failure } else { NonSuccessKind::Error };
            let mut status = TestCaseStatus::non_success(kind);
            status.set_message(verdict.as_str()).set_description(format!("{wrong}\nto see it again: {repro}"));
            status
        }
    };
    let mut case = TestCase::new(VERDICT, status);
    case.set_classname(name);
    case
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ublkit_harness::Seed;
    use ublkit_harness::event::{Finding, Part};

    use super::*;

    fn step(name: &str, ok: bool, detail: &str) -> StepFinished {
        StepFinished { name: name.into(), ok, detail: detail.into(), elapsed_ms: 1500, deadline_ms: 2000 }
    }

    fn written(events: Vec<Event>, verdict: Verdict) -> String {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("deep/junit.xml");
        let mut junit = JUnit::new(path.clone()).expect("it can be written");
        assert!(!path.exists(), "nothing is there before the verdict");
        let line = Event::Verdict(VerdictLine {
            scenario: "probe".into(),
            seed: Seed::new(7),
            verdict,
            evidence: BTreeMap::new(),
            repro: "ublk-torture probe --seed 7".into(),
        });
        for event in events.into_iter().chain([line]) {
            junit.report(&event).expect("report");
        }
        std::fs::read_to_string(path).expect("a report")
    }

    fn part(verdict: Verdict) -> Event {
        Event::Part(Box::new(Part {
            name: "torture".into(),
            verdict,
            exit_code: Some(0),
            elapsed_ms: 3000,
            what: "what was \"wrong\"".into(),
            evidence: BTreeMap::new(),
            gates: vec!["killing it in DEL: some-bug: it hangs (fixed: never)".into()],
            steps: vec![step("start", true, "")],
            report: None,
            repro: "ublk-torture torture".into(),
        }))
    }

    #[test]
    fn there_is_a_case_for_each_step_and_one_for_the_verdict() {
        let text = written(vec![Event::StepFinished(step("open", true, "42 of 42"))], Verdict::Pass);
        assert!(text.contains("tests=\"2\"") && text.contains("failures=\"0\""), "{text}");
        assert!(text.contains("name=\"open\" classname=\"probe\" time=\"1.500\""), "{text}");
        assert!(text.contains("42 of 42") && text.contains("name=\"verdict\""), "{text}");
    }

    #[test]
    fn what_is_no_file_is_written_to_and_stays() {
        let dir = tempfile::tempdir().expect("a directory");
        let link = dir.path().join("junit.xml");
        std::os::unix::fs::symlink("/dev/null", &link).expect("link");
        drop(JUnit::new(link.clone()).expect("it can be written"));
        assert!(link.is_symlink(), "/dev/null itself would be gone");
        let file = dir.path().join("old.xml");
        std::fs::write(&file, "of an earlier run").expect("write");
        drop(JUnit::new(file.clone()).expect("it can be written"));
        assert!(!file.exists());
    }

    #[test]
    fn whatever_the_text_holds_the_report_can_be_read_again() {
        let nasty = "<a> & \"b\" 'c' ]]> \u{0}\u{1b}[31mred\u{1b}[0m \u{8} \u{fffe} \t ende\u{301}";
        let events = vec![
            Event::StepFinished(step(nasty, false, nasty)),
            Event::Finding(Finding { oracle: "io".into(), what: nasty.into(), detail: vec![nasty.into()] }),
        ];
        let text = written(events, Verdict::Fail);
        let control = text.chars().find(|c| c.is_control() && !"\n\t\r".contains(*c));
        assert_eq!(control, None, "{text:?}");
        let report = Report::deserialize_from_str(&text).expect("well-formed");
        assert_eq!((report.tests, report.failures), (2, 2));
        assert!(text.contains("&lt;a&gt; &amp;"), "{text}");
    }

    #[test]
    fn each_part_is_a_suite_and_what_a_gate_leaves_out_is_skipped() {
        let text = written(vec![part(Verdict::Pass)], Verdict::Pass);
        let report = Report::deserialize_from_str(&text).expect("well-formed");
        assert_eq!(report.test_suites.len(), 2);
        assert_eq!((report.test_suites[1].tests, report.test_suites[1].skipped), (3, 1), "{text}");
        assert!(text.contains("some-bug"), "{text}");
    }

    #[test]
    fn a_lack_is_an_error_and_a_broken_promise_a_failure() {
        let text = written(vec![part(Verdict::Hang)], Verdict::Environment);
        let report = Report::deserialize_from_str(&text).expect("well-formed");
        assert_eq!((report.failures, report.errors), (1, 1), "{text}");
        assert!(text.contains("to see it again: ublk-torture torture"), "{text}");
    }
}
