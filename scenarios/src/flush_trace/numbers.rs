//! What a run comes to: durations, throughput, latencies, the largest gaps. As JSON, and as a table.

use serde::Serialize;
use ublkit_harness::OpKind;

use super::attribution::{Gap, Shares, Why, gaps};
use super::story::{Phase, Story};
use crate::table::Table;
use crate::units::format_rounded;

/// How many of the largest gaps are told.
const GAPS: usize = 5;

/// How long some things took, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Latency {
    pub(super) count: usize,
    pub(super) p10: u64,
    pub(super) p50: u64,
    pub(super) p90: u64,
    pub(super) p99: u64,
    pub(super) max: u64,
}

impl Latency {
    pub(super) fn of(mut durations: Vec<u64>) -> Self {
        durations.sort_unstable();
        // The smallest that so many of them do not exceed.
        let rank = |percent: usize| {
            let index = (durations.len() * percent).div_ceil(100).max(1) - 1;
            durations.get(index).copied().unwrap_or(0)
        };
        Self {
            count: durations.len(),
            p10: rank(10),
            p50: rank(50),
            p90: rank(90),
            p99: rank(99),
            max: durations.last().copied().unwrap_or(0),
        }
    }
}

/// One kind of operation.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct OfKind {
    pub(super) kind: OpKind,
    pub(super) bytes: u64,
    /// Of the calls of the backend.
    pub(super) backend: Latency,
    /// Of the requests, from the driver's getting them to their completion.
    pub(super) kernel: Latency,
}

/// One phase.
#[derive(Clone, Debug, Serialize)]
pub(super) struct OfPhase {
    pub(super) name: &'static str,
    pub(super) about: &'static str,
    pub(super) round: u32,
    pub(super) duration_ns: u64,
    pub(super) calls: usize,
    pub(super) flushes: usize,
    pub(super) bytes: u64,
    /// Over the whole phase, and over the time when calls were running.
    pub(super) bytes_per_s: f64,
    pub(super) bytes_per_busy_s: f64,
    pub(super) shares_ns: Shares,
    /// Times in nanoseconds from the beginning of the phase.
    pub(super) largest_gaps: Vec<Gap>,
    /// System calls of the application, in order.
    pub(super) application: Vec<(String, u64)>,
}

/// Everything.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Numbers {
    pub(super) kernel_release: String,
    pub(super) seed: u64,
    pub(super) calls: u64,
    pub(super) recorded: usize,
    pub(super) overflow: u64,
    pub(super) recording_cost_ns: u64,
    /// From the driver's getting a request to the beginning of its call, and from the call's end to the completion, together.
    pub(super) server: Latency,
    pub(super) shares_ns: Shares,
    pub(super) kinds: Vec<OfKind>,
    pub(super) phases: Vec<OfPhase>,
}

impl Numbers {
    pub(super) fn of(story: &Story) -> Self {
        let phases: Vec<OfPhase> = story.phases.iter().map(|phase| of_phase(story, phase)).collect();
        let mut shares = Shares::default();
        for phase in &phases {
            shares.add(phase.shares_ns);
        }
        Self {
            kernel_release: story.kernel_release.clone(),
            seed: story.seed,
            calls: story.recording.calls,
            recorded: story.recording.records.len(),
            overflow: story.recording.overflow,
            recording_cost_ns: story.recording.cost_ns,
            server: Latency::of(story.server_delays()),
            shares_ns: shares,
            kinds: kinds(story),
            phases,
        }
    }

    /// The tables, a line each.
    pub(super) fn table(&self) -> Vec<String> {
        let mut phases = Table::new([
            "phase",
            "time",
            "calls",
            "flushes",
            "bytes",
            "bytes/s",
            "backend",
            "server",
            "kernel",
            "nothing",
            "largest gap",
        ]);
        for phase in &self.phases {
            let shares = phase.shares_ns;
            let percent = |part: u64| format!("{:.1} %", shares.percent(part));
            let gap = phase.largest_gaps.first();
            phases.row([
                phase.name.to_owned(),
                duration(phase.duration_ns),
                phase.calls.to_string(),
                phase.flushes.to_string(),
                format_rounded(phase.bytes),
                format_rounded(phase.bytes_per_s as u64),
                percent(shares.backend),
                percent(shares.before + shares.after),
                percent(shares.kernel),
                percent(shares.nothing),
                gap.map_or_else(String::new, |gap| format!("{} {}", duration(gap.span.len()), gap.mostly.name())),
            ]);
        }
        let four = |latency: Latency| [latency.p50, latency.p90, latency.p99, latency.max].map(duration).join(" / ");
        let mut operations =
            Table::new(["operation", "count", "backend p50 / p90 / p99 / max", "kernel p50 / p90 / p99 / max"]);
        for kind in &self.kinds {
            let count = kind.backend.count.to_string();
            operations.row([kind.kind.to_string(), count, four(kind.backend), four(kind.kernel)]);
        }
        operations.row(["server".to_owned(), self.server.count.to_string(), four(self.server)]);
        [phases, operations]
            .iter()
            .flat_map(|table| table.text().lines().map(str::to_owned).collect::<Vec<_>>())
            .collect()
    }
}

