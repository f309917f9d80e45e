//! ADD_DEV and `SET_PARAMS` in every shape: what is asked for, on both sides of every bound.

use nix::errno::Errno;
use ublkit::raw::{Payload, RawCommand};
use ublkit::sys::ublk::{self, DevInfo, Features, ParamDiscard, ParamSegment, Params};

use super::expect::{Probe, control, err, memory, ok, room};
use super::lab::{self, ABSENT_ID, Rig};
use super::protocol::MAX_IO;
use super::state::State::{self, Absent, Added, Configured};
use super::table::{V6_16, V7_0, V7_1};
use crate::gates::ADDED_LIVE;

/// A flag that no driver knows.
const UNKNOWN_FLAG: u64 = 1 << 62;
/// A kind of parameters that no driver knows.
const UNKNOWN_TYPE: u32 = 1 << 31;
/// Parameters for metadata, which not every driver knows; without the feature nobody takes them.
const INTEGRITY_TYPE: u32 = 1 << 6;
/// A device can be asked for with this where there is none.
const NEW: &[State] = &[Absent];

/// Every shape.
pub(super) fn all() -> Vec<Probe> {
    let mut all = refused_devices();
    all.extend(devices());
    all.extend(flags());
    all.extend(refused_params());
    all.extend(params());
    all
}

fn add(variant: &'static str, change: fn(&mut DevInfo)) -> Probe {
    let shape = move |rig: &Rig, _| {
        let mut info = lab::add(rig.id, Features::NONE);
        change(&mut info);
        lab::add_command(info)
    };
    control("ADD_DEV", variant, ublk::CMD_ADD_DEV, shape).only(NEW)
}

fn refused_devices() -> Vec<Probe> {
    let command = |variant, shape: fn(RawCommand) -> RawCommand| {
        let shape = move |rig: &Rig, _| shape(lab::add_command(lab::add(rig.id, Features::NONE)));
        control("ADD_DEV", variant, ublk::CMD_ADD_DEV, shape)
    };
    let invalid = || [err(State::ALL, Errno::EINVAL)];
    vec![
        control("ADD_DEV", "short", ublk::CMD_ADD_DEV, room(63)).gives(invalid()),
        control("ADD_DEV", "no memory", ublk::CMD_ADD_DEV, |_, command| command).gives(invalid()),
        control("ADD_DEV", "null", ublk::CMD_ADD_DEV, memory(Payload::Null(64))).gives(invalid()),
        control("ADD_DEV", "unreadable", ublk::CMD_ADD_DEV, memory(Payload::Inaccessible(64)))
            .gives([err(State::ALL, Errno::EFAULT)]),
        command("about a queue", |command| RawCommand { queue_id: 0, ..command }).gives(invalid()),
        command("another id in the header", |command| RawCommand { dev_id: ABSENT_ID - 1, ..command })
            .gives(invalid()),
        add("id 2^20", |info| info.dev_id = 1 << 20).gives([err(NEW, Errno::EINVAL)]),
        add("id 2^31", |info| info.dev_id = 1 << 31).gives([err(NEW, Errno::EINVAL)]),
        add("depth 0", |info| info.queue_depth = 0).gives([err(NEW, Errno::EINVAL)]),
        add("depth 4097", |info| info.queue_depth = 4097).gives([err(NEW, Errno::EINVAL)]),
        add("no queues", |info| info.nr_hw_queues = 0).gives([err(NEW, Errno::EINVAL)]),
        add("4097 queues", |info| info.nr_hw_queues = 4097).gives([err(NEW, Errno::EINVAL)]),
    ]
}

fn devices() -> Vec<Probe> {
    vec![
        add("depth 1", |info| info.queue_depth = 1).gives([ok(NEW)]).answers(as_asked),
        add("depth 4096", |info| info.queue_depth = 4096).gives([ok(NEW)]).answers(as_asked),
        // As many as there are processors are enough.
        add("4096 queues", |info| info.nr_hw_queues = 4096).gives([ok(NEW)]).answers(|answer| {
            let queues = DevInfo::from_bytes(answer).nr_hw_queues;
            (queues == 0 || queues == 4096).then(|| format!("{queues} queues"))
        }),
        add("largest I/O of a page and a byte", |info| info.max_io_buf_bytes = 4097).gives([ok(NEW)]).answers(
            |answer| {
                let bytes = DevInfo::from_bytes(answer).max_io_buf_bytes;
                (bytes != 4096).then(|| format!("a largest I/O of {bytes} bytes"))
            },
        ),
        // They are the server's own.
        add("every flag of a server", |info| info.ublksrv_flags = u64::MAX).gives([ok(NEW)]).answers(as_asked),
        // What it says of itself is the driver's to know.
        add("live already", |info| info.state = ublk::STATE_LIVE)
            .gives([ok(NEW)])
            .answers(|answer| {
                let state = DevInfo::from_bytes(answer).state;
                (state != ublk::STATE_DEAD).then(|| format!("state {state}"))
            })
            .gated(&ADDED_LIVE, NEW),
    ]
}

