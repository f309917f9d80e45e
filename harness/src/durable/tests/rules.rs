//! The rules, one by one.

use super::{Device, W};
use crate::classify::Content::{Unknown, Zero};
use crate::durable::Durable;
use crate::outcome::Outcome::{self, Done, Failed};
use crate::sector::GENERATION_MAX;

#[test]
fn without_a_volatile_cache_what_is_acknowledged_is_durable() {
    let mut device = Device::new(Zero, false);
    device.change(W(1), Done);
    assert_eq!(device.survivors(), [W(1)]);
    assert_eq!(device.durable.busy_blocks(), 0);
}

#[test]
fn with_a_volatile_cache_every_version_since_the_flush_may_survive() {
    let mut device = Device::new(Zero, true);
    device.change(W(1), Done);
    device.flush();
    device.change(W(2), Done);
    device.change(W(3), Done);
    assert_eq!(device.survivors(), [W(1), W(2), W(3)]);
    device.flush();
    assert_eq!(device.survivors(), [W(3)]);
}

#[test]
fn a_flush_covers_what_ended_before_its_submission_not_before_its_completion() {
    let mut device = Device::new(Zero, true);
    device.change(W(1), Done);
    let write = device.begin(W(2));
    let flush = device.tick();
    device.end(write, Done, false);
    device.durable.flush_done(flush);
    assert_eq!(device.survivors(), [W(1), W(2)]);
    device.flush();
    assert_eq!(device.survivors(), [W(2)]);
}

#[test]
fn a_flush_that_was_submitted_earlier_takes_nothing_back() {
    let mut device = Device::new(Zero, true);
    let early = device.tick();
    device.change(W(1), Done);
    device.flush();
    device.durable.flush_done(early);
    assert_eq!(device.survivors(), [W(1)]);
}

#[test]
fn a_failed_flush_proves_nothing() {
    let mut device = Device::new(Zero, true);
    device.change(W(1), Done);
    // A flush fails here, and nobody is told. Neither is the next write any more durable.
    device.tick();
    device.change(W(2), Done);
    assert_eq!(device.survivors(), [Zero, W(1), W(2)]);
}

#[test]
fn fua_is_durable_at_once_and_ends_what_came_before() {
    let mut device = Device::new(Zero, true);
    device.change(W(1), Done);
    let write = device.begin(W(2));
    device.end(write, Done, true);
    assert_eq!(device.survivors(), [W(2)]);
    device.change(W(3), Done);
    assert_eq!(device.survivors(), [W(2), W(3)]);
}

#[test]
fn fua_leaves_what_it_overlapped() {
    let mut device = Device::new(Zero, true);
    let plain = device.begin(W(1));
    let through = device.begin(W(2));
    device.end(plain, Done, false);
    device.end(through, Done, true);
    assert_eq!(device.survivors(), [W(1), W(2)]);
}

#[test]
fn fua_that_failed_is_not_durable() {
    let mut device = Device::new(Zero, true);
    let write = device.begin(W(1));
    device.end(write, Failed, true);
    assert_eq!(device.survivors(), [Zero, W(1)]);
}

#[test]
fn a_write_that_failed_may_survive_until_a_later_one_is_durable() {
    for volatile_cache in [true, false] {
        let mut device = Device::new(Zero, volatile_cache);
        device.change(W(1), Done);
        device.flush();
        device.change(W(2), Failed);
        device.flush();
        assert_eq!(device.survivors(), [W(1), W(2)]);
        device.change(W(3), Done);
        device.flush();
        assert_eq!(device.survivors(), [W(3)]);
    }
}

#[test]
fn a_write_in_flight_may_survive() {
    let mut device = Device::new(Zero, false);
    let write = device.begin(W(1));
    assert_eq!(device.survivors(), [Zero, W(1)]);
    assert_eq!(device.cut(), [Zero, W(1)]);
    // It is acknowledged to nobody: what the cut left is all there is.
    device.end(write, Done, false);
    assert_eq!(device.survivors(), [Zero, W(1)]);
}

#[test]
fn a_write_of_unknown_outcome_may_survive_until_the_power_is_cut() {
    let mut device = Device::new(Zero, false);
    device.change(W(1), Outcome::Unknown);
    for generation in 2..100 {
        device.change(W(generation), Done);
        assert_eq!(device.survivors(), [W(1), W(generation)]);
    }
    device.cut();
    device.durable.settle(0, W(99));
    assert_eq!(device.survivors(), [W(99)]);
}

