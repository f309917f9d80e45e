//! The scenarios of `ublk-torture` as its users run them: what they say of a sound server, and of one that is not.

use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ublkit::ctrl::block_path;

use super::runner::cases;

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
    Command::new(env!("CARGO_BIN_EXE_ublk-torture"))
        // What has spaces in it has them unbreakable.
        .args(arguments.split(' ').map(|argument| argument.replace('\u{a0}', " ")))
        .args(["--json", "--report"])
        .arg(reports.path())
        .output()
        .expect("run ublk-torture")
}

/// The last line of its output: the verdict.
pub(crate) fn verdict(arguments: &str, code: i32) -> serde_json::Value {
    let output = run(arguments);
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
    passes("torture --seed 1 --duration 3s --size 64M");
}

fn torture_passes_copied_by_the_server_with_workers_over_a_file() {
    passes(
        "torture --seed 2 --duration 3s --size 64M --backend file --mode user-copy --queues 2 --workers-backend 4",
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
    // zeroed later, and the first write that is lost is none of those: with this seed, it is the 42nd of the first 50.
    let lost = "--prefill --mix read=50,write=50 --mutant lost-write:50";
    let repro = names(&format!("torture --seed 3 --duration 30s --size 16M {lost}"), "lost");
    assert!(repro.contains("--seed 3") && repro.contains("--mutant lost-write:50"), "{repro}");
    let arguments = repro.strip_prefix("ublk-torture ").expect("a command of this program");
    names(arguments, "lost");
}

fn torture_names_a_misdirected_write() {
    names("torture --seed 4 --duration 30s --size 16M --mutant misdirected-write:30", "misdirected");
}

fn torture_names_a_flipped_bit() {
    names("torture --seed 5 --duration 30s --size 16M --mutant bitflip-read:30", "bit_flip");
}

/// A run that is under way, with its device there. Killed with whatever it started if the trial fails.
struct Underway {
    child: Child,
    id: u32,
    server: i32,
}

impl Underway {
    fn start() -> Self {
        let before = ids();
        let child = Command::new(env!("CARGO_BIN_EXE_ublk-torture"))
            .args(["torture", "--seed", "6", "--duration", "50s", "--size", "16M"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("run ublk-torture");
        let new = || ids().into_iter().find(|id| !before.contains(id) && block_path(*id).exists());
        let id = wait_for("the device of a run", new);
        // Well into its work.
        std::thread::sleep(Duration::from_secs(1));
        let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).expect("read");
        let server = children.split_whitespace().next().expect("a server process").parse().expect("a pid");
        Self { child, id, server }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).expect("kill");
    }

    fn wait(&mut self) -> ExitStatus {
        wait_for("the end of a run", || self.child.try_wait().expect("wait"))
    }
}

impl Drop for Underway {
    fn drop(&mut self) {
        // Both have ended where the trial passes.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = kill(Pid::from_raw(self.server), Signal::SIGKILL);
    }
}

pub(crate) fn wait_for<T>(what: &str, mut there: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(found) = there() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what} did not come within 20 s");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The ids of all ublk devices.
fn ids() -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir("/sys/class/ublk-char") else { return Vec::new() };
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter_map(|name| name.strip_prefix("ublkc")?.parse().ok()).collect()
}

fn an_interrupted_run_leaves_no_device() {
    let mut run = Underway::start();
    run.signal(Signal::SIGINT);
    let status = run.wait();
    // Judged by the work it had done: a pass or vacuous.
    assert!(matches!(status.code(), Some(0 | 5)), "{status}");
    assert!(!ids().contains(&run.id) && !block_path(run.id).exists());
}

fn a_killed_run_leaves_no_device() {
    let mut run = Underway::start();
    run.signal(Signal::SIGKILL);
    run.wait();
    // Its server notices, closes the device, and ends.
    wait_for("the end of the device", || (!ids().contains(&run.id)).then_some(()));
}

fn a_run_killed_with_its_server_is_cleaned_up_by_the_next() {
    let mut run = Underway::start();
    let device = ublkit::Device::builder(ublkit::backends::Memory::new(1 << 20)).start().expect("start a bystander");
    let bystander = device.id();
    kill(Pid::from_raw(run.server), Signal::SIGKILL).expect("kill");
    run.signal(Signal::SIGKILL);
    run.wait();
    assert!(ids().contains(&run.id), "a killed server leaves a dead device");
    passes("torture --seed 7 --ops 400 --size 16M");
    assert!(!ids().contains(&run.id), "the next run deletes what the killed one left");
    assert!(ids().contains(&bystander), "and nothing else");
    device.close().expect("close");
}
