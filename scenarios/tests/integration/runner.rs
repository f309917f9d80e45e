//! Runs each trial alone, within a deadline, and looks for what it left behind.

use std::any::Any;
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use nix::fcntl::{Flock, FlockArg};
use ublk_torture::gates::{Gate, KernelVersion};
use ublk_torture::kernel_log::KernelLog;
use ublkit::Controller;
use ublkit_harness::kernel_log::complaints;
use ublkit_harness::threads::stacks;

use super::notes;

/// What a trial may take unless it says otherwise; a trial takes a second or so in an emulated guest.
const DEADLINE: Duration = Duration::from_secs(40);
/// A trial that takes longer is named with its time.
const SLOW: Duration = Duration::from_secs(3);
/// How long what a trial used may take to vanish: the kernel drops rings and minors in the background.
const SETTLE: Duration = Duration::from_secs(8);

/// A trial: it fails by panicking.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) deadline: Duration,
    /// Left out, by name, on kernels with this bug.
    pub(crate) gate: Option<&'static Gate>,
    pub(crate) run: fn(),
}

impl Case {
    pub(crate) const fn new(name: &'static str, run: fn()) -> Self {
        Self { name, deadline: DEADLINE, gate: None, run }
    }

    pub(crate) const fn gated(mut self, gate: &'static Gate) -> Self {
        self.gate = Some(gate);
        self
    }

    pub(crate) const fn within(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }
}

/// The cases of a module, named after it. `unless GATE` leaves a case out, by name, on kernels that have the bug.
macro_rules! cases {
    ($module:literal: $($name:ident $(in $seconds:literal s)? $(unless $gate:ident)?),+ $(,)?) => {
        pub(crate) fn cases() -> Vec<super::runner::Case> {
            vec![$(
                super::runner::Case::new(concat!($module, "::", stringify!($name)), $name)
                    $(.within(std::time::Duration::from_secs($seconds)))?
                    $(.gated(&ublk_torture::gates::$gate))?
            ),+]
        }
    };
}
pub(crate) use cases;

pub(crate) fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    // Listing works anywhere: that is how nextest learns what there is.
    if !arguments.list
        && let Err(reason) = requirements()
    {
        eprintln!("error: these trials need a kernel with ublk, and root: {reason}");
        eprintln!("       as root on this machine: modprobe ublk_drv; anywhere else: ci/vm -- COMMAND");
        return ExitCode::from(101);
    }
    let trials = super::all().into_iter().map(|case| Trial::ignorable_test(case.name, move || tell(&case))).collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn requirements() -> Result<(), String> {
    Controller::open().map(drop).map_err(|error| format!("failed to {error}"))?;
    if !nix::unistd::geteuid().is_root() {
        return Err("not root".into());
    }
    Ok(())
}

/// Runs a case unless its gate is shut, and notes what came of it for the tables.
fn tell(case: &Case) -> Result<Completion, Failed> {
    if let Some(gate) = case.gate.filter(|gate| gate.is_shut(KernelVersion::here())) {
        let why = format!("{}: {} (fixed: {})", gate.name, gate.bug, gate.fixed);
        println!("gated: {}: {why}", case.name);
        notes::gated(case.name, &why);
        return Ok(Completion::ignored_with(format!("gated: {why}")));
    }
    notes::begun(case.name);
    let begun = Instant::now();
    let result = run(case);
    notes::ended(case.name, result.is_ok(), begun.elapsed());
    result.map(|()| Completion::Completed)
}

