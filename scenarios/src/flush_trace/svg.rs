//! The picture: when the device was busy, with what, and why it was idle.
//!
//! One panel for each phase of the first round. From the top: what the application did, the requests that the driver had,
//! the calls of the backend on each thread, and a strip that says who had the work.

mod scale;

use std::fmt::Write;

use ublkit_harness::OpKind;

use self::scale::Scale;
use super::attribution::{Shares, Span, Why, gaps};
use super::numbers::{Numbers, duration};
use super::story::{Phase, Story};
use crate::units::format_rounded;

const WIDTH: f64 = 1320.0;
const MARGIN: f64 = 28.0;
/// Where the time begins.
const LEFT: f64 = 168.0;
const PLOT: f64 = WIDTH - LEFT - MARGIN;
const LANE: f64 = 18.0;
const LANE_GAP: f64 = 5.0;
/// A request in flight.
const THIN: f64 = 7.0;
const THIN_GAP: f64 = 2.0;
/// Requests in flight are drawn on at most so many lines.
const THIN_MOST: usize = 12;
const STRIP: f64 = 24.0;
/// The width of a character, at the size of labels.
const CHARACTER: f64 = 6.3;
/// How many gaps get a number.
const NUMBERED: usize = 4;

const fn op_colour(kind: OpKind) -> &'static str {
    match kind {
        OpKind::Read => "#3b82c4",
        OpKind::Write => "#f0892b",
        OpKind::WriteFua => "#b5462a",
        OpKind::Flush => "#7c3fa8",
        OpKind::Discard => "#55a04a",
        OpKind::WriteZeroes => "#3aa6a0",
    }
}

const fn why_colour(why: Why) -> &'static str {
    match why {
        Why::Backend => "#2f4858",
        Why::Before => "#e5383b",
        Why::After => "#f2a1a3",
        Why::Kernel => "#ffcf56",
        Why::Nothing => "#e9edf0",
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// The picture as a whole.
pub(super) fn draw(story: &Story, numbers: &Numbers) -> String {
    let mut canvas = Canvas { body: String::new(), y: MARGIN };
    canvas.head(story, numbers);
    for phase in story.phases.iter().filter(|phase| phase.round == 1) {
        canvas.panel(story, phase);
    }
    canvas.foot(story);
    let height = canvas.y + MARGIN;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH:.0}\" height=\"{height:.0}\" viewBox=\"0 0 {WIDTH:.0} \
         {height:.0}\" font-family=\"DejaVu Sans, Verdana, Helvetica, Arial, sans-serif\" font-size=\"11\" fill=\"#22303a\">\n\
         <title>ublk-torture flush-trace</title>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n{}</svg>\n",
        canvas.body
    )
}

struct Canvas {
    body: String,
    /// The upper edge of what comes next.
    y: f64,
}

impl Canvas {
    fn put(&mut self, element: std::fmt::Arguments<'_>) {
        // Writing into a string cannot fail.
        let _ = self.body.write_fmt(element);
        self.body.push('\n');
    }

    fn text(&mut self, (x, y): (f64, f64), style: &str, text: &str) {
        let text = escape(text);
        self.put(format_args!("<text x=\"{x:.1}\" y=\"{y:.1}\" {style}>{text}</text>"));
    }

    fn rect(&mut self, (x, y): (f64, f64), (width, height): (f64, f64), style: &str, title: &str) {
        let title = escape(title);
        self.put(format_args!(
            "<rect x=\"{x:.2}\" y=\"{y:.1}\" width=\"{width:.2}\" height=\"{height:.1}\" {style}><title>{title}</title></rect>"
        ));
    }

    fn head(&mut self, story: &Story, numbers: &Numbers) {
        self.text(
            (MARGIN, self.y + 14.0),
            "font-size=\"20\" font-weight=\"bold\"",
            "When the device was busy, and why it was idle",
        );
        let about = format!(
            "{}; kernel {}; {} calls of the backend, recorded at {} each; seed {}",
            story.device,
            story.kernel_release,
            numbers.recorded,
            duration(numbers.recording_cost_ns),
            numbers.seed
        );
        self.text((MARGIN, self.y + 34.0), "fill=\"#5b6b76\"", &about);
        self.y += 52.0;
        let mut x = MARGIN;
        self.text((x, self.y + 10.0), "font-weight=\"bold\"", "operation");
        x += 74.0;
        for kind in OpKind::ALL {
            self.key(&mut x, op_colour(kind), &kind.to_string());
        }
        x += 28.0;
        self.text((x, self.y + 10.0), "font-weight=\"bold\"", "who has the work");
        x += 118.0;
        for why in Why::ALL {
            self.key(&mut x, why_colour(why), why.name());
        }
        self.y += 28.0;
        self.overview(story);
    }

