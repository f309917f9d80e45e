//! Time on a line of limited length: to scale where something happens, and cut short where nothing does.

use super::super::attribution::{Span, Stretch, Why};

/// How wide a time in which nothing is asked is drawn once it is cut short.
const CUT_WIDTH: f64 = 46.0;
/// A time in which nothing is asked is cut short when it is longer than this part of everything else.
const CUT_SHARE: u64 = 8;
/// How far apart ticks are at least.
const TICK_DISTANCE: f64 = 90.0;

/// A part of the time that is drawn to scale.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Part {
    span: Span,
    x: f64,
    width: f64,
    cut: bool,
}

/// Where each time is on the line.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Scale {
    origin: u64,
    parts: Vec<Part>,
    /// Of the parts that are to scale.
    px_per_ns: f64,
}

impl Scale {
    /// A line from `x` on, `width` long, for stretches that follow each other.
    pub(super) fn new(stretches: &[Stretch], x: f64, width: f64) -> Self {
        let busy: u64 = stretches.iter().filter(|s| s.why != Why::Nothing).map(|s| s.span.len()).sum();
        let is_cut = |s: &Stretch| s.why == Why::Nothing && busy > 0 && s.span.len() > busy / CUT_SHARE;
        // Neighbours that are both to scale are one part.
        let mut parts: Vec<Part> = Vec::new();
        for stretch in stretches {
            let cut = is_cut(stretch);
            match parts.last_mut() {
                Some(last) if !last.cut && !cut => last.span.to = stretch.span.to,
                _ => parts.push(Part { span: stretch.span, x: 0.0, width: 0.0, cut }),
            }
        }
        let cuts = parts.iter().filter(|part| part.cut).count() as f64;
        let cut_width = CUT_WIDTH.min(width / 2.0 / cuts.max(1.0));
        let time: u64 = parts.iter().filter(|part| !part.cut).map(|part| part.span.len()).sum();
        let px_per_ns = (width - cuts * cut_width) / time.max(1) as f64;
        let mut at = x;
        for part in &mut parts {
            part.x = at;
            part.width = if part.cut { cut_width } else { part.span.len() as f64 * px_per_ns };
            at += part.width;
        }
        Self { origin: stretches.first().map_or(0, |first| first.span.from), parts, px_per_ns }
    }

    /// Where a time is.
    pub(super) fn x(&self, at: u64) -> f64 {
        let part = self.parts.iter().find(|part| at <= part.span.to).or(self.parts.last());
        part.map_or(0.0, |part| {
            let share = at.clamp(part.span.from, part.span.to) - part.span.from;
            part.x + part.width * share as f64 / part.span.len().max(1) as f64
        })
    }

    /// The times that were cut short: what they are, where they are drawn, and how wide.
    pub(super) fn cuts(&self) -> impl Iterator<Item = (Span, f64, f64)> {
        self.parts.iter().filter(|part| part.cut).map(|part| (part.span, part.x, part.width))
    }

    /// Round times for ticks, in nanoseconds from the origin, with their places.
    pub(super) fn ticks(&self) -> Vec<(u64, f64)> {
        let at_least = TICK_DISTANCE / self.px_per_ns.max(1e-18);
        let power = 10_f64.powf(at_least.max(1.0).log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|step| *step >= at_least);
        let step = step.unwrap_or(power * 10.0).max(1.0) as u64;
        let mut ticks: Vec<(u64, f64)> = Vec::new();
        for part in self.parts.iter().filter(|part| !part.cut) {
            let (from, to) = (part.span.from - self.origin, part.span.to - self.origin);
            // Where time was cut short, the line begins anew with a time of its own.
            let mut those: Vec<u64> = (from.div_ceil(step)..=to / step).map(|tick| tick * step).collect();
            if those.is_empty() && part.width > TICK_DISTANCE {
                those.push(from);
            }
            for tick in those {
                let x = self.x(self.origin + tick);
                if ticks.last().is_none_or(|(_, last)| x - last > TICK_DISTANCE * 0.8) {
                    ticks.push((tick, x));
                }
            }
        }
        ticks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stretch(from: u64, to: u64, why: Why) -> Stretch {
        Stretch { span: Span::new(from, to), why }
    }

    #[test]
    fn time_is_to_scale_and_in_order() {
        let scale = Scale::new(&[stretch(1000, 1500, Why::Kernel), stretch(1500, 2000, Why::Backend)], 100.0, 800.0);
        assert_eq!([1000, 1250, 1500, 2000].map(|at| scale.x(at).round() as u64), [100, 300, 500, 900]);
        assert_eq!(scale.cuts().count(), 0);
        // What lies beyond the ends is drawn at them.
        assert_eq!([0, 9999].map(|at| scale.x(at).round() as u64), [100, 900]);
        assert!(scale.ticks().len() > 4, "{:?}", scale.ticks());
    }

    #[test]
    fn a_long_time_of_nothing_is_cut_short() {
        let stretches = [
            stretch(0, 1000, Why::Backend),
            stretch(1000, 1_000_000, Why::Nothing),
            stretch(1_000_000, 1_001_000, Why::Backend),
        ];
        let scale = Scale::new(&stretches, 0.0, 1000.0);
        let cuts: Vec<_> = scale.cuts().collect();
        assert_eq!(cuts.len(), 1);
        assert_eq!(cuts[0].0, Span::new(1000, 1_000_000));
        assert!((scale.x(1000) - 477.0).abs() < 1.0 && (scale.x(1_000_000) - 523.0).abs() < 1.0);
        assert!((scale.x(1_001_000) - 1000.0).abs() < 1e-6);
    }

    #[test]
    fn nothing_at_all_is_a_line_too() {
        let scale = Scale::new(&[stretch(5, 100, Why::Nothing)], 10.0, 100.0);
        assert!((scale.x(100) - 110.0).abs() < 1e-6);
        assert!(Scale::new(&[], 10.0, 100.0).x(7).abs() < 1e-6);
    }
}
