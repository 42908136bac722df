//! Programs that are no maps of tensors, and archives that are not what they should be: each is an error, soon.

use super::*;

fn text(s: &str) -> Vec<u8> {
    [&b"X"[..], &(s.len() as u32).to_le_bytes(), s.as_bytes()].concat()
}

fn int(n: i32) -> Vec<u8> {
    [&b"J"[..], &n.to_le_bytes()].concat()
}

fn tuple(all: &[i32]) -> Vec<u8> {
    [b"(".to_vec(), all.iter().flat_map(|n| int(*n)).collect(), b"t".to_vec()].concat()
}

/// A tensor of the storage `0`, as torch writes it.
fn tensor(class: &str, offset: i32, shape: &[i32], strides: &[i32]) -> Vec<u8> {
    let class = format!("ctorch\n{class}\n").into_bytes();
    let storage = [b"(".to_vec(), text("storage"), class, text("0"), text("cpu"), int(6), b"tQ".to_vec()].concat();
    let hooks = b"\x89ccollections\nOrderedDict\n)RtR".to_vec();
    let head = b"ctorch._utils\n_rebuild_tensor_v2\n(".to_vec();
    [head, storage, int(offset), tuple(shape), tuple(strides), hooks].concat()
}

/// A map of one value.
fn map(value: &[u8]) -> Vec<u8> {
    [&b"\x80\x02}("[..], &text("w"), value, b"u."].concat()
}

/// Six numbers, 0 to 5.
fn six() -> Vec<u8> {
    (0..6u8).flat_map(|n| f32::from(n).to_le_bytes()).collect()
}

fn run(program: &[u8]) -> Read<Vec<(String, Numbers)>> {
    let stored = six();
    tensors(program, program.len(), |key| (key == "0").then_some(stored.as_slice()))
}

fn numbers(program: &[u8]) -> Vec<f32> {
    let read = run(program).expect("a map");
    read[0].1.bytes.as_chunks().0.iter().map(|four| f32::from_le_bytes(*four)).collect()
}

#[track_caller]
fn refused(program: &[u8], word: &str) {
    let said = run(program).map(|all| all.len()).expect_err("refused");
    assert!(said.contains(word), "{said}");
    assert!(said.len() < 1000, "errors are short");
}

#[test]
fn tensors_are_views_of_what_is_stored() {
    assert_eq!(numbers(&map(&tensor("FloatStorage", 0, &[2, 3], &[3, 1]))), [0., 1., 2., 3., 4., 5.]);
    assert_eq!(numbers(&map(&tensor("FloatStorage", 0, &[3, 2], &[1, 3]))), [0., 3., 1., 4., 2., 5.]);
    assert_eq!(numbers(&map(&tensor("FloatStorage", 4, &[2], &[1]))), [4., 5.]);
    assert_eq!(numbers(&map(&tensor("FloatStorage", 1, &[2, 2], &[3, 1]))), [1., 2., 4., 5.]);
    assert_eq!(numbers(&map(&tensor("FloatStorage", 3, &[], &[]))), [3.]);
    assert!(numbers(&map(&tensor("FloatStorage", 9, &[0], &[1]))).is_empty());
    // as a parameter, and with what objects have beside their items
    let parameter = [&b"ctorch._utils\n_rebuild_parameter\n("[..], &tensor("FloatStorage", 5, &[1], &[1]), b"\x88}tR"];
    let program = [&b"\x80\x02}("[..], &text("w"), &parameter.concat(), b"u}", &text("_metadata"), b"}sb."].concat();
    assert_eq!(numbers(&program), [5.]);
}

#[test]
fn tensors_that_reach_beyond_what_is_stored_are_refused() {
    let far = [
        tensor("FloatStorage", 0, &[7], &[1]),
        tensor("FloatStorage", 5, &[2], &[1]),
        tensor("FloatStorage", 0, &[2, 3], &[4, 1]),
        tensor("FloatStorage", i32::MAX, &[1], &[1]),
        tensor("FloatStorage", 0, &[2], &[i32::MAX]),
        // one number shown many times
        tensor("FloatStorage", 0, &[100_000, 100_000], &[0, 0]),
        tensor("FloatStorage", 0, &[i32::MAX; 8], &[0; 8]),
        tensor("DoubleStorage", 0, &[4], &[1]),
    ];
    for program in far {
        refused(&map(&program), "beyond");
    }
    refused(&map(&tensor("FloatStorage", -1, &[1], &[1])), "the number -1");
    refused(&map(&tensor("FloatStorage", 0, &[-1], &[1])), "the number -1");
    refused(&map(&tensor("FloatStorage", 0, &[1; 9], &[1; 9])), "9 dimensions");
    refused(&map(&tensor("FloatStorage", 0, &[1, 1], &[1])), "2 dimensions and 1 strides");
    refused(&map(&tensor("LongStorage", 0, &[1], &[1])), "w is I64; floats");
    refused(&map(&tensor("PickleStorage", 0, &[1], &[1])), "w is PickleStorage");
}

