#!/usr/bin/env bash
# Writes the bill of materials of a release: deploy/sbom.sh [FILE] [options of cargo metadata, such as --features cuda]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-target/sbom.cdx.json}
shift || true
mkdir -p "$(dirname "$out")"
target=$(rustc -vV | sed -n 's/^host: //p')
cargo metadata --format-version 1 --locked --filter-platform "$target" "$@" | python3 deploy/sbom.py Cargo.lock >"$out"
python3 deploy/sbom.py --check "$out"
echo "$out"
