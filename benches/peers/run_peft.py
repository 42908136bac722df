#!/usr/bin/env python3
"""Decode speed of PEFT/transformers with no LoRA, one LoRA, and different LoRAs in one batch (`adapter_names`).

    python benches/peers/run_peft.py --base /tmp/gpt2/base --loras /tmp/gpt2 [--threads 2] [--repeat 5]

One JSON line per setting on stdout.  The loop is forward + argmax on the library's own cache, without `generate`,
which is the fastest the library allows.  Prompts are `(7919 row + 104729 column + 11) mod 2000`, so that another
server can be sent the same ids; --tokens FILE keeps what was decoded, to compare.

`foreign` is the share of all cores that other processes took during the measured part: trust lines below 0.02, compare
only lines of one quiet run.  `tok_per_cpu_s` is tokens per second of this process's own CPU time.
"""
from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

TICK = os.sysconf("SC_CLK_TCK")


def machine_cpu() -> float:
    """CPU seconds that everybody used since boot, idle and I/O waits left out."""
    with open("/proc/stat") as f:
        t = [int(x) for x in f.readline().split()[1:9]]
    return (sum(t) - t[3] - t[4]) / TICK


class Clock:
    """Wall time, own CPU time and the share of the machine that others took."""

    def __enter__(self):
        self.wall, self.own, self.all = time.perf_counter(), time.process_time(), machine_cpu()
        return self

    def __exit__(self, *_):
        self.wall = time.perf_counter() - self.wall
        self.own = time.process_time() - self.own
        others = machine_cpu() - self.all - self.own
        self.foreign = max(0.0, others / self.wall / os.cpu_count())


def prompts(rows: int, length: int) -> torch.Tensor:
    r, c = torch.arange(rows)[:, None], torch.arange(length)[None, :]
    return (7919 * r + 104729 * c + 11) % 2000


@torch.inference_mode()
def decode(model, ids: torch.Tensor, new: int, extra: dict) -> tuple[Clock, Clock, list[list[int]]]:
    with Clock() as prefill:
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **extra)
        tokens = [out.logits[:, -1].argmax(-1, keepdim=True)]
    with Clock() as steps:
        for _ in range(new):
            out = model(input_ids=tokens[-1], past_key_values=out.past_key_values, use_cache=True, **extra)
            tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
    return prefill, steps, torch.cat(tokens, 1).tolist()


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--base", type=Path, required=True, help="HF folder of the base model")
    ap.add_argument("--loras", type=Path, required=True, help="folder that holds the LoRA folders")
    ap.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    ap.add_argument("--distinct", type=int, nargs="+", default=[0, 1, 8, 32], help="LoRAs in the batch; 0 is the bare base")
    ap.add_argument("--prompt", type=int, default=32)
    ap.add_argument("--new", type=int, default=32)
    ap.add_argument("--repeat", type=int, default=5)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--tokens", type=Path, help="write the decoded ids of every setting here, one JSON line each")
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    folders = sorted(p.parent for p in a.loras.glob("*/adapter_config.json"))
    # a batch of b rows holds at most b LoRAs; settings that come out equal are run once
    plan = sorted({(min(d, b), b) for b in a.batches for d in a.distinct})
    most = max(d for d, _ in plan)
    if len(folders) < most:
        sys.exit(f"{a.loras} holds {len(folders)} LoRA folders, {most} are needed")
    about = dict(peer="peft", versions={n: version(n) for n in ("torch", "transformers", "peft")}, threads=a.threads,
                 prompt=a.prompt, new=a.new, repeat=a.repeat)
    sink = a.tokens.open("w") if a.tokens else None
    model, loaded = AutoModelForCausalLM.from_pretrained(a.base, dtype=torch.float32).eval(), 0
    for distinct, batch in plan:
        while loaded < distinct:                       # sorted plan: the bare base is measured before PEFT wraps it
            if loaded == 0:
                model = PeftModel.from_pretrained(model, folders[0], adapter_name="t0")
            else:
                model.load_adapter(folders[loaded], adapter_name=f"t{loaded}")
            loaded += 1
            model.eval()
        extra = {"adapter_names": [f"t{r % distinct}" for r in range(batch)]} if distinct > 1 else {}
        ids = prompts(batch, a.prompt)
        decode(model, ids, 2, extra)
        runs = [decode(model, ids, a.new, extra) for _ in range(a.repeat)]
        speed = [batch * a.new / steps.wall for _, steps, _ in runs]
        print(json.dumps(dict(
            what="decode", loras=distinct, batch=batch, tok_s=round(statistics.median(speed), 2),
            tok_s_best=round(max(speed), 2), tok_s_worst=round(min(speed), 2),
            tok_per_cpu_s=round(batch * a.new / statistics.median(s.own for _, s, _ in runs), 2),
            prefill_ms=round(1e3 * statistics.median(p.wall for p, _, _ in runs), 2),
            foreign=round(statistics.median(s.foreign for _, s, _ in runs), 3),
            peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, **about)), flush=True)
        if sink:
            print(json.dumps(dict(loras=distinct, batch=batch, tokens=runs[0][2])), file=sink, flush=True)


if __name__ == "__main__":
    main()
