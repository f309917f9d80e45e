//! The process that holds a device: it opens nodes, sends I/O commands as it is told, and serves reads of zeroes.
//!
//! It ends at once when its standard input does. Whatever it waits for in the kernel, the scenario's own process waits for
//! none of it.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use nix::libc;
use ublkit::ctrl::{block_path, character_path};
use ublkit::raw::{Address, BatchCommand, Descriptors, IoChannel, IoCommand};
use ublkit::sys::ublk;

use super::protocol::{Addr, Call, DEPTH, HELD_SECTOR, Io, MAX_IO, Reply};
use crate::aligned::AlignedBuf;

/// How often a ring with commands under way is left to look for calls.
const TURN: Duration = Duration::from_millis(1);

/// User data of what the queue itself sends; above it come the commands that somebody waits for.
const ASKED: u64 = 1 << 32;
/// In the user data of a command whose answer 0 means that a request is there.
const FETCHES: u64 = 1 << 31;

/// What a ring's thread is told.
enum Message {
    Io(Io, Duration, Sender<Reply>),
    Hold,
    Held(Duration, Sender<Reply>),
    Release(Sender<Reply>),
}

/// A thread with a ring. Ends when its sender is dropped.
struct Ring {
    messages: Sender<Message>,
    thread: thread::JoinHandle<()>,
}

#[derive(Default)]
struct Holder {
    device: Option<Arc<File>>,
    rings: Vec<Ring>,
    block: Option<File>,
    reading: Option<Receiver<i32>>,
}

/// Runs the process until its standard input ends, and returns its exit status.
pub(crate) fn main() -> u8 {
    let mut holder = Holder::default();
    for line in io::stdin().lock().lines().map_while(Result::ok) {
        let Ok(call) = serde_json::from_str::<Call>(&line) else { return 70 };
        let reply = holder.answer(&call).unwrap_or_else(|error| Reply::Result(-errno(&error)));
        let mut out = io::stdout().lock();
        if serde_json::to_writer(&mut out, &reply).is_err() || out.write_all(b"\n").is_err() || out.flush().is_err() {
            break;
        }
    }
    // Without waiting for what may never end: the kernel takes everything back.
    std::process::exit(0)
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::ENOMSG)
}

impl Holder {
    fn answer(&mut self, call: &Call) -> io::Result<Reply> {
        match *call {
            Call::Open(id) => {
                let file = OpenOptions::new().read(true).write(true).open(character_path(id))?;
                let file = Arc::new(file);
                // One that was started ends with its sender.
                let rings = Ring::start(&file).and_then(|ring| Ok(vec![ring, Ring::start(&file)?]));
                match rings {
                    Ok(rings) => self.rings = rings,
                    Err(error) => return Ok(lacks_thread(&error)),
                }
                self.device = Some(file);
            }
            Call::Close => {
                for ring in self.rings.drain(..) {
                    drop(ring.messages);
                    // It only drops its ring.
                    let _ = ring.thread.join();
                }
                self.device = None;
            }
            Call::Io { io, patience_ms, elsewhere } => {
                let (reply, answer) = mpsc::channel();
                self.tell(elsewhere, Message::Io(io, Duration::from_millis(patience_ms), reply))?;
                return answer.recv().map_err(|_| gone());
            }
            Call::Map(offset, len, writable) => {
                let device = self.device.as_ref().ok_or_else(gone)?;
                Descriptors::try_map(device, offset, len, writable)?;
            }
            Call::Hold => self.tell(false, Message::Hold)?,
            Call::Held { patience_ms } => {
                let (reply, answer) = mpsc::channel();
                self.tell(false, Message::Held(Duration::from_millis(patience_ms), reply))?;
                return answer.recv().map_err(|_| gone());
            }
            Call::Release => {
                let (reply, answer) = mpsc::channel();
                self.tell(false, Message::Release(reply))?;
                return answer.recv().map_err(|_| gone());
            }
            Call::OpenBlock(id) => self.block = Some(File::open(block_path(id))?),
            Call::CloseBlock => self.block = None,
            Call::Read(id) => {
                let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(block_path(id))?;
                let (done, reading) = mpsc::channel();
                let read = move || {
                    let mut buf = AlignedBuf::zeroed(4096);
                    let result = file.read_at(&mut buf, HELD_SECTOR * 512);
                    // Closed before it is told: who is told may look for openers.
                    drop(file);
                    let _ = done.send(result.map_or_else(|error| -errno(&error), |len| len as i32));
                };
                if let Err(error) = thread::Builder::new().name("read".to_owned()).spawn(read) {
                    return Ok(lacks_thread(&error));
                }
                self.reading = Some(reading);
            }
            Call::HasRead { patience_ms } => {
                let reading = self.reading.as_ref().ok_or_else(gone)?;
                return Ok(match reading.recv_timeout(Duration::from_millis(patience_ms)) {
                    Ok(result) => Reply::Result(result),
                    Err(RecvTimeoutError::Timeout) => Reply::Pending,
                    Err(RecvTimeoutError::Disconnected) => return Err(gone()),
                });
            }
        }
        Ok(Reply::Result(0))
    }

    fn tell(&self, elsewhere: bool, message: Message) -> io::Result<()> {
        let ring = self.rings.get(usize::from(elsewhere)).ok_or_else(gone)?;
        ring.messages.send(message).map_err(|_| gone())
    }
}

