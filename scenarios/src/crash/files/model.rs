//! What a file system has promised.
//!
//! * When `fsync` or `fdatasync` of a file returns, its content and size are durable. What changes later may be there or not,
//!   cell by cell; a size that grows or shrinks may be anything on the way.
//! * When a write through `O_DSYNC` returns, what it wrote is durable, and the file is at least as long as to have it.
//! * Cells that a file was never given, and those that were cut off since the last sync, may read as zeroes. Whatever else
//!   is there that was not written there is an old content of the disk: no file system may show that.
//! * When `fsync` of a directory returns, its names are durable. What changes later is there up to some change, and not
//!   from there on: that is what a journal means. So a rename is done or not, and no file is without a name in between.
//!
//! Everything else that file systems do in practice, such as writing a file's data before its new name, is no promise.

use std::collections::BTreeMap;

use super::content::{CELL, Content, Seen, ZERO};

/// A change of a file's content, in cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Write {
        generation: u32,
        first: u32,
        cells: u32,
        /// It was acknowledged as durable.
        durable: bool,
    },
    Resize {
        cells: u32,
    },
}

/// A change of a directory's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NameChange {
    Create { name: u32, file: u32 },
    Rename { from: u32, to: u32 },
    Unlink { name: u32 },
}

/// What made something durable: the step of the worker, and the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Promise {
    step: u64,
    call: &'static str,
}

/// A file: what it holds, and what it may hold after a cut.
#[derive(Clone, Debug)]
pub(super) struct File {
    pub(super) id: u32,
    /// The generation of each cell as reads see it now.
    now: Vec<u32>,
    /// The generation of each cell when it was last synced.
    base: Vec<u32>,
    /// What changed since, with the step.
    since: Vec<(u64, Change)>,
    /// What a cut may leave of its length, in cells.
    length: (u32, u32),
    promise: Option<Promise>,
    generation: u32,
}

/// What was judged of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Judged {
    pub(super) bytes: u64,
    /// Bytes that could be but one thing, and not because they were never written.
    pub(super) promised_bytes: u64,
}

/// What is wrong with a file or a directory, and what had been promised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wrong {
    pub(super) what: String,
    pub(super) detail: Vec<String>,
}

impl File {
    fn new(id: u32) -> Self {
        let (now, base, since) = (Vec::new(), Vec::new(), Vec::new());
        Self { id, now, base, since, length: (0, 0), promise: None, generation: 0 }
    }

    /// Its length as reads see it, in cells.
    pub(super) fn cells(&self) -> u32 {
        self.now.len() as u32
    }

    /// How many changes no sync has covered yet.
    pub(super) fn unsynced(&self) -> usize {
        self.since.len()
    }

    /// Whether a sync has promised anything of it.
    pub(super) fn is_promised(&self) -> bool {
        self.promise.is_some()
    }

    fn write(&mut self, step: u64, first: u32, cells: u32) -> u32 {
        self.generation += 1;
        let (generation, end) = (self.generation, first + cells);
        if self.now.len() < end as usize {
            self.now.resize(end as usize, ZERO);
        }
        self.now[first as usize..end as usize].fill(generation);
        self.since.push((step, Change::Write { generation, first, cells, durable: false }));
        self.length.1 = self.length.1.max(end);
        generation
    }

    /// The last write has returned, and was to be durable then.
    fn written_through(&mut self, step: u64) {
        if let Some((_, Change::Write { first, cells, durable, .. })) = self.since.last_mut() {
            *durable = true;
            self.length.0 = self.length.0.max(*first + *cells);
            self.promise = Some(Promise { step, call: "a write through O_DSYNC" });
        }
    }

    fn resize(&mut self, step: u64, cells: u32) {
        self.now.resize(cells as usize, ZERO);
        self.since.push((step, Change::Resize { cells }));
        self.length = (self.length.0.min(cells), self.length.1.max(cells));
    }

