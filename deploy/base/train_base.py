#!/usr/bin/env python3
"""Trains the bundled base `adapters/base/tiny-stories` from scratch, tokenizer and all.

    python deploy/base/train_base.py --text TEXT_DIR --out adapters/base/tiny-stories --work /tmp/tiny-stories

TEXT_DIR is laid out as corpus.py says; only stories/train and WikiText-2/valid are trained on, and what lies directly
in TEXT_DIR as `*.txt` (more stories, a line `<|endoftext|>` after each; sample_stories.py writes such a file).  Steps:

1. byte-level BPE of --vocab entries on stories/train and WikiText-2/valid (tokenizers);
2. a Llama-shaped model (grouped-query attention, tied embeddings, RoPE), Muon and AdamW, cosine rate, dropout on the
   residual branches, windows cut from shuffled documents at a new offset each epoch; --chat of the stories wear
   the chat template, with a request made by rule from the story, so that the base knows turns;
3. every --every steps the story validation loss is taken; the best weights so far are written to --out.

Everything is seeded.  One thread of a 2026 server core does about 4,000 tokens a second.
Needs torch, transformers, tokenizers, safetensors, numpy.
"""
from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

import corpus

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{- '### System:\\n' + message['content'] + '\\n' -}}"
    "{%- elif message['role'] == 'user' -%}{{- '### User:\\n' + message['content'] + '\\n' -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- '### Assistant:\\n' + message['content'] + eos_token -}}"
    "{%- else -%}{{- raise_exception('unknown role: ' + message['role']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '### Assistant:\\n' -}}{%- endif -%}"
)
STOP = set("""about after again also always asked away because before began called came could didn't don't down every
everyone felt finally found from gave girl going good happy have help into just kept know liked little lived looked loved
made many more much named never next nice once other over play played playing said saved she's some soon started
that their them then there they thing things this time together told took very wanted was went were what when where
which who will with would your from""".split())


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[BOS, EOS, PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tok.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tok.token_to_id(BOS))])
    return tok


def save_tokenizer(tok: Tokenizer, out: Path, context: int) -> None:
    tok.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": PAD,
        "add_bos_token": True, "add_eos_token": False, "model_max_length": context, "padding_side": "right",
        "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
        "added_tokens_decoder": {str(tok.token_to_id(t)): {
            "content": t, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
            for t in (BOS, EOS, PAD)}}, indent=2) + "\n")
    (out / "special_tokens_map.json").write_text(json.dumps(dict(bos_token=BOS, eos_token=EOS, pad_token=PAD), indent=2) + "\n")


def request(story: str, rng: random.Random) -> str:
    """What a user might have asked to get this story."""
    name = re.search(r"\bnamed ([A-Z][a-z]+)", story)
    first = story.split(".")[0]
    who = re.search(r"\b(?:a|an) ((?:[a-z]+ ){0,2}[a-z]+) named", first)
    if who and name and rng.random() < 0.5:
        return f"Tell me a story about a {who[1]} named {name[1]}."
    words = [w for w in re.findall(r"\b[a-z]{4,}\b", story) if w not in STOP]
    common = [w for w, _ in Counter(words).most_common(6)]
    rng.shuffle(common)
    if len(common) >= 3:
        return f"Write a story with the words {common[0]}, {common[1]} and {common[2]}."
    return "Tell me a story."


