//! See `deltaserve::fuzzing::peft_config`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| deltaserve::fuzzing::peft_config(data));
