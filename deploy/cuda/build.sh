#!/usr/bin/env bash
# Builds deltaserve for NVIDIA GPUs, on a machine that needs neither a GPU nor an installed CUDA.
#
#   deploy/cuda/build.sh [further arguments of cargo build]
#
# Environment, all optional:
#   CUDA_COMPUTE_CAP      GPU generation to build for: 90 Hopper (default), 80 A100, 89 Ada, 100 Blackwell
#   DELTASERVE_CUDA_DIR   where the toolkit and candle-core's copy go (default target/cuda)
#   CUDA_HOME             an installed CUDA 13.0 toolkit to use; nothing is downloaded then
#   CARGO_TARGET_DIR      as for cargo
#   PYTHON                interpreter whose pip fetches the toolkit (default python3)
#
# What it does and why is in README.md beside this file.  It may be run again at any time: finished steps are kept.
set -euo pipefail

die() { echo "build.sh: $*" >&2; exit 1; }
say() { echo "build.sh: $*" >&2; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
manifest=${DELTASERVE_MANIFEST:-$root/Cargo.toml}
[ -f "$manifest" ] || die "no Cargo.toml at $manifest"
home=$(cd "$(dirname "$manifest")" && pwd)
lock=$home/Cargo.lock
[ -f "$lock" ] || die "no Cargo.lock beside $manifest"
work=${DELTASERVE_CUDA_DIR:-$root/target/cuda}
mkdir -p "$work"
work=$(cd "$work" && pwd)
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90}
case $CUDA_COMPUTE_CAP in (*[!0-9]* | '') die "CUDA_COMPUTE_CAP must be a number such as 90, not '$CUDA_COMPUTE_CAP'" ;; esac
for tool in cargo gcc g++ ar; do
  command -v $tool >/dev/null || die "$tool is not installed"
done
[ "$(uname -m)" = x86_64 ] || [ -n "${CUDA_HOME:-}" ] || die "the pinned toolkit is for x86_64; set CUDA_HOME to an installed one"

# 1. The toolkit. PTX of a newer 13.x asks for a newer driver than 580, so the minor version is pinned.
if [ -n "${CUDA_HOME:-}" ]; then
  [ -x "$CUDA_HOME/bin/nvcc" ] || die "CUDA_HOME is set to $CUDA_HOME, which has no bin/nvcc"