    fn synced(&mut self, step: u64, call: &'static str) {
        self.base.clone_from(&self.now);
        self.since.clear();
        self.length = (self.cells(), self.cells());
        self.promise = Some(Promise { step, call });
    }

    /// Whether a cut may leave this generation in a cell.
    fn allows(&self, cell: u32, seen: u32) -> bool {
        let mut allowed = self.base.get(cell as usize).copied().unwrap_or(ZERO) == seen;
        for (_, change) in &self.since {
            match *change {
                Change::Write { generation, first, cells, durable } if (first..first + cells).contains(&cell) => {
                    allowed = generation == seen || allowed && !durable;
                }
                Change::Resize { cells } if cell >= cells => allowed |= seen == ZERO,
                _ => {}
            }
        }
        allowed
    }

    /// Whether a cut leaves but one thing in a cell, and that was written.
    fn is_certain(&self, cell: u32) -> bool {
        let generation = self.now.get(cell as usize).copied().unwrap_or(ZERO);
        let changed = |change: &Change| match *change {
            Change::Write { first, cells, durable, .. } => !durable && (first..first + cells).contains(&cell),
            Change::Resize { cells } => cell >= cells,
        };
        generation != ZERO && cell < self.length.0 && !self.since.iter().any(|(_, change)| changed(change))
    }

    /// Holds what is there after a cut against what was promised.
    pub(super) fn judge(&self, content: Content, bytes: &[u8]) -> Result<Judged, Wrong> {
        let (shortest, longest) = (u64::from(self.length.0) * CELL as u64, u64::from(self.length.1) * CELL as u64);
        let length = bytes.len() as u64;
        if !(shortest..=longest).contains(&length) {
            let right =
                if shortest == longest { format!("{shortest}") } else { format!("from {shortest} to {longest}") };
            return Err(self.wrong(format!("it has {length} bytes, and may have {right}"), None));
        }
        let mut judged = Judged { bytes: length, promised_bytes: 0 };
        for (cell, there) in (0..).zip(bytes.chunks(CELL)) {
            let offset = u64::from(cell) * CELL as u64;
            let seen = content.look(self.id, offset, there);
            if !matches!(seen, Seen::Generation(generation) if self.allows(cell, generation)) {
                let what = format!("bytes {offset} to {} are {seen}", offset + there.len() as u64);
                return Err(self.wrong(what, Some(cell)));
            }
            if self.is_certain(cell) {
                judged.promised_bytes += there.len() as u64;
            }
        }
        Ok(judged)
    }

    fn wrong(&self, what: String, cell: Option<u32>) -> Wrong {
        let mut detail = Vec::new();
        match self.promise {
            Some(Promise { step, call }) => detail.push(format!("{call} had returned at step {step}")),
            None => detail.push("it was never synced".to_owned()),
        }
        if let Some(cell) = cell {
            let shown = |generation| match generation {
                ZERO => "zeroes".to_owned(),
                generation => format!("write {generation}"),
            };
            let base = self.base.get(cell as usize).copied().unwrap_or(ZERO);
            let allowed: Vec<String> =
                (ZERO..=self.generation).filter(|seen| self.allows(cell, *seen)).map(shown).collect();
            detail.push(format!("there when it was last synced as a whole: {}", shown(base)));
            detail.push(format!("there may be: {}", allowed.join(", or ")));
        }
        let concerns = |change: &Change| match (*change, cell) {
            (Change::Write { first, cells, .. }, Some(cell)) => (first..first + cells).contains(&cell),
            (Change::Resize { cells }, Some(cell)) => cell >= cells,
            (_, None) => true,
        };
        let bytes = |cells: u32| u64::from(cells) * CELL as u64;
        for (step, change) in self.since.iter().filter(|(_, change)| concerns(change)) {
            detail.push(match *change {
                Change::Write { generation, first, cells, durable } => format!(
                    "  step {step}: write {generation} of {} bytes at {}{}",
                    bytes(cells),
                    bytes(first),
                    if durable { ", durable when it returned" } else { "" }
                ),
                Change::Resize { cells } => format!("  step {step}: truncate to {} bytes", bytes(cells)),
            });
        }
        Wrong { what, detail }
    }
}

