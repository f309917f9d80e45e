//! Which call of the backend served which request of the kernel, and whether it did so in time and in order.

use std::collections::HashMap;

use ublkit_harness::OpKind;

use super::kernel::Request;
use super::recorder::Record;

/// How far the kernel's times and the server's may be apart: the kernel prints whole microseconds, rounded down, and reads the
/// clock in a way that may be off by a little while it is being adjusted.
const CLOCKS_APART_NS: u64 = 10_000;

/// The call that served a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Served {
    /// While the request was under way, as it should be.
    InTime(usize),
    /// It ended after the request had been completed.
    Late(usize),
    /// None was recorded.
    Never,
    /// The request was under way, or failed.
    Open,
}

/// What belongs together: for each request the call that served it.
#[derive(Clone, Debug, Default)]
pub(super) struct Matching {
    pub(super) served: Vec<Served>,
    /// Calls that no request asked for.
    pub(super) unasked: Vec<usize>,
}

impl Matching {
    /// Matches requests, in the order of their issue, with calls, in the order of their beginning.
    pub(super) fn new(requests: &[Request], calls: &[Record]) -> Self {
        let key = |kind: OpKind, offset: u64, len: u64| (kind, offset, len);
        let mut waiting: HashMap<_, Vec<usize>> = HashMap::new();
        for (index, call) in calls.iter().enumerate().rev() {
            waiting.entry(key(call.kind, call.offset, call.len)).or_default().push(index);
        }
        let mut served = vec![Served::Open; requests.len()];
        // First what fits, and only then what does not: a call that is missing must not shift those after it.
        for (request, served) in requests.iter().zip(&mut served) {
            let Some(completed) = request.completed.filter(|_| request.error == 0) else { continue };
            *served = Served::Never;
            let Some(candidates) = waiting.get_mut(&key(request.kind, request.offset, request.len)) else { continue };
            let fits = |call: &Record| {
                call.began + CLOCKS_APART_NS >= request.issued && call.ended <= completed + CLOCKS_APART_NS
            };
            // The earliest is the last.
            if let Some(place) = candidates.iter().rposition(|index| fits(&calls[*index])) {
                *served = Served::InTime(candidates.remove(place));
            }
        }
        for (request, served) in requests.iter().zip(&mut served) {
            if *served != Served::Never {
                continue;
            }
            let Some(candidates) = waiting.get_mut(&key(request.kind, request.offset, request.len)) else { continue };
            let after = |call: &Record| call.ended > request.issued;
            if let Some(place) = candidates.iter().rposition(|index| after(&calls[*index])) {
                *served = Served::Late(candidates.remove(place));
            }
        }
        // What an unfinished or failed request may have asked for is not unasked.
        for request in requests.iter().zip(&served).filter(|(_, served)| **served == Served::Open) {
            let (Request { kind, offset, len, .. }, _) = request;
            if let Some(candidates) = waiting.get_mut(&key(*kind, *offset, *len)) {
                candidates.pop();
            }
        }
        let mut unasked: Vec<usize> = waiting.into_values().flatten().collect();
        unasked.sort_unstable();
        Self { served, unasked }
    }

    /// The call that served a request, in time or not.
    pub(super) fn call(&self, request: usize) -> Option<usize> {
        match self.served[request] {
            Served::InTime(call) | Served::Late(call) => Some(call),
            Served::Never | Served::Open => None,
        }
    }

    /// Flushes that the backend got before a write which they cover: one that the kernel had been told was done when it issued
    /// the flush. Pairs of requests, flush and write.
    pub(super) fn overtaken(&self, requests: &[Request], calls: &[Record]) -> Vec<(usize, usize)> {
        let mut found = Vec::new();
        for (flush, request) in requests.iter().enumerate() {
            let Some(flushed) = self.call(flush).filter(|_| request.kind == OpKind::Flush) else { continue };
            for (write, earlier) in requests.iter().enumerate().take(flush) {
                let writes = matches!(earlier.kind, OpKind::Write | OpKind::WriteFua | OpKind::WriteZeroes);
                let covered = earlier.completed.is_some_and(|completed| completed <= request.issued);
                let Some(written) = self.call(write).filter(|_| writes && covered) else { continue };
                if calls[written].ended > calls[flushed].began {
                    found.push((flush, write));
                }
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn request(kind: OpKind, offset: u64, issued: u64, completed: u64) -> Request {
        let len = if kind == OpKind::Flush { 0 } else { 4096 };
        Request { kind, issued: issued * MS, completed: Some(completed * MS), offset, len, error: 0 }
    }

    fn call(kind: OpKind, offset: u64, began: u64, ended: u64) -> Record {
        let len = if kind == OpKind::Flush { 0 } else { 4096 };
        Record { kind, began: began * MS, ended: ended * MS, offset, len, thread: 0, ok: true }
    }

    #[test]
    fn each_request_has_its_call_also_where_they_are_alike() {
        let requests = [request(OpKind::Write, 0, 0, 10), request(OpKind::Write, 0, 20, 30)];
        let calls = [call(OpKind::Write, 0, 2, 5), call(OpKind::Write, 0, 22, 25)];
        let matching = Matching::new(&requests, &calls);
        assert_eq!(matching.served, [Served::InTime(0), Served::InTime(1)]);
        assert!(matching.unasked.is_empty());
    }

    #[test]
    fn a_call_that_is_missing_shifts_nothing() {
        let requests = [request(OpKind::Write, 0, 0, 10), request(OpKind::Write, 0, 20, 30)];
        let matching = Matching::new(&requests, &[call(OpKind::Write, 0, 22, 25)]);
        assert_eq!(matching.served, [Served::Never, Served::InTime(0)]);
        let flags = Matching::new(&[request(OpKind::WriteFua, 0, 0, 10)], &[call(OpKind::Write, 0, 2, 5)]);
        assert_eq!((flags.served, flags.unasked), (vec![Served::Never], vec![0]), "durable or not is a difference");
    }

    #[test]
    fn what_comes_after_the_completion_is_late() {
        let matching = Matching::new(&[request(OpKind::Flush, 0, 0, 10)], &[call(OpKind::Flush, 0, 12, 13)]);
        assert_eq!(matching.served, [Served::Late(0)]);
    }

    #[test]
    fn a_flush_before_its_writes_is_found_and_one_beside_others_is_not() {
        let requests =
            [request(OpKind::Write, 0, 0, 1), request(OpKind::Write, 4096, 0, 30), request(OpKind::Flush, 0, 5, 20)];
        let right = [
            call(OpKind::Write, 0, 0, 1),
            call(OpKind::Flush, 0, 6, 7),
            // Not yet complete when the flush was issued: not covered by it.
            call(OpKind::Write, 4096, 8, 9),
        ];
        let matching = Matching::new(&requests, &right);
        assert_eq!(matching.overtaken(&requests, &right), []);
        let wrong = [call(OpKind::Flush, 0, 6, 7), call(OpKind::Write, 0, 8, 9), call(OpKind::Write, 4096, 9, 10)];
        let matching = Matching::new(&requests, &wrong);
        assert_eq!(matching.overtaken(&requests, &wrong), [(2, 0)]);
    }
}
