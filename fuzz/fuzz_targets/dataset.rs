//! See `deltaserve::fuzzing::dataset`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| deltaserve::fuzzing::dataset(data));