/// The files of a directory by their names, each name a number.
pub(super) type Names = BTreeMap<u32, u32>;

/// A directory that one worker has to itself.
#[derive(Clone, Debug)]
pub(super) struct Directory {
    pub(super) worker: u32,
    /// How many calls the worker has begun that change or sync something.
    pub(super) step: u64,
    /// The names as they are now.
    pub(super) names: Names,
    /// The names when the directory was last synced.
    base: Names,
    since: Vec<(u64, NameChange)>,
    promise: Option<Promise>,
    /// Every file that may be there after a cut.
    files: BTreeMap<u32, File>,
    next_file: u32,
    next_name: u32,
}

impl Directory {
    /// An empty directory that is durable.
    pub(super) fn new(worker: u32) -> Self {
        Self {
            worker,
            step: 0,
            names: Names::new(),
            base: Names::new(),
            since: Vec::new(),
            promise: None,
            files: BTreeMap::new(),
            next_file: (worker + 1) << 24,
            next_name: 0,
        }
    }

    pub(super) fn file(&self, id: u32) -> Option<&File> {
        self.files.get(&id)
    }

    /// How many name changes no sync has covered yet.
    pub(super) fn unsynced(&self) -> usize {
        self.since.len()
    }

    /// A name that was never used.
    pub(super) fn new_name(&mut self) -> u32 {
        self.next_name += 1;
        self.next_name
    }

    /// A file is about to be created. Returns its id.
    pub(super) fn create(&mut self, name: u32) -> u32 {
        self.next_file += 1;
        let file = self.next_file;
        self.files.insert(file, File::new(file));
        self.change(NameChange::Create { name, file });
        file
    }

    pub(super) fn rename(&mut self, from: u32, to: u32) {
        self.change(NameChange::Rename { from, to });
    }

    pub(super) fn unlink(&mut self, name: u32) {
        self.change(NameChange::Unlink { name });
    }

    fn change(&mut self, change: NameChange) {
        self.step += 1;
        apply(&mut self.names, change);
        self.since.push((self.step, change));
    }

    /// A write is about to begin. Returns its generation.
    pub(super) fn write(&mut self, file: u32, first: u32, cells: u32) -> u32 {
        self.step += 1;
        let step = self.step;
        self.files.get_mut(&file).map_or(ZERO, |file| file.write(step, first, cells))
    }

    /// The last write to a file went through `O_DSYNC`, and has returned.
    pub(super) fn written_through(&mut self, file: u32) {
        let step = self.step;
        self.files.entry(file).and_modify(|file| file.written_through(step));
    }

    /// A file is about to be truncated, or made longer.
    pub(super) fn resize(&mut self, file: u32, cells: u32) {
        self.step += 1;
        let step = self.step;
        self.files.entry(file).and_modify(|file| file.resize(step, cells));
    }

    /// A file was synced.
    pub(super) fn synced(&mut self, file: u32, call: &'static str) {
        self.step += 1;
        let step = self.step;
        self.files.entry(file).and_modify(|file| file.synced(step, call));
    }

    /// The directory was synced.
    pub(super) fn names_synced(&mut self) {
        self.step += 1;
        self.base.clone_from(&self.names);
        self.since.clear();
        self.promise = Some(Promise { step: self.step, call: "fsync of the directory" });
        let names = &self.names;
        self.files.retain(|id, _| names.values().any(|named| named == id));
    }

    /// The file that each name may lead to after a cut: as it was when the directory was synced, and after each change since.
    fn states(&self) -> Vec<Names> {
        let mut states = vec![self.base.clone()];
        let mut names = self.base.clone();
        for (_, change) in &self.since {
            apply(&mut names, *change);
            states.push(names.clone());
        }
        states
    }

