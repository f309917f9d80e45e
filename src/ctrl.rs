//! The control device: one method per command.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::error::{Error, ErrorKind, Result};
use crate::recovery::Recovery;
use crate::ring::command::{CommandRing, Outcome, Pace};
use crate::sys::ublk::{self, CtrlCmd, DevInfo, Features, Params, Plain};
use crate::writeback;

/// How long a command that has nothing to wait for may take.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(10);

/// What state a device is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum State {
    /// No block device: not started yet, stopped, or its server died.
    Dead,
    /// Started and served.
    Live,
    /// The server is gone; I/O waits for a new one.
    Quiesced,
    /// The server is gone; I/O fails until there is a new one.
    FailIo,
    /// A state that this library does not know.
    Unknown(u16),
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dead => f.write_str("DEAD"),
            Self::Live => f.write_str("LIVE"),
            Self::Quiesced => f.write_str("QUIESCED"),
            Self::FailIo => f.write_str("FAIL_IO"),
            Self::Unknown(number) => write!(f, "state {number}"),
        }
    }
}

/// A device as the driver describes it.
#[derive(Clone, Copy)]
pub struct DeviceInfo(DevInfo);

impl DeviceInfo {
    /// The device's id: the N of `/dev/ublkbN` and `/dev/ublkcN`.
    #[must_use]
    pub const fn id(&self) -> u32 {
        self.0.dev_id
    }

    /// Number of queues, as granted.
    #[must_use]
    pub const fn queues(&self) -> u16 {
        self.0.nr_hw_queues
    }

    /// Tags per queue, as granted.
    #[must_use]
    pub const fn depth(&self) -> u16 {
        self.0.queue_depth
    }

    /// Largest request in bytes, as granted.
    #[must_use]
    pub const fn max_io_bytes(&self) -> u32 {
        self.0.max_io_buf_bytes
    }

    /// The state.
    #[must_use]
    pub const fn state(&self) -> State {
        match self.0.state {
            ublk::STATE_DEAD => State::Dead,
            ublk::STATE_LIVE => State::Live,
            ublk::STATE_QUIESCED => State::Quiesced,
            ublk::STATE_FAIL_IO => State::FailIo,
            other => State::Unknown(other),
        }
    }

    /// The server's process id as the driver tells it: since Linux 6.18 as seen from the caller's pid namespace and -1
    /// when the server is gone; before that, the number that the server gave of itself.
    #[must_use]
    pub const fn server_pid(&self) -> i32 {
        self.0.ublksrv_pid
    }

    /// The device's features, unknown bits included.
    #[must_use]
    pub const fn features(&self) -> Features {
        Features::from_bits(self.0.flags)
    }

    /// What becomes of the device when its server dies.
    #[must_use]
    pub const fn recovery(&self) -> Recovery {
        Recovery::of(self.features())
    }

    /// Writes back what file systems and the page cache hold for a device that a [stop](Controller::stop) would lose: one that
    /// is served and whose I/O waits when it is not ([`Recovery::Wait`] and [`Recovery::Reissue`]). Of any other device it does
    /// nothing: the kernel does it itself, or there is nobody to write to.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] when its server has not finished that within `deadline`; a thread is left that waits for it, and
    /// with it the end of this process. Or what the file system says.
    pub fn write_back(&self, deadline: Duration) -> Result<()> {
        if self.state() == State::Live && self.recovery().waits() {
            writeback::write_back(self.id(), Instant::now() + deadline)
        } else {
            Ok(())
        }
    }

    /// Path of the block device.
    #[must_use]
    pub fn block_path(&self) -> PathBuf {
        block_path(self.id())
    }

    /// Path of the character device.
    #[must_use]
    pub fn character_path(&self) -> PathBuf {
        character_path(self.id())
    }

    /// The driver's own structure.
    #[must_use]
    pub const fn raw(&self) -> DevInfo {
        self.0
    }
}

impl fmt::Debug for DeviceInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceInfo")
            .field("id", &self.id())
            .field("state", &self.state())
            .field("queues", &self.queues())
            .field("depth", &self.depth())
            .field("max_io_bytes", &self.max_io_bytes())
            .field("server_pid", &self.server_pid())
            .field("features", &self.features())
            .finish()
    }
}

