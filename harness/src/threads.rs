//! Where each thread of a process stands, as the kernel tells it in `/proc`.

use std::fmt;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Where one thread stands. What the kernel would not tell is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadDump {
    /// The process.
    pub pid: u32,
    /// The thread.
    pub tid: u32,
    /// The thread's name.
    pub comm: String,
    /// Its state: `R` running, `S` sleeping, `D` waiting and not to be interrupted, …
    pub state: String,
    /// The kernel function it waits in.
    pub wchan: String,
    /// The number of the system call it is in and its arguments, or `running`.
    pub syscall: String,
    /// The kernel stack, innermost first; only root is told.
    pub stack: Vec<String>,
    /// The functions of the program itself, innermost first; empty where nobody could look.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub user: Vec<String>,
}

/// A clock that runs while the thread that started it has a core: others on the machine do not count.
#[derive(Clone, Copy, Debug)]
pub struct CoreClock {
    /// What the thread had taken then, if the kernel counts that.
    began: Option<Duration>,
    started: Instant,
}

impl CoreClock {
    /// Starts it.
    #[must_use]
    pub fn start() -> Self {
        Self { began: core_time(), started: Instant::now() }
    }

    /// What this thread, which has to be the one that started it, took of its core since. All the time that passed, on a
    /// kernel that does not count this.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        let core = self.began.zip(core_time()).map(|(began, now)| now.saturating_sub(began));
        core.unwrap_or_else(|| self.started.elapsed())
    }
}

/// What this thread took of its core so far.
fn core_time() -> Option<Duration> {
    let text = fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    text.split(' ').next()?.parse().ok().map(Duration::from_nanos)
}

/// What `stat` says of a process or of a thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Its name.
    pub comm: String,
    /// Its state: `R` running, `S` sleeping, `D` waiting and not to be interrupted, `Z` ended, …
    pub state: char,
    /// The process group.
    pub group: u32,
    /// The kernel's own flags (`PF_…`).
    pub flags: u64,
    /// When it began, in clock ticks since boot: with the number, that names it for good.
    pub start_time: u64,
}

impl Stat {
    /// Of the process or thread whose directory in `/proc` this is; `None` if there is none.
    #[must_use]
    pub fn read(dir: &Path) -> Option<Self> {
        read(dir, "stat").and_then(|text| Self::parse(&text))
    }

    fn parse(stat: &str) -> Option<Self> {
        // The name stands in parentheses and may hold any character, a parenthesis too.
        let (comm, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        // The first behind the name is field 3.
        let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
        Some(Self {
            comm: comm.to_owned(),
            state: fields.first()?.chars().next()?,
            group: number(5)?.try_into().ok()?,
            flags: number(9)?,
            start_time: number(22)?,
        })
    }

    /// Whether it has ended, and only waits for somebody to take its status.
    #[must_use]
    pub const fn is_gone(&self) -> bool {
        matches!(self.state, 'Z' | 'X')
    }
}

/// Where each thread of process `pid` stands now, for people; see [`dump_threads`].
#[must_use]
pub fn stacks(pid: u32) -> String {
    let threads = dump_threads(Path::new("/proc"), pid);
    if threads.is_empty() {
        return format!("process {pid} is gone");
    }
    threads.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// Where each thread of process `pid` stands, by thread id; `proc_root` is `/proc` but in tests.
///
/// A thread that ends meanwhile is left out, as is everything when there is no such process. Only files are read that the
/// kernel answers without waiting for the thread: not `cmdline` or `maps`, which want its memory lock.
#[must_use]
pub fn dump_threads(proc_root: &Path, pid: u32) -> Vec<ThreadDump> {
    let tasks = proc_root.join(pid.to_string()).join("task");
    let Ok(entries) = fs::read_dir(&tasks) else { return Vec::new() };
    let mut tids: Vec<u32> = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    tids.sort_unstable();
    tids.into_iter().filter_map(|tid| dump_thread(&tasks.join(tid.to_string()), pid, tid)).collect()
}

/// Where each thread of the machine stands that sleeps and cannot be interrupted, and whether all were looked at by
/// `until`.
#[must_use]
pub fn dump_uninterruptible(proc_root: &Path, until: Instant) -> (Vec<ThreadDump>, bool) {
    let Ok(entries) = fs::read_dir(proc_root) else { return (Vec::new(), false) };
    let mut pids: Vec<u32> = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable();
    let mut threads = Vec::new();
    for pid in pids {
        if Instant::now() > until {
            return (threads, false);
        }
        let tasks = proc_root.join(pid.to_string()).join("task");
        let Ok(entries) = fs::read_dir(&tasks) else { continue };
        let tids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        let asleep =
            tids.filter(|tid: &u32| Stat::read(&tasks.join(tid.to_string())).is_some_and(|stat| stat.state == 'D'));
        threads.extend(asleep.filter_map(|tid| dump_thread(&tasks.join(tid.to_string()), pid, tid)));
    }
    (threads, true)
}

fn dump_thread(task: &Path, pid: u32, tid: u32) -> Option<ThreadDump> {
    let stat = Stat::read(task)?;
    let wchan = read(task, "wchan").filter(|wchan| wchan != "0");
    Some(ThreadDump {
        pid,
        tid,
        comm: stat.comm,
        state: stat.state.to_string(),
        wchan: wchan.unwrap_or_default(),
        syscall: read(task, "syscall").unwrap_or_default(),
        stack: read(task, "stack").unwrap_or_default().lines().map(function).collect(),
        user: Vec::new(),
    })
}

fn read(task: &Path, file: &str) -> Option<String> {
    let bytes = fs::read(task.join(file)).ok()?;
    Some(String::from_utf8_lossy(&bytes).trim().to_owned())
}

/// `[<0>] schedule+0x1/0x2` without the address, which the kernel hides anyway.
fn function(line: &str) -> String {
    line.split_once("] ").map_or(line, |(_, function)| function).to_owned()
}

/// One line, and one more for each function: the kernel's first, and then, with a dash, the program's.
impl fmt::Display for ThreadDump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} {} {}", self.pid, self.tid, self.comm, self.state)?;
        if !self.wchan.is_empty() {
            write!(f, " in {}", self.wchan)?;
        }
        if !self.syscall.is_empty() {
            write!(f, " (syscall {})", self.syscall)?;
        }
        self.stack.iter().try_for_each(|function| write!(f, "\n    {function}"))?;
        self.user.iter().try_for_each(|function| write!(f, "\n    - {function}"))
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use super::*;

