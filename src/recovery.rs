//! Devices that outlive their servers: what becomes of their I/O, and who may take them over.

use std::fmt;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::backend::{Geometry, SECTOR_SIZE};
use crate::builder::DataMode;
use crate::ctrl::{Controller, DeviceInfo, State, character_path};
use crate::error::{Error, ErrorKind, Result};
use crate::holders::{self, Holders};
use crate::params;
use crate::sys::ublk::{self, Features, Params};

/// How often a device that is not free yet is looked at.
const SLICE: Duration = Duration::from_millis(20);
/// What a device may have been added with for this library to serve it. A feature that is not known may change what a request
/// is.
const SERVED: Features = Features::from_bits(
    Features::URING_CMD_COMP_IN_TASK.bits()
        | Features::USER_RECOVERY.bits()
        | Features::USER_RECOVERY_REISSUE.bits()
        | Features::UNPRIVILEGED_DEV.bits()
        | Features::CMD_IOCTL_ENCODE.bits()
        | Features::USER_COPY.bits()
        | Features::USER_RECOVERY_FAIL_IO.bits()
        | Features::UPDATE_SIZE.bits()
        | Features::QUIESCE.bits()
        | Features::PER_IO_DAEMON.bits()
        | Features::BUF_REG_OFF_DAEMON.bits()
        | Features::SAFE_STOP_DEV.bits()
        | Features::NO_AUTO_PART_SCAN.bits(),
);
/// How long the holder of a device's character device may take to turn out to be dying.
const HELD_PATIENCE: Duration = Duration::from_secs(1);

/// What becomes of a device and its I/O when its server dies, or [detaches](crate::Device::detach).
///
/// | | requests in the dead server's hands | new ones, and those not handed out | state |
/// | --- | --- | --- | --- |
/// | `None` | fail with `EIO` | fail with `EIO` | `DEAD`: the block device is gone |
/// | `Wait` | fail with `EIO` | wait | `QUIESCED` |
/// | `Reissue` | wait, and are issued again | wait | `QUIESCED` |
/// | `FailIo` | fail with `EIO` | fail at once, mostly with `EREMOTEIO` | `FAIL_IO` |
///
/// What waits does so until a server [takes the device over](crate::DeviceBuilder::recover) or the device is deleted,
/// whoever does the waiting: a file system is as patient, and `kill` does not reach an application in such a wait.
///
/// With `Reissue` a request can be carried out twice: by the server that died before it could say so, and by the next. A
/// backend for which that is not the same as once must not use it.
///
/// When a device with `Wait` or `Reissue` is stopped, the kernel fails its dirty pages instead of writing them back, even if
/// its server is there. [`Device::close`](crate::Device::close), `ublkit stop` and `ublkit delete` therefore write them back
/// before ([`DeviceInfo::write_back`]); another program's STOP and a write that comes between the two do not have that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Recovery {
    /// The device ends with its server.
    #[default]
    None,
    /// Requests that the server had fail; all others wait for the next one (`UBLK_F_USER_RECOVERY`).
    Wait,
    /// All requests wait for the next server (`UBLK_F_USER_RECOVERY_REISSUE`).
    Reissue,
    /// All requests fail until there is another server (`UBLK_F_USER_RECOVERY_FAIL_IO`). Linux 6.16 or later.
    FailIo,
}

impl fmt::Display for Recovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Wait => "wait",
            Self::Reissue => "reissue",
            Self::FailIo => "fail-io",
        })
    }
}

impl Recovery {
    /// The flags that it stands for: the other two mean something only beside the first.
    pub(crate) fn features(self) -> Features {
        match self {
            Self::None => Features::NONE,
            Self::Wait => Features::USER_RECOVERY,
            Self::Reissue => Features::USER_RECOVERY | Features::USER_RECOVERY_REISSUE,
            Self::FailIo => Features::USER_RECOVERY | Features::USER_RECOVERY_FAIL_IO,
        }
    }

    /// Flags that help, where the driver has them.
    pub(crate) fn welcome(self, available: Features) -> Features {
        if self == Self::None { Features::NONE } else { available & Features::QUIESCE }
    }

