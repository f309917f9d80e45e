//! The scenarios of `ublk-torture` as its users run them: what they say of a sound server, and of one that is not.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ublkit::ctrl::block_path;
use ublkit_harness::threads::Stat;

use super::runner::{cases, ids};

cases!("scenarios":
    torture_passes_copied_by_the_driver_inline in 60 s,
    torture_passes_copied_by_the_server_with_workers_over_a_file in 60 s,
    torture_names_a_lost_write_and_its_repro_fails_again in 90 s,
    torture_names_a_misdirected_write in 60 s,
    torture_names_a_flipped_bit in 60 s,
    an_interrupted_run_leaves_no_device in 60 s,
    a_killed_run_leaves_no_device in 60 s,
    a_run_killed_with_its_server_is_cleaned_up_by_the_next in 90 s,
);

pub(crate) fn run(arguments: &str) -> Output {
    let reports = tempfile::tempdir().expect("a directory");
    run_into(reports.path(), arguments)
}

/// With the report in `reports`.
fn run_into(reports: &Path, arguments: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ublk-torture"))
        // What has spaces in it has them unbreakable.
        .args(arguments.split(' ').map(|argument| argument.replace('\u{a0}', " ")))
        .args(["--json", "--report"])
        .arg(reports)
        .output()
        .expect("run ublk-torture")
}

/// The last line of its output: the verdict.
pub(crate) fn verdict(arguments: &str, code: i32) -> serde_json::Value {
    let reports = tempfile::tempdir().expect("a directory");
    verdict_into(reports.path(), arguments, code)
}

/// As [`verdict`], with the report in `reports`.
pub(crate) fn verdict_into(reports: &Path, arguments: &str, code: i32) -> serde_json::Value {
    let output = run_into(reports, arguments);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "ublk-torture {arguments}:\n{out}\n{err}");
    let last = out.lines().last().expect("a last line");
    let verdict: serde_json::Value = serde_json::from_str(last).unwrap_or_else(|error| panic!("{last}: {error}"));
    assert_eq!(verdict["event"], "verdict", "{last}");
    verdict
}

fn passes(arguments: &str) {
    let verdict = verdict(arguments, 0);
    assert_eq!(verdict["verdict"], "pass", "{verdict}");
    assert!(verdict["evidence"].as_object().is_some_and(|evidence| !evidence.is_empty()), "{verdict}");
}

fn torture_passes_copied_by_the_driver_inline() {
    passes("torture --seed 1 --duration 2s --size 64M");
}

fn torture_passes_copied_by_the_server_with_workers_over_a_file() {
    passes(
        "torture --seed 2 --duration 2s --size 64M --backend file --mode user-copy --queues 2 --workers-backend 4",
    );
}

/// Torture fails, names the kind of corruption, and says how to see it again.
fn names(arguments: &str, class: &str) -> String {
    let output = run(arguments);
    let out = String::from_utf8_lossy(&output.stdout);
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{arguments}:\n{out}\n{err}");
    let events: Vec<serde_json::Value> = out
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}")))
        .collect();
    let mismatches: Vec<_> = events.iter().filter(|event| event["event"] == "mismatch").collect();
    let named = mismatches.iter().find(|mismatch| mismatch["class"].to_string().contains(class));
    let named = named.unwrap_or_else(|| panic!("{arguments} is not called {class}: {mismatches:#?}"));
    assert!(named["sector"].is_u64() && named["worker"].is_u64(), "{named}");
    let verdict = events.last().expect("a verdict");
    assert_eq!(verdict["verdict"], "fail", "{verdict}");
    verdict["repro"].as_str().expect("a command").to_owned()
}

fn torture_names_a_lost_write_and_its_repro_fails_again() {
    // Where nothing older is found than zeroes, the loss is called that. So the device is filled first, by 32 writes, nothing is
    // zeroed later, and the first write that is lost is none of those: with this seed, it comes after 160 others, by when the
    // slowest worker has filled its share.
    let lost = "--prefill --mix read=50,write=50 --mutant lost-write:200";
    let repro = names(&format!("torture --seed 3 --duration 30s --shrink 0s --size 16M {lost}"), "lost");
    assert!(repro.contains("--seed 3") && repro.contains("--mutant lost-write:200"), "{repro}");
    let arguments = repro.strip_prefix("ublk-torture ").expect("a command of this program");
    names(arguments, "lost");
}

fn torture_names_a_misdirected_write() {
    names("torture --seed 4 --duration 30s --shrink 0s --size 16M --mutant misdirected-write:30", "misdirected");
}

fn torture_names_a_flipped_bit() {
    names("torture --seed 5 --duration 30s --shrink 0s --size 16M --mutant bitflip-read:30", "bit_flip");
}

