//! Serves a file so that the device outlives this program: `cargo run --release --example recover -- FILE`.
//!
//! End it however you like, with Ctrl-C or `kill -9`: the device stays, mounted or not, and its I/O waits. Started again with
//! the device's id, it goes on: `cargo run --release --example recover -- FILE ID`. `ublkit delete ID` ends the device; while
//! it is served, so that what applications have written is written back.

use std::process::ExitCode;

use ublkit::backends::File;
use ublkit::{Device, Recovery};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (path, id) = match arguments.as_slice() {
        [path] => (path, None),
        [path, id] if id.parse::<u32>().is_ok() => (path, id.parse().ok()),
        _ => {
            eprintln!("usage: recover FILE [ID]");
            return ExitCode::FAILURE;
        }
    };
    match serve(path, id) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("failed to {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(path: &str, id: Option<u32>) -> Result<(), Box<dyn std::error::Error>> {
    let builder = Device::builder(File::open(path)?).workers(4);
    let device = match id {
        Some(id) => builder.recover(id)?,
        // A write that is carried out twice is the same as once: what the last server had in its hands may be issued again.
        None => builder.recovery(Recovery::Reissue).start()?,
    };
    println!("{}", device.path().display());
    let ended = device.wait_for_signal();
    // Whatever ended it: the device is for the next server, unless somebody has stopped it.
    match device.detach() {
        Ok(left) => println!("{left}"),
        Err(_) => println!("{}", device.close()?),
    }
    ended?;
    Ok(())
}
