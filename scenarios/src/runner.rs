//! Runs a scenario: from its arguments to its exit status.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, IsTerminal};
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use ublkit::Signals;
use ublkit_harness::event::{Event, Run, VerdictLine};
use ublkit_harness::kernel_log::{Complaint, complaints};
use ublkit_harness::report::{JsonLines, Terminal};
use ublkit_harness::threads::dump_threads;
use ublkit_harness::verdict::EXIT_USAGE;
use ublkit_harness::watchdog::{REPORT_MAX, WatchdogOptions};
use ublkit_harness::{EventLoop, EventSink, HangReport, Reporter, Seed, Verdict, Watchdog};

use crate::backtrace;
use crate::cli::complain;
use crate::context::{Context, Interruption, LastWords, SharedEvidence};
use crate::dump;
use crate::environment::{self, Host};
use crate::in_flight::InFlight;
use crate::junit::JUnit;
use crate::kernel_log::KernelLog;
use crate::page::Page;
use crate::role;
use crate::runs::{RunRecord, StateDir};
use crate::scenario::{Failure, Scenario};
use crate::server;

/// How long the last events may take to reach their readers once the run is lost.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How long it may take to put an end to a run once everything is told of its hang: after that, the process ends all the
/// same. With [`REPORT_MAX`], less than the ten seconds by which a hang may outlive its deadline.
const LAST_RESORT: Duration = Duration::from_millis(3800);
const _: () = assert!(REPORT_MAX.as_millis() + LAST_RESORT.as_millis() < 10_000, "ten seconds");
/// How long a run may take to end after it was asked to.
const WIND_DOWN: Duration = Duration::from_secs(120);
/// Complaints of the kernel that are told; a device without power has thousands.
const COMPLAINTS_MAX: usize = 8;
/// How long it may take, once all is over, until nothing of the run is left: the kernel sees to some of that by itself.
const GONE: Duration = Duration::from_secs(10);
/// How long it may take to clean up after earlier runs.
const CLEAN_UP: Duration = Duration::from_secs(60);

/// Runs `scenario`, and returns the exit status of the process.
///
/// `args` is the whole command line, for the command that runs it again. When something hangs, the process ends here.
pub fn run(name: &'static str, scenario: &dyn Scenario, duration: Option<Duration>, args: &[OsString]) -> u8 {
    let common = scenario.common();
    let prepared = scenario.validate().and_then(|()| prepare(common.report.as_deref(), common.junit.as_deref()));
    let mut reporters: Vec<Box<dyn Reporter>> = match prepared {
        Ok(reporters) => reporters,
        Err(failure) => {
            complain(&failure.to_string());
            return EXIT_USAGE;
        }
    };
    let watched = io::stderr().is_terminal();
    if watched || common.json {
        reporters.push(Box::new(Terminal::stderr()));
    }
    if common.json {
        reporters.push(Box::new(JsonLines::new(io::stdout())));
    } else if !watched || !io::stdout().is_terminal() {
        // A log or a pipe gets the plain lines.
        reporters.push(Box::new(Terminal::plain(io::stdout())));
    }
    let events = match EventLoop::start(reporters) {
        Ok(events) => events,
        Err(error) => {
            complain(&format!("failed to start a thread: {error}"));
            return Verdict::Environment.exit_code();
        }
    };
    let seed = scenario.seed().unwrap_or_else(Seed::from_os);
    let ending = Ending {
        scenario: name,
        seed,
        repro: repro(args, seed, duration),
        evidence: SharedEvidence::default(),
        sink: events.sink(),
    };
    let code = begin(scenario, duration, &ending);
    if let Err(failures) = events.finish() {
        for failure in failures {
            complain(&format!("failed to write the report: {failure}"));
        }
        if code == 0 {
            return Verdict::Environment.exit_code();
        }
    }
    code
}

/// What is needed to end a run from wherever it ends.
#[derive(Clone, Debug)]
struct Ending {
    scenario: &'static str,
    seed: Seed,
    repro: String,
    evidence: SharedEvidence,
    sink: EventSink,
}

impl Ending {
    fn verdict(&self, verdict: Verdict) -> u8 {
        self.sink.send(Event::Verdict(VerdictLine {
            scenario: self.scenario.to_owned(),
            seed: self.seed,
            verdict,
            evidence: self.evidence.snapshot().counts(),
            repro: self.repro.clone(),
        }));
        verdict.exit_code()
    }
}

