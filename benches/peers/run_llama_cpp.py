#!/usr/bin/env python3
"""Decode and prefill speed of llama.cpp on the weights of make_gpt2.py, beside deltaserve's decode bench.

    python benches/peers/run_llama_cpp.py --work /tmp/llama --base /tmp/gpt2/base [--threads 2] [--formats f32 f16 q8_0]
        [--ours target/release/deps/decode-HASH]

What it needs it makes below --work, once: the sources that the Python package `llama-cpp-python` carries (fetched with
pip), the programs `llama-batched-bench`, `llama-bench` and `llama-quantize` built from them for this machine's processor
(cmake and ninja, as pip installs them, and a C++ compiler), and the weights as GGUF files.

One JSON line per setting on stdout: `decode_tok_s` is the median over --repeat runs of prompts of 32 tokens and --new new
ones (`llama-batched-bench`, no HTTP), prefill is one prompt of 512 tokens (`llama-bench`). With --ours, each format is
measured in turn with the decode bench (f32 as it is, f16 beside `--dtype bf16`, q8_0 beside `--quantize q8_0`), and a line
with the ratios follows. `foreign` is the share of the cores that other processes took: above 0.02 a line only orients.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")
PROGRAMS = ["llama-batched-bench", "llama-bench", "llama-quantize"]
OURS = {"f32": [], "f16": ["--dtype", "bf16"], "q8_0": ["--quantize", "q8_0"]}
# GPT-2's tensors in llama.cpp's names; its linears are stored turned
LAYER = {"ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
         "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}


def build(work: Path) -> Path:
    """The folder of llama.cpp's programs."""
    out = work / "build" / "bin"
    if all((out / p).exists() for p in PROGRAMS):
        return out
    sources = work / "sources"
    if not sources.exists():
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python",
                        "llama-cpp-python", "-d", work], check=True)
        with tarfile.open(next(work.glob("llama_cpp_python-*.tar.gz"))) as tar:
            tar.extractall(sources, filter="data")
    tree = next(sources.glob("*/vendor/llama.cpp"))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    log, env = sys.stderr, dict(os.environ, PATH=path)
    subprocess.run(["cmake", "-S", tree, "-B", work / "build", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON",
                    "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF",
                    "-DBUILD_SHARED_LIBS=OFF"], check=True, env=env, stdout=log)
    subprocess.run(["ninja", "-C", work / "build", *PROGRAMS], check=True, env=env, stdout=log)
    return out


def convert(base: Path, to: Path, half: bool) -> None:
    """The base as a GGUF file. Its tokenizer is bytes and filler: the benchmarks send ids."""
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    config = json.loads((base / "config.json").read_text())
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(base / "model.safetensors").items()}
    w = gguf.GGUFWriter(to, "gpt2")
    w.add_block_count(config["n_layer"])
    w.add_context_length(config["n_positions"])
    w.add_embedding_length(config["n_embd"])
    w.add_feed_forward_length(4 * config["n_embd"])
    w.add_head_count(config["n_head"])
    w.add_layer_norm_eps(config["layer_norm_epsilon"])
    w.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    alphabet = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    words = [alphabet[b] for b in range(256)]
    words += [f"\u0120word{i}" for i in range(config["vocab_size"] - len(words))]
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(words)
    w.add_token_types([gguf.TokenType.NORMAL] * len(words))
    w.add_token_merges(["\u0120 w"])
    w.add_bos_token_id(config["bos_token_id"])
    w.add_eos_token_id(config["eos_token_id"])

    def put(name: str, x, matrix: bool) -> None:
        w.add_tensor(name, np.ascontiguousarray(x.astype(np.float16 if half and matrix else np.float32)))

    put("token_embd.weight", tensors["wte.weight"], True)
    put("position_embd.weight", tensors["wpe.weight"], False)
    for part in ("weight", "bias"):
        put(f"output_norm.{part}", tensors[f"ln_f.{part}"], False)
    for layer in range(config["n_layer"]):
        for ours, theirs in LAYER.items():
            for part in ("weight", "bias"):
                x = tensors[f"h.{layer}.{ours}.{part}"]
                put(f"blk.{layer}.{theirs}.{part}", x.T if x.ndim == 2 else x, x.ndim == 2)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def machine_cpu() -> float:
    with open("/proc/stat") as f:
        t = [int(x) for x in f.readline().split()[1:9]]
    return (sum(t) - t[3] - t[4]) / TICK