class Data:
    """Token streams of a training epoch, and fixed validation streams."""

    def __init__(self, root: Path, vocab: int, chat: float, wiki: float, repeat: int, seed: int):
        self.stories, self.wiki = corpus.stories(root, "train"), corpus.articles(root, "valid")
        self.tok = train_tokenizer(self.stories + self.wiki, vocab)
        self.more = [d.strip() for f in sorted(Path(root).glob("*.txt")) for d in f.read_text().split("<|endoftext|>") if d.strip()]
        self.repeat = repeat
        self.bos, self.eos = self.tok.token_to_id(BOS), self.tok.token_to_id(EOS)
        self.chat, self.share, self.rng = chat, wiki, random.Random(seed)
        self.val = {"tinystories val": corpus.stories(root, "val"), "wikitext2 test": corpus.articles(root, "test"),
                    "tinyshakespeare val": ["\n\n".join(corpus.speeches(root, "val")[i:i + 8])
                                            for i in range(0, len(corpus.speeches(root, "val")), 8)]}
        self.val_ids = {k: [self.ids(d) for d in v] for k, v in self.val.items()}

    def ids(self, text: str) -> list[int]:
        return [self.bos, *self.tok.encode(text, add_special_tokens=False).ids, self.eos]

    def story_ids(self, story: str) -> list[int]:
        if self.rng.random() < self.chat:
            return self.ids(f"### User:\n{request(story, self.rng)}\n### Assistant:\n{story}")
        return self.ids(story)

    def epoch(self, window: int) -> list[torch.Tensor]:
        docs = [self.story_ids(s) for s in self.stories * self.repeat + self.more]
        docs += [self.ids(p) for p in self.rng.sample(self.wiki, int(self.share * len(self.wiki)))]
        self.rng.shuffle(docs)
        stream = [t for d in docs for t in d][self.rng.randrange(window):]
        rows = [torch.tensor(stream[i:i + window + 1]) for i in range(0, len(stream) - window - 1, window)]
        self.rng.shuffle(rows)
        return rows


@torch.inference_mode()
def evaluate(model, docs: list[list[int]], pad: int, context: int, limit: int | None = None) -> tuple[float, int]:
    """Sum of -log p over the tokens of each document (cut at the context), and their number."""
    model.eval()
    docs = sorted((d[:context] for d in docs[:limit]), key=len)
    total, count = 0.0, 0
    for i in range(0, len(docs), 8):
        part = docs[i:i + 8]
        n = max(map(len, part))
        x = torch.full((len(part), n), pad)
        y = torch.full((len(part), n), -100)
        for r, d in enumerate(part):
            x[r, :len(d)] = torch.tensor(d)
            y[r, :len(d) - 1] = torch.tensor(d[1:])
        logits = model(input_ids=x).logits.float()
        total += F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100, reduction="sum").item()
        count += int((y >= 0).sum())
    model.train()
    return total, count


