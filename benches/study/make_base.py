#!/usr/bin/env python3
"""Makes what a small base is trained from: a folder with a configuration, seeded random weights and a tokenizer of its own,
and the texts as JSON Lines. No released GPT-2 or T5 is needed; `deltaserve` itself then trains all weights:

    python benches/study/make_base.py --family gpt2 --out target/study/gpt2 --data DATA/tweeteval-sentiment/train.jsonl
    deltaserve serve --base target/study/gpt2/random --data-dir target/study/gpt2/data
    deltaserve train base --file target/study/gpt2/texts.jsonl --task causal-lm --method full --lr 1e-3 --epochs 2 \
        --batch-size 32 --max-length 64
    deltaserve jobs download JOB target/study/gpt2/base

    python benches/study/make_base.py --family t5 --out target/study/t5 --data DATA/webnlg2017/train.jsonl
    head -n 4000 DATA/webnlg2017/train.jsonl > target/study/t5/train.jsonl
    head -n 300 DATA/webnlg2017/test_seen.jsonl > target/study/t5/test.jsonl
    ... the same with --task seq2seq and --max-length 128

For `t5` the texts become spans that are left out and must be filled in (Raffel et al. 2020, section 3.1.4: 15 % of the words, spans
of 3 on average), as rows of prompt and completion: every row is drawn anew `--rounds` times.

Of each row of --data, the fields `text`, `prompt` and `completion` are texts; labels are not read.
Needs torch, transformers, tokenizers.
"""
import argparse
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END, PAD, UNKNOWN = "<|endoftext|>", "<pad>", "<unk>"
SPANS = 32


def read(files: list[Path]) -> list[str]:
    texts = []
    for f in files:
        for line in f.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            texts += [row[k] for k in ("text", "prompt", "completion") if isinstance(row.get(k), str)]
    return texts


def spans(text: str, rng: random.Random) -> dict | None:
    """The text with some spans of words replaced by sentinels, and the spans."""
    words = text.split()
    if len(words) < 4:
        return None
    want = max(1, round(0.15 * len(words)))
    out = [False] * len(words)
    while sum(out) < want:
        length = min(rng.choice([1, 2, 3, 4, 5]), want - sum(out), len(words) - 1)
        at = rng.randrange(len(words) - length + 1)
        out[at:at + length] = [True] * length
    prompt, completion, n = [], [], 0
    for i, word in enumerate(words):
        if out[i]:
            if i == 0 or not out[i - 1]:
                prompt.append(f"<extra_id_{n}>")
                completion.append(f"<extra_id_{n}>")
                n = min(n + 1, SPANS - 1)
            completion.append(word)
        else:
            prompt.append(word)
    return dict(prompt=" ".join(prompt), completion=" ".join(completion))


def tokenizer(family: str, texts: list[str], vocab: int) -> Tokenizer:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    special = [END] if family == "gpt2" else [PAD, END, UNKNOWN] + [f"<extra_id_{i}>" for i in range(SPANS)]
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    if family == "t5":
        tok.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return tok


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--family", choices=["gpt2", "t5"], required=True)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--data", type=Path, nargs="+", required=True, help="JSON Lines files")
    ap.add_argument("--vocab", type=int, default=4096)
    ap.add_argument("--width", type=int, default=192)
    ap.add_argument("--layers", type=int, default=4)
    ap.add_argument("--context", type=int, default=256)
    ap.add_argument("--rounds", type=int, default=1)
    ap.add_argument("--seed", type=int, default=0)
    a = ap.parse_args()

    torch.manual_seed(a.seed)
    rng = random.Random(a.seed)
    texts = read(a.data)
    base = a.out / "random"
    base.mkdir(parents=True, exist_ok=True)
    tok = tokenizer(a.family, texts, a.vocab)
    tok.save(str(base / "tokenizer.json"))
    size = tok.get_vocab_size()
    config = dict(eos_token=END, model_max_length=a.context, tokenizer_class="PreTrainedTokenizerFast")
    if a.family == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel
        model = GPT2LMHeadModel(GPT2Config(
            vocab_size=size, n_positions=a.context, n_embd=a.width, n_layer=a.layers, n_head=a.width // 48,
            bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
        config["bos_token"] = END
        rows = [dict(text=t) for t in texts]
    else:
        from transformers import T5Config, T5ForConditionalGeneration
        model = T5ForConditionalGeneration(T5Config(
            vocab_size=size, d_model=a.width, d_kv=48, d_ff=4 * a.width, num_layers=a.layers, num_heads=a.width // 48,
            feed_forward_proj="relu", dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0))
        config["pad_token"] = PAD
        rows = [row for _ in range(a.rounds) for row in (spans(t, rng) for t in texts) if row]
    rng.shuffle(rows)
    model.save_pretrained(base, safe_serialization=True)
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    (a.out / "texts.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    print(json.dumps(dict(base=str(base), parameters=sum(p.numel() for p in model.parameters()), vocab=size, rows=len(rows))))


if __name__ == "__main__":
    main()
