//! The tensors of a file that `torch.save` wrote, read without running anything.
//!
//! A pickle is a program for a machine that imports and calls whatever it names. This reads the instructions that maps of
//! tensors are made of and treats the rest as an error; names are compared, never imported ([`machine`]). candle's reader is
//! not used: on files that are not what they should be it panics, copies what is referred to, allocates what lengths say,
//! and leaves out what it cannot read.

mod machine;

use self::machine::{Id, Machine, Node};
use super::archive::Archive;

type Read<T> = Result<T, String>;

/// Most tensors in one file.
const MAX_TENSORS: usize = 50_000;
/// Longest program: a tensor takes some 300 bytes.
const MAX_PROGRAM_BYTES: usize = 16 << 20;
/// Most dimensions of a tensor.
const MAX_DIMS: usize = 8;
/// Most bytes that all tensors come to, beyond twice the file's: tensors may share what is stored, as a prefix does that is
/// saved once per layer.
const MAX_SHARED_BYTES: usize = 4 << 30;
/// How often a tensor may be wrapped (as a parameter, as a tensor of a subclass).
const MAX_WRAPPED: usize = 4;

/// What a tensor's numbers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    F16,
    Bf16,
    F32,
    F64,
}

impl Kind {
    /// By the name of torch's class of storage.
    ///
    /// # Errors
    /// The name of another one.
    fn of_storage(class: &str) -> Result<Self, &str> {
        match class {
            "HalfStorage" => Ok(Self::F16),
            "BFloat16Storage" => Ok(Self::Bf16),
            "FloatStorage" => Ok(Self::F32),
            "DoubleStorage" => Ok(Self::F64),
            "LongStorage" => Err("I64"),
            "IntStorage" => Err("I32"),
            "ShortStorage" => Err("I16"),
            "CharStorage" => Err("I8"),
            "ByteStorage" => Err("U8"),
            "BoolStorage" => Err("bool"),
            other => Err(other),
        }
    }

    fn bytes(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }
}

/// A tensor, its numbers little-endian in row-major order.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Numbers {
    pub(super) kind: Kind,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: Vec<u8>,
}

/// The tensors of a whole file, by name.
///
/// # Errors
/// What is no map of floating-point tensors, and where it is not.
pub(super) fn read(file: &[u8]) -> Read<Vec<(String, Numbers)>> {
    let archive = Archive::read(file)?;
    let mut pickles = archive.names().filter(|name| name.strip_suffix("data.pkl").is_some_and(root));
    let (Some(name), None) = (pickles.next(), pickles.next()) else {
        return Err("the archive has not one data.pkl".into());
    };
    let folder = name.trim_end_matches("data.pkl");
    if archive.file(&format!("{folder}byteorder")).is_some_and(|order| order != b"little") {
        return Err("its numbers are not little-endian".into());
    }
    let program = archive.file(name).unwrap_or_default();
    tensors(program, file.len(), |key| archive.file(&format!("{folder}data/{key}")))
}

/// Whether this is what comes before a file's name at the top of an archive: nothing, or one folder.
fn root(before: &str) -> bool {
    before.is_empty() || before.find('/') == Some(before.len() - 1)
}

/// The tensors of a pickle whose storages `stored` finds; `length` is the whole file's.
pub(super) fn tensors<'s>(
    program: &[u8],
    length: usize,
    stored: impl Fn(&str) -> Option<&'s [u8]>,
) -> Read<Vec<(String, Numbers)>> {
    if program.len() > MAX_PROGRAM_BYTES {
        return Err(format!("its pickle has {} bytes; at most {MAX_PROGRAM_BYTES} are accepted", program.len()));
    }
    let mut machine = Machine::new(program);
    let top = machine.run()?;
    let Node::Dict(items) = machine.node(top) else { return Err("it is no map".into()) };
    if items.len() > MAX_TENSORS {
        return Err(format!("it has {} entries; at most {MAX_TENSORS} are accepted", items.len()));
    }
    let mut left = length.saturating_mul(2).max(MAX_SHARED_BYTES);
    let mut out = Vec::new();
    for (key, value) in items {
        let Node::Text(name) = machine.node(*key) else { return Err("a key of it is no text".into()) };
        let of_name = |problem: String| format!("{} {problem}", short(name));
        let view = machine.view(*value).map_err(of_name)?;
        let kind =
            Kind::of_storage(view.class).map_err(|k| of_name(format!("is {}; floats are accepted", short(k))))?;
        let Some(data) = stored(view.key) else { return Err(of_name("has no numbers in the archive".into())) };
        let bytes = view.gather(kind, data, &mut left).map_err(of_name)?;
        out.push((name.to_string(), Numbers { kind, shape: view.shape, bytes }));
    }
    Ok(out)
}

/// A name as an error shows it.
fn short(name: &str) -> String {
    name.chars().take(200).collect()
}

