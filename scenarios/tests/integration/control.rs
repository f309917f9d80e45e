//! The control device: what it says of a device, and its errors.

use std::time::Duration;

use nix::errno::Errno;
use ublkit::ctrl::{AddDevice, State};
use ublkit::sys::ublk::{self, Features};
use ublkit::{Controller, DiscardLimits, ErrorKind, Geometry, Result};

use super::client::{self, MIB, start_with};
use super::disk::Disk;
use super::runner::{cases, ids};

cases!("control":
    a_live_device_is_described,
    parameters_make_the_round_trip,
    the_affinity_of_a_queue_that_is_not_there,
    an_unknown_id_is_enodev_for_every_command,
    a_device_can_be_deleted_once,
    what_add_refuses,
    features_that_this_driver_lacks_are_not_granted,
    commands_in_the_wrong_state,
    a_start_that_nobody_fetches_for_is_bounded,
    a_close_leaves_the_next_owner_of_its_id_alone,
);

const SHORT: Duration = Duration::from_secs(5);
/// Nobody has this id: the trials take low ones, or their own.
const NOBODY: u32 = 123_456;

fn controller() -> Controller {
    Controller::open().expect("open")
}

fn plain() -> AddDevice {
    AddDevice { id: None, queues: 1, depth: 8, max_io_bytes: 64 << 10, features: Features::NONE }
}

#[track_caller]
fn assert_errno<T: std::fmt::Debug>(result: Result<T>, kind: ErrorKind, errno: Errno) {
    let error = result.expect_err("an error");
    assert_eq!((error.kind(), error.errno()), (kind, Some(errno as i32)), "{error}");
}

fn a_live_device_is_described() {
    let device = start_with(&Disk::new(Geometry::bytes(MIB)), |builder| builder.queues(2).depth(32));
    let controller = controller();
    for info in [controller.get_dev_info(device.id()), controller.get_dev_info2(device.id())] {
        let info = info.expect("info");
        assert_eq!((info.id(), info.state()), (device.id(), State::Live));
        assert_eq!(info.server_pid(), std::process::id() as i32);
        assert_eq!((info.queues(), info.depth(), info.max_io_bytes()), (2, 32, 64 << 10));
        assert_eq!(info.features().bits(), device.info().features().bits());
        assert!(info.character_path().exists() && info.block_path().exists());
    }
    assert!(controller.features().contains(Features::USER_COPY), "{:?}", controller.features());
    client::close(&device);
    assert_errno(controller.get_dev_info2(device.id()), ErrorKind::NotFound, Errno::ENODEV);
}

fn parameters_make_the_round_trip() {
    let limits = DiscardLimits { granularity: 8192, alignment: 4096, max_bytes: 1 << 20 };
    let geometry = Geometry::bytes(MIB).logical_block(1024).fua().discard_limits(limits).write_zeroes_max(65536);
    let device = start_with(&Disk::new(geometry), |builder| builder);
    let controller = controller();
    let got = controller.get_params(device.id()).expect("get");
    client::close(&device);
    assert_eq!(got.types, ublk::PARAM_TYPE_BASIC | ublk::PARAM_TYPE_DISCARD | ublk::PARAM_TYPE_DEVT);
    assert_eq!((got.basic.logical_bs_shift, got.basic.dev_sectors, got.basic.max_sectors), (10, 2048, 128));
    assert_eq!(got.basic.attrs, ublk::ATTR_VOLATILE_CACHE | ublk::ATTR_FUA);
    assert_eq!((got.discard.discard_granularity, got.discard.discard_alignment), (8192, 4096));
    assert_eq!((got.discard.max_discard_sectors, got.discard.max_write_zeroes_sectors), (2048, 128));
    assert!(got.devt.disk_major > 0 && got.devt.char_major > 0);

    let info = controller.add(&plain()).expect("add");
    let refused = controller.set_params(info.id(), &got);
    let masked = ublk::Params { types: got.types & !ublk::PARAM_TYPE_DEVT, ..got };
    let accepted = controller.set_params(info.id(), &masked);
    let again = controller.get_params(info.id());
    controller.delete(info.id(), SHORT).expect("delete");
    assert_errno(refused, ErrorKind::Kernel, Errno::EINVAL);
    accepted.expect("set");
    let again = again.expect("get");
    assert_eq!((again.types, again.basic, again.discard), (got.types, got.basic, got.discard));
}

fn the_affinity_of_a_queue_that_is_not_there() {
    let device = client::start(&Disk::new(Geometry::bytes(MIB)));
    let controller = controller();
    assert!(!controller.get_queue_affinity(device.id(), 0).expect("affinity").is_empty());
    assert_errno(controller.get_queue_affinity(device.id(), 1), ErrorKind::Kernel, Errno::EINVAL);
    client::close(&device);
}

fn an_unknown_id_is_enodev_for_every_command() {
    let controller = controller();
    assert!(!ids().contains(&NOBODY));
    let not_found = |result: Result<()>| assert_errno(result, ErrorKind::NotFound, Errno::ENODEV);
    not_found(controller.get_dev_info(NOBODY).map(drop));
    not_found(controller.get_params(NOBODY).map(drop));
    not_found(controller.set_params(NOBODY, &ublk::Params::default()));
    not_found(controller.get_queue_affinity(NOBODY, 0).map(drop));
    not_found(controller.start(NOBODY, std::process::id(), SHORT, &|| false));
    not_found(controller.stop(NOBODY, SHORT));
    not_found(controller.delete(NOBODY, SHORT));
    not_found(controller.delete_async(NOBODY));
    let error = controller.get_dev_info2(NOBODY).expect_err("nobody");
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    assert!(error.to_string().contains("123456"), "{error}");
}

