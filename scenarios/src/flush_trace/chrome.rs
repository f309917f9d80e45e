//! The trace for trace viewers: JSON in the trace-event format, which Perfetto and `chrome://tracing` open.
//!
//! Three processes: the application with its system calls, the kernel with the requests that the driver had, and the server
//! with the calls of the backend on each thread and, on a track of its own, who had the work. Requests overlap as they
//! will and so are asynchronous events; everything else is complete events, which on one track never overlap. Times are in
//! microseconds from the beginning of the first phase.

use serde_json::{Value, json};

use super::attribution::Span;
use super::story::Story;

const APPLICATION: u32 = 1;
const KERNEL: u32 = 2;
const SERVER: u32 = 3;
/// Threads of the server follow this one.
const WHO: u32 = 1;

/// The whole trace.
pub(super) fn trace(story: &Story) -> Value {
    let origin = story.phases.iter().map(|phase| phase.span.from).min().unwrap_or(0);
    let end = story.phases.iter().map(|phase| phase.span.to).max().unwrap_or(0);
    let whole = Span::new(origin, end);
    let us = |at: u64| at.saturating_sub(origin) as f64 / 1e3;
    let complete = |name: &str, category: &str, (pid, tid): (u32, u32), span: Span, args: Value| {
        json!({"ph": "X", "name": name, "cat": category, "pid": pid, "tid": tid,
            "ts": us(span.from), "dur": span.len() as f64 / 1e3, "args": args})
    };
    let mut events = names(story);
    for phase in &story.phases {
        let args = json!({"round": phase.round, "about": phase.kind.about()});
        events.push(complete(phase.kind.name(), "phase", (APPLICATION, 1), phase.span, args));
        for wait in &phase.waits {
            let args = json!({"durable": wait.durable});
            events.push(complete(&wait.name, "system call", (APPLICATION, 2), wait.span, args));
        }
        for stretch in &phase.stretches {
            events.push(complete(stretch.why.name(), "who", (SERVER, WHO), stretch.span, json!({})));
        }
    }
    for call in story.calls_in(whole).filter(|call| call.began >= origin) {
        let args = json!({"offset": call.offset, "bytes": call.len, "ok": call.ok});
        let track = (SERVER, WHO + 1 + u32::from(call.thread));
        events.push(complete(&call.kind.to_string(), "call", track, Span::new(call.began, call.ended), args));
    }
    let mut levels: Vec<(u64, i64)> = Vec::new();
    let requests = story.requests_in(whole).filter(|request| request.issued >= origin);
    for (index, request) in requests.enumerate() {
        let completed = request.completed.unwrap_or(end).max(request.issued);
        let event = |ph: &str, at: u64, args: Value| {
            json!({"ph": ph, "name": request.kind.to_string(), "cat": "request", "id": format!("{index:#x}"),
                "pid": KERNEL, "tid": 1, "ts": us(at), "args": args})
        };
        let args = json!({"offset": request.offset, "bytes": request.len, "error": request.error});
        events.push(event("b", request.issued, args));
        events.push(event("e", completed, json!({})));
        levels.extend([(request.issued, 1), (completed, -1)]);
    }
    levels.sort_unstable();
    let mut level = 0;
    for (at, change) in levels {
        level += change;
        events.push(json!({"ph": "C", "name": "in flight", "pid": KERNEL, "tid": 1, "ts": us(at), "args": {"requests": level}}));
    }
    json!({
        "traceEvents": events,
        "displayTimeUnit": "ns",
        "otherData": {
            "program": "ublk-torture flush-trace",
            "kernel": story.kernel_release,
            "device": story.device,
            "seed": story.seed.to_string(),
        },
    })
}