/// What nodes say of tensors.
impl<'a> Machine<'a> {
    fn list(&self, id: Id) -> Read<&[Id]> {
        match self.node(id) {
            Node::List(items) => Ok(items),
            _ => Err("is made of something else than a list".into()),
        }
    }

    fn number(&self, id: Id) -> Read<usize> {
        match self.node(id) {
            Node::Int(n) => usize::try_from(*n).map_err(|_| format!("has the number {n} where a size is")),
            _ => Err("has something else where a number is".into()),
        }
    }

    fn numbers(&self, id: Id) -> Read<Vec<usize>> {
        let items = self.list(id)?;
        if items.len() > MAX_DIMS {
            return Err(format!("has {} dimensions; at most {MAX_DIMS} are accepted", items.len()));
        }
        items.iter().map(|item| self.number(*item)).collect()
    }

    /// What a value says that a tensor is.
    fn view(&self, value: Id) -> Read<View<'a>> {
        let strange = || "is no tensor".to_owned();
        let Node::Call(callable, arguments) = self.node(value) else { return Err(strange()) };
        let (mut callable, mut arguments) = (*callable, *arguments);
        for _ in 0..MAX_WRAPPED {
            let (Node::Class(module, class), items) = (self.node(callable), self.list(arguments)?) else {
                return Err(strange());
            };
            match (*module, *class, items) {
                ("torch._utils", "_rebuild_tensor_v2", [storage, offset, shape, strides, ..]) => {
                    return self.rebuilt(*storage, *offset, *shape, *strides);
                }
                ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state", [data, ..]) => {
                    let Node::Call(inner, own) = self.node(*data) else { return Err(strange()) };
                    (callable, arguments) = (*inner, *own);
                }
                ("torch._tensor", "_rebuild_from_type_v2", [inner, _, own, ..]) => {
                    (callable, arguments) = (*inner, *own);
                }
                _ => return Err(format!("is made by {}.{}, which is no tensor", short(module), short(class))),
            }
        }
        Err(strange())
    }

    fn rebuilt(&self, storage: Id, offset: Id, shape: Id, strides: Id) -> Read<View<'a>> {
        let Node::Stored(stored) = self.node(storage) else { return Err("has no storage".into()) };
        let [_, class, key, ..] = self.list(*stored)? else { return Err("has no storage".into()) };
        let (Node::Class(_, class), Node::Text(key)) = (self.node(*class), self.node(*key)) else {
            return Err("has a storage of no kind".into());
        };
        let (offset, shape, strides) = (self.number(offset)?, self.numbers(shape)?, self.numbers(strides)?);
        if shape.len() != strides.len() {
            return Err(format!("has {} dimensions and {} strides", shape.len(), strides.len()));
        }
        Ok(View { class, key, offset, shape, strides })
    }
}

/// A tensor in a storage; offset and strides count numbers.
struct View<'a> {
    class: &'a str,
    key: &'a str,
    offset: usize,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

impl View<'_> {
    /// Its bytes in row-major order. Takes them from what is `left`.
    fn gather(&self, kind: Kind, data: &[u8], left: &mut usize) -> Read<Vec<u8>> {
        let (size, shape) = (kind.bytes(), &self.shape);
        let have = data.len() / size;
        let beyond = || format!("of the shape {shape:?} reaches beyond the {have} numbers that are stored");
        let count = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)).ok_or_else(beyond)?;
        // a tensor that shows one number in many places would be larger than what is stored
        if count > have {
            return Err(beyond());
        }
        if count == 0 {
            return Ok(Vec::new());
        }
        let reach = shape
            .iter()
            .zip(&self.strides)
            .try_fold(self.offset, |at, (d, stride)| at.checked_add((d - 1).checked_mul(*stride)?));
        if reach.is_none_or(|last| last >= have) {
            return Err(beyond());
        }
        let bytes = count * size;
        *left = left.checked_sub(bytes).ok_or("and those before it are larger than all tensors of a file may be")?;
        if self.is_contiguous() {
            return Ok(data[self.offset * size..][..bytes].to_vec());
        }
        let mut out = Vec::with_capacity(bytes);
        let mut place = vec![0usize; shape.len()];
        for _ in 0..count {
            let at: usize = self.offset + place.iter().zip(&self.strides).map(|(i, stride)| i * stride).sum::<usize>();
            out.extend_from_slice(&data[at * size..][..size]);
            for (i, d) in place.iter_mut().zip(shape).rev() {
                *i += 1;
                if *i < *d {
                    break;
                }
                *i = 0;
            }
        }
        Ok(out)
    }

    fn is_contiguous(&self) -> bool {
        let mut next = 1usize;
        self.shape.iter().zip(&self.strides).rev().all(|(d, stride)| {
            let fits = *d == 1 || *stride == next;
            next = next.saturating_mul(*d);
            fits
        })
    }
}

#[cfg(test)]
mod tests;
