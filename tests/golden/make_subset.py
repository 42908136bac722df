#!/usr/bin/env python3
"""Copies a small part of a golden fixture folder into tests/golden/fixtures, for checkouts that have no other.

    python3 tests/golden/make_subset.py ../shared/fixtures

Nothing is recomputed. Every file that a case reads is copied byte for byte, but for two cuts of expected tensors that keep it small:
of a causal case's padded batch only the shortest row stays, without its padding (its prompts for generation and their
continuations stay whole); of a mixed batch only the rows stay whose delta is in the subset. Neither cut changes a
value, because no row of a batch depends on another. The manifest keeps its form. Standard library only.
"""

import json
import math
import shutil
import struct
import sys
from pathlib import Path

CASES = {
    "llama": ["base", "lora_all", "lora_dora"],
    "gpt2": ["base", "lora_attn", "lora_pattern", "bitfit"],
    "qwen2": ["base", "lora_qv"],
    "mistral": ["base"],
    "bert": ["base", "lora_seqcls", "lora_seqcls_b", "lora_seqcls_c", "lora_tokcls", "bitfit"],
}
# their tokenizer.json is llama's, byte for byte, and no case reads it
NO_TOKENIZER = ["qwen2", "mistral"]
MIXED = ["mixed/bert_seq_cls", "mixed/gpt2_causal_lm"]
TRAINING = ["training/gpt2/lora_attn", "training/bert/lora_seqcls"]
# of a mixed batch, at most so many rows
MIXED_ROWS = 3
MAX_BYTES = 1_000_000

SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FORMATS = {"I64": "q", "I32": "i", "U8": "B", "BOOL": "?"}

README = """# Committed golden subset

Made by `tests/golden/make_subset.py` from the full fixture folder (`../shared/fixtures`), which was itself made with
transformers, PEFT and adapters (versions: `manifest.json`); not edited by hand. `cargo test --test golden` uses it
where the full folder is absent.
"""


def read_tensors(path):
    """Name -> (dtype, shape, bytes), and the file's metadata."""
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])
    data = raw[8 + length :]
    metadata = header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if end - begin != math.prod(entry["shape"]) * SIZES[entry["dtype"]]:
            raise ValueError(f"{path}: {name} has {end - begin} bytes, which is not its shape")
        tensors[name] = (entry["dtype"], entry["shape"], data[begin:end])
    return tensors, metadata


