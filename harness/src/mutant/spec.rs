//! The mutants by name, and what each of them is.

use std::fmt;
use std::str::FromStr;

use crate::oracle::Oracle::{self, CrossDevice, Durable, Errors, Flush, Linear, Resources, Tag, Watchdog, Zero};

/// Where a mutant is planted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layer {
    /// Between the server and its storage.
    Backend,
    /// Between the driver and the server.
    Server,
    /// In what is declared, or in how a server begins and ends.
    Lifecycle,
    /// Anywhere; it is odd, but right.
    Control,
}

/// Whether a mutant can be planted in a server of a real device, with what this library lets a server do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OnDevice {
    /// As a backend, a handler, or an option of the device.
    Yes,
    /// In a server of its own on the library's raw level alone: the other levels do not let a server be wrong in this way.
    Raw,
    /// Not, and why.
    No(&'static str),
}

/// What a mutant is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Which.
    pub mutant: Mutant,
    /// Its number in the list of known bugs, or its letter in that of oddities; `+` for one that is in neither.
    pub number: &'static str,
    /// Its name, as given on the command line.
    pub name: &'static str,
    /// The real bug that it stands for.
    pub stands_for: &'static str,
    /// Where it is planted.
    pub layer: Layer,
    /// Who is expected to find it: one of these, and the kill matrix sees to that with its own seed. Nobody, for a control.
    pub oracles: &'static [Oracle],
    /// Whether a real device can have it.
    pub device: OnDevice,
    /// It errs once in so many operations of its kind unless told otherwise.
    pub every: u64,
}

const REGISTERED: OnDevice = OnDevice::No(
    "it takes I/O on buffers that the driver has registered with a ring, which neither the library nor its raw level can do",
);
const RAW: OnDevice = OnDevice::Raw;
const YES: OnDevice = OnDevice::Yes;

macro_rules! mutants {
    ($($variant:ident $number:literal $name:literal $layer:ident $every:literal [$($oracle:ident)*] $device:ident $text:literal;)*) => {
        /// A known way to be wrong, or odd.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Mutant {
            $(#[doc = concat!("Number ", $number, ": ", $text, ".")] $variant,)*
        }

        const TABLE: &[Spec] = &[$(Spec {
            mutant: Mutant::$variant,
            number: $number,
            name: $name,
            stands_for: $text,
            layer: Layer::$layer,
            oracles: &[$($oracle),*],
            device: $device,
            every: $every,
        },)*];

        impl Mutant {
            /// Every mutant, in the order of the table.
            pub const ALL: [Self; TABLE.len()] = [$(Self::$variant),*];
        }
    };
}