else
  wheels=(nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88
          nvidia-cuda-cccl==13.0.85 nvidia-cuda-runtime==13.0.96 nvidia-curand==10.4.0.35)
  stamp=$work/toolkit/.complete
  if [ "$(cat "$stamp" 2>/dev/null || true)" != "${wheels[*]}" ]; then
    python=${PYTHON:-python3}
    "$python" -m pip --version >/dev/null 2>&1 || die "$python has no pip; set PYTHON, or CUDA_HOME to an installed CUDA 13.0"
    say "fetching the CUDA 13.0 compiler (about 165 MB, unpacked 400 MB)"
    rm -rf "$work/toolkit"
    mkdir -p "$work/wheels" "$work/toolkit"
    "$python" -m pip download --quiet --no-deps --only-binary=:all: -d "$work/wheels" "${wheels[@]}" ||
      die "pip could not fetch the toolkit wheels: ${wheels[*]}"
    for w in "$work"/wheels/*.whl; do
      # the standard library can unpack, but it drops the executable bits
      "$python" -m zipfile -e "$w" "$work/toolkit" || die "cannot unpack $w"
    done
    chmod -R u+rwX,go+rX "$work/toolkit"
    for d in bin nvvm/bin; do
      if [ -d "$work/toolkit/nvidia/cu13/$d" ]; then find "$work/toolkit/nvidia/cu13/$d" -type f -exec chmod +x {} +; fi
    done
    echo "${wheels[*]}" >"$stamp"
    rm -rf "$work/wheels"
  fi
  export CUDA_HOME=$work/toolkit/nvidia/cu13
fi
export CUDA_ROOT=$CUDA_HOME CUDA_PATH=$CUDA_HOME NVCC=$CUDA_HOME/bin/nvcc PATH=$CUDA_HOME/bin:$PATH
"$NVCC" --version | grep -q 'release 13\.' || die "$NVCC is not nvcc 13: $("$NVCC" --version | tail -n 2 | head -n 1)"

# 2. The CUDA runtime goes in statically, so that the program starts where CUDA is missing.
static=
for d in lib lib64 targets/x86_64-linux/lib; do
  if [ -f "$CUDA_HOME/$d/libcudart_static.a" ]; then static=$CUDA_HOME/$d/libcudart_static.a && break; fi
done
[ -n "$static" ] || die "no libcudart_static.a under $CUDA_HOME"
export DELTASERVE_CUDA_LIB=$work/link              # proto/build.rs hands it to the linker
rm -rf "$DELTASERVE_CUDA_LIB"
mkdir -p "$DELTASERVE_CUDA_LIB"
ln -s "$static" "$DELTASERVE_CUDA_LIB/libcudart.a"

# 3. candle-core with one word changed: CUDA libraries are opened at run time, not named in the program.
version=$(awk '$1=="name" && $3=="\"candle-core\"" {f=1} f && $1=="version" {gsub(/"/,"",$3); print $3; exit}' "$lock")
[ -n "$version" ] || die "Cargo.lock names no candle-core"
# The patch drops candle-core's source and checksum from Cargo.lock: it is put back afterwards, or by the next run
# where this one was killed.
sourced() { awk '$1=="name" {f=($3=="\"candle-core\"")} f && $1=="source" {s=1} END {exit !s}' "$1"; }
if sourced "$lock"; then
  cp "$lock" "$work/Cargo.lock.before"
elif [ -f "$work/Cargo.lock.before" ] && sourced "$work/Cargo.lock.before"; then
  say "Cargo.lock was left patched by a run that was killed: putting it back"
  cp "$work/Cargo.lock.before" "$lock"
else
  die "Cargo.lock has candle-core without a source: restore it (git checkout Cargo.lock)"
fi
trap 'cmp -s "$work/Cargo.lock.before" "$lock" || cp "$work/Cargo.lock.before" "$lock"' EXIT
cargo fetch --quiet --locked --manifest-path "$manifest" || die "cargo fetch failed"
source=
for d in "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/candle-core-"$version"; do
  if [ -f "$d/Cargo.toml" ]; then source=$d && break; fi
done
[ -n "$source" ] || die "cargo's cache holds no source of candle-core $version"
patched=$work/candle-core-$version
if [ ! -f "$patched/.complete" ]; then
  rm -rf "$patched"
  cp -r "$source" "$patched"
  chmod -R u+w "$patched"
  found=$(grep -c '"dynamic-linking"' "$patched/Cargo.toml" || true)
  [ "$found" = 1 ] || die "expected one \"dynamic-linking\" in candle-core $version, found $found: has candle changed?"
  sed -i 's/"dynamic-linking"/"dynamic-loading"/' "$patched/Cargo.toml"
  touch "$patched/.complete"
fi

# 4. Build, and check what the program asks the loader for.
export CUDAFORGE_THREADS=${CUDAFORGE_THREADS:-$(nproc)}
say "candle-core $version, compute capability $CUDA_COMPUTE_CAP, $("$NVCC" --version | sed -n 's/.*release \([^,]*\).*/nvcc \1/p')"
cargo build --release --features cuda --manifest-path "$manifest" \
  --config "patch.crates-io.candle-core.path=\"$patched\"" "$@"
binary=${CARGO_TARGET_DIR:-$home/target}/release/${DELTASERVE_BIN:-deltaserve}
[ -x "$binary" ] || die "cargo built no $binary"
if command -v readelf >/dev/null; then
  if readelf -d "$binary" | grep NEEDED | grep -E 'cuda|cublas|curand|nvrtc'; then
    die "$binary names CUDA libraries: it would not start without them"
  fi
fi
say "built $binary ($(du -h "$binary" | cut -f1))"