/// Path of a device's block node.
#[must_use]
pub fn block_path(id: u32) -> PathBuf {
    format!("/dev/ublkb{id}").into()
}

/// Path of a device's character node.
#[must_use]
pub fn character_path(id: u32) -> PathBuf {
    format!("/dev/ublkc{id}").into()
}

/// What ADD_DEV is asked for.
#[derive(Clone, Copy, Debug)]
pub struct AddDevice {
    /// The id, or `None` for any free one.
    pub id: Option<u32>,
    /// Queues, 1 to 4096; the driver grants at most one per CPU.
    pub queues: u16,
    /// Tags per queue, 1 to 4096.
    pub depth: u16,
    /// Largest request in bytes.
    pub max_io_bytes: u32,
    /// Features to ask for.
    pub features: Features,
}

/// How commands are numbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encoding {
    /// As ioctl numbers, since Linux 6.4.
    Ioctl,
    /// By their bare number.
    Legacy,
}

/// How often a control command was given through one [`Controller`], and how long that took altogether.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CommandCost {
    /// The command's name in the kernel's header, such as `ADD_DEV`.
    pub command: &'static str,
    /// How often it was given.
    pub count: u64,
    /// From the moment it was given to its answer, all of them added up.
    pub total: Duration,
}

/// More than there are commands, whose numbers are small.
const COMMANDS: usize = 32;

fn command_name(number: u32) -> &'static str {
    let found = ublk::CONTROL_COMMANDS.iter().find(|(command, _)| ublk::legacy(*command) == number);
    found.map_or("other", |(_, name)| name.strip_prefix("CMD_").unwrap_or(name))
}

/// What one command has cost so far.
#[derive(Debug, Default)]
struct Cost {
    count: AtomicU64,
    nanoseconds: AtomicU64,
}

/// The control device. Any thread may use it; commands of several threads run side by side.
///
/// Every command has a deadline, and keeps the kernel's errno in its error.
#[derive(Debug)]
pub struct Controller {
    control: File,
    encoding: Encoding,
    features: Features,
    /// Rings that no command is using: one, unless several commands ran at once.
    idle: Mutex<Vec<CommandRing>>,
    /// By the commands' numbers.
    costs: [Cost; COMMANDS],
}

impl Controller {
    /// Opens `/dev/ublk-control` and asks the driver what it can do.
    ///
    /// # Errors
    /// [`ErrorKind::DriverMissing`] without `ublk_drv`, [`ErrorKind::PermissionDenied`] without root, or what the kernel
    /// says.
    pub fn open() -> Result<Self> {
        let control = OpenOptions::new().read(true).write(true).open(ublk::CONTROL_PATH).map_err(|error| {
            let what = format_args!("open {}", ublk::CONTROL_PATH);
            let plain = Error::io(&error, what);
            match plain.kind() {
                ErrorKind::NotFound => {
                    let hint = format!(
                        "{plain}: ublk_drv is not loaded: run `modprobe ublk_drv` (Linux 6.0 or later built with \
                         CONFIG_BLK_DEV_UBLK; on Ubuntu it is in linux-modules-extra-$(uname -r))"
                    );
                    plain.with_message(hint).with_kind(ErrorKind::DriverMissing)
                }
                ErrorKind::PermissionDenied => {
                    let hint = format!("{plain}: ublk needs CAP_SYS_ADMIN: run as root");
                    plain.with_message(hint)
                }
                _ => plain,
            }
        })?;
        let mut this = Self {
            control,
            encoding: Encoding::Ioctl,
            features: Features::NONE,
            idle: Mutex::default(),
            costs: Default::default(),
        };
        let payload = vec![0; size_of::<u64>()].into_boxed_slice();
        match this.run("ask for the driver's features", ublk::CMD_GET_FEATURES, CtrlCmd::default(), payload) {
            Ok((_, payload)) => {
                let mut bits = [0; size_of::<u64>()];
                bits.copy_from_slice(&payload[..size_of::<u64>()]);
                this.features = Features::from_bits(u64::from_ne_bytes(bits));
            }
            // Before 6.5 there is no such command, and before 6.4 no such numbering: the bare numbers work on both.
            Err(error) if error.kind() == ErrorKind::Unsupported => this.encoding = Encoding::Legacy,
            Err(error) => return Err(error),
        }
        Ok(this)
    }

