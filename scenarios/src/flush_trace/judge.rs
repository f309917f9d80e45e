//! Whether what was seen is as it has to be.

use std::time::Duration;

use ublkit_harness::OpKind;

use super::kernel::Request;
use super::matching::Served;
use super::numbers::{Numbers, duration, sentence};
use super::story::Story;
use crate::context::Context;
use crate::scenario::Failure;
use crate::units::format_rounded;

/// How many of a kind are listed.
const LISTED: usize = 8;

/// What is judged beside the story itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// The device has a volatile cache: what is to be durable takes a flush.
    pub(super) flushes: bool,
    /// The most that the server may take of the quickest tenth of the requests.
    pub(super) server_delay: Duration,
}

/// Judges a run. What was done is counted as evidence first.
pub(super) fn judge(context: &Context, story: &Story, numbers: &Numbers, rules: Rules) -> Result<(), Failure> {
    count(context, story);
    records(story)?;
    calls(story)?;
    durability(story, rules)?;
    server(story, numbers, rules)
}

fn count(context: &Context, story: &Story) {
    let evidence = context.evidence();
    let recording = &story.recording;
    let flushes = recording.records.iter().filter(|call| call.kind == OpKind::Flush).count();
    let in_time = story.matching.served.iter().filter(|served| matches!(served, Served::InTime(_))).count();
    let durable = story.phases.iter().flat_map(|phase| &phase.waits).filter(|wait| wait.durable).count();
    evidence.add("calls_recorded", recording.records.len() as u64);
    evidence.add("calls_not_recorded", recording.overflow);
    evidence.add("recording_whole", u64::from(recording.overflow == 0 && story.requests.lost == 0));
    evidence.add("flushes_recorded", flushes as u64);
    evidence.add("kernel_requests", story.requests.all.len() as u64);
    evidence.add("requests_matched", in_time as u64);
    evidence.add("kernel_events_lost", story.requests.lost);
    evidence.add("durable_calls", durable as u64);
    evidence.add("phases", story.phases.len() as u64);
    evidence.add("recording_cost_ns", recording.cost_ns);
    evidence.add("time_attributed_percent", attributed_percent(story));
}

/// How much of the time has a reason that both sides agree on. A call that no request asked for is a contradiction.
fn attributed_percent(story: &Story) -> u64 {
    let total: u64 = story.phases.iter().map(|phase| phase.span.len()).sum();
    let unasked: u64 = story
        .matching
        .unasked
        .iter()
        .map(|call| &story.recording.records[*call])
        .filter(|call| story.phases.iter().any(|phase| call.began >= phase.span.from && call.began < phase.span.to))
        .map(|call| call.ended - call.began)
        .sum();
    (total.saturating_sub(unasked) * 100).checked_div(total).unwrap_or(0)
}

fn describe(request: &Request) -> String {
    let place = if request.len == 0 {
        String::new()
    } else {
        format!(" of {} at {}", format_rounded(request.len), request.offset)
    };
    format!("{}{place}", request.kind)
}

/// Every call left a record, or is counted among those that found no room.
fn records(story: &Story) -> Result<(), Failure> {
    let recording = &story.recording;
    let seen = recording.recorded_ever + recording.overflow;
    if seen == recording.calls {
        return Ok(());
    }
    let what = format!(
        "the backend was called {} times; {} calls are recorded and {} are counted as not recorded",
        recording.calls, recording.recorded_ever, recording.overflow
    );
    Err(Failure::broke("records", what))
}

