//! See `deltaserve::fuzzing::chat_template`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| deltaserve::fuzzing::chat_template(data));