    fn key(&mut self, x: &mut f64, colour: &str, name: &str) {
        let y = self.y;
        self.rect((*x, y), (12.0, 12.0), &format!("rx=\"2\" fill=\"{colour}\" stroke=\"#00000022\""), name);
        self.text((*x + 17.0, y + 10.0), "", name);
        *x += 17.0 + name.len() as f64 * CHARACTER + 16.0;
    }

    /// A bar for each phase: what became of its time.
    fn overview(&mut self, story: &Story) {
        for phase in story.phases.iter().filter(|phase| phase.round == 1) {
            let shares = Shares::of(&phase.stretches);
            self.text((LEFT - 10.0, self.y + 11.0), "text-anchor=\"end\"", phase.kind.name());
            let mut x = LEFT;
            for why in Why::ALL {
                let part = shares.get(why);
                let width = PLOT * 0.8 * part as f64 / shares.total().max(1) as f64;
                if width <= 0.0 {
                    continue;
                }
                let title = format!("{}: {} ({:.1} %)", why.name(), duration(part), shares.percent(part));
                self.rect((x, self.y), (width, 14.0), &format!("fill=\"{}\"", why_colour(why)), &title);
                let label = format!("{:.0} %", shares.percent(part));
                if width > 34.0 {
                    let ink = if matches!(why, Why::Backend | Why::Before) { "#ffffff" } else { "#22303a" };
                    let style = format!("text-anchor=\"middle\" font-size=\"10\" fill=\"{ink}\"");
                    self.text((x + width / 2.0, self.y + 11.0), &style, &label);
                }
                x += width;
            }
            let total = format!("{}, busy {}", duration(shares.total()), duration(shares.backend));
            self.text((LEFT + PLOT * 0.8 + 10.0, self.y + 11.0), "fill=\"#5b6b76\"", &total);
            self.y += 18.0;
        }
        self.y += 10.0;
    }

    fn panel(&mut self, story: &Story, phase: &Phase) {
        let scale = Scale::new(&phase.stretches, LEFT, PLOT);
        self.y += 12.0;
        let (y, x2) = (self.y, WIDTH - MARGIN);
        self.put(format_args!(
            "<line x1=\"{MARGIN}\" y1=\"{y:.1}\" x2=\"{x2:.1}\" y2=\"{y:.1}\" stroke=\"#cfd8dd\"/>"
        ));
        self.y += 22.0;
        self.text((MARGIN, self.y), "font-size=\"14\" font-weight=\"bold\"", phase.kind.name());
        self.text((LEFT, self.y), "font-size=\"12\"", phase.kind.about());
        let calls: Vec<_> = story.calls_in(phase.span).collect();
        let moved: u64 = calls.iter().map(|call| call.len).sum();
        let flushes = calls.iter().filter(|call| call.kind == OpKind::Flush).count();
        let sum = format!(
            "{} · {} calls, {} flushes, {} · {:.1} MiB/s",
            duration(phase.span.len()),
            calls.len(),
            flushes,
            format_rounded(moved),
            moved as f64 * 1e9 / f64::from(1 << 20) / phase.span.len().max(1) as f64
        );
        self.text((WIDTH - MARGIN, self.y), "text-anchor=\"end\" fill=\"#5b6b76\"", &sum);
        self.y += 12.0;
        let top = self.y;
        self.application(phase, &scale);
        self.requests(story, phase, &scale);
        self.calls(story, phase, &scale);
        self.strip(phase, &scale);
        self.axis(&scale, top);
    }

    fn lane_name(&mut self, height: f64, name: &str) {
        self.text((LEFT - 10.0, self.y + height / 2.0 + 4.0), "text-anchor=\"end\"", name);
    }

    fn application(&mut self, phase: &Phase, scale: &Scale) {
        self.lane_name(LANE, "application");
        for wait in &phase.waits {
            let (x, end) = (scale.x(wait.span.from), scale.x(wait.span.to));
            let width = (end - x).max(1.0);
            let fill = if wait.durable { "#c9b6dc" } else { "#cfdbe4" };
            let title = format!("{}: {}", wait.name, duration(wait.span.len()));
            let style = format!("rx=\"3\" fill=\"{fill}\" stroke=\"#8795a0\" stroke-width=\"0.6\"");
            self.rect((x, self.y), (width, LANE), &style, &title);
            for label in [&title, &wait.name] {
                if label.len() as f64 * CHARACTER + 6.0 < width {
                    self.text((x + 5.0, self.y + 13.0), "", label);
                    break;
                }
            }
        }
        self.y += LANE + LANE_GAP;
    }

