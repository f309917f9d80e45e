use super::testing::Tree;
use super::*;

const LIMIT: Duration = Duration::from_secs(10);

fn shown(holders: &Holders) -> Vec<String> {
    holders.found.iter().map(ToString::to_string).collect()
}

#[test]
fn this_processs_own_descriptor_is_found() {
    use std::os::fd::AsRawFd;
    let null = fs::File::open("/dev/null").expect("open");
    let holders = of("/dev/null").expect("search");
    let own = std::process::id() as i32;
    let mine = |holder: &&Holder| holder.pid == Some(own) && holder.how == How::Fd(null.as_raw_fd());
    let holder = holders.found.iter().find(mine).expect("found");
    assert_eq!(holder.to_string(), format!("pid {own} ({}) fd {}", holder.comm, null.as_raw_fd()));
    assert!(!holder.comm.is_empty());
}

#[test]
fn descriptors_and_maps_are_found_by_number_whatever_the_path() {
    let tree = Tree::new("fds");
    tree.process(123, "fio");
    tree.fd(123, 7, "/dev/zero");
    tree.fd(123, 8, "/dev/null");
    tree.fd(123, 9, "socket:[1]");
    tree.process(200, "other");
    // Another name for the same device, as in a container.
    tree.link("elsewhere/disk", "/dev/zero");
    tree.fd(200, 3, tree.root.join("elsewhere/disk").to_str().expect("text"));
    tree.process(300, "mapper");
    tree.write(
        "proc/300/maps",
        "00400000-00401000 r-xp 00000000 fe:00 99 /bin/x\n7f00-7f01 rw-s 00000000 00:06 5 /gone (deleted)\n",
    );
    tree.link("proc/300/map_files/400000-401000", "/dev/null");
    tree.link("proc/300/map_files/7f00-7f01", "/dev/zero");
    // A process that ends while it is looked at.
    fs::create_dir_all(tree.root.join("proc/400")).expect("create");

    let holders = Node::at("/dev/zero").expect("stat").holders_in(&tree.roots(), LIMIT);
    assert_eq!(shown(&holders), ["pid 123 (fio) fd 7", "pid 200 (other) fd 3", "pid 300 (mapper) memory map"]);
    assert_eq!(holders.incomplete, None);
}

#[test]
fn mounts_partitions_and_stacked_devices_are_found() {
    let tree = Tree::new("mounts");
    let mount =
        |number: &str, at: &str, source: &str| format!("9 1 {number} / {at} rw shared:1 - ext4 {source} rw\n");
    tree.write("proc/self/mountinfo", &(mount("8:1", "/no", "/dev/sda1") + &mount("4000:5", "/my\\040disk", "x")));
    tree.process(50, "same");
    tree.process(60, "containerd");
    tree.link("proc/60/ns/mnt", "mnt:[2]");
    tree.write("proc/60/mountinfo", &mount("4000:6", "/data", "/dev/none"));
    tree.process(61, "inside");
    tree.link("proc/61/ns/mnt", "mnt:[2]");
    tree.write("sys/dev/block/4000:5/ublkb7p1/partition", "1\n");
    tree.write("sys/dev/block/4000:5/ublkb7p1/dev", "4000:6\n");
    tree.write("sys/dev/block/4000:5/holders/dm-0/x", "");
    tree.write("sys/dev/block/4000:6/holders/md1/x", "");
    let holders = Node::block(4000, 5).holders_in(&tree.roots(), LIMIT);
    let mut shown = shown(&holders);
    shown[2..].sort();
    let want =
        ["mounted on /my disk", "mounted on /data where pid 60 (containerd) lives", "device dm-0", "device md1"];
    assert_eq!(shown, want);
    assert_eq!(holders.to_string().matches(", ").count(), 3);
}

#[test]
fn what_cannot_be_seen_is_said() {
    let tree = Tree::new("blind");
    tree.link("proc/self/ns/pid", "pid:[4026532000]");
    let holders = Node::character(4000, 5).holders_in(&tree.roots(), LIMIT);
    assert_eq!(
        holders.to_string(),
        "nobody (there may be more: processes outside this pid namespace cannot be seen)"
    );

    tree.link("proc/self/ns/pid", INITIAL_PID_NAMESPACE);
    fs::remove_dir_all(tree.root.join("proc/1")).expect("remove");
    let holders = Node::character(4000, 5).holders_in(&tree.roots(), LIMIT);
    assert!(holders.incomplete.expect("hidepid").contains("does not show all"));

    fs::remove_dir_all(tree.root.join("proc")).expect("remove");
    assert!(Node::character(4000, 5).holders_in(&tree.roots(), LIMIT).incomplete.is_some());
}

/// A process whose maps cannot be read for as long as it hangs once made the search hang with it: a pipe that
/// nobody writes to stands in for it.
#[test]
fn a_search_that_blocks_is_given_up_with_what_was_found() {
    let tree = Tree::new("block");
    tree.process(123, "hung");
    tree.fd(123, 7, "/dev/zero");
    let maps = tree.root.join("proc/123/maps");
    fs::remove_file(&maps).expect("remove");
    nix::unistd::mkfifo(&maps, nix::sys::stat::Mode::S_IRWXU).expect("mkfifo");
    let holders = Node::at("/dev/zero").expect("stat").holders_in(&tree.roots(), Duration::from_millis(300));
    assert_eq!(shown(&holders), ["pid 123 (hung) fd 7"]);
    assert!(holders.incomplete.expect("given up").contains("given up"));
    drop(fs::OpenOptions::new().write(true).open(&maps));
}

/// When a close finds that a device is held, its node is gone already; what /proc says of it is a name.
#[test]
fn holders_of_a_removed_node_are_found_by_name() {
    let tree = Tree::new("removed");
    tree.process(123, "fio");
    for (fd, name) in [(5, "ublkb7 (deleted)"), (6, "ublkb77 (deleted)"), (7, "ublkb7")] {
        tree.link(&format!("dev/{name}"), "/dev/zero");
        tree.fd(123, fd, tree.root.join("dev").join(name).to_str().expect("text"));
    }
    let mount = |source: &str, at: &str| format!("9 1 4000:5 / {at} rw - ext4 {source} rw\n");
    let mounts = [mount("/dev/ublkb7", "/a"), mount("/dev/ublkb7p2", "/b"), mount("/dev/ublkb77", "/c")];
    tree.write("proc/self/mountinfo", &mounts.concat());
    let holders = Wanted::ublk(7).search(&tree.roots(), LIMIT);
    assert_eq!(shown(&holders), ["pid 123 (fio) fd 5", "mounted on /a", "mounted on /b"]);
    let mounts = Wanted { mounts_only: true, ..Wanted::ublk(7) }.search(&tree.roots(), LIMIT);
    assert_eq!(shown(&mounts), ["mounted on /a", "mounted on /b"]);
}

#[test]
fn only_device_nodes_have_holders() {
    assert_eq!(of("/").expect_err("a directory").kind(), ErrorKind::InvalidInput);
    assert_eq!(of("/dev/none-such").expect_err("nothing").kind(), ErrorKind::NotFound);
}

#[test]
fn the_kernels_escapes_are_undone() {
    assert_eq!(unescape(r"/a\040b\134c\11"), r"/a b\c\11");
    assert_eq!(without_leading_zeroes("00400000-00401000"), "400000-401000");
    assert_eq!(without_leading_zeroes("00000000-00001000"), "0-1000");
}