/// What processes and tracks are called, and how they are sorted.
fn names(story: &Story) -> Vec<Value> {
    let mut events = Vec::new();
    let process = [(APPLICATION, "application"), (KERNEL, "kernel: requests in flight"), (SERVER, "server")];
    for (pid, name) in process {
        events.push(json!({"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}));
        events.push(
            json!({"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}}),
        );
    }
    let mut tracks = vec![
        (APPLICATION, 1, "phase".to_owned()),
        (APPLICATION, 2, "system calls".to_owned()),
        (KERNEL, 1, "block layer".to_owned()),
        (SERVER, WHO, "who has the work".to_owned()),
    ];
    let threads = story.recording.threads.iter().zip(WHO + 1..);
    tracks.extend(threads.map(|(name, tid)| (SERVER, tid, format!("backend, {name}"))));
    for (pid, tid, name) in tracks {
        events.push(json!({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}));
        events.push(
            json!({"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}),
        );
    }
    events
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use ublkit_harness::OpKind;

    use super::super::attribution::Why;
    use super::super::story::tests::story;
    use super::*;

    /// Every name that a complete or asynchronous event may have, for whoever reads the trace by program.
    fn known_names() -> Vec<String> {
        OpKind::ALL.iter().map(ToString::to_string).chain(Why::ALL.iter().map(|why| why.name().to_owned())).collect()
    }

    /// What the format asks for: "Trace Event Format", the document that Perfetto and `chrome://tracing` go by.
    fn check(whole: &Value) -> BTreeMap<String, usize> {
        let events = whole["traceEvents"].as_array().expect("an array of events");
        assert!(matches!(whole["displayTimeUnit"].as_str(), Some("ms" | "ns")));
        let mut count = BTreeMap::new();
        let mut named = BTreeSet::new();
        let mut tracks: BTreeMap<(u64, u64), Vec<(f64, f64)>> = BTreeMap::new();
        let mut open: BTreeMap<String, f64> = BTreeMap::new();
        for event in events {
            let number = |key: &str| event[key].as_f64().unwrap_or_else(|| panic!("{key} in {event}"));
            let (ph, name) = (event["ph"].as_str().expect("ph"), event["name"].as_str().expect("name"));
            let track = (event["pid"].as_u64().expect("pid"), event["tid"].as_u64().expect("tid"));
            assert!(event["args"].is_object(), "{event}");
            *count.entry(ph.to_owned()).or_default() += 1;
            if ph != "M" {
                assert!(number("ts") >= 0.0, "{event}");
            }
            match ph {
                "M" => {
                    match name {
                        "process_name" | "thread_name" => assert!(event["args"]["name"].is_string(), "{event}"),
                        "process_sort_index" | "thread_sort_index" => {
                            assert!(event["args"]["sort_index"].is_u64(), "{event}");
                        }
                        other => panic!("no such metadata: {other}"),
                    }
                    named.insert((name.to_owned(), track));
                }
                "X" => {
                    assert!(number("dur") >= 0.0, "{event}");
                    tracks.entry(track).or_default().push((number("ts"), number("ts") + number("dur")));
                }
                "b" => {
                    let id = format!("{} {}", event["cat"].as_str().expect("cat"), event["id"].as_str().expect("id"));
                    assert!(open.insert(id, number("ts")).is_none(), "begun twice: {event}");
                }
                "e" => {
                    let id = format!("{} {}", event["cat"].as_str().expect("cat"), event["id"].as_str().expect("id"));
                    let began = open.remove(&id).unwrap_or_else(|| panic!("not begun: {event}"));
                    assert!(began <= number("ts"), "{event}");
                }
                "C" => assert!(event["args"]["requests"].as_i64().is_some_and(|level| level >= 0), "{event}"),
                other => panic!("no such phase: {other}"),
            }
            if ph == "X" || ph == "b" {
                assert!(named.contains(&("thread_name".to_owned(), track)), "a track without a name: {event}");
                assert!(named.contains(&("process_name".to_owned(), (track.0, 0))), "{event}");
            }
        }
        assert!(open.is_empty(), "not ended: {open:?}");
        for (track, mut spans) in tracks {
            // On one track complete events may nest and may follow each other; half an overlap is dropped by viewers.
            spans.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.total_cmp(&a.1)));
            let mut stack: Vec<f64> = Vec::new();
            for (from, to) in spans {
                while stack.last().is_some_and(|end| *end <= from + 1e-6) {
                    stack.pop();
                }
                assert!(stack.last().is_none_or(|end| to <= end + 1e-6), "events overlap on {track:?} at {from}");
                stack.push(to);
            }
        }
        count
    }

    #[test]
    fn the_trace_is_in_the_format() {
        let trace = trace(&story());
        // As a reader gets it.
        let read: Value = serde_json::from_str(&trace.to_string()).expect("JSON");
        let count = check(&read);
        assert_eq!((count["b"], count["e"], count["C"]), (3, 3, 6));
        assert!(count["X"] > 3 + 2 + 3, "{count:?}");
        let names = known_names();
        for event in read["traceEvents"].as_array().expect("events") {
            if matches!(event["cat"].as_str(), Some("call" | "request" | "who")) {
                assert!(names.iter().any(|name| event["name"] == *name), "{event}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "events overlap")]
    fn half_an_overlap_would_be_seen() {
        let mut story = story();
        story.recording.records[1].thread = 0;
        check(&trace(&story));
    }
}
