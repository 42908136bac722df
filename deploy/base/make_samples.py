#!/usr/bin/env python3
"""Trains the sample deltas in adapters/samples on the bundled base, with PEFT, and reports what they reach.

    python deploy/base/make_samples.py --base adapters/base/tiny-stories --data adapters/demo-data \
        --out adapters/samples [--only shakespeare text-kind cards]

shakespeare  CAUSAL_LM, LoRA r 8 on every linear, trained on style/; stored in float16
text-kind    SEQ_CLS, LoRA r 4 on every linear and a `score` head, trained on text-kind/; labels.json beside it
cards        CAUSAL_LM, LoRA r 8, trained on cards/ (loss on the completion only); not among the defaults

Seeded; needs torch, transformers, peft.  Each takes about a minute on one core.
"""
from __future__ import annotations

import argparse
import json
import math
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CARD = re.compile(r"who: [A-Z][a-z]+ \| speech: (yes|no) \| last: [a-z]+")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def pad(parts: list[list[int]], fill: int) -> torch.Tensor:
    n = max(map(len, parts))
    return torch.tensor([p + [fill] * (n - len(p)) for p in parts])


def causal_batch(examples, pad_id: int) -> dict:
    return dict(input_ids=pad([x for x, _ in examples], pad_id), labels=pad([y for _, y in examples], -100),
                attention_mask=pad([[1] * len(x) for x, _ in examples], 0))


def fit(model, examples: list, batch, epochs: int, size: int, lr: float) -> tuple[int, float]:
    """AdamW, linear warm-up over a tenth of the steps, then cosine to zero. Steps and seconds taken."""
    params = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=lr, weight_decay=0.01)
    total, step, start = epochs * math.ceil(len(examples) / size), 0, time.time()
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(examples)).tolist()
        for i in range(0, len(order), size):
            step += 1
            warm = max(1, total // 10)
            opt.param_groups[0]["lr"] = lr * min(step / warm, 0.5 * (1 + math.cos(math.pi * step / total)) + 1e-3)
            model(**batch([examples[j] for j in order[i:i + size]])).loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            opt.step()
            opt.zero_grad(set_to_none=True)
    model.eval()
    return step, time.time() - start


@torch.inference_mode()
def loss_of(model, examples, pad_id: int) -> float:
    total, count = 0.0, 0
    for i in range(0, len(examples), 8):
        b = causal_batch(examples[i:i + 8], pad_id)
        logits = model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits[:, :-1]
        y = b["labels"][:, 1:]
        total += F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100, reduction="sum").item()
        count += int((y >= 0).sum())
    return total / count


@torch.inference_mode()
def complete(model, tok, prompt: str, new: int, **kw) -> str:
    x = torch.tensor([tok(prompt).input_ids])
    out = model.generate(input_ids=x, attention_mask=torch.ones_like(x), max_new_tokens=new, pad_token_id=tok.pad_token_id, **kw)
    return tok.decode(out[0, x.shape[1]:], skip_special_tokens=True)


def score_cards(model, tok, held: list[dict]) -> dict:
    got = [complete(model, tok, r["prompt"], 32, do_sample=False) for r in held]
    return dict(format=sum(bool(CARD.fullmatch(g)) for g in got) / len(got),
                exact=sum(g == r["completion"] for g, r in zip(got, held)) / len(got), example=got[0])


def save(model, out: Path, dtype=None) -> int:
    model.peft_config["default"].base_model_name_or_path = "tiny-stories"
    if dtype:
        for n, p in model.named_parameters():
            if "lora_" in n:
                p.data = p.data.to(dtype)
    model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)                 # PEFT's empty form
    for f in out.iterdir():
        f.chmod(0o644)
    return sum(f.stat().st_size for f in out.iterdir())


def causal(a, name: str) -> dict:
    tok = transformers.AutoTokenizer.from_pretrained(a.base)
    model = transformers.AutoModelForCausalLM.from_pretrained(a.base, dtype=torch.float32)
    folder = a.data / {"shakespeare": "style", "cards": "cards"}[name]

    def encode(r):
        if "text" in r:
            x = [*tok(r["text"]).input_ids, tok.eos_token_id][:512]
            return x, x
        p, c = tok(r["prompt"]).input_ids, [*tok(r["completion"], add_special_tokens=False).input_ids, tok.eos_token_id]
        return p + c, [-100] * len(p) + c

    train, held = rows(folder / "train.jsonl"), rows(folder / "heldout.jsonl")
    train_ids, held_ids = [encode(r) for r in train], [encode(r) for r in held]
    batch = lambda ex: causal_batch(ex, tok.pad_token_id)
    report = dict(delta=name, tokens=sum(len(x) for x, _ in train_ids), heldout_loss_before=loss_of(model.eval(), held_ids, tok.pad_token_id))
    if name == "cards":
        report["before"] = score_cards(model, tok, held)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS, task_type="CAUSAL_LM"))
    epochs, size, lr = dict(shakespeare=(4, 8, 5e-3), cards=(6, 16, 6e-3))[name]
    report["steps"], report["seconds"] = fit(model, train_ids, batch, epochs, size, lr)
    report["heldout_loss_after"] = loss_of(model, held_ids, tok.pad_token_id)
    if name == "cards":
        report["after"] = score_cards(model, tok, held)
    else:
        report["sample"] = complete(model, tok, "KING RICHARD:\n", 60, do_sample=True, temperature=0.7, top_p=0.9)
    report["bytes"] = save(model, a.out / name, torch.float16)
    return report


def classifier(a, name: str) -> dict:
    tok = transformers.AutoTokenizer.from_pretrained(a.base)
    labels = json.loads((a.data / name / "labels.json").read_text())
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        a.base, dtype=torch.float32, num_labels=len(labels), pad_token_id=tok.pad_token_id)
    encode = lambda r: (tok(r["text"]).input_ids, labels.index(r["label"]))
    train = [encode(r) for r in rows(a.data / name / "train.jsonl")]
    held = [encode(r) for r in rows(a.data / name / "heldout.jsonl")]
    batch = lambda ex: dict(input_ids=pad([x for x, _ in ex], tok.pad_token_id), labels=torch.tensor([y for _, y in ex]),
                            attention_mask=pad([[1] * len(x) for x, _ in ex], 0))

    @torch.inference_mode()
    def accuracy() -> float:
        model.eval()
        hits = 0
        for i in range(0, len(held), 32):
            b = batch(held[i:i + 32])
            hits += int((model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits.argmax(-1) == b["labels"]).sum())
        return hits / len(held)

    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, task_type="SEQ_CLS"))
    report = dict(delta=name, accuracy_before=accuracy())
    report["steps"], report["seconds"] = fit(model, train, batch, 3, 16, 4e-3)
    report["accuracy_after"] = accuracy()
    report["bytes"] = save(model, a.out / name)
    (a.out / name / "labels.json").write_text(json.dumps(labels) + "\n")
    return report


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--base", type=Path, required=True)
    ap.add_argument("--data", type=Path, required=True)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--only", nargs="+", default=["shakespeare", "text-kind"], choices=["shakespeare", "text-kind", "cards"])
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--seed", type=int, default=3)
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    for name in a.only:
        torch.manual_seed(a.seed)
        print(json.dumps((classifier if name == "text-kind" else causal)(a, name), indent=1), flush=True)


if __name__ == "__main__":
    main()