fn a_device_can_be_deleted_once() {
    let controller = controller();
    let info = controller.add(&plain()).expect("add");
    assert_eq!(info.state(), State::Dead);
    assert!(ids().contains(&info.id()));
    controller.delete(info.id(), SHORT).expect("delete");
    assert_errno(controller.delete(info.id(), SHORT), ErrorKind::NotFound, Errno::ENODEV);
    assert_errno(controller.delete_async(info.id()), ErrorKind::NotFound, Errno::ENODEV);
    let info = controller.add(&plain()).expect("add");
    controller.delete_async(info.id()).expect("delete");
    client::eventually("it is gone", || controller.get_dev_info(info.id()).is_err());
}

fn what_add_refuses() {
    let (controller, before) = (controller(), ids());
    for bad in [
        AddDevice { depth: 0, ..plain() },
        AddDevice { depth: 4097, ..plain() },
        AddDevice { queues: 0, ..plain() },
        AddDevice { queues: 4097, ..plain() },
        AddDevice { id: Some(1 << 20), ..plain() },
    ] {
        assert_errno(controller.add(&bad), ErrorKind::Kernel, Errno::EINVAL);
    }
    let info = controller.add(&AddDevice { max_io_bytes: (64 << 10) + 100, ..plain() }).expect("add");
    assert_eq!(info.max_io_bytes(), 64 << 10, "what was granted is told, not what was asked");
    let error = controller.add(&AddDevice { id: Some(info.id()), ..plain() }).expect_err("taken");
    controller.delete(info.id(), SHORT).expect("delete");
    assert_eq!((error.kind(), error.errno()), (ErrorKind::Busy, Some(Errno::EEXIST as i32)), "{error}");
    assert_eq!(ids(), before);
}

fn features_that_this_driver_lacks_are_not_granted() {
    let controller = controller();
    let unknown = Features::from_bits(1 << 62);
    assert!(!controller.features().contains(unknown));
    match controller.add(&AddDevice { features: unknown, ..plain() }) {
        Ok(info) => {
            controller.delete(info.id(), SHORT).expect("delete");
            assert!(!info.features().contains(unknown), "{info:?}");
        }
        Err(error) => assert_eq!(error.errno(), Some(Errno::EINVAL as i32), "{error}"),
    }
}

fn commands_in_the_wrong_state() {
    let device = client::start(&Disk::new(Geometry::bytes(MIB)));
    let controller = controller();
    let params = controller.get_params(device.id()).expect("get");
    let params = ublk::Params { types: params.types & !ublk::PARAM_TYPE_DEVT, ..params };
    assert_errno(controller.set_params(device.id(), &params), ErrorKind::PermissionDenied, Errno::EACCES);
    let started = controller.start(device.id(), std::process::id(), SHORT, &|| false);
    assert_errno(started, ErrorKind::Busy, Errno::EEXIST);
    client::write(&client::direct(&device), 1, 0, 4096).expect("it is not disturbed");
    client::close(&device);
}

fn a_start_that_nobody_fetches_for_is_bounded() {
    let controller = controller();
    let info = controller.add(&plain()).expect("add");
    let geometry = ublk::ParamBasic {
        logical_bs_shift: 9,
        physical_bs_shift: 9,
        io_min_shift: 9,
        max_sectors: 128,
        dev_sectors: 8,
        ..ublk::ParamBasic::default()
    };
    let params = ublk::Params { types: ublk::PARAM_TYPE_BASIC, basic: geometry, ..ublk::Params::default() };
    controller.set_params(info.id(), &params).expect("set");
    let pid = std::process::id();
    let outcomes = [
        client::bounded("the start", SHORT, || {
            controller.start(info.id(), pid, Duration::from_millis(200), &|| false)
        }),
        client::bounded("the start", SHORT, || controller.start(info.id(), pid, Duration::from_secs(60), &|| true)),
    ];
    controller.delete(info.id(), SHORT).expect("delete");
    for outcome in outcomes {
        // Since Linux 6.18 the driver compares the pid with the opener of the character device, and there is none.
        let error = outcome.expect_err("nobody serves it");
        assert!(
            error.kind() == ErrorKind::TimedOut || error.errno() == Some(Errno::EINVAL as i32),
            "{error} {:?}",
            error.kind()
        );
    }
}

/// A server whose device somebody else had deleted stopped the one that had got its id meanwhile.
fn a_close_leaves_the_next_owner_of_its_id_alone() {
    let first = client::start(&Disk::new(Geometry::bytes(MIB)));
    controller().delete(first.id(), SHORT).expect("delete");
    let second = start_with(&Disk::new(Geometry::bytes(MIB)), |builder| builder.id(first.id()));
    client::close(&first);
    client::write(&client::direct(&second), 1, 0, 4096).expect("it is not disturbed");
    client::close(&second);
}