    /// Which files the names that are there after a cut lead to: each possibility, the newest first. Two differ where a
    /// name was given to another file meanwhile.
    pub(super) fn judge_names(&self, found: &[u32]) -> Result<Vec<Names>, Wrong> {
        let mut states = self.states();
        states.dedup();
        let (right, wrong): (Vec<Names>, Vec<Names>) =
            states.into_iter().rev().partition(|names| names.keys().eq(found.iter()));
        if !right.is_empty() {
            return Ok(right);
        }
        let listed =
            |names: &mut dyn Iterator<Item = u32>| names.map(|name| format!("f{name}")).collect::<Vec<_>>().join(" ");
        let mut detail = Vec::new();
        match self.promise {
            Some(Promise { step, call }) => detail.push(format!("{call} had returned at step {step}")),
            None => detail.push("it was never synced since it was made".to_owned()),
        }
        detail.push(format!("there when it was last synced: {}", listed(&mut self.base.keys().copied())));
        detail.push(format!("found: {}", listed(&mut found.iter().copied())));
        if let Some(nearest) = wrong.iter().min_by_key(|names| distance(names, found)) {
            let mut missing = nearest.keys().copied().filter(|name| !found.contains(name));
            detail.push(format!("missing from the most similar state that may be: {}", listed(&mut missing)));
            let mut surplus = found.iter().copied().filter(|name| !nearest.contains_key(name));
            detail.push(format!("and too many: {}", listed(&mut surplus)));
        }
        detail.extend(self.since.iter().map(|(step, change)| match *change {
            NameChange::Create { name, file } => format!("  step {step}: create f{name} (file {file:#x})"),
            NameChange::Rename { from, to } => format!("  step {step}: rename f{from} to f{to}"),
            NameChange::Unlink { name } => format!("  step {step}: unlink f{name}"),
        }));
        Err(Wrong {
            what: "its names are those of no state that it has had since it was last synced".to_owned(),
            detail,
        })
    }
}

fn apply(names: &mut Names, change: NameChange) {
    match change {
        NameChange::Create { name, file } => {
            names.insert(name, file);
        }
        NameChange::Rename { from, to } => {
            if let Some(file) = names.remove(&from) {
                names.insert(to, file);
            }
        }
        NameChange::Unlink { name } => {
            names.remove(&name);
        }
    }
}

