#!/usr/bin/env bash
# The long forms of what CI runs shortly: histories, a soak, kills at any time and at every failpoint. Some two hours on two cores.
# Seeds are printed; DELTASERVE_SEED=N repeats one.
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_INCREMENTAL=0 CARGO_TERM_COLOR=never
export DELTASERVE_HISTORY_SECONDS="${DELTASERVE_HISTORY_SECONDS:-1800}"
export DELTASERVE_SOAK_SECONDS="${DELTASERVE_SOAK_SECONDS:-1800}"
export DELTASERVE_CRASH_CYCLES="${DELTASERVE_CRASH_CYCLES:-200}"

echo "== histories and soak"
cargo test --locked --release --test history -- --nocapture --test-threads=1

echo "== kills at any time"
cargo test --locked --release --test crash -- --nocapture --test-threads=1

echo "== the same with failpoints"
cargo test --locked --release --features failpoints --lib failpoint
DELTASERVE_SOAK_SECONDS=10 cargo test --locked --release --features failpoints --test history -- --nocapture --test-threads=1
cargo test --locked --release --features failpoints --test crash -- --nocapture --test-threads=1