fn run(case: &Case) -> Result<(), Failed> {
    let begun = Instant::now();
    let _alone = lock().map_err(|error| format!("failed to lock {}: {error}", lock_path().display()))?;
    let mut log = KernelLog::from_here().map_err(|error| format!("failed to open the kernel log: {error}"))?;
    let before = Footprint::now();
    let (done, outcome) = mpsc::channel();
    let body = case.run;
    let thread = std::thread::Builder::new()
        .name("trial".into())
        .spawn(move || {
            let _ = done.send(std::panic::catch_unwind(body));
        })
        .map_err(|error| format!("failed to start a thread: {error}"))?;
    let mut problems = if let Ok(result) = outcome.recv_timeout(case.deadline) {
        let _ = thread.join();
        result.err().map(|payload| message_of(&*payload)).into_iter().collect()
    } else {
        let problem = format!("not done within {:?}:\n{}", case.deadline, stacks(std::process::id()));
        before.delete_the_rest();
        vec![problem]
    };
    problems.extend(before.left_behind());
    problems.extend(kernel_complaints(&mut log));
    if begun.elapsed() > SLOW {
        eprintln!("{}: {:.1} s", case.name, begun.elapsed().as_secs_f64());
    }
    if problems.is_empty() { Ok(()) } else { Err(problems.join("\n").into()) }
}

pub(crate) fn message_of(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic without a message".into())
}

fn lock_path() -> PathBuf {
    std::env::temp_dir().join("ublkit-integration.lock")
}

fn lock() -> io::Result<Flock<File>> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(lock_path())?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno.into())
}

fn entries(path: &str) -> Vec<PathBuf> {
    fs::read_dir(path).map(|dir| dir.flatten().map(|entry| entry.path()).collect()).unwrap_or_default()
}

/// Ids of the ublk devices that exist now, as the driver's own class shows them.
pub(crate) fn ids() -> BTreeSet<u32> {
    let id = |path: PathBuf| path.file_name()?.to_str()?.strip_prefix("ublkc")?.parse().ok();
    entries("/sys/class/ublk-char").into_iter().filter_map(id).collect()
}

/// Names of this process's threads. Those that io_uring made stay for some seconds, and are none of ours.
fn threads() -> Vec<String> {
    let name = |task: &PathBuf| fs::read_to_string(task.join("comm")).unwrap_or_default().trim().to_owned();
    entries("/proc/self/task").iter().map(name).filter(|name| !name.starts_with("iou-")).collect()
}

/// What a process and the driver hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Footprint {
    pub(crate) ids: BTreeSet<u32>,
    pub(crate) threads: usize,
    pub(crate) descriptors: usize,
}

impl Footprint {
    pub(crate) fn now() -> Self {
        Self { ids: ids(), threads: threads().len(), descriptors: entries("/proc/self/fd").len() }
    }

    fn exceeds(&self, other: &Self) -> bool {
        !self.ids.is_subset(&other.ids) || self.threads > other.threads || self.descriptors > other.descriptors
    }

    /// Has devices that have appeared since deleted. Whoever waits for one that nobody serves waits in the kernel, where no
    /// signal is heard, and keeps this process from ending.
    fn delete_the_rest(&self) {
        let Ok(controller) = Controller::open() else { return };
        for &id in ids().difference(&self.ids) {
            let stopped = controller.stop(id, SETTLE);
            eprintln!("a trial left device {id}: {stopped:?}, {:?}", controller.delete_async(id));
        }
    }

    /// What there is more of than at the time of `self`, after a while of patience.
    pub(crate) fn left_behind(&self) -> Option<String> {
        let deadline = Instant::now() + SETTLE;
        loop {
            let now = Self::now();
            if !now.exceeds(self) {
                return None;
            }
            if Instant::now() > deadline {
                return Some(format!("left behind: there was {self:?} and there is {now:?}; {:?}", threads()));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// What a trial writes to the kernel's log itself has this in it.
pub(crate) const PLANTED: &str = "planted/by/a/trial";

/// What a sound kernel never says. I/O errors are not among it: the trials cause them.
fn kernel_complaints(log: &mut KernelLog) -> Vec<String> {
    let mut records = log.read();
    records.retain(|record| !record.text.contains(PLANTED));
    let told = complaints(&records, false).into_iter();
    told.map(|complaint| format!("the kernel complained:\n{}", complaint.excerpt.join("\n"))).collect()
}
