//! How runs end that do not end well: each in a process of its own, since some end the process.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use serde_json::Value;
use ublk_torture::cli::CommonArgs;
use ublk_torture::scenario::Needs;
use ublk_torture::{Context, Failure, Scenario, runner};

/// Chooses the ending in the child.
const VARIABLE: &str = "UBLK_TORTURE_TEST_ENDING";

#[derive(Debug, Parser)]
struct Ends {
    #[command(flatten)]
    common: CommonArgs,
}

impl Scenario for Ends {
    fn common(&self) -> &CommonArgs {
        &self.common
    }

    fn options(&self) -> BTreeMap<String, Value> {
        BTreeMap::new()
    }

    fn needs(&self) -> Needs {
        Needs::default()
    }

    fn run(&self, context: &mut Context) -> Result<(), Failure> {
        let ending = std::env::var(VARIABLE).unwrap_or_default();
        context.evidence().require("work", 1);
        let deadline = Duration::from_secs(if ending == "hang" { 1 } else { 60 });
        context.step("work", deadline, |context| {
            match ending.as_str() {
                "hang" => std::thread::sleep(Duration::from_secs(600)),
                "panic" => panic!("as the test wants it"),
                "broke" => return Err(Failure::broke("test", "a promise")),
                "wait" => {
                    while !context.interruption().came() {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    context.evidence().add("work", 1);
                    return Err(Failure::Interrupted);
                }
                "idle" => return Ok(()),
                _ => {}
            }
            context.evidence().add("work", 1);
            Ok(())
        })
    }
}

/// The child: a run with the ending that the environment asks for.
#[test]
#[ignore = "started by the other tests"]
fn child() {
    let scenario = Ends::parse_from(["ends", "--json", "--seed", "1"]);
    let args: Vec<OsString> = ["ublk-torture", "ends", "--json"].map(OsString::from).into();
    std::process::exit(runner::run("ends", &scenario, None, &args).into());
}

fn start(ending: &str) -> Child {
    Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "child", "--ignored", "--nocapture"])
        .env(VARIABLE, ending)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts")
}

/// The exit status, and the last event.
fn ended(output: &Output) -> (Option<i32>, Value) {
    let text = String::from_utf8_lossy(&output.stdout);
    let last = text.lines().rfind(|line| line.contains("\"event\"")).expect("an event");
    // The test framework may have written before the first line.
    (output.status.code(), serde_json::from_str(&last[last.find('{').expect("JSON")..]).expect("JSON"))
}

fn run(ending: &str) -> (Option<i32>, Value) {
    ended(&start(ending).wait_with_output().expect("ends"))
}

#[test]
fn work_done_is_a_pass_and_no_work_is_not() {
    let (code, verdict) = run("well");
    assert_eq!((code, &verdict["verdict"]), (Some(0), &"pass".into()));
    let (code, verdict) = run("idle");
    assert_eq!((code, &verdict["verdict"]), (Some(5), &"vacuous".into()));
}

#[test]
fn a_broken_promise_is_a_failure() {
    let (code, verdict) = run("broke");
    assert_eq!((code, &verdict["verdict"]), (Some(2), &"fail".into()));
    assert_eq!(verdict["repro"], "ublk-torture ends --seed 1");
}

#[test]
fn a_panic_is_a_bug_of_the_harness() {
    let (code, verdict) = run("panic");
    assert_eq!((code, &verdict["verdict"]), (Some(70), &"internal".into()));
}

/// A hang must never outlive its deadline by much, and says where every thread stood.
#[test]
fn a_hang_is_dumped_and_ends_the_process() {
    let began = Instant::now();
    let output = start("hang").wait_with_output().expect("ends");
    assert!(began.elapsed() < Duration::from_secs(30));
    let (code, verdict) = ended(&output);
    assert_eq!((code, &verdict["verdict"]), (Some(3), &"hang".into()));
    let text = String::from_utf8_lossy(&output.stdout);
    let hang = text.lines().find(|line| line.contains("\"event\":\"hang\"")).expect("a dump");
    let hang: Value = serde_json::from_str(hang).expect("JSON");
    assert_eq!(hang["what"], "work");
    assert!(hang["threads"].as_array().is_some_and(|threads| threads.len() >= 2), "{hang}");
}

#[test]
fn an_interrupted_run_is_judged_by_its_work() {
    let child = start("wait");
    std::thread::sleep(Duration::from_secs(1));
    let killed = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().expect("kill");
    assert!(killed.success());
    let (code, verdict) = ended(&child.wait_with_output().expect("ends"));
    assert_eq!((code, &verdict["verdict"]), (Some(0), &"pass".into()));
    assert_eq!(verdict["evidence"]["interrupted"], 1);
}
