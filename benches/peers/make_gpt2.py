#!/usr/bin/env python3
"""Writes the model that the peers and deltaserve are compared on: GPT-2 small's shape, seeded random weights.

    python benches/peers/make_gpt2.py --out /tmp/gpt2 [--loras 32] [--text adapters/demo-data]

    OUT/base/        config.json, model.safetensors (124.4 M parameters, float32), tokenizer.json, tokenizer_config.json
    OUT/lora_000/ .. LoRAs of rank 8 on `c_attn` in PEFT's folder form, every one with its own non-zero weights

Speed does not depend on what the weights say; equal tokens from two servers do, and they get the same files here.
The tokenizer is a real byte-level BPE of 2,048 entries, trained on the `.jsonl` files below --text: its ids stay far
below the model's vocabulary of 50,257, which keeps the size (and cost) of GPT-2's output layer.
Needs torch, transformers, peft, safetensors, tokenizers.
"""
import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel

END = "<|endoftext|>"


def tokenizer(folder: Path, out: Path, context: int) -> int:
    texts = []
    for f in sorted(folder.rglob("*.jsonl")):
        for line in f.read_text(encoding="utf-8").splitlines():
            texts += [v for v in json.loads(line).values() if isinstance(v, str)]
    if not texts:
        raise SystemExit(f"no .jsonl text below {folder}")
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=2048, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tok.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token=END, eos_token=END, pad_token=END,
        model_max_length=context, clean_up_tokenization_spaces=False), indent=2) + "\n")
    return tok.token_to_id(END)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--loras", type=int, default=32)
    ap.add_argument("--rank", type=int, default=8)
    ap.add_argument("--text", type=Path, default=Path(__file__).resolve().parents[2] / "adapters" / "demo-data")
    ap.add_argument("--seed", type=int, default=1234)
    a = ap.parse_args()
    torch.set_num_threads(1)
    base = a.out / "base"
    base.mkdir(parents=True, exist_ok=True)
    cfg = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    end = tokenizer(a.text, base, cfg.n_positions)
    cfg.bos_token_id = cfg.eos_token_id = cfg.pad_token_id = end
    torch.manual_seed(a.seed)
    model = GPT2LMHeadModel(cfg)
    model.save_pretrained(base)
    for i in range(a.loras):
        gen = torch.Generator().manual_seed(a.seed + 1 + i)
        draw = lambda *shape: torch.randn(*shape, generator=gen) * 0.02
        out = a.out / f"lora_{i:03d}"
        LoraConfig(r=a.rank, lora_alpha=2 * a.rank, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM",
                   inference_mode=True, base_model_name_or_path="gpt2-shape").save_pretrained(out)
        save_file({f"base_model.model.transformer.h.{n}.attn.c_attn.lora_{side}.weight":
                   draw(a.rank, cfg.n_embd) if side == "A" else draw(3 * cfg.n_embd, a.rank)
                   for n in range(cfg.n_layer) for side in "AB"}, out / "adapter_model.safetensors", metadata={"format": "pt"})
    print(json.dumps(dict(base=str(base), parameters=sum(p.numel() for p in model.parameters()), loras=a.loras, rank=a.rank)))


if __name__ == "__main__":
    main()