def save_model(model, out: Path) -> None:
    """HF folder with bf16 weights; the tied head is not written twice."""
    model.config.save_pretrained(out)
    cfg = json.loads((out / "config.json").read_text())
    cfg["architectures"] = ["LlamaForCausalLM"]
    cfg["dtype"] = cfg["torch_dtype"] = "bfloat16"
    cfg.setdefault("rope_theta", 10000.0)
    (out / "config.json").write_text(json.dumps(cfg, indent=2) + "\n")
    sd = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(sd, out / "model.safetensors.part", metadata={"format": "pt"})
    (out / "model.safetensors.part").chmod(0o644)
    (out / "model.safetensors.part").rename(out / "model.safetensors")
    (out / "generation_config.json").write_text(json.dumps(dict(
        bos_token_id=model.config.bos_token_id, eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id,
        do_sample=True, temperature=0.7, top_p=0.9), indent=2) + "\n")


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--text", type=Path, required=True)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--work", type=Path, required=True, help="folder for log.jsonl")
    ap.add_argument("--steps", type=int, default=1200)
    ap.add_argument("--tokens", type=int, default=2048, help="tokens of a step")
    ap.add_argument("--window", type=int, default=256, help="window of the first 85 %% of the steps; then the whole context")
    ap.add_argument("--context", type=int, default=512)
    ap.add_argument("--vocab", type=int, default=2048)
    ap.add_argument("--lr", type=float, default=4e-3)
    ap.add_argument("--muon-lr", type=float, default=5e-3)
    ap.add_argument("--warmup", type=int, default=60)
    ap.add_argument("--weight-decay", type=float, default=0.1)
    ap.add_argument("--dropout", type=float, default=0.06)
    ap.add_argument("--chat", type=float, default=0.25)
    ap.add_argument("--wiki", type=float, default=0.5, help="share of the WikiText paragraphs that an epoch sees")
    ap.add_argument("--repeat", type=int, default=2, help="how often an epoch sees each story of stories/train")
    ap.add_argument("--every", type=int, default=150)
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--seed", type=int, default=11)
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    a.out.mkdir(parents=True, exist_ok=True)
    a.work.mkdir(parents=True, exist_ok=True)
    log = (a.work / "log.jsonl").open("w")

    data = Data(a.text, a.vocab, a.chat, a.wiki, a.repeat, a.seed)
    save_tokenizer(data.tok, a.out, a.context)
    cfg = LlamaConfig(
        vocab_size=data.tok.get_vocab_size(), hidden_size=192, intermediate_size=512, num_hidden_layers=6,
        num_attention_heads=6, num_key_value_heads=3, head_dim=32, max_position_embeddings=a.context,
        tie_word_embeddings=True, rms_norm_eps=1e-5, attention_dropout=0.0, bos_token_id=data.bos, eos_token_id=data.eos,
        pad_token_id=data.tok.token_to_id(PAD))
    model = LlamaForCausalLM(cfg)
    with torch.no_grad():                                   # smaller start for what writes to the residual stream
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_((2 * cfg.num_hidden_layers) ** -0.5)
            layer.mlp.down_proj.weight.mul_((2 * cfg.num_hidden_layers) ** -0.5)
    drop = lambda mod, _, out: F.dropout(out, a.dropout, mod.training)
    hooks = [model.model.embed_tokens.register_forward_hook(drop)]
    for layer in model.model.layers:
        hooks += [layer.self_attn.o_proj.register_forward_hook(drop), layer.mlp.down_proj.register_forward_hook(drop)]

    # Muon for the matrices inside the layers (about twice AdamW's progress a step here), AdamW for the rest
    inner = [p for p in model.model.layers.parameters() if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    muon = torch.optim.Muon(inner, lr=a.muon_lr, momentum=0.95, weight_decay=a.weight_decay, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW([dict(params=[model.model.embed_tokens.weight], weight_decay=0.01), dict(params=plain, weight_decay=0.0)],
                             lr=a.lr, betas=(0.9, 0.98))
    rate = lambda s: (s / a.warmup if s < a.warmup else
                      0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * (s - a.warmup) / (a.steps - a.warmup))))
    rows, epoch, best, start, seen = [], 0, math.inf, time.time(), 0
    window = a.window
    print(json.dumps(dict(params=sum(p.numel() for p in model.parameters()), stories=len(data.stories), more=len(data.more),
                          paragraphs=len(data.wiki), story_tokens=sum(len(data.ids(s)) for s in data.stories),
                          more_tokens=sum(len(data.ids(s)) for s in data.more))), flush=True)
    model.train()
    for step in range(1, a.steps + 1):
        want = a.window if step <= 0.85 * a.steps else a.context
        if want != window:
            window, rows = want, []
        n = a.tokens // window
        if len(rows) < n:
            rows, epoch = data.epoch(window), epoch + 1
        batch = torch.stack([rows.pop() for _ in range(n)])
        for opt, peak in ((muon, a.muon_lr), (adam, a.lr)):
            for g in opt.param_groups:
                g["lr"] = peak * rate(step)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch[:, :-1]).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adam.step()
        model.zero_grad(set_to_none=True)
        seen += n * window
        if step % 20 == 0 or step == a.steps:
            row = dict(step=step, epoch=epoch, loss=round(loss.item(), 4), rate=round(rate(step), 4), tokens=seen,
                       seconds=round(time.time() - start, 1))
            if step % a.every == 0 or step == a.steps:
                s, c = evaluate(model, data.val_ids["tinystories val"], cfg.pad_token_id, a.context)
                row["story_val_loss"] = round(s / c, 4)
                if s / c < best:
                    best = s / c
                    save_model(model, a.out)
            print(json.dumps(row), flush=True)
            print(json.dumps(row), file=log, flush=True)

    final = LlamaForCausalLM.from_pretrained(a.out, dtype=torch.float32)
    report = {}
    for name, docs in data.val_ids.items():
        if docs:
            s, c = evaluate(final, docs, cfg.pad_token_id, a.context)
            chars = sum(len(data.tok.decode(d[:a.context], skip_special_tokens=True).encode()) for d in docs)
            report[name] = dict(loss=round(s / c, 4), perplexity=round(math.exp(s / c), 2),
                                bits_per_byte=round(s / chars / math.log(2), 4), tokens=c)
    print(json.dumps(report, indent=1))
    (a.work / "report.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
