#!/usr/bin/env python3
"""Deltas that deltaserve trained, loaded by PEFT: the same logits.

For each base and method: `deltaserve train` makes a delta in a few steps, `deltaserve deltas download --peft` writes its
folder, PEFT loads the folder onto transformers' model, and what both say of some texts is compared: log-probabilities of
every token (language models) or of every label (classifiers).

    python3 tests/peft/check.py --deltaserve target/debug/deltaserve [--models DIR] [--only REGEX]

Needs torch, transformers and peft. `--models` is a folder of tiny Hugging Face models with tokenizers: the fixtures'
`models` (default ../shared/fixtures/models, else tests/golden/fixtures/models). Ends with a count; 1 where a case fails.
"""

import argparse
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 2e-4
WORDS = "the cat sat on a mat and saw the red dog run to the old house by the sea".split()

# stands for ids that the texts have
TOKENS = "TOKENS"
# name, options of `deltaserve train`; what PEFT has no form for is not here
METHODS = [
    ("lora", ["--method", "lora", "--rank", "4"]),
    ("rslora", ["--method", "lora", "--rank", "4", "--rslora"]),
    ("dora", ["--method", "lora", "--rank", "4", "--dora"]),
    ("lora+biases", ["--method", "lora", "--rank", "4", "--bias", "all"]),
    ("lora_bias", ["--method", "lora", "--rank", "4", "--lora-bias"]),
    ("pissa", ["--method", "lora", "--rank", "4", "--pissa"]),
    ("lora, one layer", ["--method", "lora", "--rank", "4", "--layers", "1"]),
    ("lora+tokens", ["--method", "lora", "--rank", "4", "--tokens", TOKENS]),
    ("ia3", ["--method", "ia3"]),
    ("ln", ["--method", "ln"]),
    ("tokens", ["--method", "tokens", "--tokens", TOKENS]),
    ("bitfit", ["--method", "bitfit"]),
    ("prefix", ["--method", "prefix", "--virtual-tokens", "4"]),
    ("prompt", ["--method", "prompt", "--virtual-tokens", "4"]),
    ("p-tuning", ["--method", "p-tuning", "--virtual-tokens", "4"]),
]
# What PEFT itself cannot do with these bases, with its reason
BEYOND_PEFT = {
    ("t5", "prefix"): "PEFT's generate and its loss disagree about the decoder start (fixtures, tier extra)",
}


class LeftOut(Exception):
    """What PEFT or transformers cannot do with a base."""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """`deltaserve serve` on a base, in a folder of its own."""

    def __init__(self, binary, base, folder):
        self.binary, self.address = binary, f"127.0.0.1:{free_port()}"
        self.log = open(folder / "log", "w")
        command = [binary, "serve", "--base", base, "--data-dir", folder / "data", "--listen", self.address]
        command += ["--http", "off", "--adapters-dir", folder, "--train-nice", "0"]
        self.process = subprocess.Popen([str(c) for c in command], stdout=self.log, stderr=self.log)
        for _ in range(240):
            if self.process.poll() is not None:
                raise RuntimeError("the server ended: " + (folder / "log").read_text()[-2000:])
            with socket.socket() as s:
                if s.connect_ex(tuple([self.address.split(":")[0], int(self.address.split(":")[1])])) == 0:
                    return
            time.sleep(0.25)
        raise RuntimeError("the server did not start within a minute")

    def call(self, *arguments):
        verb, *rest = arguments
        command = [self.binary, verb, "--server", f"http://{self.address}", "--json", *rest]
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300)
        if "selects no bias of this base" in done.stderr:
            raise LeftOut("the base has no biases, and PEFT cannot add any")
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(map(str, arguments))}: {done.stderr.strip()[-1500:]}")
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    def stop(self):
        self.process.terminate()
        self.process.wait(timeout=60)
        self.log.close()


