//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ublkit::Recovery;

use crate::units::{parse_bytes, parse_bytes_u32, parse_duration};

const AFTER_HELP: &str = "Exit status: 0 done, 1 wrong usage, 2 the command failed, \
4 this machine lacks something (the message says what to do).";

const RECOVER_HELP: &str = "Queues, depth, recovery mode and the way data moves are the device's own; --queues, --depth, \
--user-copy, --recovery and --id are ignored. Size, block size and what the backend can do must be those that the device was \
built with. So must what is stored: memory and --create, which begin empty, are refused.";

/// Serves block devices from user space through ublk, and looks after the ublk devices of this machine.
#[derive(Debug, Parser)]
#[command(name = "ublkit", version, after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show what this kernel's ublk driver can do
    Features(Features),
    /// List the ublk devices: what they are, who serves them, who holds them
    List(List),
    /// Serve a device until Ctrl-C
    Serve(Serve),
    /// Take over a device whose server is gone, with the I/O that waits in it, and serve it until Ctrl-C
    #[command(after_help = RECOVER_HELP)]
    Recover(Recover),
    /// Stop a device: dirty pages are written back if it is served, the block device goes away, the id stays
    Stop(Stop),
    /// Stop and delete a device; as with stop, dirty pages are written back
    Delete(Delete),
    /// Delete devices that a server left behind; whatever is alive is left alone
    Clean(Clean),
}

#[derive(Args, Debug)]
pub(crate) struct Features {
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct List {
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
    /// Search for everybody who holds a device's nodes open
    #[arg(long)]
    pub(crate) holders: bool,
    /// How long a device must have looked dead to be called so
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = parse_duration)]
    pub(crate) grace: Duration,
}

#[derive(Args, Debug)]
pub(crate) struct Serve {
    #[command(subcommand)]
    pub(crate) backend: ServeBackend,
}

#[derive(Args, Debug)]
pub(crate) struct Recover {
    /// The N of /dev/ublkbN
    pub(crate) id: u32,
    #[command(subcommand)]
    pub(crate) backend: ServeBackend,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ServeBackend {
    /// A RAM disk that costs what is written to it
    Memory(ServeSized),
    /// A regular file or a block device
    File(ServeFile),
    /// A device that swallows writes and reads as zeroes
    Null(ServeSized),
}

#[derive(Args, Debug)]
pub(crate) struct ServeSized {
    /// Size of the device
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = parse_bytes)]
    pub(crate) size: u64,
    /// Smallest unit the device can be addressed in
    #[arg(long, value_name = "SIZE", default_value = "512", value_parser = parse_bytes_u32)]
    pub(crate) logical_block: u32,
    /// Threads that do the device's work; 0 does it on the queues' own
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = parse_workers)]
    pub(crate) workers: usize,
    #[command(flatten)]
    pub(crate) shape: Shape,
}

#[derive(Args, Debug)]
pub(crate) struct ServeFile {
    /// The file, which keeps its size, or the block device, which must not be in use
    pub(crate) path: PathBuf,
    /// Make the file first, sparse, of this size; it must not exist
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, conflicts_with = "read_only")]
    pub(crate) create: Option<u64>,
    /// Bypass the page cache (`O_DIRECT`) where the file system can
    #[arg(long)]
    pub(crate) direct: bool,
    /// Smallest unit the device can be addressed in [default: 512, or what the file needs]
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes_u32)]
    pub(crate) logical_block: Option<u32>,
    /// Threads that do the device's work; 0 does it on the queues' own
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = parse_workers)]
    pub(crate) workers: usize,
    #[command(flatten)]
    pub(crate) shape: Shape,
}

/// What every served device has.
#[derive(Args, Clone, Debug)]
pub(crate) struct Shape {
    /// Queues, each with a thread of its own; the driver grants at most one per CPU
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) queues: u16,
    /// Requests that a queue can have in flight
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(crate) depth: u16,
    /// Copy data by reading and writing the character device, which workers do side by side (Linux 6.5 or later)
    #[arg(long)]
    pub(crate) user_copy: bool,
    /// Refuse writes
    #[arg(long)]
    pub(crate) read_only: bool,
    /// What becomes of the device when this server dies: another can take it over (see `recover`), and meanwhile I/O waits or
    /// fails
    #[arg(long, value_name = "MODE", value_enum, default_value_t = Mode::None)]
    pub(crate) recovery: Mode,
    /// Leave the device behind for another server at the end, instead of closing it
    #[arg(long)]
    pub(crate) detach: bool,
    /// The N of /dev/ublkbN [default: any free one]
    #[arg(long, value_name = "N")]
    pub(crate) id: Option<u32>,
}

/// [`ublkit::Recovery`], as an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// The device ends with its server
    None,
    /// Requests that the server had fail; all others wait
    Wait,
    /// All requests wait, and those that the server had are issued again
    Reissue,
    /// All requests fail at once (Linux 6.16 or later)
    FailIo,
}

