//! Bundles come back as they were written, and their page can be read.

use serde_json::json;

use super::*;
use crate::classify::{Classifier, Content, Expected};
use crate::event::Hang;
use crate::mismatch::{Mismatch, SectorDump};
use crate::plan::OpKind;
use crate::range::SectorRange;
use crate::script::{Act, Action, Recovery};
use crate::sector::{Pattern, SECTOR};

/// A directory that is removed when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("bundle-{}-{}", std::process::id(), Seed::from_os()));
        fs::create_dir(&path).expect("a directory");
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _gone = fs::remove_dir_all(&self.0);
    }
}

fn setup() -> Setup {
    Setup {
        bytes: 64 << 10,
        logical_block: 4096,
        max_io_bytes: 8192,
        queues: 1,
        queue_depth: 1,
        workers: 2,
        io_depth: 1,
        volatile_cache: true,
        fua: false,
        discard: false,
        discard_zeroes: false,
        write_zeroes: false,
        read_only: false,
        recovery: Recovery::None,
        merges: false,
        reorder: 0,
        memory_pressure: false,
        compressible: 0,
    }
}

fn op(worker: u32, kind: OpKind, first: u64, sectors: u64) -> Action {
    Action { worker, act: Act::Op { kind, range: SectorRange::new(first, sectors) } }
}

fn script(actions: Vec<Action>) -> Script {
    let mutant = Some("lost-write:1".parse().expect("a mutant"));
    let faults = "write rate 1/1000: error EIO after".parse().expect("a rule");
    Script { version: crate::script::VERSION, seed: Seed::new(42), setup: setup(), mutant, faults, actions }
}

/// Sector 9 of a device holds `found`, and generation 2 should be there.
fn mismatch(found: &[u8; SECTOR]) -> Event {
    let allowed = vec![Content::Written(2)];
    let expected = Expected { allowed, previous: Some(Content::Written(1)), newest: 2 };
    let pattern = Pattern::new(42, 0);
    let class = Classifier { pattern: &pattern, foreign: &[], device_sectors: 128 }.classify(found, 9, &expected);
    let past = |op, kind, generation| {
        json!({"worker": 1, "op": op, "kind": kind, "range": {"first": 8, "sectors": 8}, "generation": generation,
               "outcome": "done"})
    };
    let mismatch: Mismatch = serde_json::from_value(json!({
        "oracle": "linear",
        "worker": 1,
        "op": 1,
        "range": {"first": 8, "sectors": 8},
        "sector": 9,
        "class": class,
        "expected": expected,
        "got": SectorDump::new(found),
        "wrong_sectors": {"lost": 7, "torn": 1},
        "history": [past(0, "write", json!(1)), past(0, "write", json!(2)), past(1, "read", json!(null))],
    }))
    .expect("a mismatch");
    mismatch.into()
}

fn sector(lba: u64, generation: u32) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    Pattern::new(42, 0).fill_sector(&mut bytes, lba, generation);
    bytes
}

fn bundle(event: &Event) -> Bundle {
    let failure = |after_ops| Failure { oracle: Oracle::Linear, event: event.clone(), after_ops };
    let small = vec![op(0, OpKind::Write, 8, 8), op(1, OpKind::Write, 8, 8), op(1, OpKind::Read, 8, 8)];
    Bundle {
        scenario: "torture".to_owned(),
        found_on: FoundOn::Served([("backend".to_owned(), json!("medium"))].into()),
        device: 0,
        failure: failure(4711),
        script: script(small.iter().cycle().take(5000).copied().collect()),
        shrunk: Some(Smaller {
            script: script(small),
            failure: failure(3),
            rate: Rate { failed: 97, of: 100 },
            runs: 412,
            stop: Stop::Smallest,
        }),
        repro: "ublk-torture torture --seed 42".to_owned(),
        versions: [("ublkit".to_owned(), "0.1.0".to_owned())].into(),
        kernel: "6.18.15".to_owned(),
        events: (0..5).map(|n| format!("{{\"event\":\"note\",\"text\":\"{n}\"}}")).collect(),
        threads: Vec::new(),
        kernel_log: vec!["[1.0] I/O error, dev ublkb0, sector 9".to_owned()],
    }
}