    /// What the driver can do; nothing on kernels before 6.5, which cannot say.
    #[must_use]
    pub fn features(&self) -> Features {
        self.features
    }

    /// What the commands given through this controller have cost so far: where the time of starting and closing goes.
    /// Commands that were never given are left out.
    #[must_use]
    pub fn costs(&self) -> Vec<CommandCost> {
        let read = |(number, cost): (usize, &Cost)| CommandCost {
            command: command_name(number as u32),
            count: cost.count.load(Ordering::Relaxed),
            total: Duration::from_nanos(cost.nanoseconds.load(Ordering::Relaxed)),
        };
        self.costs.iter().enumerate().map(read).filter(|cost| cost.count > 0).collect()
    }

    /// Creates a device (`UBLK_U_CMD_ADD_DEV`). What the driver granted is in the answer and may be less than asked.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] (`EEXIST`) when the id is taken, [`ErrorKind::PermissionDenied`], or what the kernel says.
    pub fn add(&self, add: &AddDevice) -> Result<DeviceInfo> {
        let id = add.id.unwrap_or(ublk::ANY_ID);
        // Everything else, the state and the pid among it, must be zero: 6.18 takes a state from here for real.
        let info = DevInfo {
            nr_hw_queues: add.queues,
            queue_depth: add.depth,
            max_io_buf_bytes: add.max_io_bytes,
            dev_id: id,
            flags: (add.features | Features::CMD_IOCTL_ENCODE).bits(),
            ..DevInfo::default()
        };
        let command = CtrlCmd { dev_id: id, queue_id: u16::MAX, ..CtrlCmd::default() };
        let (_, payload) =
            self.run("add a ublk device", ublk::CMD_ADD_DEV, command, info.to_boxed_bytes()).map_err(explain_add)?;
        Ok(DeviceInfo(DevInfo::from_byte_prefix(&payload)))
    }

    /// Starts a device (`UBLK_U_CMD_START_DEV`), waiting until every tag has been fetched.
    ///
    /// `called_off` is asked every 20 ms; once it says yes the command is cancelled.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] at the deadline or when called off; [`ErrorKind::Kernel`] (`EINVAL`) for parameters that
    /// the block layer refuses; or what the kernel says.
    pub fn start(&self, id: u32, server_pid: u32, deadline: Duration, called_off: &dyn Fn() -> bool) -> Result<()> {
        let command = CtrlCmd { data: u64::from(server_pid), ..device_command(id) };
        self.run_bounded("start", ublk::CMD_START_DEV, command, Box::default(), deadline, called_off).map(drop)
    }

    /// Stops a device (`UBLK_U_CMD_STOP_DEV`): the kernel writes back dirty pages through the server, waits for I/O in
    /// flight, and removes the block device. Must not be called from a thread that serves one of its queues.
    ///
    /// With [`Recovery::Wait`] and [`Recovery::Reissue`] the kernel fails the dirty pages instead: what file systems and
    /// applications have written and not synced is lost, unless [`DeviceInfo::write_back`] is called before. The same goes for
    /// deleting a device that was not stopped.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`], [`ErrorKind::NotFound`], or what the kernel says.
    pub fn stop(&self, id: u32, deadline: Duration) -> Result<()> {
        self.simple("stop", ublk::CMD_STOP_DEV, id, deadline)
    }

    /// Deletes a device (`UBLK_U_CMD_DEL_DEV`) and waits until its id is free, that is, until nobody has either of its
    /// nodes open.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] when somebody still holds it; it then goes when they let go. [`ErrorKind::NotFound`].
    pub fn delete(&self, id: u32, deadline: Duration) -> Result<()> {
        self.simple("delete", ublk::CMD_DEL_DEV, id, deadline)
    }