fn begin(scenario: &dyn Scenario, duration: Option<Duration>, ending: &Ending) -> u8 {
    let common = scenario.common();
    let host = Host::here();
    let mut options = scenario.options();
    options.insert("duration_ms".to_owned(), json!(duration.map(|duration| duration.as_millis() as u64)));
    options.insert("ops".to_owned(), json!(common.ops));
    ending.sink.send(Event::Run(Run {
        scenario: ending.scenario.to_owned(),
        seed: ending.seed,
        options,
        versions: host.versions,
        kernel: host.kernel,
        features: host.features,
        host: host.facts,
    }));
    let result = environment::check(&scenario.needs()).and_then(|()| watched(scenario, duration, ending));
    conclude(&result, ending)
}

/// Runs the scenario with signals caught and the watchdog awake.
fn watched(scenario: &dyn Scenario, duration: Option<Duration>, ending: &Ending) -> Result<(), Failure> {
    let state = StateDir::default();
    let record = state.record();
    let last_words = LastWords::default();
    let lost = (ending.clone(), record.clone(), last_words.clone());
    let options = WatchdogOptions {
        processes: Some(Arc::new(server::pids)),
        backtraces: Some(Arc::new(backtrace::of)),
        ..WatchdogOptions::default()
    };
    let watchdog = Watchdog::start(options, move |report| lose(report, &lost.0, &lost.1, &lost.2));
    let watchdog = Arc::new(watchdog.map_err(|error| no_thread(&error))?);
    // Those that meet a device which a kernel serves are judged by what that kernel says, too.
    let kernel = scenario.meets_kernel_device().then(Complaints::begin);
    let log = kernel.is_some().then(KernelLog::from_here).and_then(Result::ok);
    dump::ask_for_all(&watchdog, log, scenario.common().report.clone(), ending.evidence.clone());
    let in_flight = InFlight::default();
    let workers = in_flight.clone();
    // Nothing is said where nobody ever was one.
    watchdog.ask("the workers wait for", move || if workers.was_used() { workers.tell() } else { Vec::new() });
    let interruption = Interruption::default();
    let listener = Listener::start(interruption.clone(), ending.sink.clone(), Arc::clone(&watchdog))?;
    if scenario.needs().ublk {
        let looking = watchdog.guard("clean up after earlier runs", CLEAN_UP);
        for remark in state.clean_gone_runs() {
            ending.sink.send(Event::note(remark));
        }
        drop(looking);
    }
    let mut context = Context {
        seed: ending.seed,
        duration,
        ops: scenario.common().ops,
        report_dir: scenario.common().report.clone(),
        sink: ending.sink.clone(),
        evidence: ending.evidence.clone(),
        watchdog,
        interruption,
        record,
        repro: ending.repro.clone(),
        last_words,
        in_flight,
        detail: String::new(),
        deadline: scenario.common().deadline,
        io_is_sound: false,
    };
    let mut result = match std::panic::catch_unwind(AssertUnwindSafe(|| scenario.run(&mut context))) {
        Ok(result) => result,
        Err(panic) => Err(Failure::Internal(format!("panicked: {}", panic_message(panic.as_ref())))),
    };
    context.end_if_lost();
    for failure in role::bad_ends() {
        match result {
            Ok(()) | Err(Failure::Interrupted) => result = Err(failure),
            // What came first is what became of the run.
            Err(_) => context.note(failure.to_string()),
        }
    }
    if let Err(failure) = &mut result {
        context.report(failure);
    }
    result = nothing_left(&context, result);
    if let Some(kernel) = kernel {
        result = kernel.judge(&context, result);
    }
    if let Some(remark) = context.record.finish() {
        context.note(remark);
    }
    drop(listener);
    result
}

/// Ends the process, for something hangs: it tells everything that was found, and sees to it that no device is left and
/// that what was changed of the machine is as it was.
fn lose(report: HangReport, ending: &Ending, record: &RunRecord, last_words: &LastWords) {
    // Whatever comes: nobody waits for this process for longer.
    let _ = thread::Builder::new().name("last-resort".to_owned()).spawn(|| {
        thread::sleep(LAST_RESORT);
        std::process::exit(Verdict::Hang.exit_code().into());
    });
    let hang = Event::Hang(report.into());
    ending.sink.send(hang.clone());
    thread::scope(|scope| {
        let said = scope.spawn(|| last_words.say(&hang));
        // What this process waits for fails then, so that it can end.
        let undone = server::kill_all().into_iter().chain(record.put_back());
        for remark in undone.chain(said.join().unwrap_or_default()) {
            ending.sink.send(Event::note(remark));
        }
    });
    let code = ending.verdict(Verdict::Hang);
    let _unread = ending.sink.flush(LAST_WORDS);
    std::process::exit(code.into());
}

