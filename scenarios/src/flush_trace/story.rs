//! Everything that is known of a run: what applications did, what the kernel asked, what the backend did, and when.

use super::attribution::{Span, Stretch, attribute};
use super::kernel::{Request, Requests};
use super::matching::{Matching, Served};
use super::recorder::{Record, Recording};
use super::workload::{Kind, Played};

/// A system call of an application, or another thing that it did and that took time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wait {
    pub(super) name: String,
    pub(super) span: Span,
    /// Whether its return promises that what was written is durable.
    pub(super) durable: bool,
}

/// One phase of the workload, and what became of its time.
#[derive(Clone, Debug)]
pub(super) struct Phase {
    pub(super) kind: Kind,
    pub(super) round: u32,
    pub(super) span: Span,
    pub(super) waits: Vec<Wait>,
    /// Bytes that the application wrote.
    pub(super) written: u64,
    pub(super) stretches: Vec<Stretch>,
}

/// Everything that is known of a run.
#[derive(Clone, Debug)]
pub(super) struct Story {
    pub(super) kernel_release: String,
    pub(super) seed: u64,
    /// The device, in words.
    pub(super) device: String,
    pub(super) recording: Recording,
    pub(super) requests: Requests,
    pub(super) matching: Matching,
    pub(super) phases: Vec<Phase>,
}

impl Story {
    /// Puts together what was seen. Calls from before `since` are left out: the kernel was not watched yet.
    pub(super) fn new(
        (kernel_release, seed, device): (String, u64, String),
        mut recording: Recording,
        requests: Requests,
        played: Vec<Played>,
        since: u64,
    ) -> Self {
        recording.records.retain(|call| call.began >= since);
        let matching = Matching::new(&requests.all, &recording.records);
        let phases = played
            .into_iter()
            .map(|Played { kind, round, span, waits, written }| {
                let asleep: Vec<Span> = waits.iter().map(|wait| wait.span).collect();
                let stretches = attribute(span, &requests.all, &recording.records, &matching, &asleep);
                Phase { kind, round, span, waits, written, stretches }
            })
            .collect();
        Self { kernel_release, seed, device, recording, requests, matching, phases }
    }

    /// Calls that were running in `span`.
    pub(super) fn calls_in(&self, span: Span) -> impl Iterator<Item = &Record> {
        self.recording.records.iter().filter(move |call| call.began < span.to && call.ended > span.from)
    }

    /// Requests that were under way in `span`.
    pub(super) fn requests_in(&self, span: Span) -> impl Iterator<Item = &Request> {
        let all = self.requests.all.iter();
        all.filter(move |request| {
            request.issued < span.to && request.completed.is_none_or(|completed| completed > span.from)
        })
    }

    pub(super) fn calls_in_phases(&self) -> impl Iterator<Item = &Record> {
        self.phases.iter().flat_map(|phase| self.calls_in(phase.span))
    }

    pub(super) fn requests_in_phases(&self) -> impl Iterator<Item = &Request> {
        self.phases.iter().flat_map(|phase| self.requests_in(phase.span))
    }

    /// How long each request of the phases spent in the server, beside its call.
    pub(super) fn server_delays(&self) -> Vec<u64> {
        let in_phase = |request: &Request| {
            self.phases.iter().any(|Phase { span, .. }| (span.from..span.to).contains(&request.issued))
        };
        self.requests
            .all
            .iter()
            .zip(&self.matching.served)
            .filter(|(request, _)| in_phase(request))
            .filter_map(|(request, served)| match served {
                Served::InTime(call) => {
                    let call = &self.recording.records[*call];
                    let total = request.completed?.saturating_sub(request.issued);
                    Some(total.saturating_sub(call.ended - call.began))
                }
                _ => None,
            })
            .collect()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use ublkit_harness::OpKind;

    const MS: u64 = 1_000_000;

    /// A small run: one phase of 100 ms with two writes on two threads, which overlap, and a flush.
    pub(in super::super) fn story() -> Story {
        let request = |kind, offset, len, issued: u64, completed: u64| Request {
            kind,
            issued: issued * MS,
            completed: Some(completed * MS),
            offset,
            len,
            error: 0,
        };
        let call = |kind, offset, len, thread, began: u64, ended: u64| Record {
            kind,
            began: began * MS,
            ended: ended * MS,
            offset,
            len,
            thread,
            ok: true,
        };
        let requests = vec![
            request(OpKind::Write, 0, 4096, 1010, 1030),
            request(OpKind::Write, 8192, 4096, 1011, 1035),
            request(OpKind::Flush, 0, 0, 1050, 1060),
        ];
        let records = vec![
            call(OpKind::Write, 0, 4096, 0, 1012, 1028),
            call(OpKind::Write, 8192, 4096, 1, 1014, 1034),
            call(OpKind::Flush, 0, 0, 0, 1052, 1058),
        ];
        let recording = Recording {
            calls: 3,
            recorded_ever: 3,
            records,
            threads: vec!["ublk0-w0".to_owned(), "ublk0-w1".to_owned()],
            overflow: 0,
            cost_ns: 80,
        };
        let wait = |name: &str, from: u64, to: u64, durable| Wait {
            name: name.to_owned(),
            span: Span::new(from * MS, to * MS),
            durable,
        };
        let played = Played {
            kind: Kind::Fsync,
            round: 1,
            span: Span::new(1000 * MS, 1100 * MS),
            waits: vec![wait("write 8 KiB", 1001, 1005, false), wait("fsync <&>", 1006, 1070, true)],
            written: 8192,
        };
        let about = ("7.2.12".to_owned(), 1, "memory \"256 MiB\"".to_owned());
        Story::new(about, recording, Requests { all: requests, lost: 0 }, vec![played], 0)
    }

    #[test]
    fn a_story_is_put_together() {
        let story = story();
        assert_eq!(story.matching.served, [Served::InTime(0), Served::InTime(1), Served::InTime(2)]);
        assert_eq!(story.server_delays(), [4 * MS, 4 * MS, 4 * MS]);
        let phase = &story.phases[0];
        let mut shorter = story.clone();
        shorter.phases[0].span.to = 1040 * MS;
        assert_eq!(shorter.server_delays(), [4 * MS, 4 * MS], "the flush came when the phase was over");
        assert_eq!(phase.stretches.iter().map(|s| s.span.len()).sum::<u64>(), 100 * MS);
    }
}