#[test]
fn the_page_says_what_broke_first() {
    let mut found = sector(9, 1);
    found[..256].copy_from_slice(&sector(9, 2)[..256]);
    found[504..].fill(0);
    let page = bundle(&mismatch(&found)).report();
    let lines: Vec<&str> = page.lines().collect();
    assert!(lines.len() <= 60 && lines.iter().all(|line| line.chars().count() <= 120), "{page}");
    let mut rest = lines.iter();
    // In this order, with anything between them.
    for line in [
        "torture: partial: 32 of 64 words are right, 64 name an origin",
        "  where     sector 9 (byte 4608), in sectors 8+8 read by worker 1 (its #1)",
        "  expected  generation 2, in place of generation 1",
        "  in all    7 lost, 1 torn of 8 sectors",
        "  oracle    linear",
        "  fails     with 97 of 100 seeds",
        "Show it again (the script alone: ublk-torture replay DIRECTORY, the one that this page is in)",
        "  ublk-torture torture --seed 42",
        "The smallest script that fails: 3 of 5000 actions (shrunk.json; 412 runs, nothing more can be taken away)",
        "    1. worker 0 writes sectors 8+8                 #0",
        "    2. worker 1 writes sectors 8+8                 #0",
        "    3. worker 1 reads sectors 8+8                  #1  <- finds it",
        "What was done to sector 9, the oldest first (#: which operation of its worker)",
        "Words of sector 9 that differ (8 bytes each, as they lie there)",
        "Faults",
        "  planted bug lost-write:1",
        "Setup",
        "The run that it was found in",
        "  after 4711 operations: partial: 32 of 64 words are right, 64 name an origin (linear)",
        "Machine",
        "  kernel 6.18.15, ublkit 0.1.0",
        "Kernel log",
        "  [1.0] I/O error, dev ublkb0, sector 9",
    ] {
        assert!(rest.any(|there| *there == line), "{line:?} is missing, or comes too early:\n{page}");
    }
    let hex = |range: std::ops::Range<usize>, bytes: &[u8]| String::from(SectorDump::new(&bytes[range]));
    let row = lines.iter().find(|line| line.starts_with("  32-62")).expect("a run of words");
    assert!(row.contains(&hex(256..264, &found)) && row.ends_with(&hex(256..264, &sector(9, 2))), "{row}");
    assert!(row.contains("generation 1 of this sector"), "{row}");
    assert!(page.contains("  63       0000000000000000  zero "), "{page}");
}

#[test]
fn words_are_decoded() {
    let page = |found: &[u8; SECTOR]| bundle(&mismatch(found)).report();
    assert!(page(&sector(17, 5)).contains(" sector 17, generation 5 "));
    assert!(page(&sector(18, 5)).contains(" sector 18, generation 5 "));
    let mut flipped = sector(9, 2);
    flipped[100] ^= 0x11;
    let flipped = page(&flipped);
    assert!(flipped.contains("  12       ") && flipped.contains(" right but for 2 bits "), "{flipped}");
    assert!(page(&[0xa5; SECTOR]).contains(" nothing that was written "));
    let mut shifted = [0; SECTOR];
    shifted[8..].copy_from_slice(&sector(9, 2)[..504]);
    let shifted = page(&shifted);
    assert!(shifted.contains(" sector 9, generation 2, its word 0 ") && shifted.contains("… and "), "{shifted}");
}

#[test]
fn findings_and_hangs_have_pages_too() {
    let finding = Event::finding("errors", "EIO was seen that nobody injected");
    let page = Bundle { shrunk: None, ..bundle(&finding) }.report();
    assert!(page.starts_with("torture: EIO was seen that nobody injected\n"), "{page}");
    assert!(page.contains("The script: 5000 actions (script.json; not shrunk)\n  … 4975 before\n"), "{page}");
    assert!(page.contains("\n  5000. worker 1 writes sectors 8+8"), "{page}");
    assert!(page.lines().count() < 50);
    let stuck = ThreadDump { pid: 1, tid: 2, comm: "reader".to_owned(), ..ThreadDump::default() };
    let hang = Hang {
        what: "closing the device".to_owned(),
        deadline_ms: 5000,
        threads: vec![stuck],
        notes: vec!["3 requests in flight".to_owned()],
    };
    let page = bundle(&Event::Hang(hang)).report();
    assert!(page.starts_with("torture: closing the device did not end within 5.0 s\n\n  3 requests in flight\n"));
    assert!(page.contains("\nThreads\n  1/2 reader"), "{page}");
}