/// A run that leaves a device of its own behind, or a process that cannot be ended, has failed; unless it had failed before.
fn nothing_left(context: &Context, result: Result<(), Failure>) -> Result<(), Failure> {
    let watched = context.watchdog.guard("nothing is left", 3 * GONE);
    let left = until_gone(&|| left(context), GONE);
    drop(watched);
    if left.is_empty() {
        return result;
    }
    let what = format!("left behind {} s after the end: {}", GONE.as_secs(), left.join(", "));
    match result {
        Ok(()) | Err(Failure::Interrupted) => {
            let mut failure = Failure::broke("leak", what);
            context.report(&mut failure);
            Err(failure)
        }
        Err(failure) => {
            context.note(what);
            Err(failure)
        }
    }
}

/// What is left after `patience`, or nothing as soon as there is nothing.
fn until_gone(left: &dyn Fn() -> Vec<String>, patience: Duration) -> Vec<String> {
    let until = Instant::now() + patience;
    loop {
        let left = left();
        if left.is_empty() || Instant::now() >= until {
            return left;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Devices of this run, and processes that it started and that sleep uninterruptibly.
fn left(context: &Context) -> Vec<String> {
    let devices = context.record.left().into_iter().map(|id| format!("device {id}"));
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let children = tasks.map(|task| fs::read_to_string(task.path().join("children")).unwrap_or_default());
    let children: Vec<u32> =
        children.flat_map(|pids| pids.split_whitespace().flat_map(str::parse).collect::<Vec<_>>()).collect();
    let threads = children.into_iter().flat_map(|pid| dump_threads(Path::new("/proc"), pid));
    let stuck = threads.filter(|thread| thread.state.starts_with('D'));
    devices.chain(stuck.map(|thread| format!("thread {} of process {}: {thread}", thread.tid, thread.pid))).collect()
}

/// What the kernel complains of while a run lasts.
struct Complaints(io::Result<KernelLog>);

impl Complaints {
    fn begin() -> Self {
        Self(KernelLog::from_here())
    }

    /// A run that the kernel complained of has failed, whatever else came of it.
    fn judge(self, context: &Context, result: Result<(), Failure>) -> Result<(), Failure> {
        let mut log = match self.0 {
            Ok(log) => log,
            Err(error) => {
                context.note(format!("what the kernel says is not looked at: failed to open /dev/kmsg: {error}"));
                return result;
            }
        };
        let records = log.read();
        context.evidence.add("kernel_log_scanned", 1);
        context.evidence.add("kernel_log_lines", records.len() as u64);
        if log.lost() > 0 {
            context.note("the kernel said more than its log can hold: some of it was not seen");
        }
        let complaints = complaints(&records, context.io_is_sound);
        if complaints.is_empty() {
            return result;
        }
        if let Some(report) = context.report_dir()
            && let Err(error) = dump::keep(report, &records)
        {
            context.note(format!("failed to keep the kernel's log: {error}"));
        }
        let told = complaints.into_iter().take(COMPLAINTS_MAX).map(|complaint| {
            let Complaint { what, excerpt, .. } = complaint;
            let mut failure = Failure::broke_with("kernel", format!("the kernel complained: {what}"), excerpt);
            context.report(&mut failure);
            failure
        });
        // All of them are told; the first is what became of the run, if nothing had broken before.
        let mut told: Vec<_> = told.collect();
        match result {
            Err(failure @ Failure::DeviceBroke(_)) => Err(failure),
            Ok(()) | Err(Failure::Interrupted) => Err(told.swap_remove(0)),
            Err(other) => {
                context.note(other.to_string());
                Err(told.swap_remove(0))
            }
        }
    }
}

/// A thread that the machine does not give.
pub(crate) fn no_thread(error: &io::Error) -> Failure {
    Failure::Environment(format!("failed to start a thread: {error}"))
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("with a message that is no text")
}

/// From what came back to the verdict.
fn conclude(result: &Result<(), Failure>, ending: &Ending) -> u8 {
    let verdict = match result {
        Ok(()) => None,
        Err(Failure::DeviceBroke(_)) => Some(Verdict::Fail),
        Err(failure @ Failure::Usage(_)) => {
            complain(&failure.to_string());
            return EXIT_USAGE;
        }
        Err(Failure::Interrupted) => {
            ending.evidence.add("interrupted", 1);
            None
        }
        Err(failure) => {
            ending.sink.send(Event::note(failure.to_string()));
            failure.verdict()
        }
    };
    let verdict = verdict.unwrap_or_else(|| match ending.evidence.snapshot().judge() {
        Ok(()) => Verdict::Pass,
        Err(vacuous) => {
            ending.sink.send(Event::note(format!("too little was done to say anything: {vacuous}")));
            Verdict::Vacuous
        }
    });
    ending.verdict(verdict)
}

/// A thread that waits for Ctrl-C.
#[derive(Debug)]
struct Listener {
    done: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Listener {
    fn start(interruption: Interruption, sink: EventSink, watchdog: Arc<Watchdog>) -> Result<Self, Failure> {
        let signals = Signals::catch().map_err(|error| Failure::Internal(error.to_string()))?;
        let done = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&done);
        let listen = move || {
            let mut winding_down = None;
            while !told.load(Ordering::Relaxed) {
                if winding_down.is_some() {
                    thread::park_timeout(Duration::from_millis(100));
                } else if let Some(signal) = signals.wait(Duration::from_millis(100)) {
                    sink.send(Event::note(format!("{signal}: ending the run")));
                    interruption.set();
                    winding_down = Some(watchdog.guard(format!("end after {signal}"), WIND_DOWN));
                }
            }
        };
        let thread =
            thread::Builder::new().name("signals".to_owned()).spawn(listen).map_err(|error| no_thread(&error))?;
        Ok(Self { done, thread: Some(thread) })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _panicked = thread.join();
        }
    }
}

/// Makes the report directory and opens what goes into it, and the JUnit report.
fn prepare(report: Option<&Path>, junit: Option<&Path>) -> Result<Vec<Box<dyn Reporter>>, Failure> {
    let mut reporters: Vec<Box<dyn Reporter>> = Vec::new();
    let cannot = |path: &Path, flag: &str| {
        let path = path.display().to_string();
        let flag = flag.to_owned();
        move |error: io::Error| {
            Failure::Usage(format!("cannot write a report to {path}: {error}; give {flag} another place"))
        }
    };
    if let Some(dir) = report {
        let cannot = cannot(dir, "--report");
        fs::create_dir_all(dir).map_err(&cannot)?;
        let events = File::create(dir.join("events.jsonl")).map_err(&cannot)?;
        let page = Page::new(dir.join("report.txt")).map_err(&cannot)?;
        reporters.push(Box::new(JsonLines::new(events)));
        reporters.push(Box::new(page));
    }
    if let Some(path) = junit {
        reporters.push(Box::new(JUnit::new(path.to_owned()).map_err(cannot(path, "--junit"))?));
    }
    Ok(reporters)
}

/// The command that runs it again: the same options, with the seed and the duration made explicit, and without those that say
/// where to report.
fn repro(args: &[OsString], seed: Seed, duration: Option<Duration>) -> String {
    let mut words = vec!["ublk-torture".to_owned()];
    let mut rest = args.iter().skip(1).map(|arg| arg.to_string_lossy());
    while let Some(arg) = rest.next() {
        match arg.as_ref() {
            "--json" => {}
            "--seed" | "--report" | "--junit" | "--duration" => drop(rest.next()),
            arg if ["--seed=", "--report=", "--junit=", "--duration="].iter().any(|flag| arg.starts_with(flag)) => {}
            arg => words.push(quote(arg)),
        }
    }
    words.push(format!("--seed {seed}"));
    if let Some(duration) = duration {
        words.push(format!("--duration {}ms", duration.as_millis()));
    }
    words.join(" ")
}

/// For a POSIX shell.
fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+,./:@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn what_goes_in_time_is_not_left() {
        let looks = Cell::new(0);
        let left = || {
            looks.set(looks.get() + 1);
            if looks.get() < 3 { vec!["device 7".to_owned()] } else { Vec::new() }
        };
        assert_eq!(until_gone(&left, Duration::from_secs(60)), [""; 0]);
        let stays = || vec!["device 7".to_owned()];
        assert_eq!(until_gone(&stays, Duration::from_millis(30)), ["device 7"]);
    }

    #[test]
    fn a_run_that_leaves_nothing_ends_as_it_did() {
        let testing = crate::context::testing::context();
        nothing_left(&testing.context, Ok(())).expect("nothing is left");
        let failed = nothing_left(&testing.context, Err(Failure::Environment("lacking".to_owned())));
        assert_eq!(failed.expect_err("as before").verdict(), Some(Verdict::Environment));
    }
}
