//! What users and scripts see of a run.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::*;
use crate::event::{Event, Hang, Progress, Run, StepFinished, StepStarted, VerdictLine};
use crate::outcome::Outcome;
use crate::range::SectorRange;
use crate::sector::{Pattern, SECTOR};
use crate::seed::Seed;
use crate::shadow::{Shadow, ShadowOptions};
use crate::threads::ThreadDump;
use crate::verdict::Verdict;

/// A writer whose bytes can be looked at from outside.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Shared {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }
}

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A writer that fails in a given way.
struct Broken(io::ErrorKind);

impl Write for Broken {
    fn write(&mut self, _bytes: &[u8]) -> io::Result<usize> {
        Err(self.0.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn verdict() -> Event {
    Event::Verdict(VerdictLine {
        scenario: "torture".to_owned(),
        seed: Seed::new(u64::MAX),
        verdict: Verdict::Fail,
        evidence: BTreeMap::from([("writes".to_owned(), 7), ("reads".to_owned(), 9)]),
        repro: "ublk-torture torture --seed 18446744073709551615".to_owned(),
    })
}

fn mismatch() -> Event {
    let region = SectorRange::new(0, 8);
    let mut shadow = Shadow::new(ShadowOptions {
        region,
        worker: 2,
        pattern: Arc::new(Pattern::new(1, 0)),
        foreign: Arc::new([]),
        device_sectors: 8,
        initially_zero: true,
    });
    let ticket = shadow.begin_write(5, region, &mut [0; 8 * SECTOR]);
    shadow.finish(ticket, Outcome::Done);
    shadow.verify(region, &[0; 8 * SECTOR]).expect_err("nothing was stored").into()
}

fn one_of_each() -> Vec<Event> {
    let progress =
        |elapsed_ms| Progress { what: "torture".to_owned(), elapsed_ms, fraction: Some(0.5), ..Progress::default() };
    vec![
        Event::Run(Run {
            scenario: "torture".to_owned(),
            seed: Seed::new(42),
            options: BTreeMap::from([("workers".to_owned(), 4.into())]),
            versions: BTreeMap::from([("ublkit".to_owned(), "0.1.0".to_owned())]),
            kernel: "6.12.1".to_owned(),
            features: vec!["user-copy".to_owned()],
            host: BTreeMap::new(),
        }),
        Event::StepStarted(StepStarted { name: "size".to_owned(), deadline_ms: 5000 }),
        Event::StepFinished(StepFinished {
            name: "size".to_owned(),
            ok: true,
            detail: "64 MiB".to_owned(),
            elapsed_ms: 3,
            deadline_ms: 5000,
        }),
        Event::Progress(progress(500)),
        Event::Progress(progress(10_500)),
        Event::Progress(progress(11_000)),
        mismatch(),
        Event::finding("flush", "an fsync never reached the backend"),
        Event::Hang(Hang {
            what: "close".to_owned(),
            deadline_ms: 30_000,
            threads: vec![ThreadDump {
                pid: 1,
                tid: 2,
                comm: "queue".to_owned(),
                state: "D".to_owned(),
                ..ThreadDump::default()
            }],
            notes: vec!["in flight: 3".to_owned()],
        }),
        Event::note("the device has no discard"),
        verdict(),
    ]
}

#[test]
fn the_verdict_line_is_the_contract() {
    let line = serde_json::to_string(&verdict()).expect("plain data");
    let contract = concat!(
        r#"{"event":"verdict","scenario":"torture","seed":18446744073709551615,"verdict":"fail","#,
        r#""evidence":{"reads":9,"writes":7},"repro":"ublk-torture torture --seed 18446744073709551615"}"#
    );
    assert_eq!(line, contract);
}

#[test]
fn exit_codes_are_the_contract() {
    let all =
        [Verdict::Pass, Verdict::Fail, Verdict::Hang, Verdict::Environment, Verdict::Vacuous, Verdict::Internal];
    assert_eq!(all.map(Verdict::exit_code), [0, 2, 3, 4, 5, 70]);
    for verdict in all {
        let word = serde_json::to_string(&verdict).expect("plain data");
        assert_eq!(word, format!("\"{verdict}\""));
    }
}

#[test]
fn every_event_survives_json() {
    let out = Shared::default();
    let mut reporter = JsonLines::new(out.clone());
    let events = one_of_each();
    for event in &events {
        reporter.report(event).expect("memory");
    }
    let text = out.text();
    assert!(text.ends_with('\n') && text.lines().all(|line| line.starts_with("{\"event\":\"")));
    let read: Vec<Event> = text.lines().map(|line| serde_json::from_str(line).expect("an event")).collect();
    assert_eq!(read, events);
    assert!(text.contains(r#""event":"step_finished","name":"size","ok":true"#), "{text}");
}

#[test]
fn a_log_is_quiet_and_plain() {
    let out = Shared::default();
    let mut reporter = Terminal::plain(out.clone());
    for event in one_of_each() {
        reporter.report(&event).expect("memory");
    }
    let text = out.text();
    assert!(
        text.starts_with("torture: seed 42\n  on: kernel 6.12.1, ublkit 0.1.0\n  features: user-copy\n"),
        "{text}"
    );
    for part in [
        "\n  ok    size (3 ms): 64 MiB\n",
        "\nmismatch: sector 0 (worker 2, checking 0+8): lost: ",
        "\n  2#5 write 0+8 generation 1 done",
        "\nflush: an fsync never reached the backend\n",
        "\nhang: close did not end within 30.0 s\n  1/2 queue D\n  in flight: 3\n",
        "\nnote: the device has no discard\n",
        "\nfail: torture, seed 18446744073709551615\n  evidence: reads 9, writes 7\n  repro: ublk-torture",
    ] {
        assert!(text.contains(part), "{part:?} in {text}");
    }
    assert_eq!(text.matches("torture: 0 operations").count(), 1, "{text}");
    assert!(!text.contains('\x1b'));
}

#[test]
fn colours_are_only_for_terminals() {
    let text = super::text::Text { colour: true }.lines(&verdict());
    assert!(text.is_some_and(|text| text.starts_with("\x1b[1;31mfail\x1b[0m: ")));
}

#[test]
fn every_reporter_sees_every_event_in_order() {
    let (collector, collected) = Collector::new();
    let (other, others) = Collector::new();
    let events = EventLoop::start(vec![Box::new(collector), Box::new(other)]).expect("a thread");
    thread::scope(|scope| {
        for worker in 0..4 {
            let sink = events.sink();
            scope.spawn(move || (0..50).for_each(|at| sink.send(Event::note(format!("{worker} {at}")))));
        }
    });
    let sink = events.sink();
    assert!(sink.flush(Duration::from_secs(60)));
    assert_eq!(collected.events().len(), 200);
    sink.send(verdict());
    assert!(events.finish().is_ok());
    sink.send(verdict());
    let seen = collected.events();
    assert_eq!(seen, others.events());
    assert_eq!((seen.len(), seen.last()), (201, Some(&verdict())));
    for worker in 0..4 {
        let of_worker: Vec<_> =
            seen.iter().filter(|event| format!("{event:?}").contains(&format!("\"{worker} "))).collect();
        assert!(of_worker.is_sorted_by_key(|event| format!("{event:?}").len()) && of_worker.len() == 50);
    }
}

/// `ublk-torture --json | head -1` is no failure; a full disk is.
#[test]
fn a_reader_may_go_away() {
    let (collector, collected) = Collector::new();
    let reporters: Vec<Box<dyn Reporter>> = vec![
        Box::new(JsonLines::new(Broken(io::ErrorKind::BrokenPipe))),
        Box::new(Terminal::plain(Broken(io::ErrorKind::BrokenPipe))),
        Box::new(JsonLines::new(Broken(io::ErrorKind::StorageFull))),
        Box::new(collector),
    ];
    let events = EventLoop::start(reporters).expect("a thread");
    for event in one_of_each() {
        events.sink().send(event);
    }
    let failures = events.finish().expect_err("one disk is full");
    assert_eq!(failures.iter().map(io::Error::kind).collect::<Vec<_>>(), [io::ErrorKind::StorageFull]);
    assert_eq!(collected.events(), one_of_each());
}

/// A reader who stopped reading cannot keep a hung process alive.
#[test]
fn flushing_is_bounded() {
    struct Stuck;
    impl Reporter for Stuck {
        fn report(&mut self, _event: &Event) -> io::Result<()> {
            loop {
                thread::park();
            }
        }
    }
    let events = EventLoop::start(vec![Box::new(Stuck)]).expect("a thread");
    events.sink().send(verdict());
    assert!(!events.sink().flush(Duration::from_millis(20)));
}
