//! What the kernel makes of a geometry, and what it refuses.

use std::sync::Arc;

use nix::errno::Errno;
use ublkit::ctrl::AddDevice;
use ublkit::sys::ublk::{self, Features, ParamBasic, ParamDiscard, Params};
use ublkit::{Controller, Device, DiscardLimits, ErrorKind, Geometry, blkdev};

use super::client::{self, KIB, MIB, builder, sysfs, sysfs_number};
use super::disk::Disk;
use super::runner::{cases, ids};

cases!("geometry":
    sysfs_and_ioctls_say_what_was_declared in 90 s,
    what_the_library_refuses_leaves_nothing_behind,
    the_driver_agrees_with_the_librarys_rules,
    the_widest_of_everything_is_accepted,
);

fn grid() -> Vec<(Geometry, u32, u16)> {
    let plain = Geometry::bytes(MIB);
    let limits = DiscardLimits { granularity: 8192, alignment: 4096, max_bytes: 256 * KIB };
    vec![
        (plain, 512 << 10, 1),
        (plain.physical_block(512), 4096, 1),
        (plain.logical_block(1024).physical_block(8192).io_hints(16384, 65536), 128 << 10, 1),
        (plain.logical_block(2048).rotational(), 64 << 10, 1),
        (plain.logical_block(4096).volatile_cache(), 1 << 20, 2),
        (plain.fua().read_only(), 64 << 10, 1),
        (plain.discard_limits(limits), 64 << 10, 1),
        (plain.discard(512), 64 << 10, 1),
        (plain.write_zeroes_max(192 * KIB), 64 << 10, 1),
        (plain.fua().discard(4096).write_zeroes().rotational(), 64 << 10, 2),
    ]
}

fn sysfs_and_ioctls_say_what_was_declared() {
    for (geometry, max_io_bytes, queues) in grid() {
        let disk = Disk::new(geometry);
        let device = builder(&disk).max_io_bytes(max_io_bytes).queues(queues).start().expect("start");
        compare(&device, &geometry, max_io_bytes, queues);
        client::close(&device);
    }
}

fn compare(device: &Device, geometry: &Geometry, max_io_bytes: u32, queues: u16) {
    let say = |wrong: Vec<String>| assert!(wrong.is_empty(), "{geometry:?}: {wrong:#?}");
    let mut wrong = Vec::new();
    let mut number = |name: &str, want: u64| {
        let got = sysfs_number(device, name);
        if got != want {
            wrong.push(format!("{name}: got {got}, want {want}"));
        }
    };
    number("size", geometry.size / 512);
    number("ro", u64::from(geometry.read_only));
    number("queue/logical_block_size", geometry.logical_block.into());
    number("queue/physical_block_size", geometry.physical_block.into());
    number("queue/minimum_io_size", geometry.io_min.max(geometry.physical_block).into());
    number("queue/optimal_io_size", geometry.io_opt.into());
    number("queue/max_hw_sectors_kb", u64::from(max_io_bytes) / KIB);
    number("queue/max_sectors_kb", u64::from(max_io_bytes) / KIB);
    number("queue/rotational", geometry.rotational.into());
    number("queue/fua", geometry.fua.into());
    number("queue/write_zeroes_max_bytes", geometry.write_zeroes.unwrap_or(0));
    let discard = geometry.discard.map_or(0, |limits| limits.max_bytes);
    number("queue/discard_max_hw_bytes", discard);
    number("queue/discard_max_bytes", discard);
    if let Some(limits) = geometry.discard {
        // The kernel raises it to the physical block (blk_validate_limits() in block/blk-settings.c).
        number("queue/discard_granularity", limits.granularity.max(geometry.physical_block).into());
    }
    let cache = sysfs(device, "queue/write_cache");
    if cache != if geometry.volatile_cache { "write back" } else { "write through" } {
        wrong.push(format!("write_cache: {cache}"));
    }
    let hardware_queues = std::fs::read_dir(format!("/sys/block/ublkb{}/mq", device.id())).expect("mq").count();
    if hardware_queues != usize::from(queues.min(cpus())) || hardware_queues != usize::from(device.info().queues()) {
        wrong.push(format!("{hardware_queues} hardware queues, {} granted", device.info().queues()));
    }

    let file = std::fs::File::open(device.path()).expect("open");
    let asked = (
        blkdev::size(&file).expect("BLKGETSIZE64"),
        blkdev::logical_block(&file).expect("BLKSSZGET"),
        blkdev::physical_block(&file).expect("BLKPBSZGET"),
        blkdev::read_only(&file).expect("BLKROGET"),
    );
    let want = (geometry.size, geometry.logical_block, geometry.physical_block, geometry.read_only);
    if asked != want {
        wrong.push(format!("ioctls: got {asked:?}, want {want:?}"));
    }
    say(wrong);
}

type Choice = fn(client::Builder) -> client::Builder;

fn cpus() -> u16 {
    std::thread::available_parallelism().expect("count CPUs").get().try_into().expect("few")
}