    /// A `/proc` of our own, removed when dropped.
    struct FakeProc(PathBuf);

    impl FakeProc {
        fn new(name: &str) -> Self {
            let root = std::env::temp_dir().join(format!("ublkit-{name}-{}", std::process::id()));
            Self(root)
        }

        fn write(&self, tid: u32, file: &str, content: &str) {
            let task = self.0.join("7/task").join(tid.to_string());
            fs::create_dir_all(&task).and_then(|()| fs::write(task.join(file), content)).expect("a writable temp");
        }
    }

    impl Drop for FakeProc {
        fn drop(&mut self) {
            let _gone = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_line_of_stat_is_read() {
        let line = "17 (ublk0-q0 (x) 1) S 1 18 17 0 -1 5767168 55 0 0 0 1 2 3 4 20 0 1 0 4711 9 9";
        let expected =
            Stat { comm: "ublk0-q0 (x) 1".to_owned(), state: 'S', group: 18, flags: 5_767_168, start_time: 4711 };
        assert_eq!(Stat::parse(line), Some(expected.clone()));
        assert!(!expected.is_gone() && Stat { state: 'Z', ..expected }.is_gone());
        assert_eq!(Stat::parse("17 (x"), None);
        assert_eq!(Stat::parse("17 (x) S 1"), None);
        let own = Stat::read(Path::new("/proc/self")).expect("this process");
        assert!(own.start_time > 0 && own.flags > 0 && own.group > 0, "{own:?}");
        assert_eq!(Stat::read(Path::new("/proc/self/task/0")), None);
        assert!(stacks(std::process::id()).contains(&own.comm));
    }

    #[test]
    fn a_fake_process_is_read() {
        let proc = FakeProc::new("threads");
        proc.write(9, "stat", "9 (queue (0) x) D 1 9 9 0 -1 64 0 0 0 0 1 2 3 4 20 0 1 0 4711");
        proc.write(9, "wchan", "blk_mq_get_tag");
        proc.write(9, "syscall", "18 0x3 0x0\n");
        proc.write(9, "stack", "[<0>] blk_mq_get_tag+0x11/0x2a\n[<0>] submit_bio+0x5/0x9\n");
        proc.write(7, "stat", "7 (main) S 1 7 7 0 -1 64 0 0 0 0 1 2 3 4 20 0 1 0 4700");
        proc.write(7, "wchan", "0");
        proc.write(8, "stat", "nonsense");
        fs::create_dir_all(proc.0.join("7/task/10")).expect("a writable temp");
        let dump = dump_threads(&proc.0, 7);
        assert_eq!(dump.iter().map(|thread| thread.tid).collect::<Vec<_>>(), [7, 9]);
        assert_eq!((dump[0].wchan.as_str(), dump[0].stack.len()), ("", 0));
        assert_eq!(
            dump[1].to_string(),
            "7/9 queue (0) x D in blk_mq_get_tag (syscall 18 0x3 0x0)\n    blk_mq_get_tag+0x11/0x2a\n    submit_bio+0x5/0x9"
        );
        assert!(dump_threads(&proc.0, 8).is_empty());
        let (asleep, complete) = dump_uninterruptible(&proc.0, Instant::now() + Duration::from_secs(60));
        assert_eq!((asleep.iter().map(|thread| thread.tid).collect::<Vec<_>>(), complete), (vec![9], true));
        assert_eq!(dump_uninterruptible(&proc.0, Instant::now()), (Vec::new(), false));
    }

    #[test]
    fn the_own_process_is_read() {
        let (ready, started) = mpsc::channel();
        let (stop, stopped) = mpsc::channel::<()>();
        let sleeper = thread::Builder::new().name("sleeper".to_owned()).spawn(move || {
            let _sent = ready.send(());
            let _until_told = stopped.recv();
        });
        started.recv().expect("the thread starts");
        let dump = dump_threads(Path::new("/proc"), std::process::id());
        drop(stop);
        assert!(dump.iter().any(|thread| thread.comm == "sleeper" && !thread.state.is_empty()), "{dump:?}");
        assert!(sleeper.is_ok_and(|sleeper| sleeper.join().is_ok()));
    }

    #[test]
    fn a_core_clock_runs_while_its_thread_does() {
        let clock = CoreClock::start();
        if clock.began.is_none() {
            return;
        }
        std::thread::sleep(Duration::from_millis(300));
        assert!(clock.elapsed() < Duration::from_millis(200), "{:?} of sleep", clock.elapsed());
        let asleep = clock.elapsed();
        let until = Instant::now() + Duration::from_secs(60);
        while clock.elapsed() < asleep + Duration::from_millis(20) {
            assert!(Instant::now() < until, "it does not run");
        }
    }
}