    /// Requests, each on the first line that is free.
    fn requests(&mut self, story: &Story, phase: &Phase, scale: &Scale) {
        let mut free: Vec<u64> = Vec::new();
        let top = self.y;
        for request in story.requests_in(phase.span) {
            let completed = request.completed.unwrap_or(phase.span.to);
            let line = free.iter().position(|until| *until <= request.issued).unwrap_or(free.len());
            if line == free.len() {
                free.push(0);
            }
            free[line] = completed;
            let line = line.min(THIN_MOST - 1);
            let (x, end) = (scale.x(request.issued), scale.x(completed));
            let y = top + line as f64 * (THIN + THIN_GAP);
            let colour = op_colour(request.kind);
            let title = described(
                request.kind,
                request.offset,
                request.len,
                Span::new(request.issued, completed),
                phase.span.from,
            );
            let style = format!("fill=\"{colour}\" fill-opacity=\"0.45\" stroke=\"{colour}\" stroke-width=\"0.5\"");
            self.rect((x, y), ((end - x).max(1.0), THIN), &style, &title);
        }
        let height = free.len().clamp(1, THIN_MOST) as f64 * (THIN + THIN_GAP);
        self.lane_name(height.min(LANE), "requests in flight");
        self.y += height.max(LANE) + LANE_GAP;
    }

    /// A lane for each thread that called.
    fn calls(&mut self, story: &Story, phase: &Phase, scale: &Scale) {
        let mut threads: Vec<_> = story.recording.threads.iter().enumerate().collect();
        threads.sort_by_key(|(_, name)| *name);
        for (index, name) in threads {
            let mut calls = story.calls_in(phase.span).filter(|call| usize::from(call.thread) == index).peekable();
            if calls.peek().is_none() {
                continue;
            }
            self.lane_name(LANE, &format!("backend, {name}"));
            let y = self.y;
            self.rect((LEFT, y), (PLOT, LANE), "fill=\"#f6f8f9\"", name);
            // Calls that would be drawn within the same pixel are drawn once.
            let mut last = (f64::MIN, OpKind::Read);
            for call in calls {
                let (x, end) = (scale.x(call.began), scale.x(call.ended));
                if end - last.0 < 0.3 && call.kind == last.1 {
                    continue;
                }
                last = (end, call.kind);
                let title =
                    described(call.kind, call.offset, call.len, Span::new(call.began, call.ended), phase.span.from);
                self.rect((x, y), ((end - x).max(1.0), LANE), &format!("fill=\"{}\"", op_colour(call.kind)), &title);
            }
            self.y += LANE + LANE_GAP;
        }
    }

    /// Who had the work at each moment, the largest gaps with numbers.
    fn strip(&mut self, phase: &Phase, scale: &Scale) {
        self.lane_name(STRIP, "who has the work");
        let y = self.y;
        for stretch in &phase.stretches {
            let (x, end) = (scale.x(stretch.span.from), scale.x(stretch.span.to));
            let title = format!("{}: {}", stretch.why.name(), duration(stretch.span.len()));
            let style = format!("fill=\"{}\"", why_colour(stretch.why));
            self.rect((x, y), ((end - x).max(0.6), STRIP), &style, &title);
        }
        for (span, x, width) in scale.cuts() {
            let middle = x + width / 2.0;
            self.put(format_args!(
                "<path d=\"M{a:.1} {top:.1}l-6 {h:.1}M{b:.1} {top:.1}l-6 {h:.1}\" stroke=\"#5b6b76\" fill=\"none\"/>",
                a = middle + 1.0,
                b = middle + 7.0,
                top = y - 2.0,
                h = STRIP + 4.0
            ));
            let style = "text-anchor=\"middle\" font-size=\"10\" fill=\"#5b6b76\"";
            self.text((middle, y + STRIP + 13.0), style, &duration(span.len()));
        }
        let mut told = String::from("longest without a call:");
        for (index, gap) in gaps(&phase.stretches).iter().take(NUMBERED).enumerate() {
            let number = index + 1;
            // On the longest part of what it is named for.
            let named = phase.stretches.iter().filter(|s| s.why == gap.mostly && s.span.within(gap.span).is_some());
            let part = named.max_by_key(|s| s.span.len()).map_or(gap.span, |s| s.span);
            let middle = f64::midpoint(scale.x(part.from), scale.x(part.to));
            self.put(format_args!(
                "<circle cx=\"{middle:.1}\" cy=\"{cy:.1}\" r=\"7\" fill=\"#ffffff\" stroke=\"#22303a\"/>",
                cy = y + STRIP / 2.0
            ));
            let style = "text-anchor=\"middle\" font-size=\"9\" font-weight=\"bold\"";
            self.text((middle, y + STRIP / 2.0 + 3.3), style, &number.to_string());
            let _ = write!(
                told,
                "{} ({number}) {}, {}",
                if index == 0 { "" } else { " ·" },
                duration(gap.span.len()),
                gap.mostly.name()
            );
        }
        self.y += STRIP;
        self.text((LEFT, self.y + 34.0), "fill=\"#5b6b76\"", &told);
    }

