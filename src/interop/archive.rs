//! Zip archives of stored files, the container of `torch.save`: a directory at the end, each file's bytes as they are.
//!
//! The archive comes from a stranger: every offset and length is held against the bytes that are there, nothing is
//! unpacked, so no archive is larger inside than outside, and checksums must hold.

use std::{collections::BTreeMap, ops::Range};

type Read<T> = Result<T, String>;

/// Most files in an archive: one per tensor and a few more.
const MAX_ENTRIES: usize = 100_000;
/// An end record and the longest comment behind it.
const MAX_END: usize = 22 + 0xFFFF;

/// Where the files of an archive are.
pub(super) struct Archive<'a> {
    bytes: &'a [u8],
    files: BTreeMap<&'a str, Range<usize>>,
}

impl<'a> Archive<'a> {
    /// Reads the directory and holds every file against its checksum.
    ///
    /// # Errors
    /// What is no archive of stored files, or damaged, and where.
    pub(super) fn read(bytes: &'a [u8]) -> Read<Self> {
        let (mut at, count) = directory(bytes)?;
        if count > MAX_ENTRIES as u64 {
            return Err(format!("the archive lists {count} files; at most {MAX_ENTRIES} are accepted"));
        }
        let mut files = BTreeMap::new();
        // files that share bytes would make a small archive large
        let mut left = bytes.len();
        for _ in 0..count {
            let entry = Entry::read(bytes, &mut at)?;
            let name = entry.name;
            if entry.encrypted || entry.method != 0 || entry.stored != entry.size {
                return Err(format!("{name:?} is compressed or encrypted; torch.save stores its files as they are"));
            }
            let range = entry.range(bytes).ok_or_else(|| format!("{name:?} is not where the archive says"))?;
            left = left.checked_sub(range.len()).ok_or("the archive's files overlap")?;
            if crc32(&bytes[range.clone()]) != entry.checksum {
                return Err(format!("{name:?} is damaged: its checksum does not hold"));
            }
            if files.insert(name, range).is_some() {
                return Err(format!("{name:?} is there twice"));
            }
        }
        Ok(Self { bytes, files })
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &'a str> {
        self.files.keys().copied()
    }

    /// A file's bytes; `None` where there is none of this name.
    pub(super) fn file(&self, name: &str) -> Option<&'a [u8]> {
        self.bytes.get(self.files.get(name)?.clone())
    }
}

/// Where the directory begins, and how many entries it has.
fn directory(bytes: &[u8]) -> Read<(usize, u64)> {
    let none = || "it is no zip archive, which torch.save writes since version 1.6".to_owned();
    let from = bytes.len().saturating_sub(MAX_END);
    let end = bytes.get(from..).and_then(|tail| tail.windows(4).rposition(|four| four == b"PK\x05\x06"));
    let end = from + end.ok_or_else(none)?;
    // an archive that may be larger than 4 GiB has a second record, which a locator before the first one points to
    let locator = end.checked_sub(20).filter(|at| bytes.get(*at..*at + 4) == Some(b"PK\x06\x07".as_slice()));
    let (start, count) = match locator {
        Some(at) => {
            let record = u64_at(bytes, at + 8).and_then(|at| usize::try_from(at).ok()).ok_or_else(none)?;
            let signed = record.checked_add(4).and_then(|end| bytes.get(record..end)) == Some(b"PK\x06\x06".as_slice());
            let of = |offset| if signed { u64_at(bytes, record.checked_add(offset)?) } else { None };
            (of(48), of(32))
        }
        None => (u32_at(bytes, end + 16).map(u64::from), u16_at(bytes, end + 10).map(u64::from)),
    };
    u16_at(bytes, end + 20).ok_or_else(none)?; // the record is whole
    let (start, count) = start.zip(count).ok_or_else(none)?;
    Ok((usize::try_from(start).map_err(|_| none())?, count))
}

/// An entry of the directory.
struct Entry<'a> {
    name: &'a str,
    encrypted: bool,
    method: u16,
    checksum: u32,
    stored: u64,
    size: u64,
    header: u64,
}

impl<'a> Entry<'a> {
    /// Reads the entry at `at`, which moves behind it.
    fn read(bytes: &'a [u8], at: &mut usize) -> Read<Self> {
        let start = *at;
        let read = || {
            let head = bytes.get(start..start.checked_add(46)?)?;
            if !head.starts_with(b"PK\x01\x02") {
                return None;
            }
            let lengths = [28, 30, 32].map(|field| u16_at(head, field).map(usize::from));
            let [Some(name), Some(extra), Some(comment)] = lengths else { return None };
            let rest = bytes.get(start + 46..(start + 46).checked_add(name + extra + comment)?)?;
            let (name, rest) = rest.split_at_checked(name)?;
            let extra = rest.get(..extra)?;
            let mut large = large_fields(extra);
            // a field that is full is in the extra fields, in this order
            let mut field = |offset| match u32_at(head, offset)? {
                u32::MAX => large.next(),
                small => Some(u64::from(small)),
            };
            let (size, stored, header) = (field(24)?, field(20)?, field(42)?);
            let entry = Self {
                name: std::str::from_utf8(name).ok()?,
                encrypted: u16_at(head, 8)? & 1 == 1,
                method: u16_at(head, 10)?,
                checksum: u32_at(head, 16)?,
                stored,
                size,
                header,
            };
            Some((entry, start + 46 + name.len() + rest.len()))
        };
        let (entry, behind) = read().ok_or_else(|| "the archive's directory is damaged".to_owned())?;
        *at = behind;
        Ok(entry)
    }

    /// Where the file's bytes are.
    fn range(&self, bytes: &[u8]) -> Option<Range<usize>> {
        let header = usize::try_from(self.header).ok()?;
        let head = bytes.get(header..header.checked_add(30)?)?;
        if !head.starts_with(b"PK\x03\x04") {
            return None;
        }
        let names = usize::from(u16_at(head, 26)?) + usize::from(u16_at(head, 28)?);
        let start = header.checked_add(30 + names)?;
        let end = start.checked_add(usize::try_from(self.size).ok()?)?;
        (end <= bytes.len()).then_some(start..end)
    }
}

/// The numbers of the extra field that large archives have.
fn large_fields(mut extra: &[u8]) -> impl Iterator<Item = u64> {
    let mut found: &[u8] = &[];
    while let Some((id, length)) = u16_at(extra, 0).zip(u16_at(extra, 2)) {
        let Some((data, rest)) = extra.get(4..).and_then(|data| data.split_at_checked(length.into())) else { break };
        if id == 1 {
            found = data;
        }
        extra = rest;
    }
    found.as_chunks::<8>().0.iter().map(|eight| u64::from_le_bytes(*eight))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk::<N>().copied()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    array(bytes, at).map(u64::from_le_bytes)
}

/// CRC-32 of zip files, by table.
const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        let (mut c, mut bit) = (i as u32, 0);
        while bit < 8 {
            c = if c & 1 == 1 { (c >> 1) ^ 0xEDB8_8320 } else { c >> 1 };
            bit += 1;
        }
        table[i] = c;
        i += 1;
    }
    table
};

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| (crc >> 8) ^ TABLE[usize::from((crc as u8) ^ byte)])
}
