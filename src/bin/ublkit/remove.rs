//! `ublkit stop` and `ublkit delete`

use std::time::{Duration, Instant};

use ublkit::ctrl::DeviceInfo;
use ublkit::{Controller, ErrorKind, holders};

use crate::args;
use crate::failure::Failure;
use crate::output;

/// What can make a command to a device last.
const STUCK: &str = "I/O that its server does not finish keeps the kernel from stopping it: end that process";

pub(crate) fn stop(arguments: &args::Stop) -> Result<(), Failure> {
    let id = arguments.id;
    let (controller, info) = controller_of(id)?;
    match controller.stop(id, write_back(info, arguments.timeout)?) {
        Ok(()) => output::print(format_args!("device {id} is stopped; held by {}\n", holders::of_ublk(id))),
        Err(error) if error.kind() == ErrorKind::TimedOut => {
            Err(Failure::failed(format!("failed to {error}. {STUCK}. Held by {}", holders::of_ublk(id))))
        }
        Err(error) => Err(error.into()),
    }
}

pub(crate) fn delete(arguments: &args::Delete) -> Result<(), Failure> {
    let id = arguments.id;
    let (controller, info) = controller_of(id)?;
    let left = write_back(info, arguments.timeout)?;
    if arguments.do_not_wait {
        controller.delete_async(id)?;
        // It may be gone by now, if nobody held it.
        let held = holders::of_ublk(id);
        if held.found.is_empty() {
            return output::print(format_args!("device {id} is deleted\n"));
        }
        return output::print(format_args!(
            "device {id} is deleted; its id becomes free when these let go: {held}\n"
        ));
    }
    match controller.delete(id, left) {
        Ok(()) => output::print(format_args!("device {id} is deleted\n")),
        Err(error) if error.kind() == ErrorKind::TimedOut => {
            let held = holders::of_ublk(id);
            let why = if held.found.is_empty() { STUCK } else { "It goes when those who hold it let go" };
            Err(Failure::failed(format!("failed to {error}. {why}. Held by {held}")))
        }
        Err(error) => Err(error.into()),
    }
}

/// Writes back what stopping the device would lose. Returns how much of the time is left for that.
fn write_back(info: Option<DeviceInfo>, timeout: Duration) -> Result<Duration, Failure> {
    let begun = Instant::now();
    if let Some(info) = info {
        info.write_back(timeout).map_err(|error| {
            Failure::failed(format!(
                "failed to {error}. The device is left as it is, because to stop it now would lose what is not written back:                  to give that up, end its server first"
            ))
        })?;
    }
    Ok(timeout.saturating_sub(begun.elapsed()).max(Duration::from_secs(1).min(timeout)))
}

/// The control device and the device's description, once it is known that the device exists: what a kernel says of one that
/// does not differs from command to command.
fn controller_of(id: u32) -> Result<(Controller, Option<DeviceInfo>), Failure> {
    let controller = Controller::open()?;
    match controller.get_dev_info(id).or_else(|_| controller.get_dev_info2(id)) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Err(Failure::failed(format!("there is no ublk device {id}: see `ublkit list`")))
        }
        // That it cannot be described does not mean that it cannot be removed.
        described => Ok((controller, described.ok())),
    }
}
