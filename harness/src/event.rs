//! What happens in a run, as one linear stream.
//!
//! Each event is one JSON object tagged `"event"`. The first is [`Event::Run`], the last [`Event::Verdict`]; everything
//! that shows a run to anyone is made from these and from nothing else.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::matrix::Row;
use crate::mismatch::Mismatch;
use crate::seed::Seed;
use crate::threads::ThreadDump;
use crate::verdict::Verdict;

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Event {
    /// The run begins: everything needed to have it again.
    Run(Run),
    /// A step begins.
    StepStarted(StepStarted),
    /// A step ended.
    StepFinished(StepFinished),
    /// How far the work has come.
    Progress(Progress),
    /// A sector holds what it may not hold.
    Mismatch(Box<Mismatch>),
    /// A promise other than the content of a sector was broken.
    Finding(Finding),
    /// Something did not end within its deadline.
    Hang(Hang),
    /// What became of one planted bug or control.
    MatrixRow(Box<Row>),
    /// The same for one that was planted in a server of a real device.
    DeviceRow(Box<DeviceRow>),
    /// A run that was a part of this one has ended.
    Part(Box<Part>),
    /// A remark for the reader.
    Note(Note),
    /// How the run ended.
    Verdict(VerdictLine),
}

/// The run begins.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// The scenario.
    pub scenario: String,
    /// The seed.
    pub seed: Seed,
    /// Every option, given or drawn, by name.
    pub options: BTreeMap<String, Value>,
    /// Versions of the programs and libraries that take part, by name.
    pub versions: BTreeMap<String, String>,
    /// The kernel's release.
    pub kernel: String,
    /// Features of the kernel and of the device that are in use.
    pub features: Vec<String>,
    /// What the machine is, by name.
    pub host: BTreeMap<String, String>,
}

/// A step begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepStarted {
    /// The step.
    pub name: String,
    /// How long it may take, in milliseconds.
    pub deadline_ms: u64,
}

/// A step ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepFinished {
    /// The step.
    pub name: String,
    /// Whether it held.
    pub ok: bool,
    /// What it saw, or why it failed.
    pub detail: String,
    /// How long it took, in milliseconds.
    pub elapsed_ms: u64,
    /// How long it might have taken, in milliseconds.
    pub deadline_ms: u64,
}

/// How far the work has come.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// What is being done.
    pub what: String,
    /// Operations completed so far.
    pub ops: u64,
    /// Bytes moved so far.
    pub bytes: u64,
    /// Bytes compared so far.
    pub verified_bytes: u64,
    /// Time since the work began, in milliseconds.
    pub elapsed_ms: u64,
    /// Operations per second since the previous progress.
    pub ops_per_s: f64,
    /// Bytes per second since the previous progress.
    pub bytes_per_s: f64,
    /// How much of the work is done, from 0 to 1, where that is known.
    pub fraction: Option<f64>,
}

/// A promise other than the content of a sector was broken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// The oracle that says so.
    pub oracle: String,
    /// What is wrong, in one line.
    pub what: String,
    /// What a reader needs to understand it, one line each.
    pub detail: Vec<String>,
}

/// Something did not end within its deadline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hang {
    /// What did not end.
    pub what: String,
    /// How long it might have taken, in milliseconds.
    pub deadline_ms: u64,
    /// Where each thread of the watched processes stood.
    pub threads: Vec<ThreadDump>,
    /// What the watched parts said of themselves, such as requests in flight.
    pub notes: Vec<String>,
}

/// What became of one planted bug or control on a real device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRow {
    /// Its name.
    pub mutant: String,
    /// Its number in the list of known bugs, its letter in that of oddities, or `+`.
    pub number: String,
    /// It is odd but right.
    pub control: bool,
    /// How its run ended; `None` where it cannot be planted.
    pub verdict: Option<Verdict>,
    /// What was wrong, or why it cannot be planted.
    pub what: String,
    /// How often it struck.
    pub hits: u64,
    /// How many operations were done.
    pub ops: u64,
    /// How long it took until something was wrong, or until the end, in milliseconds from the first operation.
    pub elapsed_ms: u64,
    /// The command that runs it again.
    pub repro: String,
}

impl DeviceRow {
    /// Whether something was found to be wrong.
    #[must_use]
    pub fn found(&self) -> bool {
        matches!(self.verdict, Some(Verdict::Fail | Verdict::Hang))
    }
}

/// One line: what it is, whether it was found, and when.
impl fmt::Display for DeviceRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mutant, number, control, verdict, what, hits, ops, elapsed_ms, .. } = self;
        write!(f, "{number:>3} {mutant:<22} ")?;
        let Some(verdict) = verdict else { return write!(f, "not on a device: {what}") };
        match (self.found(), control, verdict) {
            (true, false, _) => write!(f, "found: {what}, after {ops} operations, {hits} hits"),
            (true, true, _) => write!(f, "FLAGGED: {what}, after {ops} operations, odd {hits} times"),
            (false, true, Verdict::Pass) => write!(f, "passes: {ops} operations, odd {hits} times"),
            (false, false, Verdict::Pass) => write!(f, "SURVIVES {ops} operations, {hits} hits"),
            (false, ..) => write!(f, "{verdict}: {what}, {ops} operations"),
        }?;
        write!(f, ", {elapsed_ms} ms")
    }
}

/// A run of its own that was a part of this one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// What it is called: its scenario, and its number where that has several.
    pub name: String,
    /// How it ended.
    pub verdict: Verdict,
    /// The exit status of its process; `None` if a signal ended it, or nothing could.
    pub exit_code: Option<i32>,
    /// How long it took, in milliseconds.
    pub elapsed_ms: u64,
    /// What was wrong, in one line; or, of a pass, the most telling of what was done.
    pub what: String,
    /// What was done, by name.
    pub evidence: BTreeMap<String, u64>,
    /// What was left out because of bugs of this kernel, and which.
    pub gates: Vec<String>,
    /// Its steps, in the order in which they ended.
    pub steps: Vec<StepFinished>,
    /// Where its report is, if one was asked for.
    pub report: Option<String>,
    /// The command that runs it again.
    pub repro: String,
}

/// A remark for the reader.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// The remark.
    pub text: String,
}

/// How the run ended. As JSON it is the last line of a run, with exactly these fields in this order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerdictLine {
    /// The scenario.
    pub scenario: String,
    /// The seed.
    pub seed: Seed,
    /// The verdict.
    pub verdict: Verdict,
    /// What was done, by name.
    pub evidence: BTreeMap<String, u64>,
    /// The command that runs it again.
    pub repro: String,
}

impl Event {
    /// A remark.
    #[must_use]
    pub fn note(text: impl Into<String>) -> Self {
        Self::Note(Note { text: text.into() })
    }

    /// A broken promise, with no more to say than one line.
    #[must_use]
    pub fn finding(oracle: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Finding(Finding { oracle: oracle.into(), what: what.into(), detail: Vec::new() })
    }
}

impl From<Mismatch> for Event {
    fn from(mismatch: Mismatch) -> Self {
        Self::Mismatch(Box::new(mismatch))
    }
}

impl From<Box<Mismatch>> for Event {
    fn from(mismatch: Box<Mismatch>) -> Self {
        Self::Mismatch(mismatch)
    }
}
