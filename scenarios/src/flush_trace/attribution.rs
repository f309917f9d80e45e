//! Why the backend was idle: who had the work, at each moment when no call was running.

use serde::Serialize;

use super::kernel::Request;
use super::matching::Matching;
use super::recorder::Record;

/// Who has the work. In the order of precedence where several are true of a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Why {
    /// A call of the backend is running.
    Backend,
    /// The driver has a request for which no call has begun: it is on its way to the server, or lies there.
    Before,
    /// A call has ended, and its request is not complete: it is on its way back.
    After,
    /// The driver has nothing, and an application waits in a system call: the kernel has the work.
    Kernel,
    /// The driver has nothing, and no application waits: nothing is asked, dirty pages wait for writeback.
    Nothing,
}

impl Why {
    pub(super) const ALL: [Self; 5] = [Self::Backend, Self::Before, Self::After, Self::Kernel, Self::Nothing];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Backend => "backend",
            Self::Before => "server, before the backend",
            Self::After => "server, after the backend",
            Self::Kernel => "kernel",
            Self::Nothing => "nothing asked",
        }
    }

    pub(super) const fn is_server(self) -> bool {
        matches!(self, Self::Before | Self::After)
    }
}

/// Times in nanoseconds, from the first to before the second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Span {
    pub(super) from: u64,
    pub(super) to: u64,
}

impl Span {
    pub(super) const fn new(from: u64, to: u64) -> Self {
        Self { from, to: if to < from { from } else { to } }
    }

    pub(super) const fn len(self) -> u64 {
        self.to - self.from
    }

    /// The part of it inside `window`, if there is one.
    pub(super) fn within(self, window: Self) -> Option<Self> {
        let (from, to) = (self.from.max(window.from), self.to.min(window.to));
        (from < to).then_some(Self { from, to })
    }
}

/// A stretch of time with one reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stretch {
    pub(super) span: Span,
    pub(super) why: Why,
}

/// Nanoseconds by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Shares {
    pub(super) backend: u64,
    pub(super) before: u64,
    pub(super) after: u64,
    pub(super) kernel: u64,
    pub(super) nothing: u64,
}

impl Shares {
    pub(super) fn of<'a>(stretches: impl IntoIterator<Item = &'a Stretch>) -> Self {
        let mut this = Self::default();
        for stretch in stretches {
            *this.get_mut(stretch.why) += stretch.span.len();
        }
        this
    }

    fn get_mut(&mut self, why: Why) -> &mut u64 {
        match why {
            Why::Backend => &mut self.backend,
            Why::Before => &mut self.before,
            Why::After => &mut self.after,
            Why::Kernel => &mut self.kernel,
            Why::Nothing => &mut self.nothing,
        }
    }

    pub(super) fn get(mut self, why: Why) -> u64 {
        *self.get_mut(why)
    }

    pub(super) const fn total(self) -> u64 {
        self.backend + self.before + self.after + self.kernel + self.nothing
    }

    /// The part of the total, in percent.
    pub(super) fn percent(self, part: u64) -> f64 {
        100.0 * part as f64 / self.total().max(1) as f64
    }

    pub(super) fn add(&mut self, other: Self) {
        for why in Why::ALL {
            *self.get_mut(why) += other.get(why);
        }
    }
}

/// A time without calls between two calls, or between one and an end of the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Gap {
    pub(super) span: Span,
    pub(super) shares: Shares,
    /// The reason for most of it.
    pub(super) mostly: Why,
}

/// Every moment of `window`, with its reason, in order and without holes. `waits` are the system calls of applications.
pub(super) fn attribute(
    window: Span,
    requests: &[Request],
    calls: &[Record],
    matching: &Matching,
    waits: &[Span],
) -> Vec<Stretch> {
    let mut spans: Vec<(Span, Why)> = Vec::new();
    for (index, request) in requests.iter().enumerate() {
        let end = request.completed.unwrap_or(window.to);
        match matching.call(index).map(|call| calls[call]) {
            Some(call) => {
                spans.push((Span::new(request.issued, call.began.min(end)), Why::Before));
                spans.push((Span::new(call.ended.min(end), end), Why::After));
            }
            None => spans.push((Span::new(request.issued, end), Why::Before)),
        }
    }
    spans.extend(calls.iter().map(|call| (Span::new(call.began, call.ended), Why::Backend)));
    spans.extend(waits.iter().map(|wait| (*wait, Why::Kernel)));
    // Where each begins and ends; a sweep keeps count.
    let mut edges: Vec<(u64, Why, i32)> = spans
        .iter()
        .filter_map(|(span, why)| Some((span.within(window)?, *why)))
        .flat_map(|(span, why)| [(span.from, why, 1), (span.to, why, -1)])
        .collect();
    edges.sort_unstable_by_key(|(at, ..)| *at);
    let mut open = [0; Why::ALL.len()];
    let mut stretches: Vec<Stretch> = Vec::new();
    let mut from = window.from;
    for (at, why, change) in edges.into_iter().chain([(window.to, Why::Nothing, 0)]) {
        if at > from {
            let now = Why::ALL.into_iter().find(|why| open[*why as usize] > 0).unwrap_or(Why::Nothing);
            match stretches.last_mut() {
                Some(last) if last.why == now => last.span.to = at,
                _ => stretches.push(Stretch { span: Span::new(from, at), why: now }),
            }
            from = at;
        }
        open[why as usize] += change;
    }
    stretches
}

