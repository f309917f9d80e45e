//! Hangs, planted wherever there can be one: each ends its run with status 3 within ten seconds of the deadline, is shown
//! by the function that hangs and by the request that waits, and leaves nothing behind.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::runner::{cases, ids};
use super::scenarios::{Underway, verdict};

cases!("hangs":
    a_backend_that_never_returns in 60 s,
    a_handler_that_never_returns in 60 s,
    a_queue_that_never_fetches in 60 s,
    a_read_that_is_never_answered in 60 s,
    a_stop_behind_a_held_request in 60 s,
    a_worker_that_never_comes_back in 60 s,
    a_server_that_was_stopped in 60 s,
    a_server_that_does_not_end in 60 s,
);

/// What a hang may outlive its deadline by.
const AFTER: Duration = Duration::from_secs(10);
/// What the program itself takes until the step that hangs begins, in an emulated guest that is busy.
const UNTIL: Duration = Duration::from_secs(15);
/// What it takes from the beginning of the load to the request that hangs.
const LEAD: Duration = Duration::from_secs(5);

/// From when on the deadline counts.
#[derive(Clone, Copy)]
enum Since {
    /// From the beginning of this step, which is what hangs.
    Step(&'static str),
    /// From a request of the load.
    Load,
    /// From then.
    Then(Instant),
}

/// A run of torture.
struct Run {
    underway: Underway,
    report: tempfile::TempDir,
    begun: Instant,
}

/// What became of it.
struct Ended {
    hang: Value,
    /// Every line of the report that a person reads.
    text: String,
    report: tempfile::TempDir,
}

impl Run {
    fn start(arguments: &str) -> Self {
        let report = tempfile::tempdir().expect("a directory");
        let mut all = vec!["torture", "--seed", "3", "--size", "16M", "--faults", "none"];
        all.extend(arguments.split_whitespace());
        all.extend(["--report", report.path().to_str().expect("a path")]);
        Self { underway: Underway::start(&all), report, begun: Instant::now() }
    }