mutants! {
LostWrite "1" "lost-write" Backend 500 [Linear Zero] YES
    "a write is acknowledged and never stored, as by a drive that drops its cache (dm-flakey drop_writes; FAST'08)";
LostOverwrite "2" "lost-overwrite" Backend 20 [Linear Zero] YES
    "the second write to a place since the last flush is dropped (FAST'13)";
MisdirectedWrite "3" "misdirected-write" Backend 500 [Tag Linear] YES
    "a write lands on the wrong blocks, as by a firmware that miscounts: two victims (TigerBeetle's storage.zig)";
MisdirectedRead "4" "misdirected-read" Backend 200 [Tag Zero Linear] YES
    "a read returns another place's data, and the media are fine (IRON, SOSP'05)";
AddressAlias "5" "address-alias" Backend 20 [Tag Linear] YES
    "the top bit of an address is lost, as by a disk that claims more than it has (f3) or 32 bits of sectors";
ShornWrite "6" "shorn-write" Backend 100 [Tag Linear Zero] YES
    "only the first sectors of a write are stored (FAST'13)";
TornBelowAtomic "7" "torn-below-atomic" Backend 1 [Tag Durable Linear] YES
    "a power cut tears a logical block (LazyFS torn-op)";
BitflipRead "8" "bitflip-read" Backend 500 [Tag] YES
    "a read returns one flipped bit and the next one does not, as by a bad cable or memory (nbdkit-evil cosmic-rays)";
StuckBit "9" "stuck-bit" Backend 40 [Tag] YES
    "one bit of some blocks reads as set for ever (nbdkit-evil stuck-bits)";
StuckWire "9" "stuck-wire" Backend 20 [Tag Zero] YES
    "one bit at one place of the buffer is set, whatever is read (nbdkit-evil stuck-wires)";
StaleCache "10" "stale-cache" Backend 40 [Linear Zero] YES
    "a read cache keeps a block that was written since";
ZeroedBuffer "11" "zeroed-buffer" Backend 100 [Zero] YES
    "an idle buffer is given back while its write is in flight, and zeroes are stored (libublk-rs #48, ublksrv #196)";
FlushNoop "12" "flush-noop" Backend 1 [Durable Flush Linear Zero] YES
    "a flush is acknowledged and nothing is persisted, as by disks that lie";
FlushRange "13" "flush-range" Backend 1 [Durable Flush Linear Zero] YES
    "a flush persists the range of a request, and a flush has none (rublk 9c1f58f, ublksrv #118)";
FlushEarly "14" "flush-early" Backend 1 [Durable Flush Linear Zero] YES
    "a flush is acknowledged before what it covers is durable (fio 22b970ed)";
FuaIgnored "15" "fua-ignored" Backend 1 [Durable Flush Linear Zero] YES
    "a FUA write is lost at a power cut";
MetadataNotFlushed "16" "metadata-not-flushed" Backend 2 [Durable Flush Linear Zero] YES
    "a flush persists data but not the map to it: what was new reads as zeroes (ubiblk #92, dittofs #1909)";
ReorderAcrossFlush "17" "reorder-across-flush" Backend 4 [Durable Flush Linear Zero] YES
    "what came after a flush is durable and what came before it is not (unserializable writes: FAST'13)";
SameLbaLogRace "18" "same-lba-log-race" Backend 2 [Durable Flush Linear Zero] YES
    "the journal has two writes to a place and persists but the earlier one (crucible #1798)";
DiscardOffByOne "19" "discard-off-by-one" Backend 10 [Zero] YES
    "a discard takes a neighbouring block with it (brd, Linux a26a339a654b)";
LatePunch "20" "late-punch" Backend 2 [Zero] YES
    "a hole is punched late, into what was written there meanwhile (cloud-hypervisor #8624)";
WriteZeroesIgnored "21" "write-zeroes-ignored" Backend 10 [Zero Linear] YES
    "zeroes are acknowledged and the old data stay";
DiscardResurrects "22" "discard-resurrects" Backend 1 [Durable Zero Linear] YES
    "what was discarded and flushed is back after a power cut";
RefetchOverwrites "23" "refetch-overwrites" Backend 40 [Linear Tag Zero] YES
    "a block is fetched from the base image once more, over newer data (ubiblk v0.2.1)";
MixedFetchRead "24" "mixed-fetch-read" Backend 20 [Linear Zero] YES
    "a read of blocks that are fetched and blocks that are not is served from the base image alone (ubiblk v0.2.1)";
RmwNeighbour "25" "rmw-neighbour" Backend 40 [Zero Linear] YES
    "a write of a part of a physical block writes the rest of it stale or zeroed (longhorn-engine #750, LMCache #3154)";
ShortIoAsFull "26" "short-io-as-full" Backend 100 [Tag Linear Zero] YES
    "a short read or write is reported as complete";
ErrorSwallowed "27" "error-swallowed" Backend 200 [Errors Flush Linear Zero] YES
    "an error becomes a success (IRON, SOSP'05)";
ErrorSticky "28" "error-sticky" Backend 500 [Errors] YES
    "a place keeps failing when its fault is gone";
RebuildLosesWrite "29" "rebuild-loses-write" Backend 20 [Linear Zero] YES
    "a write that lands while its place is being copied is lost (crucible #893, #1146)";
CrossDeviceBleed "30" "cross-device-bleed" Backend 200 [CrossDevice Tag] YES
    "another device's bytes are stored";
HoleLeak "31" "hole-leak" Backend 10 [Tag Zero Linear] YES
    "what was never written reads as old memory (ublk.rst on zero copy)";
EndOfDevice "32" "end-of-device" Backend 1 [Tag Linear Zero] YES
    "an I/O that reaches the end of the device is cut short";
TagSwap "33" "tag-swap" Server 20 [Tag Linear Zero] YES
    "two requests are completed with each other's buffers";
EarlyCommit "34" "early-commit" Backend 20 [Linear Zero] YES
    "a write is committed before the backend has done it";
BufferReuse "35" "buffer-reuse" Server 20 [Tag Linear] RAW
    "an asynchronous backend still uses the buffer of a slot that was committed (virtio-drivers #7)";
DoubleCommit "36" "double-commit" Server 200 [Tag Linear Errors Flush Watchdog] RAW
    "a slot is committed twice, the second time for its next request";
WrongResultLen "37" "wrong-result-len" Server 200 [Errors Tag Linear Zero Watchdog] RAW
    "a result is not the number of bytes that moved (ublk.rst)";
ErrnoSign "38" "errno-sign" Server 200 [Errors Flush Tag Linear Zero Watchdog] RAW
    "an error is committed as a positive number";
OpFlagMask "39" "op-flag-mask" Server 1 [Durable Flush Linear Zero] YES
    "the operation is taken without its flags, and FUA is lost";
UserCopyOffset "40" "user-copy-offset" Server 50 [Tag Linear Zero] RAW
    "the queue's bits in the place of a request's data are wrong, and another queue's buffer is used";
SglContiguity "41" "sgl-contiguity" Server 4 [Tag Linear Zero] RAW
    "the data of a large request are taken to be contiguous (ublksrv e062def)";
ZcEarlyUnregister "42" "zc-early-unregister" Server 100 [Zero Tag Linear Durable] REGISTERED
    "a zero-copy buffer is unregistered before the I/O on it ends (Linux 6ee6bd5d)";
AutobufFallback "43" "autobuf-fallback" Server 100 [Zero Tag Linear] REGISTERED
    "a buffer was not registered, nobody looked, and zeroes are moved";
CqeDropped "44" "cqe-dropped" Server 2000 [Watchdog] YES
    "a completion is filtered away and never comes (libublk-rs 14c4d39)";
FetchMissing "45" "fetch-missing" Server 1 [Watchdog] RAW
    "one slot is never fetched, and the device does not start (libublk-rs e9b911a)";
NoVolatileCache "46" "no-volatile-cache" Lifecycle 1 [Resources Flush Durable Linear Zero] YES
    "the device does not say that it has a volatile cache, and is never flushed (ublksrv 27e9327, #118)";
StopWithInflight "47" "stop-with-inflight" Lifecycle 1 [Watchdog] RAW
    "a server that is stopped drops what it has in hand";
RecoveryStaleState "48" "recovery-stale-state" Lifecycle 1 [Linear Durable Zero] YES
    "the next server serves an old or an empty backend (as SPDK's ublk_recovery.sh has it)";
ReissueOldOverNew "50" "reissue-old-over-new" Lifecycle 1 [Linear Durable] YES
    "recovery does an acknowledged write once more, over a newer one (UBLK_F_USER_RECOVERY_REISSUE, ublk.rst)";
NoIoFlusher "54" "no-io-flusher" Lifecycle 50 [Watchdog Resources] YES
    "the server is no part of writeback and allocates: reclaim waits for itself (libublk-rs 70cc964)";
MinorLeak "55" "minor-leak" Lifecycle 1 [Resources] RAW
    "a device's id is not given back (longhorn #10738)";
WrongLimits "56" "wrong-limits" Lifecycle 1 [Resources Errors Zero Linear] YES
    "the device declares longer discards and zeroes than the backend takes";
RoNotEnforced "57" "ro-not-enforced" Lifecycle 1 [Resources Errors Tag Linear Zero] YES
    "a device that is to be read-only takes writes";
ShiftedWrite "+" "shifted-write" Backend 200 [Tag] YES
    "data are stored some bytes off, as by DMA to an address that is not aligned";
LateRetry "+" "late-retry" Backend 40 [Linear Zero Durable] YES
    "a write that timed out was done after all, and its retry comes after a newer one";
DiscardRoundsOut "+" "discard-rounds-out" Backend 4 [Zero] YES
    "a discard is widened to whole units and takes parts of its neighbours with it";
ZeroesEdgesKept "+" "zeroes-edges-kept" Backend 2 [Zero Linear] YES
    "zeroes are narrowed to whole units, and the edges keep their data";
ColdFlush "+" "cold-flush" Backend 1 [Durable Flush Linear Zero] YES
    "a server that was just started takes nothing to be dirty, and skips its first flushes";
FlushGivesUp "+" "flush-gives-up" Backend 10 [Durable Flush Linear Zero] YES
    "a flush fails, and the next one succeeds without what the failed one had to persist (fsyncgate)";
SwappedBlocks "+" "swapped-blocks" Backend 50 [Tag] YES
    "two blocks of one write are stored in each other's place";
FlushSubmitted "+" "flush-submitted" Backend 16 [Flush] YES
    "a flush is acknowledged once it is handed on, and done a moment later: next to no power cut comes between";
FtlRollback "+" "ftl-rollback" Backend 1 [Durable] YES
    "a disk flushes, and when the power is cut its map rolls back to before (FAST'13)";
LaggingMirror "+" "lagging-mirror" Backend 20 [Linear] YES
    "a read is served by a mirror that has not got the last write yet";
UnwrittenExtent "+" "unwritten-extent" Backend 20 [Zero] YES
    "a read right behind a write finds its extent still marked as unwritten, and returns zeroes";
ErroredWrite "a" "errored-write" Control 200 [] YES
    "a write that fails was done in full, in part or not at all (fio #1215)";
UnflushedLost "b" "unflushed-lost" Control 1 [] YES
    "what was not flushed is lost at a power cut";
AnySubset "c" "any-subset" Control 5 [] YES
    "a cache writes back what it likes, when it likes";
ReadInPieces "d" "read-in-pieces" Control 4 [] YES
    "a read beside a write returns old or new, block by block (fio #366, #1938)";
WriteInPieces "e" "write-in-pieces" Control 4 [] YES
    "two overlapping writes interleave, block by block";
DiscardGarbage "f" "discard-garbage" Control 1 [] YES
    "what was discarded without a promise reads as anything";
WrittenTwice "g" "written-twice" Control 4 [] YES
    "a write in flight is done twice";
PartialThenError "h" "partial-then-error" Control 200 [] YES
    "an operation fails when a part of it is done";
FlushFails "i" "flush-fails" Control 10 [] YES
    "a flush fails, and what it had to persist may be durable or not until the next good one";
}

