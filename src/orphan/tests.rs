use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use nix::errno::Errno;

use super::*;
use crate::holders::testing::Tree;

const SHORT: Duration = Duration::from_millis(20);
/// Stands for the character device.
const CHARACTER: &str = "/dev/zero";

type Devices = BTreeMap<u32, (State, i32)>;

/// A driver whose devices are a table, and something that happens in the world at the nth look at a device.
struct Fake<'a> {
    devices: Mutex<Devices>,
    deleted: Mutex<Vec<u32>>,
    looks: AtomicU32,
    at_look: u32,
    happens: &'a (dyn Fn(&Fake<'_>) + Sync),
    claimed_elsewhere: AtomicBool,
    /// Held by whoever has the character device open, beside this.
    open: Arc<()>,
    /// The link in sysfs that goes when the device is deleted.
    link: PathBuf,
}

impl<'a> Fake<'a> {
    fn new(tree: &Tree, state: State, pid: i32) -> Self {
        Self {
            devices: Mutex::new(BTreeMap::from([(3, (state, pid))])),
            deleted: Mutex::default(),
            looks: AtomicU32::new(0),
            at_look: 0,
            happens: &|_| {},
            claimed_elsewhere: AtomicBool::new(false),
            open: Arc::new(()),
            link: tree.root.join("sys/class/ublk-char/ublkc3"),
        }
    }

    fn then(mut self, at_look: u32, happens: &'a (dyn Fn(&Fake<'_>) + Sync)) -> Self {
        (self.at_look, self.happens) = (at_look, happens);
        self
    }

    fn devices(&self) -> MutexGuard<'_, Devices> {
        self.devices.lock().expect("not poisoned")
    }

    fn set(&self, state: State, pid: i32) {
        self.devices().insert(3, (state, pid));
    }

    fn deleted(&self) -> Vec<u32> {
        self.deleted.lock().expect("not poisoned").clone()
    }

    fn is_open(&self) -> bool {
        Arc::strong_count(&self.open) > 1
    }

    fn on<'b>(&'b self, tree: &Tree) -> Survey<'b, Self> {
        Survey { driver: self, roots: tree.roots(), node: |roots, id| roots.sys.join(format!("../dev/ublkc{id}")) }
    }
}