/// A call that makes no sense: no errno that the driver uses.
fn gone() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOMSG)
}

/// No errno of the driver's either, and nothing that the harness could help.
fn lacks_thread(error: &io::Error) -> Reply {
    Reply::Lacking(crate::runner::no_thread(error).to_string())
}

impl Ring {
    fn start(device: &Arc<File>) -> io::Result<Self> {
        let device = Arc::clone(device);
        let (messages, told) = mpsc::channel();
        let thread = thread::Builder::new().name("ring".to_owned()).spawn(move || {
            // Nobody is left to tell: whoever asks next sees that this end is gone.
            let _ = Queue::new(device).and_then(|mut queue| queue.run(&told));
        })?;
        Ok(Self { messages, thread })
    }
}

/// The queue's side of a ring.
struct Queue {
    channel: IoChannel,
    device: Arc<File>,
    descriptors: Option<Descriptors>,
    asked: u64,
    answers: BTreeMap<u64, i32>,
    hold: bool,
    held: Vec<u16>,
}

impl Queue {
    fn new(device: Arc<File>) -> io::Result<Self> {
        let channel = IoChannel::new(Arc::clone(&device), 64, DEPTH, MAX_IO as usize)?;
        Ok(Self { channel, device, descriptors: None, asked: 0, answers: BTreeMap::new(), hold: false, held: vec![] })
    }

    fn run(&mut self, told: &Receiver<Message>) -> io::Result<()> {
        loop {
            let message = if self.channel.pending() == 0 {
                told.recv().map_err(|_| gone())?
            } else {
                self.turn(TURN)?;
                match told.try_recv() {
                    Ok(message) => message,
                    Err(mpsc::TryRecvError::Empty) => continue,
                    Err(mpsc::TryRecvError::Disconnected) => return Ok(()),
                }
            };
            match message {
                Message::Io(io, patience, reply) => {
                    let answer = self.io(&io, patience)?;
                    let _ = reply.send(answer);
                }
                Message::Hold => self.hold = true,
                Message::Held(patience, reply) => {
                    let until = Instant::now() + patience;
                    while self.held.is_empty() && Instant::now() < until {
                        self.turn(TURN)?;
                    }
                    let answer = self.held.first().map_or(Reply::Pending, |tag| Reply::Result(i32::from(*tag)));
                    let _ = reply.send(answer);
                }
                Message::Release(reply) => {
                    self.hold = false;
                    for tag in std::mem::take(&mut self.held) {
                        self.commit(tag)?;
                    }
                    let _ = reply.send(Reply::Result(0));
                }
            }
        }
    }

    fn io(&mut self, io: &Io, patience: Duration) -> io::Result<Reply> {
        self.asked += 1;
        let fetches = if (0x20..=0x22).contains(&(io.operation & 0xff)) { FETCHES } else { 0 };
        let user_data = ASKED * self.asked + fetches + u64::from(io.tag);
        if let Some((flags, elements, bytes)) = io.batch {
            self.channel.submit_batch(&BatchCommand {
                operation: io.operation,
                queue: io.queue,
                flags,
                elements_claimed: elements,
                element_bytes: bytes,
                elements: (0..elements.min(DEPTH)).map(|tag| (tag, 0)).collect(),
                user_data,
            })?;
        } else {
            let address = match io.addr {
                Addr::None => Address::None,
                Addr::Own => Address::Buffer(io.tag.min(DEPTH - 1)),
                Addr::Nowhere => Address::Inaccessible,
                Addr::Number(number) => Address::Number(number),
            };
            self.channel.submit(&IoCommand {
                operation: io.operation,
                queue: io.queue,
                tag: io.tag,
                result: io.result,
                address,
                registration: 0,
                user_data,
            })?;
        }
        let until = Instant::now() + patience;
        loop {
            self.turn(Duration::ZERO)?;
            if let Some(result) = self.answers.remove(&user_data) {
                return Ok(Reply::Result(result));
            }
            if Instant::now() >= until {
                return Ok(Reply::Pending);
            }
            self.turn(TURN)?;
        }
    }

    /// Takes what has come, and serves what is a request.
    fn turn(&mut self, patience: Duration) -> io::Result<()> {
        for completion in self.channel.completions(1, patience)? {
            let own = completion.user_data < ASKED;
            if completion.result != ublk::IO_RES_OK || !(own || completion.user_data & FETCHES != 0) {
                self.answers.insert(completion.user_data, completion.result);
                continue;
            }
            // Whatever sent it, it is this tag's request now.
            let tag = completion.user_data as u16;
            if self.descriptors.is_none() {
                self.descriptors = Descriptors::map(&self.device, 0, DEPTH).ok();
            }
            let described = self.descriptors.as_ref().and_then(|all| all.get(tag)).unwrap_or_default();
            if self.hold && described.start_sector == HELD_SECTOR {
                self.held.push(tag);
            } else {
                self.commit(tag)?;
            }
        }
        Ok(())
    }

    fn commit(&mut self, tag: u16) -> io::Result<()> {
        let described = self.descriptors.as_ref().and_then(|all| all.get(tag)).unwrap_or_default();
        self.channel.submit(&IoCommand {
            operation: ublk::IO_COMMIT_AND_FETCH_REQ,
            tag,
            result: (described.nr_sectors * 512) as i32,
            address: Address::Buffer(tag),
            user_data: u64::from(tag),
            ..IoCommand::default()
        })
    }
}