    /// Deletes a device without waiting for whoever holds it (`UBLK_U_CMD_DEL_DEV_ASYNC`).
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], or what the kernel says.
    pub fn delete_async(&self, id: u32) -> Result<()> {
        self.simple("delete", ublk::CMD_DEL_DEV_ASYNC, id, COMMAND_DEADLINE)
    }

    /// Begins the recovery of a device whose server is gone (`UBLK_U_CMD_START_USER_RECOVERY`). Its character device can be
    /// opened then, and every tag is to be fetched anew.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] (`EBUSY`) when it is still served, or the kernel has not taken it back yet, or somebody has its
    /// character device open; [`ErrorKind::Kernel`] (`EINVAL`) when it has no [`Recovery`], and on Linux before 6.16 also
    /// when a recovery has begun of which no queue was ready; [`ErrorKind::NotFound`].
    ///
    /// On Linux 6.12 the command must not be sent after a recovery that ended when some of several queues were ready: the
    /// driver then dies of a task that is not there.
    pub fn start_user_recovery(&self, id: u32) -> Result<()> {
        self.simple("begin to recover", ublk::CMD_START_USER_RECOVERY, id, COMMAND_DEADLINE)
    }

    /// Ends a recovery (`UBLK_U_CMD_END_USER_RECOVERY`), waiting until every tag has been fetched: I/O goes on, served by
    /// process `server_pid`.
    ///
    /// `called_off` is asked every 20 ms; once it says yes the command is cancelled.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] at the deadline or when called off; [`ErrorKind::Busy`] when the device is not one that is
    /// being recovered; [`ErrorKind::Kernel`] (`EINVAL`) since Linux 6.18 when the process is not the one that has opened
    /// the character device; [`ErrorKind::NotFound`].
    pub fn end_user_recovery(
        &self,
        id: u32,
        server_pid: u32,
        deadline: Duration,
        called_off: &dyn Fn() -> bool,
    ) -> Result<()> {
        let command = CtrlCmd { data: u64::from(server_pid), ..device_command(id) };
        let operation = ublk::CMD_END_USER_RECOVERY;
        self.run_bounded("recover", operation, command, Box::default(), deadline, called_off).map(drop)
    }

    /// Holds back new I/O of a device that can be recovered, and takes the idle tags away from its server
    /// (`UBLK_U_CMD_QUIESCE_DEV`), which is then to complete what it has and to let go of the character device. Linux 6.16
    /// or later, and only for devices that were added with [`Features::QUIESCE`].
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] (`EBUSY`) when some queue had no idle tag within `deadline`. I/O is held back all the same, until
    /// the server is gone: the kernel does not undo that. [`ErrorKind::Unsupported`], [`ErrorKind::NotFound`],
    /// [`ErrorKind::TimedOut`] when the kernel is later than that.
    pub fn quiesce(&self, id: u32, deadline: Duration) -> Result<()> {
        // 0 would mean 49 days.
        let timeout_ms = deadline.as_millis().clamp(1, u128::from(u32::MAX)) as u64;
        let command = CtrlCmd { data: timeout_ms, ..device_command(id) };
        let grace = deadline + COMMAND_DEADLINE;
        self.run_bounded("quiesce", ublk::CMD_QUIESCE_DEV, command, Box::default(), grace, &|| false).map(drop)
    }

    /// Describes a device (`UBLK_U_CMD_GET_DEV_INFO`).
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is none with this id.
    pub fn get_dev_info(&self, id: u32) -> Result<DeviceInfo> {
        let payload = DevInfo::default().to_boxed_bytes();
        let (_, payload) =
            self.run(&format!("describe device {id}"), ublk::CMD_GET_DEV_INFO, device_command(id), payload)?;
        Ok(DeviceInfo(DevInfo::from_byte_prefix(&payload)))
    }

    /// As [`get_dev_info`](Self::get_dev_info), permitted by the character node's own permissions
    /// (`UBLK_U_CMD_GET_DEV_INFO2`).
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], [`ErrorKind::PermissionDenied`].
    pub fn get_dev_info2(&self, id: u32) -> Result<DeviceInfo> {
        let path = character_path(id).into_os_string().into_encoded_bytes();
        let path_len = path.len() + 1;
        let mut payload = path;
        payload.push(0);
        payload.extend_from_slice(&DevInfo::default().to_boxed_bytes());
        let command = CtrlCmd { dev_path_len: path_len as u16, ..device_command(id) };
        let (_, payload) =
            self.run(&format!("describe device {id}"), ublk::CMD_GET_DEV_INFO2, command, payload.into())?;
        Ok(DeviceInfo(DevInfo::from_byte_prefix(&payload[path_len..])))
    }

    /// Sets a device's parameters (`UBLK_U_CMD_SET_PARAMS`), before it is started.
    ///
    /// # Errors
    /// [`ErrorKind::Kernel`] (`EINVAL`) for parameters that the driver refuses.
    pub fn set_params(&self, id: u32, params: &Params) -> Result<()> {
        let params = Params { len: size_of::<Params>() as u32, ..*params };
        let what = format!("set the parameters of device {id}");
        self.run(&what, ublk::CMD_SET_PARAMS, device_command(id), params.to_boxed_bytes()).map(drop)
    }

    /// A device's parameters (`UBLK_U_CMD_GET_PARAMS`). The driver adds `PARAM_TYPE_DEVT` to the types: mask it out
    /// before setting them again.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub fn get_params(&self, id: u32) -> Result<Params> {
        let params = Params { len: size_of::<Params>() as u32, ..Params::default() };
        let what = format!("get the parameters of device {id}");
        let (_, payload) = self.run(&what, ublk::CMD_GET_PARAMS, device_command(id), params.to_boxed_bytes())?;
        Ok(Params::from_byte_prefix(&payload))
    }

    /// The CPUs whose I/O comes through a queue (`UBLK_U_CMD_GET_QUEUE_AFFINITY`).
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Kernel`] (`EINVAL`) when there is no such queue.
    pub fn get_queue_affinity(&self, id: u32, queue: u16) -> Result<Vec<usize>> {
        // Room for 8192 CPUs, the most that Linux is built for on any machine.
        const MASK_BYTES: usize = 1024;
        let command = CtrlCmd { data: u64::from(queue), ..device_command(id) };
        let what = format!("get the affinity of queue {queue} of device {id}");
        let payload = vec![0; MASK_BYTES].into_boxed_slice();
        let (_, payload) = self.run(&what, ublk::CMD_GET_QUEUE_AFFINITY, command, payload)?;
        let mut cpus = Vec::new();
        for (word, bytes) in payload.chunks_exact(size_of::<usize>()).enumerate() {
            // The mask is an array of native longs.
            let mut native = [0; size_of::<usize>()];
            native.copy_from_slice(bytes);
            let bits = usize::from_ne_bytes(native);
            cpus.extend(
                (0..usize::BITS as usize)
                    .filter(|bit| bits >> bit & 1 == 1)
                    .map(|bit| word * usize::BITS as usize + bit),
            );
        }
        Ok(cpus)
    }

    /// The control device itself.
    #[cfg(feature = "raw")]
    pub(crate) fn control(&self) -> &File {
        &self.control
    }

    fn simple(&self, verb: &str, operation: u32, id: u32, deadline: Duration) -> Result<()> {
        self.run_bounded(verb, operation, device_command(id), Box::default(), deadline, &|| false).map(drop)
    }

    fn run_bounded(
        &self,
        verb: &str,
        operation: u32,
        command: CtrlCmd,
        payload: Box<[u8]>,
        deadline: Duration,
        called_off: &dyn Fn() -> bool,
    ) -> Result<(i32, Box<[u8]>)> {
        let what = format!("{verb} device {}", command.dev_id);
        self.run_at(&what, operation, command, payload, Pace::Waiting(deadline), called_off)
    }

    /// A command that waits for nothing.
    fn run(&self, what: &str, operation: u32, command: CtrlCmd, payload: Box<[u8]>) -> Result<(i32, Box<[u8]>)> {
        self.run_at(what, operation, command, payload, Pace::Prompt(COMMAND_DEADLINE), &|| false)
    }

    fn run_at(
        &self,
        what: &str,
        operation: u32,
        command: CtrlCmd,
        payload: Box<[u8]>,
        pace: Pace,
        called_off: &dyn Fn() -> bool,
    ) -> Result<(i32, Box<[u8]>)> {
        let (Pace::Waiting(deadline) | Pace::Prompt(deadline)) = pace;
        let number = ublk::legacy(operation);
        let operation = match self.encoding {
            Encoding::Ioctl => operation,
            Encoding::Legacy => number,
        };
        let idle = self.idle.lock().unwrap_or_else(std::sync::PoisonError::into_inner).pop();
        let ring = match idle {
            Some(ring) => ring,
            None => CommandRing::new().map_err(|error| explain_ring(&error))?,
        };
        let given = Instant::now();
        let (outcome, ring) = ring
            .run(&self.control, operation, command, payload, pace, called_off)
            .map_err(|error| Error::io(&error, what))?;
        if let Some(cost) = self.costs.get(number as usize) {
            cost.count.fetch_add(1, Ordering::Relaxed);
            cost.nanoseconds.fetch_add(given.elapsed().as_nanos() as u64, Ordering::Relaxed);
        }
        if let Some(ring) = ring {
            self.idle.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(ring);
        }
        match outcome {
            Outcome::Answered(result, payload) if result >= 0 => Ok((result, payload)),
            // A command that finished while it was being called off is finished.
            Outcome::CalledOff(result, payload) if result >= 0 => Ok((result, payload)),
            Outcome::Answered(result, _) => Err(Error::kernel(Errno::from_raw(-result), what)),
            Outcome::CalledOff(..) => Err(Error::new(
                ErrorKind::TimedOut,
                format!("{what}: not done within {deadline:?}; the command was cancelled"),
            )),
            Outcome::Stuck => Err(Error::new(
                ErrorKind::TimedOut,
                format!("{what}: not done within {deadline:?}, and the kernel does not let the command be cancelled"),
            )),
        }
    }
}

fn device_command(id: u32) -> CtrlCmd {
    CtrlCmd { dev_id: id, queue_id: u16::MAX, ..CtrlCmd::default() }
}

fn explain_add(error: Error) -> Error {
    let hint = match error.errno().map(Errno::from_raw) {
        Some(Errno::EACCES) => {
            let limit = std::fs::read_to_string("/sys/module/ublk_drv/parameters/ublks_max").unwrap_or_default();
            format!(
                "{error}: the driver's limit of devices (ublks_max = {}) is reached: delete devices that nobody serves, \
                 or raise /sys/module/ublk_drv/parameters/ublks_max",
                limit.trim()
            )
        }
        Some(Errno::EPERM) => format!("{error}: adding a ublk device needs CAP_SYS_ADMIN: run as root"),
        Some(Errno::EEXIST) => format!("{error}: a device with this id exists: choose another, or none for any"),
        _ => return error,
    };
    error.with_message(hint)
}

pub(crate) fn explain_ring(error: &io::Error) -> Error {
    let plain = Error::io(error, "set up an io_uring");
    let hint = match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EPERM) => {
            "io_uring is switched off here (sysctl kernel.io_uring_disabled, or a container's seccomp)"
        }
        Some(Errno::ENOSYS) => "this kernel is built without io_uring",
        Some(Errno::ENOMEM) => "the locked-memory limit is too low: raise it (ulimit -l)",
        Some(Errno::EMFILE) => "this process has too many open files: raise the limit (ulimit -n)",
        _ => return plain,
    };
    let message = format!("{plain}: {hint}");
    plain.with_message(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_is_counted_under_its_name() {
        for (command, name) in ublk::CONTROL_COMMANDS {
            let number = ublk::legacy(*command);
            assert!((number as usize) < COMMANDS, "{name}");
            assert_eq!(format!("CMD_{}", command_name(number)), *name);
        }
        assert_eq!(command_name(ublk::legacy(ublk::CMD_QUIESCE_DEV)), "QUIESCE_DEV");
        assert_eq!(command_name(0), "other");
    }
}