impl Driver for Fake<'_> {
    type Claim = Arc<()>;

    fn info(&self, id: u32) -> Result<Option<(State, i32)>> {
        if self.looks.fetch_add(1, Ordering::Relaxed) + 1 == self.at_look {
            (self.happens)(self);
        }
        Ok(self.devices().get(&id).copied())
    }

    fn claim(&self, _path: &Path) -> io::Result<Arc<()>> {
        if self.claimed_elsewhere.load(Ordering::Relaxed) {
            return Err(Errno::EBUSY.into());
        }
        Ok(Arc::clone(&self.open))
    }

    /// As the kernel does it: remove the nodes, then wait for whoever has them open.
    fn delete(&self, id: u32, deadline: Duration) -> Result<()> {
        std::thread::sleep(SHORT);
        assert!(self.is_open(), "deleted without a claim");
        fs::remove_file(&self.link).expect("remove");
        let deadline = Instant::now() + deadline;
        while self.is_open() {
            if Instant::now() >= deadline {
                return Err(Error::new(ErrorKind::TimedOut, "delete"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.deleted.lock().expect("not poisoned").push(id);
        self.devices().remove(&id);
        Ok(())
    }
}

/// A machine with the device 3.
fn machine(name: &str) -> Tree {
    let tree = Tree::new(&format!("orphan-{name}"));
    device(&tree, "first");
    tree.link("dev/ublkc3", CHARACTER);
    tree
}

/// Makes a directory of that name what id 3 leads to. The one before stays, so that its inode is not used again, which sysfs
/// does not do either.
fn device(tree: &Tree, name: &str) {
    tree.write(&format!("sys/{name}/dev"), "1:5\n");
    tree.link("sys/class/ublk-char/ublkc3", &format!("../../{name}"));
}

fn class(found: &[Found]) -> Class {
    assert_eq!(found.len(), 1, "{found:?}");
    found[0].class
}

#[track_caller]
fn left(cleaned: &[Cleaned], why: &str) {
    assert_eq!(cleaned.len(), 1);
    assert!(matches!(&cleaned[0].outcome, Outcome::Left(left) if left.contains(why)), "{}", cleaned[0]);
}

#[test]
fn without_the_driver_there_are_no_devices() {
    let tree = Tree::new("orphan-none");
    assert!(Fake::new(&tree, State::Dead, -1).on(&tree).list(SHORT).expect("list").is_empty());
}

#[test]
fn a_dead_device_is_found_and_cleaned() {
    let tree = machine("dead");
    let driver = Fake::new(&tree, State::Dead, -1);
    let survey = driver.on(&tree);
    let found = survey.list(SHORT).expect("list");
    assert_eq!(class(&found), Class::Dead, "{}", found[0]);
    assert!(driver.deleted().is_empty(), "listing deletes nothing");
    let started = Instant::now();
    let cleaned = survey.clean(&found, |class| class == Class::Dead);
    assert!(matches!(cleaned[0].outcome, Outcome::Deleted), "{}", cleaned[0]);
    assert!(started.elapsed() < GONE_LIMIT / 2, "the claim was kept too long");
    assert_eq!(driver.deleted(), [3]);
}

#[test]
fn a_device_between_add_and_start_is_left_alone() {
    // Its server has opened it and not started it yet. There is no /dev/ublkb3.
    let tree = machine("starting");
    tree.process(123, "server");
    tree.fd(123, 5, CHARACTER);
    let driver = Fake::new(&tree, State::Dead, -1);
    let found = driver.on(&tree).list(SHORT).expect("list");
    assert_eq!(class(&found), Class::Starting);
    assert!(found[0].reason.contains("pid 123 (server) fd 5"), "{}", found[0]);
    left(&driver.on(&tree).clean(&found, |class| class == Class::Dead), "starting");
    left(&driver.on(&tree).clean_ids(&[3], SHORT).expect("clean"), "held by pid 123");
    assert!(driver.deleted().is_empty());
}

#[test]
fn a_device_that_is_opened_or_started_within_the_grace_period_is_left_alone() {
    let tree = machine("young");
    let open = |_: &Fake<'_>| {
        tree.process(123, "server");
        tree.fd(123, 5, CHARACTER);
    };
    let driver = Fake::new(&tree, State::Dead, -1).then(2, &open);
    assert_eq!(class(&driver.on(&tree).list(SHORT).expect("list")), Class::Starting);

    let tree = machine("young-live");
    let driver = Fake::new(&tree, State::Dead, -1).then(2, &|driver| driver.set(State::Live, 123));
    assert_eq!(class(&driver.on(&tree).list(SHORT).expect("list")), Class::Served);
}

#[test]
fn a_device_that_is_opened_or_started_after_it_was_listed_is_left_alone() {
    let tree = machine("late");
    let driver = Fake::new(&tree, State::Dead, -1);
    let found = driver.on(&tree).list(SHORT).expect("list");
    driver.claimed_elsewhere.store(true, Ordering::Relaxed);
    left(&driver.on(&tree).clean(&found, |class| class == Class::Dead), "just opened");
    driver.claimed_elsewhere.store(false, Ordering::Relaxed);
    driver.set(State::Live, 123);
    left(&driver.on(&tree).clean(&found, |class| class == Class::Dead), "LIVE now");
    tree.process(123, "server");
    tree.fd(123, 5, CHARACTER);
    left(&driver.on(&tree).clean(&found, |class| class == Class::Dead), "held by pid 123");
    assert!(driver.deleted().is_empty());
}

#[test]
fn a_device_served_from_another_mount_namespace_is_left_alone() {
    let tree = machine("namespace");
    // Started: no node of it is to be seen from here, neither in /dev nor in any process.
    let driver = Fake::new(&tree, State::Live, 123);
    let found = driver.on(&tree).list(SHORT).expect("list");
    assert_eq!(class(&found), Class::Served);
    left(&driver.on(&tree).clean_ids(&[3], SHORT).expect("clean"), "served");
    // Not started yet, and held through a node of another name.
    tree.process(123, "contained");
    tree.link("container/dev/u", CHARACTER);
    tree.fd(123, 5, tree.root.join("container/dev/u").to_str().expect("text"));
    driver.set(State::Dead, -1);
    assert_eq!(class(&driver.on(&tree).list(SHORT).expect("list")), Class::Starting);
    assert!(driver.deleted().is_empty());
}

#[test]
fn where_not_every_process_can_be_seen_nothing_is_dead() {
    let tree = machine("pid-namespace");
    tree.link("proc/self/ns/pid", "pid:[4026532000]");
    for state in [State::Dead, State::Quiesced, State::FailIo] {
        let driver = Fake::new(&tree, state, -1);
        let found = driver.on(&tree).list(SHORT).expect("list");
        assert_eq!(class(&found), Class::Starting);
        left(&driver.on(&tree).clean_ids(&[3], SHORT).expect("clean"), "outside this pid namespace");
        assert!(driver.deleted().is_empty());
    }
}

#[test]
fn a_pid_that_was_used_again_neither_protects_nor_condemns() {
    let tree = machine("reuse");
    let mut innocent = std::process::Command::new("sleep").arg("60").spawn().expect("spawn");
    let pid = innocent.id() as i32;
    tree.process(pid, "sleep");
    tree.fd(pid, 0, "/dev/null");
    // The server is another process; the driver's number leads to one that has nothing to do with it.
    let driver = Fake::new(&tree, State::Live, pid);
    left(&driver.on(&tree).clean_ids(&[3], SHORT).expect("clean"), "served");
    assert!(driver.deleted().is_empty());
    // The number of a living process does not keep a dead device.
    driver.set(State::Dead, pid);
    let found = driver.on(&tree).list(SHORT).expect("list");
    assert_eq!((class(&found), found[0].server_pid), (Class::Dead, pid));
    let cleaned = driver.on(&tree).clean(&found, |class| class == Class::Dead);
    assert!(matches!(cleaned[0].outcome, Outcome::Deleted), "{}", cleaned[0]);
    assert!(innocent.try_wait().expect("wait").is_none(), "the innocent process lives");
    innocent.kill().expect("end the process this test started");
    innocent.wait().expect("wait");
}

#[test]
fn an_id_that_was_used_again_is_left_alone() {
    let tree = machine("id");
    let driver = Fake::new(&tree, State::Dead, -1);
    let found = driver.on(&tree).list(SHORT).expect("list");
    assert_eq!(class(&found), Class::Dead);
    device(&tree, "second");
    left(&driver.on(&tree).clean(&found, |class| class == Class::Dead), "another device");
    assert!(driver.deleted().is_empty());

    // Within the grace period: the new device's begins anew.
    let reuse = |_: &Fake<'_>| device(&tree, "third");
    let driver = Fake::new(&tree, State::Dead, -1).then(1, &reuse);
    let found = driver.on(&tree).list(SHORT).expect("list");
    assert_eq!(class(&found), Class::Starting);
    assert!(found[0].reason.contains("new"), "{}", found[0]);
    let found = driver.on(&tree).list(SHORT).expect("list");
    assert_eq!(class(&found), Class::Dead);
}

#[test]
fn a_recoverable_device_goes_only_by_id() {
    let tree = machine("recoverable");
    for state in [State::Quiesced, State::FailIo] {
        device(&tree, "first");
        let driver = Fake::new(&tree, state, -1);
        let found = driver.on(&tree).list(SHORT).expect("list");
        assert_eq!(class(&found), Class::Recoverable);
        left(&driver.on(&tree).clean(&found, |class| class == Class::Dead), "recoverable");
        assert!(driver.deleted().is_empty());
        let cleaned = driver.on(&tree).clean_ids(&[9, 3], SHORT).expect("clean");
        assert_eq!((cleaned[0].id, cleaned[1].id), (9, 3));
        assert!(matches!(cleaned[0].outcome, Outcome::Left(_)) && matches!(cleaned[1].outcome, Outcome::Deleted));
    }
}

#[test]
fn a_device_whose_node_is_missing_or_anothers_is_left_alone() {
    let tree = machine("node");
    let driver = Fake::new(&tree, State::Dead, -1);
    let found = driver.on(&tree).list(SHORT).expect("list");
    tree.link("dev/ublkc3", "/dev/null");
    left(&driver.on(&tree).clean(&found, |class| class == Class::Dead), "another device");
    fs::remove_file(tree.root.join("dev/ublkc3")).expect("remove");
    left(&driver.on(&tree).clean(&found, |class| class == Class::Dead), "cannot be used");
    assert!(driver.deleted().is_empty());
}
