//! Fewer faults, a smaller device, and less that happens at once.

use super::actions;
use super::search::Search;
use crate::fault::Trigger;
use crate::plan::OpKind;
use crate::script::{Act, Recovery, Script, Setup};

/// The device is not made smaller than this, in bytes: a kernel would not take it.
const BYTES_MIN: u64 = 4096;

/// 1, 2, 4, … below `value`.
fn below(value: u64) -> impl Iterator<Item = u64> {
    (0..63).map(|power| 1 << power).take_while(move |smaller| *smaller < value)
}

/// A planted bug strikes, and a fault happens, as often as it can: then few operations are enough.
pub(super) fn strike_more_often(search: &mut Search<'_>) {
    if let Some(planted) = search.best().mutant {
        let mut more_often = below(planted.every);
        more_often
            .any(|every| search.offer(|script| script.mutant.iter_mut().for_each(|planted| planted.every = every)));
    }
    for at in 0..search.best().faults.rules.len() {
        let mut triggers = [Trigger::Always, Trigger::Nth(1), Trigger::Nth(2), Trigger::Nth(3)].into_iter();
        // Those that come earlier in this list are the simpler ones.
        let now = search.best().faults.rules[at].trigger;
        let known = triggers.clone().position(|trigger| trigger == now).unwrap_or(usize::MAX);
        triggers.by_ref().take(known).any(|trigger| search.offer(|script| script.faults.rules[at].trigger = trigger));
        search.offer(|script| script.faults.rules[at].calls = None);
        search.offer(|script| script.faults.rules[at].state = None);
    }
}

/// Without faults, or without some.
pub(super) fn drop_faults(search: &mut Search<'_>) {
    search.offer(|script| script.faults.rules.clear());
    for at in (0..search.best().faults.rules.len()).rev() {
        search.offer(|script| {
            script.faults.rules.remove(at);
        });
    }
}

/// Nothing at once.
pub(super) fn serialise_at_once(search: &mut Search<'_>) {
    search.offer(|script| {
        actions::one_worker(script);
        let setup = &mut script.setup;
        setup.io_depth = 1;
        setup.queues = 1;
        setup.reorder = 0;
        setup.merges = false;
        setup.memory_pressure = false;
        setup.compressible = 0;
    });
}

/// Less at once, and options that are off, each alone.
pub(super) fn serialise(search: &mut Search<'_>) {
    serialise_at_once(search);
    search.offer(actions::one_worker);
    actions::merge_workers(search);
    less(search, |setup| u64::from(setup.io_depth), |setup, depth| setup.io_depth = depth as u32);
    less(search, |setup| u64::from(setup.queues), |setup, queues| setup.queues = queues as u16);
    less(search, |setup| u64::from(setup.queue_depth), |setup, depth| setup.queue_depth = depth as u16);
    let reorder = search.best().setup.reorder;
    for less in [0, reorder / 2] {
        search.offer(|script| script.setup.reorder = less.min(script.setup.reorder));
    }
    let off: [fn(&mut Setup); 7] = [
        |setup| setup.compressible = 0,
        |setup| setup.merges = false,
        |setup| setup.memory_pressure = false,
        |setup| setup.fua = false,
        |setup| (setup.volatile_cache, setup.fua) = (false, false),
        |setup| setup.discard_zeroes = false,
        |setup| setup.recovery = Recovery::None,
    ];
    let kills = search.best().actions.iter().any(|action| action.act == Act::Kill);
    for switch_off in &off[..off.len() - usize::from(kills)] {
        search.offer(|script| switch_off(&mut script.setup));
    }
    // A script that has these operations does not pass as one for a device without them.
    search.offer(|script| (script.setup.discard, script.setup.discard_zeroes) = (false, false));
    search.offer(|script| script.setup.write_zeroes = false);
}

/// Offers a smaller value of one option, the smallest first.
fn less(search: &mut Search<'_>, get: impl Fn(&Setup) -> u64, set: impl Fn(&mut Setup, u64)) {
    let now = get(&search.best().setup);
    below(now).any(|smaller| search.offer(|script| set(&mut script.setup, smaller)));
}

/// No larger than what is used of it, and shorter requests.
pub(super) fn shrink_device(search: &mut Search<'_>) {
    let Setup { bytes, max_io_bytes, logical_block, .. } = search.best().setup;
    let page = u64::from(logical_block).max(BYTES_MIN);
    let used = used_bytes(search.best()).next_multiple_of(page).max(page);
    below(bytes / used + 1)
        .map(|times| used * times)
        .take_while(|smaller| *smaller < bytes)
        .any(|smaller| search.offer(|script| script.setup.bytes = smaller));
    let blocks = u64::from(max_io_bytes) / page;
    below(blocks).any(|pages| search.offer(|script| script.setup.max_io_bytes = (pages * page) as u32));
}

fn used_bytes(script: &Script) -> u64 {
    let ends = script.actions.iter().map(|action| match action.act {
        Act::Op { kind, range } if kind != OpKind::Flush => range.offset_bytes() + range.len_bytes(),
        _ => 0,
    });
    ends.max().unwrap_or(0)
}
