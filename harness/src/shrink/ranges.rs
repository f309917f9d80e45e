//! Shorter operations, at lower addresses and at fewer.

use std::collections::BTreeSet;

use super::actions::ONE_BY_ONE;
use super::search::Search;
use crate::plan::OpKind;
use crate::range::SectorRange;
use crate::script::{Act, Script};

/// The ranges of operations that have one.
fn ranges_mut(script: &mut Script) -> impl Iterator<Item = &mut SectorRange> {
    script.actions.iter_mut().filter_map(|action| match &mut action.act {
        Act::Op { kind, range } if *kind != OpKind::Flush => Some(range),
        _ => None,
    })
}

fn ranges(search: &Search<'_>) -> Vec<SectorRange> {
    let acts = search.best().actions.iter().map(|action| action.act);
    acts.filter_map(|act| match act {
        Act::Op { kind, range } if kind != OpKind::Flush => Some(range),
        _ => None,
    })
    .collect()
}

/// One block each, or else shorter.
pub(super) fn shorten(search: &mut Search<'_>) {
    let block = search.best().setup.block_sectors();
    search.offer(|script| ranges_mut(script).for_each(|range| *range = SectorRange::new(0, block)));
    search.offer(pack);
    search.offer(|script| ranges_mut(script).for_each(|range| range.sectors = block));
    each(search, |range, _| {
        let last = SectorRange::new(range.end() - block, block);
        let shorter = lower(range.sectors, block).filter(|sectors| *sectors > 0).flat_map(|sectors| {
            [SectorRange::new(range.first, sectors), SectorRange::new(range.end() - sectors, sectors)]
        });
        let ends = [SectorRange::new(range.first, block), last];
        ends.into_iter().chain(shorter).filter(|shorter| shorter.sectors < range.sectors).collect()
    });
}

/// Multiples of `block` from 0 that come ever closer to `value`, which is none of them.
fn lower(value: u64, block: u64) -> impl Iterator<Item = u64> {
    let blocks = value / block;
    let steps = (0..64).map(move |power| blocks >> power).take_while(|step| *step > 0);
    steps.map(move |step| (blocks - step) * block)
}

/// To the beginning of the device, or onto each other.
pub(super) fn move_down(search: &mut Search<'_>) {
    let block = search.best().setup.block_sectors();
    search.offer(|script| ranges_mut(script).for_each(|range| range.first = 0));
    let lowest = ranges(search).iter().map(|range| range.first).min().unwrap_or(0);
    search.offer(|script| ranges_mut(script).for_each(|range| range.first -= lowest));
    each(search, |range, others| {
        let others = others.iter().map(|other| other.first);
        let lower: BTreeSet<u64> = lower(range.first, block).chain(others).collect();
        let lower = lower.range(..range.first);
        lower.map(|first| SectorRange::new(*first, range.sectors)).collect()
    });
}

/// Offers what `smaller` says for each range, as long as something is taken: for all operations that have the range
/// together, and then for each alone.
fn each(search: &mut Search<'_>, smaller: impl Fn(SectorRange, &[SectorRange]) -> Vec<SectorRange>) {
    if search.best().actions.len() > ONE_BY_ONE {
        return;
    }
    for mut range in ranges(search).into_iter().collect::<BTreeSet<_>>() {
        while let Some(taken) = smaller(range, &ranges(search)).into_iter().find(|smaller| {
            search.offer(|script| {
                ranges_mut(script).filter(|other| **other == range).for_each(|other| *other = *smaller);
            })
        }) {
            range = taken;
        }
    }
    for at in 0..ranges(search).len() {
        while smaller(ranges(search)[at], &ranges(search)).into_iter().any(|smaller| {
            search.offer(|script| {
                if let Some(range) = ranges_mut(script).nth(at) {
                    *range = smaller;
                }
            })
        }) {}
    }
}

/// One block between any two places where some range begins or ends: who meets whom stays as it is.
fn pack(script: &mut Script) {
    let block = script.setup.block_sectors();
    let edges: BTreeSet<u64> = ranges_mut(script).flat_map(|range| [range.first, range.end()]).collect();
    let packed = |edge: u64| edges.range(..edge).count() as u64 * block;
    for range in ranges_mut(script) {
        let (first, end) = (packed(range.first), packed(range.end()));
        // Never further back: what begins at the first block has its edge there too.
        if first <= range.first && end - first <= range.sectors {
            *range = SectorRange::new(first, end - first);
        }
    }
}
