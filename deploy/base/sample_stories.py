#!/usr/bin/env python3
"""Writes more training stories, sampled from Andrej Karpathy's stories260K (MIT), which saw all of TinyStories.

    python deploy/base/sample_stories.py --model stories260K-hf --out TEXT_DIR/stories260k-samples.txt

The published sample of TinyStories is under 1 MB, far too little for 2.8 M parameters: without these the bundled base
learns it by heart and stays a poor story teller (figures in its README).  --model is a folder in Hugging Face form of
the `stories260K` checkpoint of karpathy/tinyllamas.  Only stories that end within the context are kept.
"""
from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def sample(model, rows: int, length: int, temperature: float, stop: int, gen: torch.Generator) -> list[list[int]]:
    tokens = torch.full((rows, 1), stop)
    out, cache, here = [[] for _ in range(rows)], None, list(range(rows))
    for _ in range(length):
        step = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        tokens = torch.multinomial(F.softmax(step.logits[:, -1].float() / temperature, -1), 1, generator=gen)
        for r, t in zip(here, tokens[:, 0].tolist()):
            out[r].append(t)
        stay = [i for i, r in enumerate(here) if stop not in out[r]]
        if not stay:
            break
        if len(stay) < 0.85 * len(here):                      # finished rows leave the batch, some at a time
            cache.batch_select_indices(torch.tensor(stay))
            tokens, here = tokens[stay], [here[i] for i in stay]
    return [o[:o.index(stop)] for o in out if stop in o]


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", type=Path, required=True)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--megabytes", type=float, default=1.5)
    ap.add_argument("--temperature", type=float, default=0.85)
    ap.add_argument("--rows", type=int, default=256)
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--seed", type=int, default=260)
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    gen = torch.Generator().manual_seed(a.seed)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval()
    tok = Tokenizer.from_file(str(a.model / "tokenizer.json"))
    size, start = 0, time.time()
    with a.out.open("w", encoding="utf-8") as f:
        while size < a.megabytes * 1e6:
            for ids in sample(model, a.rows, 480, a.temperature, model.config.bos_token_id, gen):
                text = tok.decode(ids).strip()
                if len(text) >= 200 and text.isascii():
                    f.write(text + "\n<|endoftext|>\n")
                    size += len(text)
            f.flush()
            print(f"{size / 1e6:.2f} MB after {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
