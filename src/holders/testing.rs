use std::os::unix::fs::symlink;

use super::*;

/// A made-up /proc and /sys in a directory that is gone afterwards. Nodes are stood for by links to real ones.
pub(crate) struct Tree {
    pub(crate) root: PathBuf,
}

impl Tree {
    pub(crate) fn new(name: &str) -> Self {
        let root = std::env::temp_dir().join(format!("ublkit-tree-{}-{name}", std::process::id()));
        let tree = Self { root };
        tree.link("proc/self/ns/pid", INITIAL_PID_NAMESPACE);
        tree.link("proc/self/ns/mnt", "mnt:[1]");
        tree.write("proc/self/mountinfo", "22 27 0:21 / /proc rw - proc proc rw\n");
        tree.process(1, "init");
        tree
    }

    pub(crate) fn roots(&self) -> Roots {
        Roots { proc: self.root.join("proc"), sys: self.root.join("sys") }
    }

    pub(crate) fn write(&self, path: &str, text: &str) {
        let path = self.root.join(path);
        fs::create_dir_all(path.parent().expect("has a parent")).expect("create");
        fs::write(path, text).expect("write");
    }

    pub(crate) fn link(&self, path: &str, target: &str) {
        let path = self.root.join(path);
        fs::create_dir_all(path.parent().expect("has a parent")).expect("create");
        let _ = fs::remove_file(&path);
        symlink(target, path).expect("link");
    }

    pub(crate) fn process(&self, pid: i32, comm: &str) {
        self.write(&format!("proc/{pid}/comm"), &format!("{comm}\n"));
        self.write(&format!("proc/{pid}/maps"), "");
        self.link(&format!("proc/{pid}/ns/mnt"), "mnt:[1]");
        fs::create_dir_all(self.root.join(format!("proc/{pid}/fd"))).expect("create");
    }

    pub(crate) fn fd(&self, pid: i32, fd: i32, target: &str) {
        self.link(&format!("proc/{pid}/fd/{fd}"), target);
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}