fn what_the_library_refuses_leaves_nothing_behind() {
    let good = Geometry::bytes(MIB);
    let before = ids();
    let mut sizeless = good;
    sizeless.size = 0;
    let mut odd = good;
    odd.size = 1000;
    let mut inverted = good;
    (inverted.logical_block, inverted.physical_block) = (4096, 512);
    for (geometry, word) in [
        (sizeless, "size"),
        (odd, "size"),
        (good.logical_block(256), "logical block"),
        (good.logical_block(8192), "logical block"),
        (inverted, "physical block"),
        (good.physical_block(1 << 29), "physical block"),
        (good.io_hints(0, 3), "io_opt"),
        (good.discard(0), "granularity"),
        (good.write_zeroes_max(100), "write-zeroes"),
    ] {
        let error = builder(&Disk::new(geometry)).start().expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{geometry:?}: {error}");
        assert!(error.to_string().contains(word) && error.to_string().contains("choose"), "{geometry:?}: {error}");
        assert_eq!(ids(), before);
    }
    let shapes: [(&str, Choice); 7] = [
        ("queues", |builder| builder.queues(0)),
        ("queues", |builder| builder.queues(4097)),
        ("depth", |builder| builder.depth(0)),
        ("depth", |builder| builder.depth(4097)),
        ("largest I/O", |builder| builder.max_io_bytes(2048)),
        ("largest I/O", |builder| builder.max_io_bytes(4097)),
        ("id", |builder| builder.id(1 << 20)),
    ];
    for (word, choose) in shapes {
        let error = choose(builder(&Disk::new(good))).start().expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        assert!(error.to_string().contains(word), "{error}");
        assert_eq!(ids(), before);
    }
}

/// The library's rules are the driver's: what it refuses in their name is put to the driver itself.
fn the_driver_agrees_with_the_librarys_rules() {
    let basic = ParamBasic {
        logical_bs_shift: 9,
        physical_bs_shift: 12,
        io_min_shift: 12,
        max_sectors: 128,
        dev_sectors: 2048,
        ..ParamBasic::default()
    };
    let discard = ParamDiscard { discard_granularity: 4096, max_discard_segments: 1, ..ParamDiscard::default() };
    let with_basic = |basic| Params { types: ublk::PARAM_TYPE_BASIC, basic, ..Params::default() };
    let with_discard =
        |discard| Params { types: ublk::PARAM_TYPE_BASIC | ublk::PARAM_TYPE_DISCARD, discard, ..with_basic(basic) };
    let table = [
        ("good", with_basic(basic), true),
        ("good discard", with_discard(ParamDiscard { max_discard_sectors: 8, ..discard }), true),
        ("logical 256", with_basic(ParamBasic { logical_bs_shift: 8, ..basic }), false),
        ("logical 8192", with_basic(ParamBasic { logical_bs_shift: 13, physical_bs_shift: 13, ..basic }), false),
        (
            "physical below logical",
            with_basic(ParamBasic { logical_bs_shift: 12, physical_bs_shift: 9, ..basic }),
            false,
        ),
        ("max I/O beyond the buffer", with_basic(ParamBasic { max_sectors: 129, ..basic }), false),
        ("discard granularity 0", with_discard(ParamDiscard { discard_granularity: 0, ..discard }), false),
        (
            "two discard segments",
            with_discard(ParamDiscard { max_discard_segments: 2, max_discard_sectors: 8, ..discard }),
            false,
        ),
        ("no basic", Params { types: ublk::PARAM_TYPE_DISCARD, discard, ..Params::default() }, false),
    ];
    let controller = Controller::open().expect("open");
    let add = AddDevice { id: None, queues: 1, depth: 4, max_io_bytes: 64 << 10, features: Features::NONE };
    let info = controller.add(&add).expect("add");
    let verdicts: Vec<_> =
        table.iter().map(|(what, params, _)| (*what, controller.set_params(info.id(), params))).collect();
    controller.delete(info.id(), std::time::Duration::from_secs(5)).expect("delete");
    for ((what, verdict), (_, _, accepted)) in verdicts.into_iter().zip(table) {
        assert_eq!(verdict.is_ok(), accepted, "{what}: {verdict:?}");
        if let Err(error) = verdict {
            assert_eq!(error.errno(), Some(Errno::EINVAL as i32), "{what}: {error}");
        }
    }
}

fn the_widest_of_everything_is_accepted() {
    let limits = DiscardLimits { granularity: 1 << 20, alignment: 4096, max_bytes: u64::from(u32::MAX) & !511 };
    let wide = Geometry::bytes(MIB)
        .physical_block(1 << 20)
        .io_hints(1 << 20, 1 << 21)
        .discard_limits(limits)
        .write_zeroes_max(limits.max_bytes);
    let disk = Disk::new(wide);
    let device = builder(&disk).depth(1).max_io_bytes(32 << 20).start().expect("start");
    assert_eq!(device.info().max_io_bytes(), 32 << 20);
    assert_eq!(sysfs_number(&device, "queue/max_hw_sectors_kb"), 32 << 10);
    assert_eq!(sysfs_number(&device, "queue/physical_block_size"), 1 << 20);
    let file = client::direct(&device);
    client::write(&file, 1, 512, 4096).expect("write");
    drop(file);
    client::close(&device);

    let disk = Disk::new(Geometry::bytes(MIB));
    let device = builder(&disk).depth(4096).max_io_bytes(4096).queues(4096).start().expect("start");
    assert_eq!((device.info().depth(), device.info().queues()), (4096, cpus()));
    client::write(&client::direct(&device), 1, 0, 8192).expect("write");
    assert!(Arc::strong_count(&disk) > 1);
    client::close(&device);
}
