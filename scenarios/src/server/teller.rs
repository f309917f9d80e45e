//! A server's second way to be asked: what it has in flight, and how often a planted bug struck, even when everything else in
//! it is stuck.
//!
//! A thread of its own listens on a socket in the abstract namespace, named after the process, and shares nothing with
//! the others but tables whose locks are held for moments. A process that is stopped does not answer, and whoever asks
//! gives up.

use std::io::{self, BufRead, BufReader, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use ublkit_harness::mutant::Hits;

use crate::in_flight::InFlight;

/// What the line begins with that says how often planted bugs struck.
const STRUCK: &str = "struck ";

/// How often the bugs struck that are planted in the devices served now. Of those that are closed, whoever closes them is
/// told. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(super) struct Struck(Arc<Mutex<Vec<Weak<Hits>>>>);

impl Struck {
    /// Counts `hits` in, until what is returned is dropped.
    pub(super) fn count_in(&self, hits: Hits) -> Arc<Hits> {
        let hits = Arc::new(hits);
        let mut all = self.lock();
        all.retain(|one| one.strong_count() > 0);
        all.push(Arc::downgrade(&hits));
        hits
    }

    /// The sum; `None` where no bug is planted.
    fn sum(&self) -> Option<u64> {
        self.lock().iter().filter_map(Weak::upgrade).map(|hits| hits.count()).reduce(|sum, hits| sum + hits)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Weak<Hits>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a server says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Told {
    /// What it has in flight, a line for each.
    pub(crate) in_flight: Vec<String>,
    /// How often planted bugs struck, if it has any.
    pub(crate) struck: Option<u64>,
}

impl Told {
    fn take(&mut self, line: String) {
        match line.strip_prefix(STRUCK).and_then(|count| count.parse().ok()) {
            Some(count) => self.struck = Some(count),
            None => self.in_flight.push(line),
        }
    }
}

fn address(pid: u32) -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(format!("ublk-torture-{pid}"))
}

/// Answers whoever asks this process, from now on.
///
/// # Errors
/// There is no such socket or thread to be had.
pub(super) fn start(in_flight: InFlight, struck: Struck) -> io::Result<()> {
    let listener = UnixListener::bind_addr(&address(std::process::id())?)?;
    std::thread::Builder::new().name("teller".to_owned()).spawn(move || {
        for stream in listener.incoming().flatten() {
            // Who asks and does not read is not waited for.
            let _ = answer(&stream, &in_flight, &struck);
        }
    })?;
    Ok(())
}

fn answer(mut stream: &UnixStream, in_flight: &InFlight, struck: &Struck) -> io::Result<()> {
    stream.set_write_timeout(Some(Duration::from_millis(500)))?;
    let mut lines = in_flight.tell();
    lines.extend(struck.sum().map(|count| format!("{STRUCK}{count}")));
    // The last line ends too.
    lines.push(String::new());
    stream.write_all(lines.join("\n").as_bytes())
}

/// Asks server `pid` what it has in flight, and how often its bugs struck; it may take `limit` for each line.
///
/// # Errors
/// It is gone, or does not answer in time.
pub(crate) fn ask(pid: u32, limit: Duration) -> io::Result<Told> {
    let stream = UnixStream::connect_addr(&address(pid)?)?;
    stream.set_read_timeout(Some(limit))?;
    let mut told = Told::default();
    for line in BufReader::new(stream).lines() {
        told.take(line?);
    }
    Ok(told)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::in_flight::Who;
    use ublkit_harness::{OpKind, SectorRange};

    #[test]
    fn who_asks_is_told() {
        let in_flight = InFlight::default();
        let struck = Struck::default();
        start(in_flight.clone(), struck.clone()).expect("starts");
        let _noted = in_flight.begin(Who::this_thread(), OpKind::Write, SectorRange::new(8, 8));
        let pid = std::process::id();
        let told = || ask(pid, Duration::from_secs(5)).expect("an answer");
        let Told { in_flight, struck: nothing } = told();
        assert!(in_flight[0].starts_with("write of sectors 8+8"), "{in_flight:?}");
        assert_eq!((in_flight.len(), nothing), (1, None), "no bug is planted");
        let hits = [Hits::default(), Hits::default()];
        let counted = hits.clone().map(|hits| struck.count_in(hits));
        assert_eq!(told().struck, Some(0), "none has struck");
        hits.iter().for_each(Hits::hit);
        hits[1].hit();
        assert_eq!(told(), Told { struck: Some(3), ..told() });
        let [closed, serving] = counted;
        drop(closed);
        assert_eq!(told().struck, Some(2), "whoever closed a device has its count");
        drop(serving);
        assert_eq!(told().struck, None);
        assert!(ask(u32::MAX, Duration::from_secs(5)).is_err(), "nobody is there");
    }
}