def rows(task):
    """Examples that some method can learn something of in a few steps."""
    texts = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 7)) for i in range(1, 13)]
    if task == "seq-cls":
        return [{"text": t, "label": "ab"[i % 2]} for i, t in enumerate(texts)]
    if task == "token-cls":
        return [{"tokens": t.split(), "labels": ["xy"[len(w) % 2] for w in t.split()]} for t in texts]
    if task == "seq2seq":
        return [{"prompt": t, "completion": " ".join(reversed(t.split()))} for t in texts]
    return [{"text": t} for t in texts]


def kind_of(config):
    """(task of `deltaserve train`, transformers' class) pairs of a base."""
    import transformers as hf

    architecture = (config.get("architectures") or [""])[0]
    if config["model_type"] == "t5":
        return [("seq2seq", hf.AutoModelForSeq2SeqLM)]
    if config["model_type"] in ("bert", "roberta", "distilbert"):
        tasks = [("seq-cls", hf.AutoModelForSequenceClassification), ("token-cls", hf.AutoModelForTokenClassification)]
        if "SequenceClassification" in architecture:
            return tasks[:1]
        return tasks[1:] if "TokenClassification" in architecture else tasks
    return [("causal-lm", hf.AutoModelForCausalLM)]


def ours(server, task, name, texts):
    """Natural-log probabilities as deltaserve says them: per text a list of lists."""
    if task == "causal-lm":
        replies = [server.call("score", "-d", name, "--", t)[0]["results"][0] for t in texts]
        return [[[t["logprob"]] for t in r["tokens"]] for r in replies]
    if task == "seq2seq":
        replies = [server.call("score", "-d", name, "-p", p, "--", c)[0]["results"][0] for p, c in texts]
        return [[[t["logprob"]] for t in r["tokens"]] for r in replies]
    if task == "seq-cls":
        replies = server.call("classify", "-d", name, "--", *texts)[0]["results"]
        order = lambda labels: sorted(labels, key=lambda l: l["label"])
        return [[[math.log(l["probability"]) for l in order(r["labels"])]] for r in replies]
    raise NotImplementedError(task)


def theirs(model, tokenizer, task, texts, virtual):
    """The same of PEFT's model. `virtual`: positions that its logits have ahead of the text."""
    import torch

    out = []
    with torch.no_grad():
        for text in texts:
            if task == "seq2seq":
                source = torch.tensor([tokenizer(text[0])["input_ids"]])
                labels = torch.tensor([tokenizer(text[1])["input_ids"]])
                logits = model(input_ids=source, attention_mask=torch.ones_like(source), labels=labels).logits[0]
                found = torch.log_softmax(logits.float(), -1).gather(1, labels[0][:, None])
                out.append(found.tolist())
                continue
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
            if task == "seq-cls":
                out.append([torch.log_softmax(logits, -1).tolist()])
            else:
                ahead = logits.shape[0] - ids.shape[1]
                assert ahead in (0, virtual), (ahead, virtual)
                log_p = torch.log_softmax(logits[ahead:], -1)
                out.append(log_p[:-1].gather(1, ids[0, 1:, None]).tolist())
    return out


def apart(a, b):
    """Largest difference, the shorter of two lists being compared from the end (a start token is not always scored)."""
    worst = 0.0
    for x, y in zip(a, b):
        n = min(len(x), len(y))
        assert n > 0 and abs(len(x) - len(y)) <= 1, (len(x), len(y))
        for p, q in zip(x[len(x) - n :], y[len(y) - n :]):
            worst = max([worst] + [abs(s - t) for s, t in zip(p, q)])
    return worst