fn distance(names: &Names, found: &[u32]) -> usize {
    let missing = names.keys().filter(|name| !found.contains(name)).count();
    missing + found.iter().filter(|name| !names.contains_key(name)).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTENT: Content = Content::new(99);

    /// A file of which each cell has the generation that is given.
    fn bytes(file: u32, cells: &[u32]) -> Vec<u8> {
        let mut bytes = vec![0; cells.len() * CELL];
        for (index, (cell, generation)) in bytes.chunks_mut(CELL).zip(cells).enumerate() {
            if *generation != ZERO {
                CONTENT.fill(file, *generation, (index * CELL) as u64, cell);
            }
        }
        bytes
    }

    fn may_be(directory: &Directory, file: u32, cells: &[u32]) -> bool {
        directory.file(file).expect("known").judge(CONTENT, &bytes(file, cells)).is_ok()
    }

    #[test]
    fn what_was_never_synced_may_be_there_in_part_or_not() {
        let mut directory = Directory::new(0);
        let file = directory.create(1);
        assert_eq!(directory.write(file, 0, 3), 1);
        for cells in [&[][..], &[1], &[1, 1, 1], &[0, 1, 1], &[0, 0, 0], &[1, 0]] {
            assert!(may_be(&directory, file, cells), "{cells:?}");
        }
        // Longer than it ever was; and a write that it never had.
        for cells in [&[1, 1, 1, 0][..], &[2]] {
            assert!(!may_be(&directory, file, cells), "{cells:?}");
        }
    }

    #[test]
    fn what_was_synced_is_there_and_later_changes_may_be() {
        let mut directory = Directory::new(0);
        let file = directory.create(1);
        directory.write(file, 0, 4);
        directory.synced(file, "fsync");
        for cells in [&[1, 1, 1][..], &[1, 1, 0, 1], &[]] {
            assert!(!may_be(&directory, file, cells), "{cells:?}");
        }
        let whole = directory.file(file).expect("known").judge(CONTENT, &bytes(file, &[1; 4])).expect("right");
        assert_eq!((whole.bytes, whole.promised_bytes), (2048, 2048));
        directory.write(file, 1, 2);
        directory.resize(file, 3);
        directory.write(file, 4, 1);
        for cells in [&[1, 1, 1, 1][..], &[1, 2, 1, 1], &[1, 1, 2], &[1, 2, 2, 0, 3], &[1, 2, 2, 1, 0]] {
            assert!(may_be(&directory, file, cells), "{cells:?}");
        }
        // Zeroes where nothing was cut off, the new where the old was not overwritten, shorter than it ever was.
        for cells in [&[1, 0, 1, 1][..], &[2, 2, 2, 1], &[1, 1], &[1, 1, 1, 1, 1]] {
            assert!(!may_be(&directory, file, cells), "{cells:?}");
        }
    }

    #[test]
    fn a_write_through_promises_itself_and_nothing_else() {
        let mut directory = Directory::new(0);
        let file = directory.create(1);
        directory.write(file, 0, 1);
        directory.write(file, 2, 1);
        directory.written_through(file);
        assert!(may_be(&directory, file, &[0, 0, 2]) && may_be(&directory, file, &[1, 0, 2]));
        assert!(!may_be(&directory, file, &[1, 0]) && !may_be(&directory, file, &[1, 0, 0]));
        directory.write(file, 2, 1);
        assert!(may_be(&directory, file, &[0, 0, 3]) && may_be(&directory, file, &[0, 0, 2]));
        assert!(!may_be(&directory, file, &[0, 0, 0]));
    }

    #[test]
    fn a_wrong_file_tells_what_was_promised() {
        let mut directory = Directory::new(0);
        let file = directory.create(1);
        directory.write(file, 0, 2);
        directory.synced(file, "fdatasync");
        directory.write(file, 1, 1);
        let wrong = directory.file(file).expect("known").judge(CONTENT, &bytes(file, &[1, 0])).expect_err("zeroes");
        assert_eq!(wrong.what, "bytes 512 to 1024 are zeroes");
        assert_eq!(wrong.detail[0], "fdatasync had returned at step 3");
        assert_eq!(wrong.detail[2], "there may be: write 1, or write 2");
        assert_eq!(wrong.detail[3], "  step 4: write 2 of 512 bytes at 512");
    }

    #[test]
    fn names_are_those_of_one_moment_since_the_last_sync() {
        let mut directory = Directory::new(0);
        let old = directory.create(1);
        directory.names_synced();
        let new = directory.create(2);
        directory.rename(2, 1);
        directory.unlink(1);
        let one = |name, file| Names::from([(name, file)]);
        assert_eq!(directory.judge_names(&[1]).expect("right"), [one(1, new), one(1, old)]);
        assert_eq!(directory.judge_names(&[1, 2]).expect("right"), [Names::from([(1, old), (2, new)])]);
        assert_eq!(directory.judge_names(&[]).expect("right"), [Names::new()]);
        let wrong = directory.judge_names(&[2]).expect_err("the old file may only go with the rename");
        assert!(wrong.detail.iter().any(|line| line.ends_with("rename f2 to f1")), "{wrong:?}");
        directory.names_synced();
        directory.judge_names(&[1]).expect_err("it is gone for good");
        assert!(directory.file(old).is_none());
    }
}