/// What a plain device has to say of itself.
fn as_asked(answer: &[u8]) -> Option<String> {
    let info = DevInfo::from_bytes(answer);
    let right = info.dev_id == ABSENT_ID
        && info.nr_hw_queues == 1
        && info.queue_depth > 0
        && info.max_io_buf_bytes == MAX_IO
        && info.state == ublk::STATE_DEAD;
    (!right).then(|| format!("{info:?}"))
}

/// The answer must not have these flags.
fn without(answer: &[u8], flags: u64) -> Option<String> {
    let told = DevInfo::from_bytes(answer).flags;
    (told & flags != 0).then(|| format!("flags {told:#x}, of which {:#x} should not be there", told & flags))
}

fn flags() -> Vec<Probe> {
    const RECOVERY: u64 = Features::USER_RECOVERY.bits();
    const REISSUE: u64 = Features::USER_RECOVERY_REISSUE.bits();
    const FAIL_IO: u64 = Features::USER_RECOVERY_FAIL_IO.bits();
    vec![
        add("unknown flag", |info| info.flags |= UNKNOWN_FLAG)
            .gives([ok(NEW)])
            .answers(|answer| without(answer, UNKNOWN_FLAG)),
        // It is for those who are not privileged.
        add("unprivileged, by root", |info| info.flags |= Features::UNPRIVILEGED_DEV.bits())
            .gives([ok(NEW)])
            .answers(|answer| without(answer, Features::UNPRIVILEGED_DEV.bits())),
        add("user copy, and buffers given late", |info| {
            info.flags |= (Features::USER_COPY | Features::NEED_GET_DATA).bits();
        })
        .gives([ok(NEW)])
        .answers(|answer| without(answer, Features::NEED_GET_DATA.bits())),
        // A driver that does not know a flag takes no offence.
        add("reissue without recovery", |info| info.flags |= REISSUE)
            .gives([ok(NEW).before(V6_16), err(NEW, Errno::EINVAL)]),
        add("failing without recovery", |info| info.flags |= FAIL_IO)
            .gives([ok(NEW).before(V6_16), err(NEW, Errno::EINVAL)]),
        add("recovery that reissues and fails", |info| info.flags |= RECOVERY | REISSUE | FAIL_IO)
            .gives([ok(NEW).before(V6_16), err(NEW, Errno::EINVAL)]),
        add("quiesce without recovery", |info| info.flags |= Features::QUIESCE.bits())
            .gives([ok(NEW).before(V6_16), err(NEW, Errno::EINVAL)]),
        add("zoned, copied by the driver", |info| info.flags |= Features::ZONED.bits())
            .gives([err(NEW, Errno::EINVAL)]),
        add("integrity, copied by the driver", |info| info.flags |= Features::INTEGRITY.bits())
            .gives([ok(NEW).before(V7_0), err(NEW, Errno::EINVAL)]),
    ]
}

fn set(variant: &'static str, change: fn(&mut Params)) -> Probe {
    let shape = move |rig: &Rig, _| {
        let mut params = lab::params();
        change(&mut params);
        lab::set_params(rig.id, &params)
    };
    control("SET_PARAMS", variant, ublk::CMD_SET_PARAMS, shape)
}

fn discard(params: &mut Params, granularity: u32, sectors: u32, segments: u16) {
    params.types |= ublk::PARAM_TYPE_DISCARD;
    params.discard = ParamDiscard {
        discard_granularity: granularity,
        max_discard_sectors: sectors,
        max_discard_segments: segments,
        ..ParamDiscard::default()
    };
}

fn alignment(params: &mut Params, alignment: u32) {
    params.types |= ublk::PARAM_TYPE_DMA_ALIGN;
    params.dma_alignment = alignment;
}

fn segment(params: &mut Params, seg_boundary_mask: u64, max_segment_size: u32, max_segments: u16) {
    params.types |= ublk::PARAM_TYPE_SEGMENT;
    params.seg = ParamSegment { seg_boundary_mask, max_segment_size, max_segments, pad: 0 };
}