impl Spec {
    /// Whether it is between the driver and the server: a real device then needs a handler of its own for it, or a server of
    /// its own.
    #[must_use]
    pub fn is_in_server(&self) -> bool {
        let pieces = [Mutant::ReadInPieces, Mutant::WriteInPieces];
        let stops = [Mutant::StopWithInflight, Mutant::NoIoFlusher];
        self.layer == Layer::Server || pieces.contains(&self.mutant) || stops.contains(&self.mutant)
    }
}

impl Mutant {
    /// What it is.
    #[must_use]
    pub fn spec(self) -> &'static Spec {
        // The table has the order of the variants: both come from one list.
        &TABLE[self as usize]
    }

    /// Its name, as given on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.spec().name
    }

    /// The real bug that it stands for.
    #[must_use]
    pub fn doc(self) -> &'static str {
        self.spec().stands_for
    }

    /// Whether it is odd but right.
    #[must_use]
    pub fn is_control(self) -> bool {
        self.spec().layer == Layer::Control
    }
}

impl fmt::Display for Mutant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is no mutant's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownMutant(String);

impl fmt::Display for UnknownMutant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = Mutant::ALL.map(Mutant::name).join(", ");
        write!(f, "no mutant is called {:?}; there are {names}", self.0)
    }
}

impl std::error::Error for UnknownMutant {}

impl FromStr for Mutant {
    type Err = UnknownMutant;

    fn from_str(text: &str) -> Result<Self, UnknownMutant> {
        Self::ALL.into_iter().find(|mutant| mutant.name() == text).ok_or_else(|| UnknownMutant(text.to_owned()))
    }
}
