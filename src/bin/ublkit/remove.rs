//! `ublkit stop` and `ublkit delete`

use ublkit::{Controller, ErrorKind, holders};

use crate::args;
use crate::failure::Failure;
use crate::output;

/// What can make a command to a device last.
const STUCK: &str = "I/O that its server does not finish keeps the kernel from stopping it: end that process";

pub(crate) fn stop(arguments: &args::Stop) -> Result<(), Failure> {
    let id = arguments.id;
    let controller = controller_of(id)?;
    match controller.stop(id, arguments.timeout) {
        Ok(()) => output::print(format_args!("device {id} is stopped; held by {}\n", holders::of_ublk(id))),
        Err(error) if error.kind() == ErrorKind::TimedOut => {
            Err(Failure::failed(format!("failed to {error}. {STUCK}. Held by {}", holders::of_ublk(id))))
        }
        Err(error) => Err(error.into()),
    }
}

pub(crate) fn delete(arguments: &args::Delete) -> Result<(), Failure> {
    let id = arguments.id;
    let controller = controller_of(id)?;
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
    match controller.delete(id, arguments.timeout) {
        Ok(()) => output::print(format_args!("device {id} is deleted\n")),
        Err(error) if error.kind() == ErrorKind::TimedOut => {
            let held = holders::of_ublk(id);
            let why = if held.found.is_empty() { STUCK } else { "It goes when those who hold it let go" };
            Err(Failure::failed(format!("failed to {error}. {why}. Held by {held}")))
        }
        Err(error) => Err(error.into()),
    }
}

/// The control device, once it is known that the device exists: what a kernel says of one that does not differs from
/// command to command.
fn controller_of(id: u32) -> Result<Controller, Failure> {
    let controller = Controller::open()?;
    match controller.get_dev_info(id).or_else(|_| controller.get_dev_info2(id)) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Err(Failure::failed(format!("there is no ublk device {id}: see `ublkit list`")))
        }
        // That it cannot be described does not mean that it cannot be removed.
        _ => Ok(controller),
    }
}
