//! User-space instructions per request of the data path, counted by callgrind on `/dev/null`.
//!
//! Counted, not timed: the difference between a long and a short run, divided by the requests between them, is the
//! same on a busy machine and an idle one. Needs valgrind. Fails when a path costs more than its bound.

use std::io;
use std::process::{Command, ExitCode};

use ublkit::{Backend, Geometry, Request, WriteFlags, driverless};

const DEPTH: u16 = 64;
const BYTES: u32 = 4096;
const SHORT: u64 = 100_000;
const LONG: u64 = 300_000;

/// A backend that touches no byte: what is counted is the library.
struct Nothing;

impl Backend for Nothing {
    fn geometry(&self) -> Geometry {
        Geometry::bytes(1 << 30)
    }
    fn read_at(&self, _: &mut [u8], _: u64) -> io::Result<()> {
        Ok(())
    }
    fn write_at(&self, _: &[u8], _: u64, _: WriteFlags) -> io::Result<()> {
        Ok(())
    }
}

/// Name, most instructions allowed, and how to run so many requests.
type Path = (&'static str, u64, fn(u64));

const PATHS: &[Path] = &[
    ("handler, read", 60, |requests| {
        driverless::serve(DEPTH, false, BYTES, requests, |request: Request<'_>| request.complete()).expect("serve");
    }),
    ("backend inline, read", 100, |requests| {
        driverless::serve_backend(DEPTH, false, BYTES, requests, Nothing).expect("serve");
    }),
    ("backend inline, write", 100, |requests| {
        driverless::serve_backend(DEPTH, true, BYTES, requests, Nothing).expect("serve");
    }),
];

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    if let (Some(path), Some(requests)) = (args.next(), args.next()) {
        let (path, requests) = (path.parse::<usize>().expect("path"), requests.parse().expect("requests"));
        (PATHS[path].2)(requests);
        return ExitCode::SUCCESS;
    }
    let mut good = true;
    println!("user instructions per request, queue depth {DEPTH} (callgrind, {SHORT} to {LONG} requests)");
    for (index, (name, most, _)) in PATHS.iter().enumerate() {
        let counted = match (count(index, SHORT), count(index, LONG)) {
            (Ok(short), Ok(long)) => (long - short) as f64 / (LONG - SHORT) as f64,
            (Err(error), _) | (_, Err(error)) => {
                eprintln!("failed to count: {error}");
                return ExitCode::from(4);
            }
        };
        let within = counted <= *most as f64;
        good &= within;
        println!("{name:<24} {counted:>7.1}   (at most {most}){}", if within { "" } else { "   TOO MANY" });
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs this program under callgrind and reads the total from what it prints.
fn count(path: usize, requests: u64) -> Result<u64, String> {
    let own = std::env::current_exe().map_err(|error| error.to_string())?;
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(own)
        .args([path.to_string(), requests.to_string()])
        .output()
        .map_err(|error| format!("run valgrind: {error}: install it (Debian: apt-get install valgrind)"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    let total = text.lines().find_map(|line| line.split_once("Collected : "));
    total.and_then(|(_, count)| count.trim().parse().ok()).ok_or_else(|| format!("valgrind said: {text}"))
}