#[test]
fn bundles_come_back() {
    let scratch = Scratch::new();
    let dir = scratch.0.join("failures/torture-42");
    let whole = bundle(&mismatch(&sector(9, 1)));
    assert_eq!(whole.write(&dir), Ok(dir.clone()));
    assert_eq!(Bundle::load(&dir), Ok(whole.clone()));
    assert_eq!(fs::read_to_string(dir.join("report.txt")).ok(), Some(whole.report()));
    let second = Bundle { shrunk: None, events: Vec::new(), kernel_log: Vec::new(), ..whole.clone() };
    let elsewhere = scratch.0.join("failures/torture-42-2");
    assert_eq!(second.write(&dir), Ok(elsewhere.clone()), "what is there is not overwritten");
    assert_eq!(Bundle::load(&elsewhere), Ok(second));
    assert_eq!(Bundle::load(&dir), Ok(whole.clone()));
    assert!(!elsewhere.join("shrunk.json").exists() && !elsewhere.join("events.jsonl").exists());
    let many = Bundle { events: (0..EVENTS_KEPT + 5).map(|n| n.to_string()).collect(), ..whole };
    let dir = many.write(&dir).expect("a third");
    assert_eq!(
        Bundle::load(&dir).map(|bundle| (bundle.events.len(), bundle.events[0].clone())),
        Ok((EVENTS_KEPT, "5".to_owned()))
    );
}

#[test]
fn a_bundle_that_was_made_small_meanwhile_takes_its_own_place() {
    let scratch = Scratch::new();
    let whole = bundle(&mismatch(&sector(9, 1)));
    let dir = Bundle { shrunk: None, ..whole.clone() }.write(&scratch.0.join("x")).expect("a bundle");
    assert!(Bundle::load(&dir).is_ok_and(|bundle| bundle.shrunk.is_none()));
    whole.rewrite(&dir).expect("it is there");
    assert_eq!(Bundle::load(&dir), Ok(whole));
}

#[test]
fn a_bundle_of_the_first_version_was_found_on_the_simulator() {
    let scratch = Scratch::new();
    let whole = Bundle { found_on: FoundOn::Simulator, ..bundle(&mismatch(&sector(9, 1))) };
    let dir = whole.write(&scratch.0.join("x")).expect("a bundle");
    let mut about: Value =
        serde_json::from_str(&fs::read_to_string(dir.join(ABOUT)).expect("it was written")).expect("json");
    about["version"] = json!(1);
    assert_eq!(about.as_object_mut().and_then(|about| about.remove("found_on")), Some(json!("simulator")));
    fs::write(dir.join(ABOUT), about.to_string()).expect("a file");
    assert_eq!(Bundle::load(&dir), Ok(whole));
}

#[test]
fn what_is_no_bundle_is_refused() {
    let scratch = Scratch::new();
    let dir = bundle(&mismatch(&sector(9, 1))).write(&scratch.0.join("x")).expect("a bundle");
    let about = dir.join(ABOUT);
    let good = fs::read_to_string(&about).expect("it was written");
    let refuse = |text: &str, why: &str| {
        fs::write(&about, text).expect("a file");
        let error = Bundle::load(&dir).expect_err(why).to_string();
        assert!(error.contains(why) && error.contains("bundle"), "{error}");
    };
    refuse(
        &good.replace("\"version\": 2,", "\"version\": 7,"),
        "version 7; this program reads versions 1 to 2: use the",
    );
    refuse(
        &good.replace("\"version\": 2,", "\"version\": 0,"),
        "version 0; this program reads versions 1 to 2: use the",
    );
    refuse(&good.replace("\"served\"", "\"found\""), "unknown variant `found`");
    refuse("{}", "describes no bundle: missing field `version`");
    refuse(&good.replace("\"repro\"", "\"again\""), "unknown field `again`");
    refuse(&good.replace("\"script.json\"", "\"../script.json\""), "not the name of a file in the bundle");
    refuse(&good.replace("\"script.json\"", "\"other.json\""), "other.json: cannot read the script");
    fs::write(&about, good).expect("a file");
    fs::remove_file(dir.join(EVENTS)).expect("it is there");
    let error = Bundle::load(&dir).expect_err("a file is gone").to_string();
    assert!(error.contains("events.jsonl") && error.contains("not whole"), "{error}");
    let error = Bundle::load(&scratch.0).expect_err("nothing there").to_string();
    assert!(error.contains("give the directory that has a bundle.json"), "{error}");
    let error = Bundle::load(&about).expect_err("a file").to_string();
    assert!(error.contains("give the directory that has a bundle.json"), "{error}");
    let error = bundle(&Event::note("x")).write(&about.join("below")).expect_err("a file in the way").to_string();
    assert!(error.contains("cannot make the directory") && error.contains("name another one"), "{error}");
}
