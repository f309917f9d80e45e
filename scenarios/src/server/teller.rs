//! A server's second way to be asked: what it has in flight, even when everything else in it is stuck.
//!
//! A thread of its own listens on a socket in the abstract namespace, named after the process, and shares nothing with
//! the others but a table whose lock is held for moments. A process that is stopped does not answer, and whoever asks
//! gives up.

use std::io::{self, BufRead, BufReader, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::Duration;

use crate::in_flight::InFlight;

fn address(pid: u32) -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(format!("ublk-torture-{pid}"))
}

/// Answers whoever asks this process, from now on.
///
/// # Errors
/// There is no such socket or thread to be had.
pub(super) fn start(in_flight: InFlight) -> io::Result<()> {
    let listener = UnixListener::bind_addr(&address(std::process::id())?)?;
    std::thread::Builder::new().name("teller".to_owned()).spawn(move || {
        for stream in listener.incoming().flatten() {
            // Who asks and does not read is not waited for.
            let _ = answer(&stream, &in_flight);
        }
    })?;
    Ok(())
}

fn answer(mut stream: &UnixStream, in_flight: &InFlight) -> io::Result<()> {
    stream.set_write_timeout(Some(Duration::from_millis(500)))?;
    let mut text = in_flight.tell().join("\n");
    text.push('\n');
    stream.write_all(text.as_bytes())
}

/// Asks server `pid` what it has in flight; it may take `limit` for each line.
///
/// # Errors
/// It is gone, or does not answer in time.
pub(crate) fn ask(pid: u32, limit: Duration) -> io::Result<Vec<String>> {
    let stream = UnixStream::connect_addr(&address(pid)?)?;
    stream.set_read_timeout(Some(limit))?;
    BufReader::new(stream).lines().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::in_flight::Who;
    use ublkit_harness::{OpKind, SectorRange};

    #[test]
    fn who_asks_is_told() {
        let in_flight = InFlight::default();
        start(in_flight.clone()).expect("starts");
        let _noted = in_flight.begin(Who::this_thread(), OpKind::Write, SectorRange::new(8, 8));
        let pid = std::process::id();
        let told = ask(pid, Duration::from_secs(5)).expect("an answer");
        assert!(told[0].starts_with("write of sectors 8+8"), "{told:?}");
        assert!(ask(u32::MAX, Duration::from_secs(5)).is_err(), "nobody is there");
    }
}
