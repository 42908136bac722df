//! The parts of the benchmark `zipf` that can be wrong without anyone noticing: its trace, and the optimum that it compares with.

#[path = "../benches/zipf/policies.rs"]
mod policies;