    fn axis(&mut self, scale: &Scale, top: f64) {
        let y = self.y;
        for (time, x) in scale.ticks() {
            self.put(format_args!(
                "<line x1=\"{x:.1}\" y1=\"{top:.1}\" x2=\"{x:.1}\" y2=\"{bottom:.1}\" stroke=\"#00000018\"/>",
                bottom = y + 4.0
            ));
            let near_cut = scale.cuts().any(|(_, cut, width)| (cut - 30.0..cut + width + 30.0).contains(&x));
            if !near_cut {
                let label = if time == 0 { "0".to_owned() } else { format!("+{}", duration(time)) };
                self.text((x, y + 15.0), "text-anchor=\"middle\" font-size=\"10\"", &label);
            }
        }
        self.y += 38.0;
    }

    fn foot(&mut self, story: &Story) {
        self.y += 22.0;
        let rounds = story.phases.iter().map(|phase| phase.round).max().unwrap_or(0);
        let mut lines = vec![
            "Requests: from when the driver got them to their completion (block layer trace points). Calls: of the backend, on the \
             thread that made them. Times in which nothing is asked are cut short where marked."
                .to_owned(),
        ];
        if rounds > 1 {
            lines.push(format!("The first of {rounds} rounds; trace.json has all of them."));
        }
        for line in lines {
            self.text((MARGIN, self.y), "font-size=\"10\" fill=\"#5b6b76\"", &line);
            self.y += 14.0;
        }
    }
}

fn described(kind: OpKind, offset: u64, len: u64, span: Span, origin: u64) -> String {
    let place =
        if len == 0 { String::new() } else { format!(" {} at {}", format_rounded(len), format_rounded(offset)) };
    let at = duration(span.from.saturating_sub(origin));
    format!("{kind}{place}: {} from +{at}", duration(span.len()))
}

#[cfg(test)]
mod tests {
    use super::super::story::tests::story;
    use super::*;

    /// Elements are closed in the order in which they were opened, and text is escaped: what an XML parser insists on.
    fn well_formed(xml: &str) -> usize {
        let mut open = Vec::new();
        let mut elements = 0;
        let mut rest = xml;
        while let Some(start) = rest.find('<') {
            let text = &rest[..start];
            assert!(!text.contains('>'), "{text}");
            for entity in text.split('&').skip(1) {
                assert!(["amp;", "lt;", "gt;", "quot;"].iter().any(|known| entity.starts_with(known)), "{entity}");
            }
            let end = start + rest[start..].find('>').expect("closed");
            let tag = &rest[start + 1..end];
            assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name));
            } else {
                elements += 1;
                if !tag.ends_with('/') {
                    open.push(tag.split(' ').next().expect("a name"));
                }
            }
            rest = &rest[end + 1..];
        }
        assert!(open.is_empty(), "{open:?}");
        elements
    }

    #[test]
    fn the_picture_is_well_formed_and_shows_everything() {
        let story = story();
        let picture = draw(&story, &Numbers::of(&story));
        assert!(well_formed(&picture) > 50);
        for shown in [
            "fsync",
            "backend, ublk0-w0",
            "backend, ublk0-w1",
            "requests in flight",
            "application",
            "who has the work",
            "memory &quot;256 MiB&quot;",
            "fsync &lt;&amp;&gt;",
            "longest without a call:",
            "+20.0 ms",
            "write 4.0 KiB at 8.0 KiB: 20.0 ms from +14.0 ms",
        ] {
            assert!(picture.contains(shown), "{shown} is not in\n{picture}");
        }
        for kind in [OpKind::Write, OpKind::Flush] {
            // In the legend, as a request, as a call.
            assert!(picture.matches(op_colour(kind)).count() >= 3, "{kind}");
        }
        for why in Why::ALL {
            assert!(picture.matches(why_colour(why)).count() >= 2, "{why:?}");
        }
    }

    #[test]
    fn no_place_is_off_the_canvas_or_not_a_number() {
        let story = story();
        let picture = draw(&story, &Numbers::of(&story));
        for attribute in [" x=\"", " width=\"", " x1=\"", " cx=\""] {
            for value in picture.split(attribute).skip(1) {
                let value = value.split('"').next().expect("a value");
                let Ok(number) = value.parse::<f64>() else {
                    assert_eq!(value, "100%");
                    continue;
                };
                assert!(number.is_finite() && (0.0..=WIDTH).contains(&number), "{attribute}{value}");
            }
        }
    }
}
