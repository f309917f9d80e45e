//! Names for addresses.

use std::collections::HashMap;

use addr2line::gimli::{Dwarf, EndianSlice, NativeEndian, SectionId};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _, ObjectSymbolTable as _, SymbolIndex, SymbolKind};

use super::image::{Image, Images};

/// The function below everything that a Rust program's thread was given to do.
const BOTTOM: &str = "__rust_begin_short_backtrace";
/// How many frames of the standard library and of others are told before the first of our own.
const FOREIGN_MAX: usize = 4;

/// What the files say of their addresses, by path. Read when it is asked for.
#[derive(Default)]
pub(super) struct Names {
    symbols: HashMap<String, Symbols>,
    lines: HashMap<String, Option<Lines>>,
}

type Lines = addr2line::Context<EndianSlice<'static, NativeEndian>>;

/// Functions by address: where each begins and ends, and which symbol it is. Their names are read when they are asked for:
/// each of them is a read of the file, and there are tens of thousands.
struct Symbols(Vec<(u64, u64, Place)>);

/// Which symbol: its table and its index there.
#[derive(Clone, Copy)]
enum Place {
    Static(SymbolIndex),
    Dynamic(SymbolIndex),
}

impl Symbols {
    fn of(image: &Image) -> Self {
        let Some(object) = image.object() else { return Self(Vec::new()) };
        let all = object.symbols().map(|symbol| (Place::Static(symbol.index()), symbol));
        // A library without a symbol table has this one.
        let dynamic = object.dynamic_symbols().map(|symbol| (Place::Dynamic(symbol.index()), symbol));
        let mut symbols: Vec<_> = all
            .chain(dynamic)
            .filter(|(_, symbol)| symbol.kind() == SymbolKind::Text && symbol.address() > 0)
            .map(|(place, symbol)| (symbol.address(), symbol.address() + symbol.size().max(1), place))
            .collect();
        symbols.sort_unstable_by_key(|(start, ..)| *start);
        Self(symbols)
    }

    fn name(&self, image: &Image, address: u64) -> Option<String> {
        let after = self.0.partition_point(|(start, ..)| *start <= address);
        let (_, end, place) = self.0.get(after.checked_sub(1)?)?;
        if address >= *end {
            return None;
        }
        let object = image.object()?;
        let symbol = match place {
            Place::Static(index) => object.symbol_by_index(*index),
            Place::Dynamic(index) => object.dynamic_symbol_table()?.symbol_by_index(*index),
        };
        symbol.ok()?.name().ok().map(function)
    }
}

fn read_lines(image: &'static Image) -> Option<Lines> {
    let object = image.object()?;
    let section = |id: SectionId| {
        let data = object.section_by_name(id.name()).and_then(|section| section.data().ok()).unwrap_or_default();
        Ok::<_, addr2line::gimli::Error>(EndianSlice::new(data, NativeEndian))
    };
    Dwarf::load(section).and_then(addr2line::Context::from_dwarf).ok()
}

/// A function, and where in it.
struct Frame {
    text: String,
    /// Not of the standard library, nor of anything else that has no lines.
    ours: bool,
}

impl Names {
    /// The functions at `addresses`, by the symbol table.
    pub(super) fn functions(&mut self, images: &Images, addresses: &[u64]) -> Vec<String> {
        let frames = addresses.iter().flat_map(|&address| match images.at(address) {
            Some((image, inside)) => vec![Frame { text: self.symbol(image, inside), ours: true }],
            None => unknown(address),
        });
        told(frames)
    }

    /// The functions at `addresses` with files and lines, those among them that were inlined into others.
    pub(super) fn lines(&mut self, images: &'static Images, addresses: &[u64]) -> Vec<String> {
        let frames = addresses.iter().flat_map(|&address| match images.at(address) {
            Some((image, inside)) => self.frames(image, inside),
            None => unknown(address),
        });
        told(frames)
    }

    fn symbol(&mut self, image: &Image, inside: u64) -> String {
        let symbols = self.symbols.entry(image.path.clone()).or_insert_with(|| Symbols::of(image));
        symbols.name(image, inside).unwrap_or_else(|| format!("{}+{inside:#x}", short(&image.path)))
    }

