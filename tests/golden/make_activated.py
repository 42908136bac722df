"""Makes tests/golden/activated: what PEFT computes with activated LoRAs (aLoRA) on the committed tiny models. Prompts that call the
delta at their beginning, in the middle, twice, at their end, and not at all.

    python make_activated.py [FOLDER]        # torch, transformers, peft 0.18 or later, safetensors

The golden tests run the folder where it is there.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import save_file

NEW = 8
LENGTH = 20
CALL = [5, 9, 7]
HERE = Path(__file__).parent
ROOT = Path(sys.argv[1] if len(sys.argv) > 1 else HERE / "activated")
MODULES = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}


def prompts(vocab, gen):
    """One row for each place of the call: the start of each one in the row, or none."""
    rows = []
    for places in [[0], [6], [3, 11], [LENGTH - len(CALL)], []]:
        row = torch.randint(10, vocab, (LENGTH,), generator=gen)
        for at in places:
            row[at : at + len(CALL)] = torch.tensor(CALL)
        rows.append(row)
    return torch.stack(rows)


def case(kind, seed):
    folder = HERE / "fixtures" / "models" / kind
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    base.generation_config.eos_token_id = None
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=MODULES[kind], fan_in_fan_out=kind == "gpt2",
        alora_invocation_tokens=CALL,
    )
    model = peft.get_peft_model(base, config).eval()
    gen = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = 0.3 * torch.randn(p.shape, generator=gen)
    delta = f"deltas/{kind}/alora"
    model.save_pretrained(ROOT / delta)
    (ROOT / delta / "README.md").unlink(missing_ok=True)
    edit = ROOT / delta / "adapter_config.json"
    said = json.loads(edit.read_text())
    assert said["alora_invocation_tokens"] == CALL
    said["base_model_name_or_path"] = kind
    edit.write_text(json.dumps(said, indent=1, sort_keys=True) + "\n")
    ids = prompts(base.config.vocab_size, gen)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
        # a row at a time: which rows call the delta must not matter to others
        generated = torch.cat([
            model.generate(input_ids=row[None], attention_mask=mask[:1], max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
            for row in ids
        ])[:, -NEW:]
        with model.disable_adapter():
            bare = base(input_ids=ids, attention_mask=mask).logits
    changed = (logits - bare).abs().amax(-1) > 1e-3
    starts = [0, 6, 11, LENGTH - len(CALL), LENGTH]
    assert all(not row[:start].any() and row[start:].all() for row, start in zip(changed, starts)), changed
    name = f"expected/{kind}/alora.safetensors"
    (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
    tensors = dict(input_ids=ids, attention_mask=mask, logits=logits, generated=generated)
    tensors |= dict(gen_input_ids=ids, gen_attention_mask=mask)
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, ROOT / name)
    return dict(
        id=f"activated/{kind}/alora", model=kind, delta=delta, task="causal_lm", expected=name, outputs=["logits"],
        format="peft", type="LORA", tier="core", atol=1e-4,
    )


def main():
    shutil.rmtree(ROOT, ignore_errors=True)
    ROOT.mkdir(parents=True)
    cases = [case(kind, 7 + i) for i, kind in enumerate(MODULES)]
    models = {kind: dict(path=os.path.relpath(HERE / "fixtures" / "models" / kind, ROOT)) for kind in MODULES}
    manifest = dict(
        models=models, tolerance=dict(logits_atol=1e-4), cases=cases,
        versions=dict(torch=torch.__version__, transformers=transformers.__version__, peft=peft.__version__),
    )
    (ROOT / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


main()