def check(server, base, task, cls, method, options, folder):
    """Trains, downloads, loads, compares: (largest difference, difference to the bare base)."""
    from peft import PeftModel
    from transformers import PreTrainedTokenizerFast

    data = folder / f"{task}.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows(task)))
    name = re.sub(r"[^a-z0-9]+", "-", f"{task}-{method}")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(base / "tokenizer.json"))
    ids = tokenizer(" ".join(WORDS), add_special_tokens=False)["input_ids"][:3]
    wants_tokens = TOKENS in options
    options = [",".join(map(str, sorted(set(ids)))) if o == TOKENS else o for o in options]
    server.call("train", name, "--file", data, "--task", task, *options, "--max-steps", "6", "--lr", "0.01", "--seed", "3")
    written = folder / name
    server.call("deltas", "download", name, written, "--peft")
    texts = [r["text"] for r in rows(task)[:4]] if task != "seq2seq" else [(r["prompt"], r["completion"]) for r in rows(task)[:4]]
    extra = {"num_labels": 2, "ignore_mismatched_sizes": True} if task == "seq-cls" else {}
    bare = cls.from_pretrained(base, dtype="float32", **extra).eval()
    out = bare.get_output_embeddings()
    tied = out is None or out.weight is bare.get_input_embeddings().weight
    if wants_tokens and bare.config.tie_word_embeddings and not tied:
        raise LeftOut("transformers says of this untied head that it is tied, and PEFT changes its rows, too")
    virtual = 4 if method in ("prompt", "p-tuning") else 0
    before = theirs(bare, tokenizer, task, texts, 0)
    try:
        model = PeftModel.from_pretrained(bare, written).eval()
        after = theirs(model, tokenizer, task, texts, virtual)
    except ValueError as e:
        if "does not support past key values" in str(e):
            raise LeftOut("PEFT has no prefixes for it") from e
        raise
    return apart(ours(server, task, name, texts), after), apart(before, after)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--deltaserve", default=ROOT / "target/debug/deltaserve")
    arguments.add_argument("--models", type=Path)
    arguments.add_argument("--only", default="")
    given = arguments.parse_args()
    for name, value in [("HF_HUB_OFFLINE", "1"), ("HF_HUB_DISABLE_PROGRESS_BARS", "1"), ("TRANSFORMERS_VERBOSITY", "error")]:
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore")
    places = [given.models] if given.models else [ROOT.parent / "shared/fixtures/models", ROOT / "tests/golden/fixtures/models"]
    models = next((p for p in places if p.is_dir()), None)
    if models is None:
        print(f"skipped: no folder of models at {', '.join(map(str, places))}")
        return
    passed, failed, left = 0, [], 0
    for base in sorted(p for p in models.iterdir() if (p / "tokenizer.json").is_file()):
        config = json.loads((base / "config.json").read_text())
        cases = [(t, c, m, o) for t, c in kind_of(config) if t != "token-cls" for m, o in METHODS]
        cases = [case for case in cases if re.search(given.only, f"{base.name} {case[0]} {case[2]}")]
        if not cases:
            continue
        with tempfile.TemporaryDirectory() as folder:
            server = Server(given.deltaserve, base, Path(folder))
            try:
                for task, cls, method, options in cases:
                    what = f"{base.name} {task} {method}"
                    reason = BEYOND_PEFT.get((config["model_type"], method))
                    if reason:
                        left += 1
                        print(f"left out  {what}: {reason}", flush=True)
                        continue
                    try:
                        difference, effect = check(server, base, task, cls, method, options, Path(folder))
                        good = difference <= TOLERANCE and effect > 10 * TOLERANCE
                        print(f"{'passed' if good else 'FAILED'}    {what}: {difference:.1e} apart (the delta changes {effect:.1e})", flush=True)
                        passed, failed = passed + good, failed + ([] if good else [what])
                    except LeftOut as e:
                        left += 1
                        print(f"left out  {what}: {e}", flush=True)
                    except Exception as e:  # each case tells its own
                        print(f"FAILED    {what}: {type(e).__name__}: {e}", flush=True)
                        failed.append(what)
            finally:
                server.stop()
    print(f"{passed} passed, {len(failed)} failed, {left} left out")
    if not passed + len(failed):
        print(f"nothing was compared: {models} has no model with a tokenizer that --only matches")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