    /// Whether this step has begun.
    fn is_in(&self, step: &str) -> bool {
        let events = std::fs::read_to_string(self.report.path().join("events.jsonl")).unwrap_or_default();
        let begins = format!(r#""event":"step_started","name":"{step}""#);
        events.contains(&begins)
    }

    /// Waits for its end, which has to come in time, with status 3 and nothing left.
    fn hangs(mut self, since: Since, deadline: Duration) -> Ended {
        let mut began = None;
        let status = loop {
            if let Some(status) = self.underway.ended() {
                break status;
            }
            began = began.or_else(|| match since {
                Since::Step(step) => self.is_in(step).then(Instant::now),
                Since::Load => self.is_in("torture").then(|| Instant::now() + LEAD),
                Since::Then(then) => Some(then),
            });
            let until = began.unwrap_or(self.begun + UNTIL) + deadline + AFTER;
            assert!(Instant::now() < until, "the run goes on {AFTER:?} after its deadline of {deadline:?}");
            std::thread::sleep(Duration::from_millis(50));
        };
        assert!(began.is_some(), "what was to hang had not begun");
        let report = std::mem::replace(&mut self.report, tempfile::tempdir().expect("a directory"));
        let read = |file: &str| std::fs::read_to_string(report.path().join(file)).unwrap_or_default();
        let text = read("report.txt");
        assert_eq!(status.code(), Some(3), "{text}");
        let events: Vec<Value> =
            read("events.jsonl").lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        let last = events.last().expect("events");
        assert_eq!((&last["event"], &last["verdict"]), (&"verdict".into(), &"hang".into()), "{last}");
        let hangs: Vec<&Value> = events.iter().filter(|event| event["event"] == "hang").collect();
        assert_eq!(hangs.len(), 1, "one hang");
        // The device goes when the last who holds it has ended, and a process when its parent has heard of its end; both are
        // seen to in the background.
        let settled = Instant::now() + Duration::from_secs(5);
        while !ids().is_empty() || !self.underway.left().is_empty() {
            let (ids, processes) = (ids(), self.underway.left());
            assert!(Instant::now() < settled, "left: devices {ids:?}, processes {processes:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ended { hang: hangs[0].clone(), text, report }
    }
}

impl Ended {
    fn is_found_in(&self, thread: &str, function: &str) -> bool {
        let threads = self.hang["threads"].as_array().expect("threads");
        let frames = |thread: &Value| thread["user"].to_string();
        threads.iter().any(|one| {
            one["comm"].as_str().is_some_and(|comm| comm.starts_with(thread)) && frames(one).contains(function)
        })
    }

    /// A thread named so stands in `function`, which the symbol table says in any case: there is time for that.
    fn is_named(&self, thread: &str, function: &str) {
        assert!(self.is_found_in(thread, function), "no {thread} in {function}:\n{}", self.text);
    }

    /// A thread named so stands in `function`.
    fn stands_in(&self, thread: &str, function: &str) {
        let found = self.is_found_in(thread, function);
        let late = ["backtraces: incomplete", "backtraces: no answer within"];
        if !found && late.iter().any(|late| self.text.contains(late)) {
            // What a report may take is bounded, and this machine is too busy.
            eprintln!("no backtrace of {thread} in time: this machine is busy");
            return;
        }
        assert!(found, "no {thread} in {function}:\n{}", self.text);
    }

    /// A note of `who` says so.
    fn says(&self, who: &str, what: &str) {
        let notes = self.hang["notes"].as_array().expect("notes");
        let found = notes.iter().filter_map(Value::as_str).any(|note| note.starts_with(who) && note.contains(what));
        assert!(found, "{who} does not say {what}:\n{}", self.text);
    }

    /// Something in flight is as old as it has to be, by what `who` says.
    fn waits(&self, who: &str, at_least: f64) {
        let notes = self.hang["notes"].as_array().expect("notes");
        let age = |note: &str| note.split_once("in flight for ")?.1.split_once(" s")?.0.parse::<f64>().ok();
        let ages = notes.iter().filter_map(Value::as_str).filter(|note| note.starts_with(who)).filter_map(age);
        let oldest = ages.fold(0.0, f64::max);
        assert!(oldest >= at_least, "the oldest is {oldest} s old:\n{}", self.text);
    }
}

const SECONDS_3: Duration = Duration::from_secs(3);
const SECONDS_4: Duration = Duration::from_secs(4);

fn a_backend_that_never_returns() {
    let ended =
        Run::start("--hang backend --stall 3s --duration 20s --workers-backend 2").hangs(Since::Load, SECONDS_3);
    ended.stands_in("ublk", "never_returns");
    ended.stands_in("torture-", "operations");
    ended.waits("in flight: server", 2.0);
    ended.waits("the workers wait for: ", 2.0);
    ended.says("driver: ", "Live");
    ended.says("holders: ", "is held by pid");
    ended.says("block layer: ", "in flight");
    ended.says("kernel log: ", "");
    ended.says("uninterruptible: ", "");
}

fn a_handler_that_never_returns() {
    let ended = Run::start("--hang queue --stall 3s --duration 20s").hangs(Since::Load, SECONDS_3);
    ended.is_named("ublk", "never_returns");
    ended.waits("in flight: server", 2.0);
}

fn a_queue_that_never_fetches() {
    let ended = Run::start("--hang start --deadline 4s").hangs(Since::Step("start"), SECONDS_4);
    ended.stands_in("ublk", "never_returns");
    ended.stands_in("ublk-torture", "serve");
    ended.says("driver: ", "DeviceInfo");
}

/// The reader sleeps uninterruptibly and cannot be stopped: where it came from is told all the same.
fn a_read_that_is_never_answered() {
    let ended = Run::start("--hang read --ops 20 --deadline 4s")
        .hangs(Since::Step("verify through a second opening"), SECONDS_4);
    ended.stands_in("ublk", "never_returns");
    // Of a thread that the kernel keeps, a part of the way back is not always found.
    ended.stands_in("ublk-torture", "read_at");
    ended.waits("in flight: server", 1.0);
    ended.says("uninterruptible: ", "ublk-torture D");
}

fn a_stop_behind_a_held_request() {
    let ended =
        Run::start("--hang stop --ops 20 --deadline 4s --workers-backend 2").hangs(Since::Step("close"), SECONDS_4);
    ended.stands_in("ublk", "never_returns");
    ended.waits("in flight: server", 1.0);
    let events = std::fs::read_to_string(ended.report.path().join("events.jsonl")).expect("events");
    assert!(events.contains(r#""what":"close"#), "it hangs while it is closed:\n{}", ended.text);
}

fn a_worker_that_never_comes_back() {
    let ended = Run::start("--hang worker --stall 3s --duration 20s").hangs(Since::Load, SECONDS_3);
    ended.stands_in("torture-0", "never_returns");
    ended.waits("the workers wait for: ", 2.0);
}

/// Everything is done and right by then, and it is a hang all the same.
fn a_server_that_does_not_end() {
    let before = ids();
    verdict("torture --seed 3 --size 16M --faults none --hang end --ops 400 --deadline 5s", 3);
    let settled = Instant::now() + Duration::from_secs(5);
    while ids() != before {
        assert!(Instant::now() < settled, "a device is left: {:?}", ids());
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn a_server_that_was_stopped() {
    let mut run = Run::start("--stall 3s --duration 50s");
    run.underway.device();
    // Well into its work.
    std::thread::sleep(Duration::from_secs(1));
    let stopped = Instant::now();
    for server in run.underway.servers() {
        kill(Pid::from_raw(server as i32), Signal::SIGSTOP).expect("stop");
    }
    let ended = run.hangs(Since::Then(stopped), SECONDS_3);
    // By whoever gives up first.
    ended.says("in flight: ", "no answer");
    ended.waits("the workers wait for: ", 2.0);
    ended.stands_in("torture-", "operations");
    ended.says("block layer: ", "in flight");
}