/// Parameters that the driver does not take. It has forgotten the earlier ones then, so they are for a device without.
fn refused_params() -> Vec<Probe> {
    const AT: &[State] = &[Added];
    let refused = |variant, change: fn(&mut Params)| set(variant, change).only(AT).gives([err(AT, Errno::EINVAL)]);
    // 6.18.15 takes them, and its START would be refused with a warning. 6.12.117 has been put right.
    let less_than_a_page = |variant, change: fn(&mut Params)| {
        set(variant, change).only(AT).gives([
            err(AT, Errno::EINVAL).before(V6_16),
            ok(AT).before(V7_1),
            err(AT, Errno::EINVAL),
        ])
    };
    // Drivers that do not know these rules, or these parameters, take them.
    let since = |kernel, variant, change: fn(&mut Params)| {
        set(variant, change).only(AT).gives([ok(AT).before(kernel), err(AT, Errno::EINVAL)])
    };
    vec![
        refused("logical block 2^8", |params| params.basic.logical_bs_shift = 8),
        refused("logical block 2^13", |params| {
            params.basic.logical_bs_shift = 13;
            params.basic.physical_bs_shift = 13;
        }),
        refused("physical block below the logical one", |params| {
            params.basic.logical_bs_shift = 12;
            params.basic.physical_bs_shift = 11;
        }),
        since(V7_0, "physical block 2^29", |params| params.basic.physical_bs_shift = 29),
        since(V7_0, "least I/O 2^29", |params| params.basic.io_min_shift = 29),
        since(V7_0, "best I/O 2^29", |params| params.basic.io_opt_shift = 29),
        refused("one sector more than fits", |params| params.basic.max_sectors = MAX_IO / 512 + 1),
        less_than_a_page("7 sectors", |params| params.basic.max_sectors = 7),
        less_than_a_page("no sectors", |params| params.basic.max_sectors = 0),
        refused("only discard", |params| {
            discard(params, 4096, 8, 1);
            params.types = ublk::PARAM_TYPE_DISCARD;
        }),
        refused("discard granularity 0", |params| discard(params, 0, 8, 1)),
        refused("two discard segments", |params| discard(params, 4096, 8, 2)),
        refused("no discard segment", |params| discard(params, 4096, 8, 0)),
        refused("numbers of nodes", |params| params.types |= ublk::PARAM_TYPE_DEVT),
        refused("zones of a device without", |params| {
            params.types |= ublk::PARAM_TYPE_ZONED;
            params.basic.chunk_sectors = 128;
            params.zoned.max_zone_append_sectors = 8;
        }),
        since(V6_16, "alignment 4096", |params| alignment(params, 4096)),
        since(V6_16, "alignment 4", |params| alignment(params, 4)),
        since(V6_16, "segment boundary 2^11", |params| segment(params, (1 << 11) - 1, 4096, 1)),
        since(V6_16, "segment boundary not a power of two", |params| segment(params, 5119, 4096, 1)),
        since(V6_16, "segment boundary 2^64", |params| segment(params, u64::MAX, 4096, 1)),
        since(V6_16, "segment of 4095 bytes", |params| segment(params, 4095, 4095, 1)),
        since(V7_0, "integrity of a device without", |params| params.types |= INTEGRITY_TYPE),
        // Refused, they are gone, and those before them too.
        set("refused instead of others", |params| params.basic.logical_bs_shift = 8)
            .only(&[Configured])
            .spoils()
            .gives([err(&[Configured], Errno::EINVAL)]),
    ]
}

/// Parameters that it does take, one after the other.
fn params() -> Vec<Probe> {
    const AT: &[State] = &[Configured];
    let taken = |variant, change: fn(&mut Params)| set(variant, change).only(AT).reads().gives([ok(AT)]);
    vec![
        taken("blocks 2^9", |params| params.basic.physical_bs_shift = 9),
        taken("blocks 2^12", |params| params.basic.logical_bs_shift = 12),
        taken("physical block 2^28", |params| params.basic.physical_bs_shift = 28),
        taken("hints 2^28", |params| {
            params.basic.io_min_shift = 28;
            params.basic.io_opt_shift = 28;
        }),
        taken("no hints", |params| {
            params.basic.io_min_shift = 0;
            params.basic.io_opt_shift = 0;
        }),
        taken("8 sectors", |params| params.basic.max_sectors = 8),
        taken("as many sectors as fit", |params| params.basic.max_sectors = MAX_IO / 512),
        taken("every attribute", |params| params.basic.attrs = 0xf),
        taken("no size", |params| params.basic.dev_sectors = 0),
        taken("every size", |params| params.basic.dev_sectors = u64::MAX),
        taken("discard in one segment", |params| discard(params, 4096, 128, 1)),
        taken("discard of nothing", |params| discard(params, 1, 0, 0)),
        taken("alignment 0", |params| alignment(params, 0)),
        taken("alignment 4095", |params| alignment(params, 4095)),
        taken("smallest segments", |params| segment(params, 4095, 4096, 0)),
        taken("largest segments", |params| segment(params, (1 << 63) - 1, u32::MAX, u16::MAX)),
        taken("unknown kind", |params| params.types |= UNKNOWN_TYPE),
    ]
}