    pub(crate) const fn of(features: Features) -> Self {
        if !features.contains(Features::USER_RECOVERY) {
            Self::None
        } else if features.contains(Features::USER_RECOVERY_REISSUE) {
            Self::Reissue
        } else if features.contains(Features::USER_RECOVERY_FAIL_IO) {
            Self::FailIo
        } else {
            Self::Wait
        }
    }

    /// Whether I/O waits for a server where there is none.
    pub(crate) const fn waits(self) -> bool {
        matches!(self, Self::Wait | Self::Reissue)
    }

    /// Refuses what the driver does not have: asked for it, it would say nothing and not do it.
    pub(crate) fn check(self, available: Features) -> Result<()> {
        let needed = self.features();
        if available.contains(needed) {
            return Ok(());
        }
        let missing = needed & !available;
        let hint = match self {
            Self::FailIo => ": it came with Linux 6.16; choose wait or reissue",
            _ => "",
        };
        Err(Error::new(
            ErrorKind::Unsupported,
            format!("use recovery mode {self}: this kernel's ublk_drv has no {missing:?}{hint}"),
        ))
    }
}

/// Waits until a device's server is gone, and describes the device.
pub(crate) fn await_unserved(controller: &Controller, id: u32, deadline: Instant) -> Result<DeviceInfo> {
    let mut patience = Patience::new(id, deadline);
    loop {
        let info = controller.get_dev_info(id).map_err(|error| match error.kind() {
            ErrorKind::NotFound => error.with_message(format!("recover device {id}: there is no such device")),
            _ => error,
        })?;
        if info.recovery() == Recovery::None {
            return Err(Error::new(
                ErrorKind::State,
                format!(
                    "recover device {id}: it was built without recovery, so it ends with its server ({})",
                    info.state()
                ),
            ));
        }
        match info.state() {
            State::Quiesced | State::FailIo => return Ok(info),
            State::Dead => {
                return Err(Error::new(
                    ErrorKind::State,
                    format!(
                        "recover device {id}: it is DEAD: stopped, or not started yet; delete it or start another"
                    ),
                ));
            }
            state => patience.wait(&state.to_string())?,
        }
    }
}

/// Begins the recovery, once the kernel has let go of the last server.
pub(crate) fn begin(controller: &Controller, id: u32, deadline: Instant) -> Result<()> {
    let mut patience = Patience::new(id, deadline);
    loop {
        match controller.start_user_recovery(id) {
            Ok(()) => return Ok(()),
            // Linux before 6.16: a recovery has begun and ended before a queue was ready. The queues are as a beginning would
            // make them.
            Err(error) if error.errno() == Some(Errno::EINVAL as i32) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::Busy => patience.wait("not free yet")?,
            Err(error) => return Err(error),
        }
    }
}

/// Waits for a device to become free: to its deadline if its server is dying, not for long if it lives.
pub(crate) struct Patience {
    id: u32,
    deadline: Instant,
    held_since: Option<Instant>,
}

impl Patience {
    pub(crate) fn new(id: u32, deadline: Instant) -> Self {
        Self { id, deadline, held_since: None }
    }

    pub(crate) fn wait(&mut self, state: &str) -> Result<()> {
        let id = self.id;
        let holders = living_holders(id);
        let now = Instant::now();
        if holders.found.is_empty() {
            self.held_since = None;
        } else if now >= *self.held_since.get_or_insert(now) + HELD_PATIENCE || now >= self.deadline {
            return Err(Error::new(
                ErrorKind::Busy,
                format!(
                    "recover device {id}: it is {state} and held by {holders}: end that process, or have it detach"
                ),
            ));
        }
        if now >= self.deadline {
            return Err(Error::new(
                ErrorKind::TimedOut,
                format!(
                    "recover device {id}: it is {state}, held by {holders}: the kernel has not taken it back in time; try \
                     again"
                ),
            ));
        }
        std::thread::sleep(SLICE);
        Ok(())
    }
}