#[test]
fn a_second_cut_leaves_what_the_first_may_have_left() {
    let mut device = Device::new(Zero, true);
    device.change(W(1), Done);
    assert_eq!(device.cut(), [Zero, W(1)]);
    assert_eq!(device.cut(), [Zero, W(1)]);
    device.change(W(2), Done);
    assert_eq!(device.cut(), [Zero, W(1), W(2)]);
    device.durable.settle(0, W(1));
    assert_eq!(device.cut(), [] as [crate::Content; 0]);
    assert_eq!(device.survivors(), [W(1)]);
}

#[test]
fn a_durable_change_ends_what_a_cut_may_have_left() {
    let mut device = Device::new(Zero, true);
    device.change(W(1), Done);
    device.cut();
    device.change(W(2), Done);
    device.flush();
    assert_eq!(device.survivors(), [W(2)]);
}

#[test]
fn a_flush_from_before_the_cut_covers_nothing_after_it() {
    let mut device = Device::new(Zero, true);
    let flush = device.tick();
    device.cut();
    device.change(W(1), Done);
    device.durable.flush_done(flush);
    assert_eq!(device.survivors(), [Zero, W(1)]);
}

#[test]
fn a_read_settles_nothing_that_was_written_since_may_explain() {
    let mut device = Device::new(Zero, true);
    device.change(W(1), Done);
    device.cut();
    device.change(Zero, Done);
    device.durable.settle(0, Zero);
    assert_eq!(device.survivors(), [Zero, W(1)]);
    device.durable.settle(0, W(1));
    assert_eq!(device.survivors(), [W(1), Zero]);
    // It is neither: not for this oracle to say.
    device.durable.settle(0, W(7));
    assert_eq!(device.survivors(), [W(1), Zero]);
}

#[test]
fn a_read_of_what_cannot_be_there_is_reported_once() {
    let mut device = Device::new(Zero, true);
    device.change(W(1), Done);
    device.flush();
    device.cut();
    assert!(!device.durable.survives(0, Zero));
    device.durable.settle(0, Zero);
    assert_eq!(device.survivors(), [Zero]);
}

#[test]
fn where_anything_may_be_nothing_settles_it() {
    let mut device = Device::new(Zero, true);
    device.change(Unknown, Done);
    assert_eq!(device.cut(), [Zero, Unknown]);
    device.durable.settle(0, Zero);
    assert_eq!(device.survivors(), [Unknown]);
    assert!(device.durable.survives(0, W(5)) && device.durable.survives(0, Unknown));
    device.change(W(1), Done);
    device.flush();
    assert!(device.durable.survives(0, W(1)) && !device.durable.survives(0, Unknown));
}

#[test]
fn zeroes_over_zeroes_are_one_survivor() {
    let mut device = Device::new(Zero, true);
    device.change(Zero, Done);
    assert_eq!(device.survivors(), [Zero]);
    assert_eq!(device.durable.busy_blocks(), 0);
    let zeroing = device.begin(Zero);
    // One content, but the cut ends what is in flight, and that is worth telling.
    assert_eq!(device.cut(), [Zero]);
    device.end(zeroing, Done, false);
    assert_eq!((device.survivors(), device.durable.busy_blocks()), (vec![Zero], 0));
}

#[test]
fn generations_wrap() {
    let mut device = Device::new(Zero, true);
    device.change(W(GENERATION_MAX), Done);
    device.flush();
    device.change(W(1), Done);
    assert_eq!(device.survivors(), [W(GENERATION_MAX), W(1)]);
    device.flush();
    assert_eq!(device.survivors(), [W(1)]);
}

#[test]
fn blocks_are_independent() {
    let mut durable = Durable::new(3, Zero, true);
    let content_of = |block| W(10 + block as u32);
    durable.begin_change(0..3, content_of, 1);
    durable.end_change(0..3, 1, 2, Done, false);
    durable.flush_done(3);
    durable.begin_change(1..2, |_| W(20), 4);
    let survivors: Vec<_> = (0..3).map(|block| durable.survivors(block)).collect();
    assert_eq!(survivors, [vec![W(10)], vec![W(11), W(20)], vec![W(12)]]);
}