/// Each request of the kernel reached the backend before it was told to be done.
fn calls(story: &Story) -> Result<(), Failure> {
    if story.recording.overflow > 0 || story.requests.lost > 0 {
        // Then there is no telling; the evidence says so.
        return Ok(());
    }
    let pairs = || story.requests.all.iter().zip(&story.matching.served);
    let mut detail = Vec::new();
    let mut never = 0;
    let mut late = 0;
    for (request, served) in pairs() {
        match served {
            Served::Never => {
                never += 1;
                detail.push(format!("{}: the backend was never called", describe(request)));
            }
            Served::Late(call) => {
                late += 1;
                let ended = story.recording.records[*call].ended;
                let after = ended.saturating_sub(request.completed.unwrap_or(ended));
                let began = if story.recording.records[*call].began > request.completed.unwrap_or(u64::MAX) {
                    "began and ended"
                } else {
                    "ended"
                };
                detail.push(format!(
                    "{}: its call {began} {} after it was completed",
                    describe(request),
                    duration(after)
                ));
            }
            Served::InTime(_) | Served::Open => {}
        }
    }
    if never + late == 0 {
        return Ok(());
    }
    let kinds = |kind: OpKind| {
        pairs()
            .filter(|(request, served)| request.kind == kind && !matches!(served, Served::InTime(_) | Served::Open))
            .count()
    };
    let what = format!(
        "{} of {} requests were completed without the backend: {never} never reached it, {late} reached it too late; {} are flushes, {} FUA writes",
        never + late,
        story.requests.all.len(),
        kinds(OpKind::Flush),
        kinds(OpKind::WriteFua),
    );
    let mut all = overtaken(story);
    all.truncate(LISTED);
    detail.truncate(LISTED);
    all.extend(detail);
    Err(Failure::broke_with("flush", what, all))
}

fn overtaken(story: &Story) -> Vec<String> {
    let pairs = story.matching.overtaken(&story.requests.all, &story.recording.records);
    let line = |(_, write): &(usize, usize)| {
        format!("a flush reached the backend before the {} that it covers", describe(&story.requests.all[*write]))
    };
    pairs.iter().map(line).collect()
}

/// What an application was told to be durable had been written and flushed when it was told.
fn durability(story: &Story, rules: Rules) -> Result<(), Failure> {
    if story.recording.overflow > 0 {
        return Ok(());
    }
    for phase in &story.phases {
        // The last of them covers everything that was written.
        let Some(promise) = phase.waits.iter().rfind(|wait| wait.durable) else { continue };
        let ended_by = |time: u64| {
            let calls = story.calls_in(phase.span);
            let written = calls.filter(|call| call.kind == OpKind::Write && call.ok && call.ended <= time);
            written.map(|call| call.len).sum::<u64>()
        };
        let (name, phase_name) = (&promise.name, phase.kind.name());
        let written = ended_by(promise.span.to);
        if written < phase.written {
            let what = format!(
                "{phase_name}: {name} returned when {} of {} had reached the backend",
                format_rounded(written),
                format_rounded(phase.written)
            );
            return Err(Failure::broke("flush", what));
        }
        let flushed = story
            .calls_in(promise.span)
            .filter(|call| matches!(call.kind, OpKind::Flush | OpKind::WriteFua) && call.ok)
            .filter(|call| call.began >= promise.span.from && call.ended <= promise.span.to)
            .any(|call| ended_by(call.began) >= phase.written);
        if rules.flushes && !flushed {
            let what = format!(
                "{phase_name}: {name} returned, and after the last of {} no flush and no FUA write had reached the backend",
                format_rounded(phase.written)
            );
            return Err(Failure::broke("flush", what));
        }
    }
    Ok(())
}

/// The server does not sit on requests. A machine that is busy with other things delays many, but not nine in ten: what is
/// asked is of the quickest tenth, so that load alone is never a failure.
fn server(story: &Story, numbers: &Numbers, rules: Rules) -> Result<(), Failure> {
    let limit = rules.server_delay.as_nanos() as u64;
    if numbers.server.count == 0 || numbers.server.p10 <= limit {
        return Ok(());
    }
    let shares = numbers.shares_ns;
    let what = format!(
        "the server keeps requests: nine in ten for {} or more, beside the call of the backend (--server-delay allows {}); of the time it has {:.0} %, the backend {:.0} %",
        duration(numbers.server.p10),
        duration(limit),
        shares.percent(shares.before + shares.after),
        shares.percent(shares.backend)
    );
    let gaps = numbers.phases.iter().flat_map(|phase| {
        let server = phase.largest_gaps.iter().filter(|gap| gap.mostly.is_server());
        server.map(|gap| format!("{}: {}", phase.name, sentence(gap)))
    });
    let mut detail = vec![format!("{} phases, {} requests", story.phases.len(), numbers.server.count)];
    detail.extend(gaps.take(LISTED));
    Err(Failure::broke_with("server-delay", what, detail))
}
