//! `stress churn`: cycles in one process, which is back where it began after each.

use std::time::Duration;

use serde_json::json;

use super::protocol::{ChurnOrder, Churned, Order, Report};
use super::stressed::{Stressed, unexpected};
use super::{Args, Bug, Kind};
use crate::context::Context;
use crate::footprint::{Measure, PARTS, Sample};
use crate::scenario::Failure;

/// Of the time of a cycle, what our own code may take, in thousandths.
const OWN_PERMILLE_MAX: u64 = 100;

pub(super) fn run(args: &Args, context: &mut Context) -> Result<(), Failure> {
    let extent = args.extent(Kind::Churn, context.duration());
    let asked = extent.least(40);
    for (name, minimum) in
        [("cycles", asked), ("dirty_closes", asked / 8), ("looks", if asked >= 20 { PARTS as u64 + 1 } else { 0 })]
    {
        context.evidence().require(name, minimum);
    }
    // A cycle takes tens of milliseconds, emulated or not; ten seconds are for a machine that does much else.
    let limit = extent.limit(Duration::from_secs(10)) + Duration::from_secs(300);
    context.step("churn", limit, |context| {
        let mut stressed = Stressed::start("churn")?;
        stressed.order(&Order::Churn(ChurnOrder {
            extent,
            announce: !args.measure,
            seed: context.seed().derive("churn", 0),
            plant: args.plant,
        }))?;
        let churned = match stressed.hear(context) {
            Ok(Report::Churned(churned)) => churned,
            Ok(other) => return Err(unexpected(&other)),
            // What it left behind is cleaned up with it.
            Err(failure) => {
                let _told_already = stressed.end(context);
                return Err(failure);
            }
        };
        let evidence = context.evidence();
        evidence.add("cycles", churned.cycles);
        evidence.add("dirty_closes", churned.dirty_cycles);
        evidence.add("looks", stressed.samples().len() as u64);
        evidence.add("bytes_verified", churned.bytes_verified);
        tell(context, &churned, stressed.samples())?;
        stressed.end(context)?;
        judge(args, context, &churned)
    })
}

/// The table, the accounts, and both in a file of the report.
fn tell(context: &mut Context, churned: &Churned, samples: &[Sample]) -> Result<(), Failure> {
    let costs = &churned.costs;
    context.note(format!("where the time of a cycle goes, on average of {} cycles:", costs.cycles));
    for line in costs.table() {
        context.note(format!("  {line}"));
    }
    if let (Some(first), Some(last)) = (samples.first(), samples.last()) {
        for measure in Measure::ALL {
            context.note(format!(
                "  {:<42} {:>12} after {} cycles, {:>12} after {}; a leak from {} per 1,000 cycles on",
                measure.name(),
                first.of(measure),
                first.cycles,
                last.of(measure),
                last.cycles,
                measure.rate()
            ));
        }
    }
    if let Some(dir) = context.report_dir() {
        let path = dir.join("churn.json");
        let text = json!({
            "cycles": churned.cycles,
            "deferred_deletions": churned.deferred,
            "ids": churned.ids,
            "own_permille": costs.own_permille(),
            "mean_ns": costs.mean(),
            "costs": costs,
            "samples": samples,
        });
        std::fs::write(&path, format!("{text:#}\n"))
            .map_err(|error| Failure::Environment(format!("failed to write {}: {error}", path.display())))?;
    }
    let evidence = context.evidence();
    evidence.add("cycle_mean_us", costs.mean() / 1000);
    evidence.add("own_code_permille", costs.own_permille());
    let mean = costs.mean() as f64 / 1e6;
    context.detail(format!(
        "{} cycles, {mean:.2} ms each, {:.1} % our own code, {} ids, {} deletions left to the kernel",
        churned.cycles,
        costs.own_permille() as f64 / 10.0,
        churned.ids,
        churned.deferred
    ));
    Ok(())
}

/// What is promised of the time.
fn judge(args: &Args, context: &Context, churned: &Churned) -> Result<(), Failure> {
    let costs = &churned.costs;
    if args.measure && costs.own_permille() > OWN_PERMILLE_MAX {
        return Err(Failure::broke_with(
            "speed",
            format!("our own code takes {:.1} % of a cycle, and may take 10", costs.own_permille() as f64 / 10.0),
            costs.table(),
        ));
    }
    let mean = Duration::from_nanos(costs.mean());
    if let Some(limit) = args.cycle_limit
        && mean > limit
    {
        let what = format!("a cycle takes {mean:.2?} on average, and may take {limit:.2?}");
        return Err(Failure::broke_with("speed", what, costs.table()));
    }
    if churned.deferred > 0 && args.plant != Some(Bug::SkippedDelete) {
        let what = format!("{} of {} closes left the deletion to the kernel", churned.deferred, churned.cycles);
        return Err(Failure::broke("close", format!("{what}: somebody held a device open for longer than 30 s")));
    }
    context.evidence().add("closes_complete", churned.cycles);
    Ok(())
}