/// Who has the character device open, without those who are about to end.
fn living_holders(id: u32) -> Holders {
    let mut holders = holders::of(character_path(id)).unwrap_or_default();
    holders.found.retain(|holder| !holder.pid.is_some_and(is_exiting));
    holders
}

/// Whether a process is past the point where it runs its own code (`PF_EXITING`).
fn is_exiting(pid: i32) -> bool {
    const PF_EXITING: u64 = 4;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The flags are the seventh field behind the name, which may have anything in it.
    let flags = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(6)?.parse::<u64>().ok());
    flags.is_none_or(|flags| flags & PF_EXITING != 0)
}

/// How a device that has `features` moves data, if this library can serve it at all.
pub(crate) fn data_mode(id: u32, features: Features) -> Result<DataMode> {
    let unserved = features & !SERVED;
    if unserved != Features::NONE {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("recover device {id}: it was added with {unserved:?}, which this library does not serve"),
        ));
    }
    Ok(if features.contains(Features::USER_COPY) { DataMode::UserCopy } else { DataMode::Copy })
}

/// Compares a device's parameters with those that `geometry` would have given it.
pub(crate) fn compare(info: &DeviceInfo, has: &Params, geometry: &Geometry) -> Result<()> {
    let wants = params::params(geometry, info.max_io_bytes());
    let differences = differences(has, &wants);
    if differences.is_empty() {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "recover device {}: the geometry is not the device's: {}; give the one that it was built with",
        info.id(),
        differences.join(", ")
    )))
}

fn differences(has: &Params, wants: &Params) -> Vec<String> {
    let mut differences = Vec::new();
    let mut number = |what: &str, has: u64, wants: u64| {
        if has != wants {
            differences.push(format!("{what} {has} and not {wants}"));
        }
    };
    let bytes = |sectors: u64| sectors.saturating_mul(SECTOR_SIZE);
    let shifted = |shift: u8| if shift == 0 { 0 } else { 1u64.checked_shl(shift.into()).unwrap_or(0) };
    number("size in bytes", bytes(has.basic.dev_sectors), bytes(wants.basic.dev_sectors));
    for (what, has, wants) in [
        ("logical block", has.basic.logical_bs_shift, wants.basic.logical_bs_shift),
        ("physical block", has.basic.physical_bs_shift, wants.basic.physical_bs_shift),
        ("io_min", has.basic.io_min_shift, wants.basic.io_min_shift),
        ("io_opt", has.basic.io_opt_shift, wants.basic.io_opt_shift),
    ] {
        number(what, shifted(has), shifted(wants));
    }
    number("largest request", bytes(has.basic.max_sectors.into()), bytes(wants.basic.max_sectors.into()));
    number("chunk", bytes(has.basic.chunk_sectors.into()), bytes(wants.basic.chunk_sectors.into()));
    number("virtual boundary", has.basic.virt_boundary_mask, wants.basic.virt_boundary_mask);
    let discard = |params: &Params| {
        let offered = params.types & ublk::PARAM_TYPE_DISCARD != 0;
        if offered { params.discard } else { ublk::ParamDiscard::default() }
    };
    let (has_discard, wants_discard) = (discard(has), discard(wants));
    for (what, has, wants) in [
        ("discard granularity", has_discard.discard_granularity, wants_discard.discard_granularity),
        ("discard alignment", has_discard.discard_alignment, wants_discard.discard_alignment),
    ] {
        number(what, has.into(), wants.into());
    }
    for (what, has, wants) in [
        ("largest discard", has_discard.max_discard_sectors, wants_discard.max_discard_sectors),
        ("largest write-zeroes", has_discard.max_write_zeroes_sectors, wants_discard.max_write_zeroes_sectors),
    ] {
        number(what, bytes(has.into()), bytes(wants.into()));
    }
    for (what, attr) in [
        ("read-only", ublk::ATTR_READ_ONLY),
        ("rotational", ublk::ATTR_ROTATIONAL),
        ("a volatile cache", ublk::ATTR_VOLATILE_CACHE),
        ("FUA", ublk::ATTR_FUA),
    ] {
        match (has.basic.attrs & attr != 0, wants.basic.attrs & attr != 0) {
            (true, false) => differences.push(format!("{what}, which it has and the backend has not")),
            (false, true) => differences.push(format!("{what}, which it has not and the backend has")),
            _ => {}
        }
    }
    differences
}

