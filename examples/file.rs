//! Serves a file or a block device as a disk, until Ctrl-C:
//! `cargo run --release --example file -- PATH [--create BYTES] [--direct] [--read-only]`.

use std::error::Error;
use std::process::ExitCode;

use ublkit::Device;
use ublkit::backends::File;

fn main() -> ExitCode {
    let Some(options) = Options::parse(std::env::args().skip(1)) else {
        eprintln!("usage: file PATH [--create BYTES] [--direct] [--read-only]");
        return ExitCode::FAILURE;
    };
    match serve(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("failed to {error}");
            ExitCode::FAILURE
        }
    }
}

#[derive(Default)]
struct Options {
    path: String,
    create: Option<u64>,
    direct: bool,
    read_only: bool,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Option<Self> {
        let mut options = Self::default();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--create" => options.create = Some(arguments.next()?.parse().ok()?),
                "--direct" => options.direct = true,
                "--read-only" => options.read_only = true,
                path if options.path.is_empty() && !path.starts_with('-') => options.path = path.into(),
                _ => return None,
            }
        }
        (!options.path.is_empty()).then_some(options)
    }
}

fn serve(options: &Options) -> Result<(), Box<dyn Error>> {
    let how = File::options().read_only(options.read_only).direct(options.direct);
    let file = match options.create {
        Some(size) => how.create(&options.path, size),
        None => how.open(&options.path),
    };
    let file = file.map_err(|error| format!("open {}: {error}", options.path))?;
    if options.direct && !file.is_direct() {
        eprintln!("{} cannot do direct I/O: it goes through the page cache", options.path);
    }
    // Reads and writes of a file block: with workers, a queue goes on meanwhile.
    let device = Device::builder(file).queues(2).workers(4).start().inspect_err(|_| {
        if options.create.is_some() {
            // It is empty and was made for nothing.
            let _ = std::fs::remove_file(&options.path);
        }
    })?;
    println!("{}", device.path().display());
    device.wait_for_signal()?;
    println!("{}", device.close()?);
    Ok(())
}
