//! Cuts: when they come, what they took, and how that is told.

use std::time::Duration;

use ublkit_harness::SeededRng;
use ublkit_harness::sim::medium::CutReport;

use crate::context::Context;
use crate::server::Moment;

/// How many losses are told at most.
const LOSSES_TOLD: usize = 24;

/// How long a moment is waited for that does not come: somebody else may be slow, and any other moment is as good.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// When the power goes, counted in requests at the disk: behind any of them, or behind one that made something durable.
pub(super) fn moment(rng: &mut SeededRng, requests: u64) -> Moment {
    if rng.chance(1, 2) { Moment::Durable(rng.within(1..=8)) } else { Moment::Requests(rng.within(1..=requests)) }
}

/// Counts a cut of a part of the scenario.
pub(super) fn count(context: &Context, part: &str, report: &CutReport) {
    let evidence = context.evidence();
    evidence.add(&format!("cuts_{part}"), 1);
    evidence.add(&format!("lost_sectors_{part}"), report.lost_sectors);
    let place = if report.unflushed > 0 { "cuts_inside_epochs" } else { "cuts_between_epochs" };
    evidence.add(place, 1);
    evidence.add("changes_lost", report.cut.lost);
    evidence.add("changes_torn", report.cut.torn);
    evidence.add("changes_survived", report.cut.kept);
}

/// What a cut took, in lines.
pub(super) fn in_lines(report: &CutReport) -> Vec<String> {
    let CutReport { cut, unflushed, lost_sectors, losses } = report;
    let first = format!(
        "the cut ({:?}): {unflushed} changes were not flushed, {} of them were lost and {} torn; {lost_sectors} sectors are not \
         what they were",
        cut.mode, cut.lost, cut.torn
    );
    // The newest of them are those that something was promised of, if anything was.
    let told = losses.iter().rev().take(LOSSES_TOLD).map(|loss| {
        let what = if loss.zeroes { "zeroes" } else { "a write" };
        let fate =
            if loss.kept_bytes == 0 { String::from("lost") } else { format!("{} bytes kept", loss.kept_bytes) };
        format!("  #{} {what} of sectors {}+{}: {fate}", loss.number, loss.offset / 512, loss.bytes.div_ceil(512))
    });
    let more = losses.len().saturating_sub(LOSSES_TOLD);
    let more = (more > 0).then(|| format!("  and {more} older ones"));
    [first].into_iter().chain(told).chain(more).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ublkit_harness::Seed;
    use ublkit_harness::sim::medium::{Medium, MediumOptions};

    #[test]
    fn what_a_cut_took_is_told_in_sectors() {
        let options = MediumOptions { bytes: 1 << 20, volatile_cache: true, atomic_bytes: 512 };
        let medium = Medium::new(options);
        for write in 0..40 {
            medium.write_at(&[1; 1024], write * 1024).expect("in range");
        }
        let reports = (0..).map(|seed| medium.crash_image(&mut Seed::new(seed).rng()).1);
        let report = reports.into_iter().find(|report| report.cut.lost == 40).expect("one that took everything");
        let lines = in_lines(&report);
        assert!(lines[0].contains("40 changes") && lines[0].contains("80 sectors"), "{lines:?}");
        assert_eq!(lines[1], "  #39 a write of sectors 78+2: lost");
        assert_eq!((lines.len(), lines[25].as_str()), (26, "  and 16 older ones"));
    }
}