/// Adds to a recovery's error what can be done with the device now.
pub(crate) fn say_what_is_left(controller: &Controller, id: u32, error: Error) -> Error {
    let state = match controller.get_dev_info(id) {
        Ok(info) => info.state(),
        Err(_) => return error,
    };
    let left = match state {
        State::Quiesced | State::FailIo => "the device is still there to be recovered".to_owned(),
        state => format!("the device is {state}"),
    };
    let message = format!("{error}; {left}");
    error.with_message(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_is_its_flags() {
        for mode in [Recovery::None, Recovery::Wait, Recovery::Reissue, Recovery::FailIo] {
            assert_eq!(Recovery::of(mode.features() | Features::USER_COPY), mode);
        }
        // Without the first flag the others mean nothing.
        assert_eq!(Recovery::of(Features::USER_RECOVERY_REISSUE), Recovery::None);
    }

    #[test]
    fn what_the_kernel_lacks_is_said_with_the_way_out() {
        let old = Features::USER_RECOVERY | Features::USER_RECOVERY_REISSUE;
        for mode in [Recovery::None, Recovery::Wait, Recovery::Reissue] {
            mode.check(old).expect("there");
            assert_eq!(mode.welcome(old), Features::NONE);
        }
        let error = Recovery::FailIo.check(old).expect_err("not there");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("USER_RECOVERY_FAIL_IO]: it came with Linux 6.16"), "{error}");
        assert_eq!(Recovery::Wait.welcome(old | Features::QUIESCE), Features::QUIESCE);
        assert_eq!(Recovery::None.welcome(old | Features::QUIESCE), Features::NONE);
    }

    #[test]
    fn what_is_not_known_is_not_served() {
        assert_eq!(data_mode(3, Features::USER_RECOVERY | Features::QUIESCE).expect("served"), DataMode::Copy);
        assert_eq!(data_mode(3, SERVED).expect("served"), DataMode::UserCopy);
        for other in [Features::ZONED, Features::IO_DESC_SIZE, Features::from_bits(1 << 42)] {
            let error = data_mode(3, Features::USER_COPY | other).expect_err("not served");
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains(&format!("{other:?}")), "{error}");
        }
    }

    #[test]
    fn every_difference_of_geometry_is_named() {
        let good = Geometry::bytes(1 << 20).fua().discard(4096).write_zeroes();
        let params = |geometry: &Geometry| params::params(geometry, 1 << 20);
        assert_eq!(differences(&params(&good), &params(&good)), Vec::<String>::new());
        for (other, word) in [
            (Geometry { size: 2 << 20, ..good }, "size in bytes 1048576 and not 2097152"),
            (good.logical_block(4096), "logical block 512 and not 4096"),
            (good.physical_block(8192), "physical block"),
            (good.io_hints(0, 65536), "io_opt 0 and not 65536"),
            (good.read_only(), "read-only, which it has not"),
            (good.rotational(), "rotational"),
            (Geometry { fua: false, ..good }, "FUA, which it has"),
            (Geometry { fua: false, volatile_cache: false, ..good }, "volatile cache, which it has"),
            (Geometry { discard: None, ..good }, "largest discard"),
            (good.discard(8192), "discard granularity 4096 and not 8192"),
            (good.write_zeroes_max(4096), "largest write-zeroes"),
        ] {
            let found = differences(&params(&good), &params(&other)).join(", ");
            assert!(found.contains(word), "{word}: {found}");
        }
        // What a device does not offer is not compared: the driver keeps what was set before.
        let plain = Geometry::bytes(1 << 20);
        let mut odd = params(&plain);
        odd.discard.discard_granularity = 512;
        assert_eq!(differences(&odd, &params(&plain)), Vec::<String>::new());
    }

    #[test]
    fn this_process_is_not_exiting_and_one_that_is_gone_is() {
        assert!(!is_exiting(std::process::id() as i32));
        assert!(is_exiting(i32::MAX));
    }
}