/// A run that is under way. Killed with whatever it started, and nothing else is, if the trial fails.
pub(crate) struct Underway {
    child: Child,
    /// The devices that were there before.
    before: BTreeSet<u32>,
    /// What it has started, and what that has: each with its time of birth, for numbers are used again.
    family: BTreeMap<u32, u64>,
}

impl Underway {
    /// Runs `ublk-torture` with these arguments.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        Self::of(Command::new(env!("CARGO_BIN_EXE_ublk-torture")).args(arguments).stderr(Stdio::null()))
    }

    pub(crate) fn of(command: &mut Command) -> Self {
        let before = ids();
        let child = command.stdout(Stdio::null()).spawn().expect("run ublk-torture");
        Self { child, before, family: BTreeMap::new() }
    }

    /// Waits for its first device.
    pub(crate) fn device(&mut self) -> u32 {
        let id = wait_for("the device of a run", || ids().difference(&self.before).next().copied());
        self.look();
        id
    }

    /// The devices that were not there before.
    pub(crate) fn devices(&self) -> Vec<u32> {
        ids().difference(&self.before).copied().collect()
    }

    /// The processes that it has started.
    pub(crate) fn servers(&mut self) -> Vec<u32> {
        self.look();
        children(self.child.id())
    }

    /// Those that it has started, and that live on.
    pub(crate) fn left(&self) -> Vec<u32> {
        self.family.iter().filter(|(pid, born)| birth(**pid) == Some(**born)).map(|(pid, _)| *pid).collect()
    }

    /// Takes down who is there now: once the run has ended, nobody knows whose they were.
    fn look(&mut self) {
        let mut found = vec![self.child.id()];
        while let Some(pid) = found.pop() {
            for child in children(pid) {
                if let Some(born) = birth(child) {
                    self.family.insert(child, born);
                }
                found.push(child);
            }
        }
    }

    pub(crate) fn signal(&mut self, signal: Signal) {
        self.look();
        kill(Pid::from_raw(self.child.id() as i32), signal).expect("kill");
    }

    /// Its status, if it has ended.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.look();
        self.child.try_wait().expect("wait")
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        wait_within(Duration::from_secs(45), "the end of a run", || self.ended())
    }
}

impl Drop for Underway {
    fn drop(&mut self) {
        // All have ended where the trial passes.
        self.look();
        let _ = self.child.kill();
        let _ = self.child.wait();
        for pid in self.left() {
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
        }
    }
}

/// The children of a process, whichever of its threads has started them.
fn children(pid: u32) -> Vec<u32> {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let lists = tasks.flatten().filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect()
}

/// When a process began, if it lives.
fn birth(pid: u32) -> Option<u64> {
    let stat = Stat::read(Path::new(&format!("/proc/{pid}")))?;
    (!stat.is_gone()).then_some(stat.start_time)
}

pub(crate) fn wait_for<T>(what: &str, there: impl FnMut() -> Option<T>) -> T {
    wait_within(Duration::from_secs(20), what, there)
}

fn wait_within<T>(limit: Duration, what: &str, mut there: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = there() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what} did not come within {limit:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Torture on a device, well into its work: the run, and the id.
fn torture() -> (Underway, u32) {
    let mut run = Underway::start(&["torture", "--seed", "6", "--duration", "50s", "--size", "16M"]);
    let id = run.device();
    wait_for("the disk of a run", || block_path(id).exists().then_some(()));
    std::thread::sleep(Duration::from_secs(1));
    (run, id)
}

fn an_interrupted_run_leaves_no_device() {
    let (mut run, id) = torture();
    run.signal(Signal::SIGINT);
    let status = run.wait();
    // Judged by the work it had done: a pass or vacuous.
    assert!(matches!(status.code(), Some(0 | 5)), "{status}");
    assert!(!ids().contains(&id) && !block_path(id).exists());
}

fn a_killed_run_leaves_no_device() {
    let (mut run, id) = torture();
    run.signal(Signal::SIGKILL);
    run.wait();
    // Its server notices, closes the device, and ends.
    wait_for("the end of the device", || (!ids().contains(&id)).then_some(()));
}

fn a_run_killed_with_its_server_is_cleaned_up_by_the_next() {
    let (mut run, id) = torture();
    let device = ublkit::Device::builder(ublkit::backends::Memory::new(1 << 20)).start().expect("start a bystander");
    let bystander = device.id();
    let [server] = run.servers()[..] else { panic!("one server") };
    kill(Pid::from_raw(server as i32), Signal::SIGKILL).expect("kill");
    run.signal(Signal::SIGKILL);
    run.wait();
    assert!(ids().contains(&id), "a killed server leaves a dead device");
    passes("torture --seed 7 --ops 400 --size 16M");
    assert!(!ids().contains(&id), "the next run deletes what the killed one left");
    assert!(ids().contains(&bystander), "and nothing else");
    device.close().expect("close");
}
