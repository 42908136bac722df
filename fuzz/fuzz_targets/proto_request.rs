//! See `deltaserve::fuzzing::proto_request`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| deltaserve::fuzzing::proto_request(data));