def children_cpu() -> float:
    t = os.times()
    return t.children_user + t.children_system


def measured(command: list) -> tuple[list[dict], float]:
    """The JSON lines that a program prints, and the share of the cores that others took."""
    wall, own, everybody = time.perf_counter(), children_cpu(), machine_cpu()
    done = subprocess.run([str(c) for c in command], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    wall = time.perf_counter() - wall
    others = machine_cpu() - everybody - (children_cpu() - own)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return lines, round(max(0.0, others / wall / os.cpu_count()), 3)


def say(**fields) -> None:
    print(json.dumps(fields), flush=True)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--work", type=Path, required=True)
    ap.add_argument("--base", type=Path, required=True, help="make_gpt2.py's OUT/base")
    ap.add_argument("--formats", nargs="+", choices=list(OURS), default=list(OURS))
    ap.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    ap.add_argument("--new", type=int, default=32)
    ap.add_argument("--repeat", type=int, default=3)
    ap.add_argument("--threads", type=int, default=os.cpu_count())
    ap.add_argument("--ours", type=Path, help="the built program of `cargo bench --bench decode --no-run`")
    a = ap.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    programs = build(a.work)
    for name in a.formats:
        file = a.work / f"base-{name}.gguf"
        f32 = a.work / "base-f32.gguf"
        if name == "q8_0" and not file.exists():
            if not f32.exists():
                convert(a.base, f32, False)
            subprocess.run([programs / "llama-quantize", f32, file, "q8_0"], check=True, stdout=sys.stderr)
        elif not file.exists():
            convert(a.base, file, name == "f16")
        threads = ["-t", a.threads, "-tb", a.threads]
        sizes = ",".join(str(b) for b in a.batches for _ in range(a.repeat))
        lines, foreign = measured([programs / "llama-batched-bench", "-m", file, *threads, "-c", 4096, "-npp", 32, "-ntg", a.new,
                                   "-npl", sizes, "--output-format", "jsonl"])
        theirs = {}
        for batch in a.batches:
            theirs[batch] = statistics.median(row["speed_tg"] for row in lines if row["pl"] == batch)
            say(peer="llama.cpp", format=name, threads=a.threads, batch=batch, decode_tok_s=round(theirs[batch], 1), foreign=foreign)
        lines, foreign = measured([programs / "llama-bench", "-m", file, "-t", a.threads, "-p", 512, "-n", 0, "-r", a.repeat, "-o", "jsonl"])
        prefill = lines[0]["avg_ts"]
        say(peer="llama.cpp", format=name, threads=a.threads, prefill_512_tok_s=round(prefill, 1), foreign=foreign)
        if not a.ours:
            continue
        decode = [a.ours, "--bench", "--base", a.base, *OURS[name]]
        repeat = ["--repeat", a.repeat]
        lines, foreign = measured([*decode, *repeat, "--batch", ",".join(map(str, a.batches)), "--new", a.new])
        bare = {row["batch"]: row["decode_tok_s"] for row in lines if row.get("deltas") == "base"}
        long, _ = measured([*decode, *repeat, "--batch", 1, "--new", 1, "--prompt", 512])
        own_prefill = 512e3 / next(row["prefill_ms"] for row in long if row.get("deltas") == "base")
        say(ours=" ".join(OURS[name]) or "f32", beside=name, decode_tok_s=bare, prefill_512_tok_s=round(own_prefill, 1), foreign=foreign,
            decode_ratio={b: round(bare[b] / theirs[b], 2) for b in a.batches}, prefill_ratio=round(own_prefill / prefill, 2))


if __name__ == "__main__":
    main()
