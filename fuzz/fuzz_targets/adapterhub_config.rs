//! See `deltaserve::fuzzing::adapterhub_config`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| deltaserve::fuzzing::adapterhub_config(data));