#[test]
fn what_names_code_is_never_more_than_a_name() {
    let call = [&b"cos\nsystem\n"[..], &text("id"), b"\x85R"].concat();
    refused(&[&b"\x80\x02"[..], &call, b"."].concat(), "it is no map");
    refused(&map(&call), "made by os.system");
    refused(&map(&text("a text")), "w is no tensor");
    refused(&map(b"ctorch._utils\n_rebuild_tensor_v2\n)R"), "is made by torch._utils._rebuild_tensor_v2");
    refused(&map(b"}"), "w is no tensor");
    refused(b"\x80\x02}(K\x01K\x02u.", "no text");
    // an instruction that torch does not write: INST, which imports and calls
    refused(b"\x80\x02(ios\nsystem\n.", "0x69");
}

#[test]
fn little_files_do_not_become_large() {
    // each refers twice to the one before: 2^60 of the first
    let doubled = b"q\0h\0h\0\x86".repeat(60);
    refused(&[&b"\x80\x02)"[..], &doubled, b"."].concat(), "it is no map");
    // a million tuples in each other
    refused(&[&b"\x80\x02)"[..], &b"\x85".repeat(1_000_000), b"."].concat(), "it is no map");
    // a list in itself
    refused(b"\x80\x02]q\0h\0a.", "it is no map");
    // four gigabytes of text that are not there
    refused(b"\x80\x02X\xff\xff\xff\xffabc", "ends within an instruction");
    refused(&[&b"\x80\x02\x8a\xff"[..], &[0; 255], b"."].concat(), "64 bits");
    refused(&b"N".repeat(5_000_000), "values");
    refused(
        &[&b"\x80\x02}("[..], &[text("w"), b"N".to_vec()].concat().repeat(MAX_TENSORS + 1), b"u."].concat(),
        "50001",
    );
    refused(&vec![b'('; MAX_PROGRAM_BYTES + 1], "at most");
    let long = "n".repeat(100_000);
    refused(&[&b"\x80\x02}("[..], &text(&long), b"Nu."].concat(), "is no tensor");
}

#[test]
fn every_beginning_of_a_program_and_every_changed_byte_is_an_answer() {
    let good = map(&tensor("FloatStorage", 0, &[2, 3], &[3, 1]));
    assert!(run(&good).is_ok());
    for end in 0..good.len() {
        assert!(run(&good[..end]).is_err(), "{end}");
        for change in [0u8, 1, 0x7F, 0x80, 0xFF, b'.', b't', b'R', b'u', b'('] {
            let mut changed = good.clone();
            changed[end] = change;
            drop(run(&changed));
        }
    }
}

/// The parts of an archive of one file as zip has them, and what may be changed of them.
fn archive(name: &str, data: &[u8], method: u16, size: u32) -> Vec<u8> {
    let crc = !data.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |c, _| if c & 1 == 1 { (c >> 1) ^ 0xEDB8_8320 } else { c >> 1 })
    });
    let (method, length) = (method.to_le_bytes(), (name.len() as u16).to_le_bytes());
    let (crc, size) = (crc.to_le_bytes(), size.to_le_bytes());
    let common = [&[20, 0, 0, 0][..], &method, &[0, 0, 33, 0], &crc, &size, &size, &length, &[0, 0]].concat();
    let mut out = [&b"PK\x03\x04"[..], &common, name.as_bytes(), data].concat();
    let at = (out.len() as u32).to_le_bytes();
    let entry = [&b"PK\x01\x02\x14\x00"[..], &common, &[0; 14], name.as_bytes()].concat();
    let length = (entry.len() as u32).to_le_bytes();
    out.extend(entry);
    out.extend([&b"PK\x05\x06\0\0\0\0\x01\0\x01\0"[..], &length, &at, &[0, 0]].concat());
    out
}

#[test]
fn archives_hold_what_their_directories_say() {
    let empty = b"\x80\x02}.";
    let refused = |file: &[u8], word: &str| {
        let said = read(file).map(|all| all.len()).expect_err("refused");
        assert!(said.contains(word), "{said}");
    };
    let good = archive("a/data.pkl", empty, 0, 4);
    assert_eq!(read(&good), Ok(vec![]));
    refused(&archive("a/data.pkl", empty, 8, 4), "compressed");
    refused(&archive("a/data.pkl", empty, 0, 3), "checksum");
    refused(&archive("a/data.pkl", empty, 0, 4_000_000_000), "not where");
    refused(&archive("a/b/data.pkl", empty, 0, 4), "not one data.pkl");
    refused(&archive("../data.pkl\0", empty, 0, 4), "not one data.pkl");
    let mut damaged = good.clone();
    damaged[41] ^= 1;
    refused(&damaged, "checksum");
    // the same entry many times: a small file that would be read as a large one
    let (start, end) = (good.len() - 22 - 56, good.len() - 22);
    let mut many = [&good[..end], &good[start..end], &good[end..]].concat();
    let count = many.len() - 22 + 10;
    many[count] = 2;
    refused(&many, "twice");
    for end in 0..good.len() {
        assert!(read(&good[..end]).is_err(), "{end}");
    }
}