impl From<Mode> for Recovery {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::None => Self::None,
            Mode::Wait => Self::Wait,
            Mode::Reissue => Self::Reissue,
            Mode::FailIo => Self::FailIo,
        }
    }
}

#[derive(Args, Debug)]
pub(crate) struct Stop {
    /// The N of /dev/ublkbN
    pub(crate) id: u32,
    /// How long it may take
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    pub(crate) timeout: Duration,
}

#[derive(Args, Debug)]
pub(crate) struct Delete {
    /// The N of /dev/ublkbN
    pub(crate) id: u32,
    /// Do not wait until whoever holds the device lets go
    #[arg(long = "async")]
    pub(crate) do_not_wait: bool,
    /// How long it may take
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    pub(crate) timeout: Duration,
}

#[derive(Args, Debug)]
pub(crate) struct Clean {
    /// Only these; the way to delete one that could be recovered, with the I/O that waits in it
    #[arg(value_name = "ID")]
    pub(crate) ids: Vec<u32>,
    /// How long a device must have looked dead
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = parse_duration)]
    pub(crate) grace: Duration,
}

fn parse_workers(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(workers) if workers <= 1024 => Ok(workers),
        _ => Err("choose 0 to 1024".into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    use super::*;

    fn parse(line: &str) -> Result<Command, ErrorKind> {
        Arguments::try_parse_from(line.split_whitespace())
            .map(|arguments| arguments.command)
            .map_err(|error| error.kind())
    }

    #[test]
    fn the_definition_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_served_device_takes_its_options() {
        let line =
            "ublkit serve memory --size 64M --queues 2 --depth 16 --workers 3 --user-copy --logical-block 4k --id 7";
        let Ok(Command::Serve(Serve { backend: ServeBackend::Memory(memory) })) = parse(line) else {
            panic!("parsed as something else")
        };
        assert_eq!((memory.size, memory.logical_block, memory.workers), (64 << 20, 4096, 3));
        let Shape { queues, depth, user_copy, read_only, id, recovery, detach } = memory.shape;
        assert_eq!((recovery, detach), (Mode::None, false));
        assert_eq!((queues, depth, user_copy, read_only, id), (2, 16, true, false, Some(7)));
    }

    #[test]
    fn a_device_is_recovered_by_its_id_with_a_backend() {
        let Ok(Command::Recover(recover)) = parse("ublkit recover 3 file disk.img --workers 2") else {
            panic!("parsed as something else")
        };
        assert!(matches!(recover.backend, ServeBackend::File(file) if file.workers == 2));
        assert_eq!(recover.id, 3);
        for mode in ["none", "wait", "reissue", "fail-io"] {
            let Ok(Command::Serve(Serve { backend: ServeBackend::Null(null) })) =
                parse(&format!("ublkit serve null --recovery {mode} --detach"))
            else {
                panic!("parsed as something else")
            };
            assert_eq!((Recovery::from(null.shape.recovery).to_string().as_str(), null.shape.detach), (mode, true));
        }
    }

    #[test]
    fn a_file_is_made_or_read_and_not_both() {
        let Ok(Command::Serve(Serve { backend: ServeBackend::File(file) })) =
            parse("ublkit serve file disk.img --create 1G --direct")
        else {
            panic!("parsed as something else")
        };
        assert_eq!((file.create, file.direct, file.workers), (Some(1 << 30), true, 4));
        let both = parse("ublkit serve file disk.img --create 1G --read-only");
        assert_eq!(both.err(), Some(ErrorKind::ArgumentConflict));
    }

    #[test]
    fn cleaning_takes_any_number_of_ids() {
        let Ok(Command::Clean(clean)) = parse("ublkit clean 3 4 --grace 250ms") else {
            panic!("parsed as something else")
        };
        assert_eq!((clean.ids, clean.grace), (vec![3, 4], Duration::from_millis(250)));
        let Ok(Command::Clean(clean)) = parse("ublkit clean") else { panic!("parsed as something else") };
        assert_eq!((clean.ids, clean.grace), (vec![], Duration::from_secs(5)));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for line in [
            "ublkit serve memory --size 1X",
            "ublkit serve memory --queues 65536",
            "ublkit serve memory --depth -1",
            "ublkit serve memory --workers 1025",
            "ublkit serve memory --direct",
            "ublkit serve null disk.img",
            "ublkit serve memory --recovery maybe",
            "ublkit recover memory",
            "ublkit stop one",
            "ublkit delete 0 --timeout 2d",
            "ublkit clean 4294967296",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
        for line in ["ublkit serve file", "ublkit stop", "ublkit delete --async"] {
            assert_eq!(parse(line).err(), Some(ErrorKind::MissingRequiredArgument), "{line}");
        }
    }
}
