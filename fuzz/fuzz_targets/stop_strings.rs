//! See `deltaserve::fuzzing::stop_strings`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| deltaserve::fuzzing::stop_strings(data));
