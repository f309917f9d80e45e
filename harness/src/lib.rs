//! Oracles for block devices: say what a device may hold, look at what it holds, and name the difference.
//!
//! Nothing in this crate opens a device, needs a kernel feature or needs root; every part can be tested anywhere.
//!
//! * **In a test of your own backend**, [`check()`] is all there is to know.
//! * **On the simulated device** ([`sim`]) a [`Trial`](trial::Trial) is a run: everything that is drawn from one seed, what is done,
//!   who judges. One that fails becomes a [`Script`](script::Script), is made small by [`shrink`], and kept as a
//!   [`Bundle`](bundle::Bundle). [`matrix`] does so with every planted bug there is.
//! * **A program that drives a real device** puts the parts together itself:
//!
//! 1. [`Seed`] is the one source of randomness; every part derives its own stream from it.
//! 2. [`Plan`] turns a seed and [`PlanOptions`] into one deterministic stream of [`Op`]s per worker.
//! 3. [`Shadow`] knows what each sector of one worker's region may hold; [`Ledger`] what each block of a shared one may, whose
//!    operations overlap: by the order they may have had ([`linear`]) and by what a power cut may leave ([`durable`]). Both
//!    fill the payload of writes from a [`Pattern`] of self-describing sectors and check what reads return.
//! 4. A wrong sector becomes a [`Mismatch`] with a [`Class`]: lost, misdirected, torn, a flipped bit, …
//! 5. [`fault`] makes errors, delays and lies from a plan; [`errors`] accounts for each of them, and [`flushes`] for each flush.
//! 6. Everything that happens is an [`Event`] in one linear stream, sent through an [`EventSink`]; reporters only
//!    read it. [`Evidence`] counts the work done, and a run that did too little is vacuous, not a pass.
//! 7. [`plant_backend`] and [`plant_server`] plant a known bug, a [`Mutant`], to see that it is found; [`Observed`] counts what
//!    reached a backend.
//! 8. [`Watchdog`] ends what does not end by itself and says where every thread stood.
//!
//! Each [`Oracle`] is the only one to find at least one of the planted bugs; `ublk-torture mutants` shows that.
//!
//! Sectors are always 512 bytes and are counted in `u64`; a length in bytes says so in its name.

#![forbid(unsafe_code)]

pub mod bundle;
pub mod check;
pub mod classify;
pub mod confusion;
mod decode;
pub mod durable;
pub mod errors;
pub mod event;
pub mod fault;
pub mod flushes;
pub mod kernel_log;
pub mod ledger;
pub mod linear;
pub mod matrix;
pub mod mismatch;
pub mod mutant;
mod near;
pub mod observe;
pub mod oracle;
pub mod outcome;
pub mod plan;
pub mod range;
pub mod report;
mod ring;
pub mod script;
pub mod sector;
pub mod seed;
pub mod shadow;
pub mod shrink;
pub mod sim;
mod sparse;
pub mod stamp;
pub mod threads;
pub mod trial;
pub mod vacuity;
pub mod verdict;
pub mod watchdog;

pub use check::{Check, Checked, Found, check};
pub use classify::{Class, Content, Expected};
pub use event::Event;
pub use ledger::{Ledger, LedgerOptions, OpId};
pub use mismatch::Mismatch;
pub use mutant::{Mutant, Planted, plant_backend, plant_server};
pub use observe::Observed;
pub use oracle::{Oracle, Oracles};
pub use outcome::Outcome;
pub use plan::{Capabilities, IoSize, Mix, Op, OpKind, Plan, PlanOptions};
pub use range::SectorRange;
pub use report::{EventLoop, EventSink, Reporter};
pub use sector::{Generation, Pattern, SECTOR};
pub use seed::{Seed, SeededRng};
pub use shadow::{Access, DiscardPromise, Shadow, ShadowOptions, Ticket, Verified};
pub use stamp::Stamp;
pub use vacuity::Evidence;
pub use verdict::Verdict;
pub use watchdog::{Deadline, Guard, HangReport, Watchdog, WatchdogOptions};