def write_tensors(path, tensors, metadata):
    header, blobs, offset = {}, [], 0
    if metadata:
        header["__metadata__"] = metadata
    # wide types first: every tensor stays aligned to its own size
    for name in sorted(tensors, key=lambda n: (-SIZES[tensors[n][0]], n)):
        dtype, shape, blob = tensors[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def take(tensor, rows, columns=None):
    """Rows of the first dimension, then columns of the second."""
    dtype, shape, blob = tensor
    size = len(blob) // shape[0]
    parts = [blob[r * size : (r + 1) * size] for r in rows]
    shape = [len(rows), *shape[1:]]
    if columns is not None:
        size //= shape[1]
        parts = [part[c * size : (c + 1) * size] for part in parts for c in columns]
        shape[1] = len(columns)
    return dtype, shape, b"".join(parts)


def mask_rows(tensor):
    dtype, (rows, columns), blob = tensor
    values = struct.unpack(f"<{rows * columns}{FORMATS[dtype]}", blob)
    return [values[r * columns : (r + 1) * columns] for r in range(rows)]


def cut_causal(tensors):
    """The shortest row of the padded batch, without padding; what generation needs stays whole."""
    mask = mask_rows(tensors["attention_mask"])
    row = min(range(len(mask)), key=lambda r: sum(mask[r]))
    columns = [c for c, kept in enumerate(mask[row]) if kept]
    whole = {"gen_input_ids", "gen_attention_mask", "generated"}
    cut = {name: t if name in whole else take(t, [row], columns) for name, t in tensors.items()}
    return cut, row


def one_item_a_line(manifest):
    """JSON with a case, model or other item per line: small, and a diff names what changed."""
    dumps = lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    lines = []
    for key, value in manifest.items():
        if isinstance(value, list) and value:
            value = "[\n" + ",\n".join(map(dumps, value)) + "\n]"
        elif isinstance(value, dict) and key == "models":
            value = "{\n" + ",\n".join(f"{dumps(k)}:{dumps(v)}" for k, v in value.items()) + "\n}"
        else:
            value = dumps(value)
        lines.append(f"{dumps(key)}:{value}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(source, target):
    manifest = json.loads((source / "manifest.json").read_text())
    wanted = {f"{model}/{name}" for model, names in CASES.items() for name in names}
    out = {**manifest, "cases": [], "mixed": [], "training": []}
    out["models"] = {name: model for name, model in manifest["models"].items() if name in CASES}
    out["tokenizers"] = {name: texts for name, texts in manifest["tokenizers"].items()}
    out["tokenizers"] = {n: t for n, t in out["tokenizers"].items() if n in CASES and n not in NO_TOKENIZER}
    if target.exists():
        shutil.rmtree(target)

    def copy(path, without=()):
        path = Path(path)
        files = [path] if (source / path).is_file() else [p.relative_to(source) for p in (source / path).iterdir()]
        for file in (f for f in files if f.name not in without):
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            # contents only: a fixture folder may be read-only
            shutil.copyfile(source / file, target / file)

    for name, model in out["models"].items():
        copy(model["path"], without=["tokenizer.json"] if name in NO_TOKENIZER else [])
    kept_row = {}
    for case in manifest["cases"]:
        if case["id"] not in wanted:
            continue
        out["cases"].append(case)
        if case["delta"]:
            copy(case["delta"])
        if case["task"] == "causal_lm":
            tensors, metadata = read_tensors(source / case["expected"])
            cut, kept_row[case["id"]] = cut_causal(tensors)
            write_tensors(target / case["expected"], cut, metadata)
        else:
            copy(case["expected"])
    for case in manifest["training"]:
        if case["id"] in TRAINING:
            out["training"].append(case)
            copy(case["expected"])
    for case in manifest["mixed"]:
        if case["id"] in MIXED:
            out["mixed"].append(mixed_batch(source, target, case, wanted))
        elif case["id"].startswith("mixed_kinds/"):
            rows = [row for row in case["rows"] if row["case"] in wanted]
            rows = [{**row, "row": 0 if row["case"] in kept_row else row["row"]} for row in rows]
            if len(rows) > 1:
                out["mixed"].append({**case, "rows": rows})

    found = {case["id"] for key in ("cases", "mixed", "training") for case in out[key]}
    missing = (wanted | set(MIXED) | set(TRAINING)) - found
    if missing:
        sys.exit(f"{source} has no {', '.join(sorted(missing))}")
    (target / "manifest.json").write_text(one_item_a_line(out), encoding="utf-8")
    (target / "README.md").write_text(README)
    total = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    print(f"{len(found)} cases, {total} bytes in {target}")
    if total > MAX_BYTES:
        sys.exit(f"more than {MAX_BYTES} bytes")


def mixed_batch(source, target, case, wanted):
    """Cuts the batch to rows whose delta is present; the first of each delta before a second of any."""
    names = case["rows"]
    present = [i for i, name in enumerate(names) if name == "__base__" or f"{case['model']}/{name}" in wanted]
    if case["task"] != "causal_lm":
        if len(present) != len(names):
            sys.exit(f"{case['id']} needs deltas that are not in the subset")
        target_file = target / case["expected"]
        target_file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / case["expected"], target_file)
        return case
    firsts = [i for i in present if names.index(names[i]) == i]
    rows = sorted((firsts + [i for i in present if i not in firsts])[:MIXED_ROWS])
    tensors, metadata = read_tensors(source / case["expected"])
    write_tensors(target / case["expected"], {name: take(t, rows) for name, t in tensors.items()}, metadata)
    return {**case, "rows": [names[i] for i in rows]}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(__file__).resolve().parent / "fixtures")