/// The times without calls, longest first.
pub(super) fn gaps(stretches: &[Stretch]) -> Vec<Gap> {
    let mut gaps: Vec<Gap> = stretches
        .split(|stretch| stretch.why == Why::Backend)
        .filter_map(|idle| {
            let span = Span::new(idle.first()?.span.from, idle.last()?.span.to);
            let shares = Shares::of(idle);
            // Both halves of the server's part count as one.
            let server = shares.before + shares.after;
            let parts = [
                (server, if shares.before >= shares.after { Why::Before } else { Why::After }),
                (shares.kernel, Why::Kernel),
                (shares.nothing, Why::Nothing),
            ];
            let mostly = parts.into_iter().max_by_key(|(part, _)| *part).map_or(Why::Nothing, |(_, why)| why);
            Some(Gap { span, shares, mostly })
        })
        .collect();
    gaps.sort_by_key(|gap| std::cmp::Reverse(gap.span.len()));
    gaps
}

#[cfg(test)]
mod tests {
    use super::*;
    use ublkit_harness::OpKind;

    fn request(issued: u64, completed: u64) -> Request {
        Request { kind: OpKind::Write, issued, completed: Some(completed), offset: issued, len: 512, error: 0 }
    }

    fn call(offset: u64, began: u64, ended: u64) -> Record {
        Record { kind: OpKind::Write, began, ended, offset, len: 512, thread: 0, ok: true }
    }

    fn reasons(requests: &[Request], calls: &[Record], waits: &[Span]) -> Vec<(u64, u64, Why)> {
        let matching = Matching::new(requests, calls);
        let stretches = attribute(Span::new(0, 1000), requests, calls, &matching, waits);
        assert_eq!(Shares::of(&stretches).total(), 1000, "every moment has a reason");
        stretches.into_iter().map(|s| (s.span.from, s.span.to, s.why)).collect()
    }

    #[test]
    fn each_moment_belongs_to_whoever_has_the_work() {
        let found = reasons(&[request(200, 700)], &[call(200, 300, 600)], &[Span::new(100, 800)]);
        let expected = [
            (0, 100, Why::Nothing),
            (100, 200, Why::Kernel),
            (200, 300, Why::Before),
            (300, 600, Why::Backend),
            (600, 700, Why::After),
            (700, 800, Why::Kernel),
            (800, 1000, Why::Nothing),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_server_that_holds_a_request_is_named_and_one_beside_a_running_call_is_not() {
        // The second lies with the server until 900; the first runs until 500.
        let requests = [request(100, 500), request(101, 960)];
        let calls = [call(100, 110, 500), call(101, 900, 950)];
        let found = reasons(&requests, &calls, &[]);
        assert!(found.contains(&(110, 500, Why::Backend)) && found.contains(&(500, 900, Why::Before)), "{found:?}");
    }

    #[test]
    fn a_window_without_anything_is_one_stretch() {
        assert_eq!(reasons(&[], &[], &[]), [(0, 1000, Why::Nothing)]);
        assert_eq!(reasons(&[], &[], &[Span::new(0, 5000)]), [(0, 1000, Why::Kernel)]);
    }

    #[test]
    fn gaps_are_ranked_and_named_by_their_larger_part() {
        let requests = [request(100, 200), request(600, 800)];
        let calls = [call(100, 110, 190), call(600, 700, 790)];
        let matching = Matching::new(&requests, &calls);
        let waits = [Span::new(150, 610)];
        let found = gaps(&attribute(Span::new(0, 1000), &requests, &calls, &matching, &waits));
        let named: Vec<_> = found.iter().map(|gap| (gap.span.from, gap.span.to, gap.mostly)).collect();
        assert_eq!(named, [(190, 700, Why::Kernel), (790, 1000, Why::Nothing), (0, 110, Why::Nothing)]);
        assert_eq!(found[0].shares.before, 100);
    }
}