fn kinds(story: &Story) -> Vec<OfKind> {
    OpKind::ALL
        .into_iter()
        .map(|kind| {
            let calls: Vec<_> = story.calls_in_phases().filter(|call| call.kind == kind).collect();
            let requests = story.requests_in_phases().filter(|request| request.kind == kind);
            OfKind {
                kind,
                bytes: calls.iter().map(|call| call.len).sum(),
                backend: Latency::of(calls.iter().map(|call| call.ended - call.began).collect()),
                kernel: Latency::of(
                    requests.filter_map(|request| Some(request.completed? - request.issued)).collect(),
                ),
            }
        })
        .filter(|kind| kind.backend.count + kind.kernel.count > 0)
        .collect()
}

fn of_phase(story: &Story, phase: &Phase) -> OfPhase {
    let shares = Shares::of(&phase.stretches);
    let calls: Vec<_> = story.calls_in(phase.span).collect();
    let bytes = calls.iter().map(|call| call.len).sum::<u64>();
    let per_s = |time: u64| bytes as f64 * 1e9 / time.max(1) as f64;
    let mut largest = gaps(&phase.stretches);
    largest.truncate(GAPS);
    for gap in &mut largest {
        gap.span.from -= phase.span.from;
        gap.span.to -= phase.span.from;
    }
    OfPhase {
        name: phase.kind.name(),
        about: phase.kind.about(),
        round: phase.round,
        duration_ns: phase.span.len(),
        calls: calls.len(),
        flushes: calls.iter().filter(|call| call.kind == OpKind::Flush).count(),
        bytes,
        bytes_per_s: per_s(phase.span.len()),
        bytes_per_busy_s: per_s(shares.backend),
        shares_ns: shares,
        largest_gaps: largest,
        application: phase.waits.iter().map(|wait| (wait.name.clone(), wait.span.len())).collect(),
    }
}

/// A duration in the unit that suits it.
pub(super) fn duration(ns: u64) -> String {
    let ns = ns as f64;
    let (value, unit) = match ns {
        ns if ns < 1e3 => (ns, "ns"),
        ns if ns < 1e6 => (ns / 1e3, "µs"),
        ns if ns < 1e9 => (ns / 1e6, "ms"),
        ns => (ns / 1e9, "s"),
    };
    // Three digits say enough.
    let places = if unit == "ns" || value >= 100.0 { 0 } else { usize::from(value < 10.0) + 1 };
    format!("{value:.places$} {unit}")
}

/// A sentence about a gap.
pub(super) fn sentence(gap: &Gap) -> String {
    let parts: Vec<String> = Why::ALL
        .into_iter()
        .filter(|why| gap.shares.get(*why) > 0)
        .map(|why| format!("{} {:.0} %", why.name(), gap.shares.percent(gap.shares.get(why))))
        .collect();
    format!("{} at +{}: {}", duration(gap.span.len()), duration(gap.span.from), parts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let latency = Latency::of((1..=100).rev().collect());
        assert_eq!(latency, Latency { count: 100, p10: 10, p50: 50, p90: 90, p99: 99, max: 100 });
        assert_eq!(Latency::of(vec![7]), Latency { count: 1, p10: 7, p50: 7, p90: 7, p99: 7, max: 7 });
        assert_eq!(Latency::of(Vec::new()), Latency::default());
    }

    #[test]
    fn durations_have_a_unit_that_suits_them() {
        assert_eq!(
            [0, 999, 1_500, 99_900, 12_340_000, 123_456_789, 2_000_000_000].map(duration),
            ["0 ns", "999 ns", "1.50 µs", "99.9 µs", "12.3 ms", "123 ms", "2.00 s"]
        );
    }
}
