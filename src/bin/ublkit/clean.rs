//! `ublkit clean`

use std::fmt::Write;

use ublkit::Controller;
use ublkit::orphan::{self, Class, Cleaned, Outcome};

use crate::args;
use crate::failure::Failure;
use crate::output;

pub(crate) fn run(arguments: &args::Clean) -> Result<(), Failure> {
    let controller = Controller::open()?;
    let by_id = !arguments.ids.is_empty();
    let (cleaned, recoverable) = if by_id {
        (orphan::clean_ids(&controller, &arguments.ids, arguments.grace)?, Vec::new())
    } else {
        let found = orphan::list(&controller, arguments.grace)?;
        let recoverable = found.iter().filter(|device| device.class == Class::Recoverable).map(|device| device.id);
        (orphan::clean(&controller, &found), recoverable.collect())
    };
    if cleaned.is_empty() {
        return output::print("no ublk devices\n");
    }
    output::print(report(&cleaned, &recoverable))?;
    if succeeded(&cleaned, by_id) { Ok(()) } else { Err(Failure::silent()) }
}

/// Whether everything was done that was asked for: of a device that was named, its removal; of the others, only that none
/// refused to go.
fn succeeded(cleaned: &[Cleaned], by_id: bool) -> bool {
    cleaned.iter().all(|device| match device.outcome {
        Outcome::Deleted | Outcome::Deleting => true,
        Outcome::Left(_) => !by_id,
        _ => false,
    })
}

fn report(cleaned: &[Cleaned], recoverable: &[u32]) -> String {
    let mut text = String::new();
    for device in cleaned {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{device}");
        if recoverable.contains(&device.id) {
            let _ = writeln!(
                text,
                "    a server can still take it over (`ublkit recover {0}`); `ublkit clean {0}` deletes it with the I/O that \
                 waits in it",
                device.id
            );
        }
    }
    text
}
