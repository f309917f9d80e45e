//! The helper that says where the threads of another process stand: no root, no ublk.

#![cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]

use std::fs;
use std::hint::black_box;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Set for the child, which is this program once more.
const VARIABLE: &str = "UBLK_TORTURE_TEST_STANDS";
/// What the child says once it is about to stand still.
const READY: &str = "about to stand still";

/// Where the child stands: to be found by this name.
#[inline(never)]
fn stands_still_here() {
    loop {
        std::thread::park_timeout(Duration::from_secs(600));
        black_box(());
    }
}

/// The child.
#[test]
#[ignore = "started by the other test"]
fn child() {
    if std::env::var_os(VARIABLE).is_some() {
        println!("{READY}");
        std::io::stdout().flush().expect("the parent listens");
        stands_still_here();
    }
}

/// Killed when dropped.
struct Standing(Child);

impl Drop for Standing {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Standing {
    fn start() -> Self {
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "child", "--ignored", "--nocapture"])
            .env(VARIABLE, "1")
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let out = child.stdout.take().expect("a pipe");
        let child = Self(child);
        let mut lines = BufReader::new(out).lines().map_while(Result::ok);
        assert!(lines.any(|line| line.contains(READY)), "the child ended early");
        child
    }

    /// The states of its threads, a letter each.
    fn states(&self) -> String {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.0.id())).expect("the child lives").flatten();
        let stats = tasks.map(|task| fs::read_to_string(task.path().join("stat")).expect("its stat"));
        stats.map(|stat| stat.rsplit_once(") ").expect("a state").1.chars().next().expect("a letter")).collect()
    }

    /// Waits until all of its threads sleep.
    fn sleeps(&self) {
        let until = Instant::now() + Duration::from_secs(60);
        while self.states().chars().any(|state| state != 'S') {
            assert!(Instant::now() < until, "its threads are {}", self.states());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Why a process may not look at a sibling of its own here, if that is so.
fn forbidden() -> Option<String> {
    // Without Yama, whoever is the same user may.
    let scope = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    let is_root = fs::metadata("/proc/self").is_ok_and(|meta| std::os::unix::fs::MetadataExt::uid(&meta) == 0);
    match scope.trim() {
        "" | "0" => None,
        "1" | "2" if is_root => None,
        scope => Some(format!("kernel.yama.ptrace_scope is {scope}, and this is not root")),
    }
}

#[test]
fn a_thread_is_found_where_it_stands_and_goes_on() {
    if let Some(why) = forbidden() {
        eprintln!("skipped: {why}");
        return;
    }
    let child = Standing::start();
    child.sleeps();
    let output = Command::new(env!("CARGO_BIN_EXE_ublk-torture"))
        .args(["dump-threads", &child.0.id().to_string()])
        .output()
        .expect("the helper starts");
    let text = String::from_utf8(output.stdout).expect("text");
    assert_eq!(output.status.code(), Some(0), "{text}");
    let told: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(told.last(), Some(&Value::from("End")), "{text}");
    let stands = |one: &&Value| one["Thread"]["frames"].to_string().contains("stands_still_here");
    let found: Vec<_> = told.iter().filter(stands).collect();
    // By the symbol table first, and then with the line.
    assert_eq!(found.len(), 2, "{text}");
    assert!(found.iter().all(|one| one["Thread"]["pid"] == child.0.id()), "{text}");
    assert!(found[1].to_string().contains("backtrace.rs:"), "{text}");
    // Nobody is left stopped: the states of a tracer's stop and of a signal's are `t` and `T`.
    child.sleeps();
}

#[test]
fn what_is_no_process_is_told_and_is_the_end() {
    // Beyond the largest that there can be.
    let output = Command::new(env!("CARGO_BIN_EXE_ublk-torture"))
        .args(["dump-threads", "4194305"])
        .output()
        .expect("the helper starts");
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(text.contains("Remark") && text.trim_end().ends_with("\"End\""), "{text}");
}
