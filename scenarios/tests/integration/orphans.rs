//! Devices that nobody serves are found and cleaned; every other one is left alone.

use std::fs::OpenOptions;
use std::time::{Duration, Instant};

use ublkit::ctrl::{AddDevice, State, block_path, character_path};
use ublkit::orphan::{self, Class, Found, Outcome};
use ublkit::sys::ublk::Features;
use ublkit::{Controller, Geometry};

use super::client::{self, MIB, eventually};
use super::disk::Disk;
use super::runner::{cases, ids};
use super::server::Server;

cases!("orphans":
    a_device_of_this_process_is_served,
    a_device_between_add_and_start_is_left_alone,
    a_device_that_was_added_and_forgotten_is_cleaned,
    a_server_in_another_mount_namespace_is_left_alone,
    a_server_in_another_pid_namespace_is_left_alone,
    a_killed_server_leaves_a_device_that_is_cleaned,
    a_pid_that_was_used_again_is_neither_asked_nor_killed,
    a_killed_server_that_was_stuck_in_closing_ends in 60 s,
);

const GRACE: Duration = Duration::from_millis(500);

fn controller() -> Controller {
    Controller::open().expect("open")
}

fn find(found: &[Found], id: u32) -> &Found {
    found.iter().find(|device| device.id == id).unwrap_or_else(|| panic!("device {id} is listed: {found:?}"))
}

fn outcome(cleaned: &[orphan::Cleaned], id: u32) -> &Outcome {
    &cleaned.iter().find(|cleaned| cleaned.id == id).unwrap_or_else(|| panic!("{id}: {cleaned:?}")).outcome
}

/// It is served, cleaning leaves it alone, even by name, and it works as before.
fn assert_left_alone(id: u32) {
    let controller = controller();
    let found = orphan::list(&controller, GRACE).expect("list");
    assert_eq!((find(&found, id).class, find(&found, id).state), (Class::Served, Some(State::Live)), "{found:?}");
    let cleaned = orphan::clean(&controller, &found);
    assert!(matches!(outcome(&cleaned, id), Outcome::Left(_)), "{cleaned:?}");
    let cleaned = orphan::clean_ids(&controller, &[id], GRACE).expect("clean");
    assert!(matches!(outcome(&cleaned, id), Outcome::Left(_)), "{cleaned:?}");
    let file = OpenOptions::new().read(true).write(true).open(block_path(id)).expect("open");
    client::write(&file, 1, 0, 4096).expect("write");
    file.sync_all().expect("fsync");
}

/// It is dead, and cleaning it frees its id.
fn assert_cleaned(id: u32) {
    let controller = controller();
    // The block device goes first, and the state changes a little later.
    let dead = || controller.get_dev_info(id).is_ok_and(|info| info.state() == State::Dead);
    eventually("the block device is gone", || dead() && !block_path(id).exists());
    let found = orphan::list(&controller, GRACE).expect("list");
    assert_eq!(find(&found, id).class, Class::Dead, "{found:?}");
    let cleaned = orphan::clean(&controller, &found);
    assert!(matches!(outcome(&cleaned, id), Outcome::Deleted), "{cleaned:?}");
    assert!(!ids().contains(&id) && !character_path(id).exists());
    let again = orphan::clean_ids(&controller, &[id], GRACE).expect("clean");
    assert!(matches!(outcome(&again, id), Outcome::Left(_)), "{again:?}");
}

fn a_device_of_this_process_is_served() {
    let device = client::start(&Disk::new(Geometry::bytes(MIB)));
    let begun = Instant::now();
    assert_left_alone(device.id());
    assert!(begun.elapsed() < Duration::from_secs(5));
    client::close(&device);
}

fn added() -> (Controller, u32) {
    let controller = controller();
    let add = AddDevice { id: None, queues: 1, depth: 4, max_io_bytes: 4096, features: Features::NONE };
    let id = controller.add(&add).expect("add").id();
    (controller, id)
}

fn a_device_between_add_and_start_is_left_alone() {
    let (controller, id) = added();
    // At the first look nobody has it open yet: its server opens it within the grace period.
    let opener = std::thread::spawn(move || {
        std::thread::sleep(GRACE / 2);
        OpenOptions::new().read(true).write(true).open(character_path(id)).expect("open")
    });
    let found = orphan::list(&controller, GRACE).expect("list");
    let claim = opener.join().expect("join");
    assert_eq!(find(&found, id).class, Class::Starting, "{found:?}");
    let cleaned = orphan::clean(&controller, &found);
    assert!(matches!(outcome(&cleaned, id), Outcome::Left(_)), "{cleaned:?}");
    let cleaned = orphan::clean_ids(&controller, &[id], Duration::ZERO).expect("clean");
    assert!(matches!(outcome(&cleaned, id), Outcome::Left(_)), "{cleaned:?}");
    assert!(ids().contains(&id));
    drop(claim);
    controller.delete(id, Duration::from_secs(5)).expect("delete");
}

fn a_device_that_was_added_and_forgotten_is_cleaned() {
    let (_controller, id) = added();
    assert_cleaned(id);
}

fn a_server_in_another_mount_namespace_is_left_alone() {
    let server = Server::start(&["unshare", "--mount"]);
    assert_left_alone(server.id);
    server.end();
}

/// There its pid is small, and here it is that of a kernel thread: some kernels tell the one, some the other.
fn a_server_in_another_pid_namespace_is_left_alone() {
    let server = Server::start(&["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    assert_left_alone(server.id);
    server.end();
}

fn a_killed_server_leaves_a_device_that_is_cleaned() {
    let server = Server::start(&[]);
    let id = server.id;
    assert_left_alone(id);
    server.kill();
    assert!(ids().contains(&id), "the driver keeps its id");
    assert_cleaned(id);
    let device = client::builder(&Disk::new(Geometry::bytes(MIB))).id(id).start().expect("the id can be used again");
    client::close(&device);
}

/// The pid that the driver has of a dead server is given to another process, which has nothing to do with it.
fn a_pid_that_was_used_again_is_neither_asked_nor_killed() {
    let server = Server::start(&[]);
    let (id, pid) = (server.id, server.pid());
    server.kill();
    let mut innocent = (0..200)
        .find_map(|_| {
            std::fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).expect("set the next pid");
            let mut child = std::process::Command::new("sleep").arg("1000").spawn().expect("start sleep");
            if child.id() == pid {
                return Some(child);
            }
            child.kill().and_then(|()| child.wait()).expect("end sleep");
            None
        })
        .expect("the pid is used again");
    assert_cleaned(id);
    assert!(innocent.try_wait().expect("wait").is_none(), "the innocent process lives on");
    innocent.kill().and_then(|()| innocent.wait()).expect("end sleep");
}

/// A server whose queue is stuck in the backend, and which has tried to close, can be killed. It once could not: the
/// kernel held its STOP, which waited for the request, which waited for the end of the server, which waited for the STOP.
fn a_killed_server_that_was_stuck_in_closing_ends() {
    let server = Server::stuck();
    let id = server.id;
    let file = OpenOptions::new().read(true).write(true).open(block_path(id)).expect("open");
    let (done, result) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(client::write(&file, 1, 0, 4096).and_then(|_| file.sync_all())));
    server.wait_for_word("closing has failed");
    server.kill_within(Duration::from_secs(10));
    let result = result.recv_timeout(Duration::from_secs(10)).expect("its client's I/O ends");
    assert!(result.is_err(), "and has failed");
    assert_cleaned(id);
}
