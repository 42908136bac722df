"""Records what transformers' `generate` finds with beams, in beams.json and beam_models.json beside this file.

The models of the first are tables: logits depend on the last token and on the length. Those of the second are the tiny
models of the fixtures; T5's is in the full fixture folder only (FIXTURES). Recorded with transformers 5.24.

    pip install torch transformers
    FIXTURES=... python tests/golden/make_beams.py
"""

import json
import os
import pathlib

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

VOCAB = 10
END = 1
SEARCHES = [
    (2, 1.0, False, 8),
    (3, 0.0, False, 8),
    (4, 1.0, True, 12),
    (3, 2.0, "never", 10),
    (5, 0.6, False, 12),
    (3, -1.0, True, 6),
    (4, 1.5, True, 9),
    (2, 1.0, "never", 12),
]


class Config(PretrainedConfig):
    model_type = "table"


class Table(PreTrainedModel, GenerationMixin):
    config_class = Config

    def __init__(self, config, table, by_length):
        super().__init__(config)
        self.by_length = by_length
        self.table = torch.nn.Parameter(table)
        self.post_init()

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}

    def forward(self, input_ids, **kwargs):
        return CausalLMOutput(logits=self.table[input_ids] + self.by_length[: input_ids.shape[1]])


def rounded(tensor):
    return (tensor * 1e4).round() / 1e4


def search(model, ids, stop, beams, penalty, early, new, repeat):
    """What is found behind these ids, without the start: tokens with the one that ends them, and scores."""
    out = model.generate(
        torch.tensor([ids]), num_beams=beams, num_return_sequences=beams, length_penalty=penalty, early_stopping=early,
        max_new_tokens=new, no_repeat_ngram_size=repeat, do_sample=False, eos_token_id=stop, pad_token_id=0,
        return_dict_in_generate=True, output_scores=True)
    start = 1 if model.config.is_encoder_decoder else len(ids)
    found = out.sequences[:, start:].tolist()
    ends = [min([i + 1 for i, t in enumerate(s) if t in stop] + [new]) for s in found]
    return [s[:end] for s, end in zip(found, ends)], [round(x, 6) for x in out.sequences_scores.tolist()]


def models():
    here = pathlib.Path(__file__).parent / "fixtures"
    full = pathlib.Path(os.environ["FIXTURES"])
    generator, cases = torch.Generator().manual_seed(9), []
    for name, folder in [("llama", here), ("gpt2", here), ("qwen2", here), ("t5", full)]:
        kind = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
        model = kind.from_pretrained(folder / "models" / name, dtype=torch.float32).eval()
        for beams, penalty, early, new, repeat in [(3, 1.0, False, 12, 0), (4, 0.0, True, 16, 2), (2, 2.0, "never", 10, 3), (5, -0.5, False, 8, 0)]:
            ids = torch.randint(3, model.config.vocab_size, (3 + 2 * beams,), generator=generator).tolist()
            # tokens that greedy search comes to, so that some outputs end
            stop = sorted({search(model, ids, [1], 2, 1.0, False, new, 0)[0][0][i] for i in (2, 4)} - {0})
            tokens, scores = search(model, ids, stop, beams, penalty, early, new, repeat)
            cases.append({
                "model": name, "prompt": ids, "stop": stop, "beams": beams, "length_penalty": penalty, "early_stopping": early,
                "max_new_tokens": new, "no_repeat_ngram_size": repeat, "tokens": tokens, "scores": scores})
    body = ",\n".join(json.dumps(case) for case in cases)
    pathlib.Path(__file__).with_name("beam_models.json").write_text("[\n%s\n]\n" % body)


def main():
    models()
    generator = torch.Generator().manual_seed(5)
    by_length = rounded(torch.randn(14, VOCAB, generator=generator))
    tables, cases = [], []
    for t in range(4):
        table = 1.5 * torch.randn(VOCAB, VOCAB, generator=generator)
        table[:, END] += [0.5, -1.0, 1.5, 0.0][t]
        tables.append(rounded(table))
        model = Table(Config(vocab_size=VOCAB), tables[-1], by_length).eval()
        for beams, penalty, early, new in SEARCHES:
            for start in (0, 3):
                out = model.generate(
                    torch.tensor([[start]]), num_beams=beams, num_return_sequences=beams, length_penalty=penalty,
                    early_stopping=early, max_new_tokens=new, do_sample=False, eos_token_id=END, pad_token_id=0,
                    return_dict_in_generate=True, output_scores=True, use_cache=False)
                found = [s[: s.index(END) + 1] if END in s else s[:new] for s in out.sequences[:, 1:].tolist()]
                cases.append({
                    "table": t, "start": start, "beams": beams, "length_penalty": penalty, "early_stopping": early,
                    "max_new_tokens": new, "tokens": found, "scores": [round(x, 6) for x in out.sequences_scores.tolist()]})
    numbers = lambda rows: [[round(x, 6) for x in row] for row in rows.tolist()]
    body = ",\n".join("  " + json.dumps(case) for case in cases)
    text = '{"tables": %s,\n"by_length": %s,\n"cases": [\n%s\n]}\n' % (
        json.dumps([numbers(t) for t in tables]), json.dumps(numbers(by_length)), body)
    pathlib.Path(__file__).with_name("beams.json").write_text(text)


if __name__ == "__main__":
    main()