    fn frames(&mut self, image: &'static Image, inside: u64) -> Vec<Frame> {
        let mut frames = Vec::new();
        let symbol = self.symbol(image, inside);
        let lines = self.lines.entry(image.path.clone()).or_insert_with(|| read_lines(image));
        if let Some(lines) = lines
            && let Ok(mut found) = lines.find_frames(inside).skip_all_loads()
        {
            while let Ok(Some(frame)) = found.next() {
                let name = frame.function.and_then(|name| Some(function(&name.raw_name().ok()?))).unwrap_or_default();
                let Some(place) = frame.location else { continue };
                let (Some(file), Some(line)) = (place.file, place.line) else { continue };
                let ours = !["/rustc/", "/library/", "/registry/src/"].iter().any(|part| file.contains(part));
                frames.push((name, format!(" at {}:{line}", short(file)), ours));
            }
        }
        match frames.last_mut() {
            // All but the last were inlined into it, and it is the one that the symbol table knows, by its full name.
            Some((name, ..)) => name.clone_from(&symbol),
            None => return vec![Frame { text: symbol, ours: false }],
        }
        frames.into_iter().map(|(name, place, ours)| Frame { text: name + &place, ours }).collect()
    }
}

fn unknown(address: u64) -> Vec<Frame> {
    vec![Frame { text: format!("{address:#x}"), ours: false }]
}

/// The lines that are worth reading: not what begins every thread, and of the calls that the standard library makes
/// between ours, none.
fn told(frames: impl Iterator<Item = Frame>) -> Vec<String> {
    let mut told: Vec<String> = Vec::new();
    let mut ours_seen = false;
    for Frame { text, ours } in frames {
        if text.contains(BOTTOM) {
            break;
        }
        ours_seen |= ours;
        if ours || !ours_seen && told.len() < FOREIGN_MAX {
            told.push(text);
        }
    }
    told
}

/// A function's name without its hash and without its parameters of type, which can be longer than everything else.
fn function(raw: &str) -> String {
    let name = format!("{:#}", rustc_demangle::demangle(raw));
    let mut short = String::with_capacity(name.len());
    let mut depth = 0usize;
    // `<T as Trait>::method` is what it begins with, and stays.
    let keep = name.starts_with('<').then(|| name.find(">::")).flatten().unwrap_or(0);
    let mut before = ' ';
    for (at, character) in name.char_indices() {
        match character {
            '<' if at >= keep && keep + at > 0 => depth += 1,
            '>' if at > keep && before != '-' && depth > 0 => depth -= 1,
            _ if depth == 0 => short.push(character),
            _ => {}
        }
        before = character;
    }
    // `f::<T>` leaves two colons behind.
    short.trim_end_matches("::").replace("::::", "::")
}

/// The last parts of a path: enough to find the file, and no more than fits a line.
fn short(path: &str) -> &str {
    let mut slashes = path.rmatch_indices('/');
    slashes.nth(3).map_or(path, |(at, _)| &path[at + 1..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_short() {
        assert_eq!(short("/home/somebody/code/scenarios/src/server/child.rs"), "scenarios/src/server/child.rs");
        assert_eq!(short("src/main.rs"), "src/main.rs");
        assert_eq!(function("read"), "read");
        assert_eq!(function("call_once<fn() -> core::option::Option<u8>, ()>"), "call_once");
        assert_eq!(function("a::work::<b::C<d>>::{closure#0}"), "a::work::{closure#0}");
        assert_eq!(function("<a::Crew<b> as c::Work>::begin::<d>"), "<a::Crew<b> as c::Work>::begin");
        assert_eq!(function("_ZN4core3fmt5write17h0123456789abcdefE"), "core::fmt::write");
    }

    #[test]
    fn what_says_nothing_is_left_out() {
        let frame = |(text, ours): (&str, bool)| Frame { text: text.to_owned(), ours };
        let frames = [("futex", false), ("lock", false), ("ours", true), ("call_once", false), ("outer", true)];
        assert_eq!(told(frames.into_iter().map(frame)), ["futex", "lock", "ours", "outer"]);
        let bottom = [("ours", true), ("std::sys::__rust_begin_short_backtrace", false), ("start", true)];
        assert_eq!(told(bottom.into_iter().map(frame)), ["ours"]);
    }

    /// The addresses of this test's own functions are named by the tables of its own file.
    #[test]
    fn a_function_of_this_program_is_named() {
        let images = Box::leak(Box::new(Images::of(std::process::id()).expect("maps")));
        let address = a_function_of_this_program_is_named as fn() as usize as u64 + 1;
        let mut names = Names::default();
        let by_symbol = names.functions(images, &[address]);
        assert!(by_symbol[0].ends_with("a_function_of_this_program_is_named"), "{by_symbol:?}");
        let with_line = names.lines(images, &[address]);
        assert!(with_line.iter().any(|frame| frame.contains("src/backtrace/names.rs:")), "{with_line:?}");
        assert_eq!(names.lines(images, &[16]), ["0x10"]);
    }
}
