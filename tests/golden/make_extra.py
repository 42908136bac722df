"""Makes tests/golden/extra: tiny random bases and what transformers and PEFT compute with them, for cases that the shared
fixtures lack. Prompts on Gemma, whose table's rows are scaled and whose prompts are not.

    python make_extra.py [FOLDER]        # torch 2.15, transformers 5.23, peft 0.21.2, safetensors
"""

import json
import shutil
import sys
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import save_file

NEW = 8
ROOT = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "extra")


def shake(model, seed):
    """Weights large enough that every part of the model shows in the logits."""
    gen = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        spread = 0.1 if p.dim() == 1 else 1.0 / p.shape[-1] ** 0.5
        p.data = spread * torch.randn(p.shape, generator=gen)


def gemma(kind):
    common = dict(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=24, max_position_embeddings=64, sliding_window=5, query_pre_attn_scalar=8,
        hidden_activation="gelu_pytorch_tanh", pad_token_id=0, bos_token_id=1, eos_token_id=None,
        attn_implementation="eager",
    )
    if kind == "gemma2":
        config = transformers.Gemma2Config(**common, attn_logit_softcapping=3.0, final_logit_softcapping=5.0)
        return transformers.Gemma2ForCausalLM(config)
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**common))


def prompt_case(kind, seed):
    base = gemma(kind).eval()
    shake(base, seed)
    base.save_pretrained(ROOT / "models" / kind)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(base, config).eval()
    rows = model.prompt_encoder["default"].embedding.weight
    gen = torch.Generator().manual_seed(seed + 1)
    rows.data = torch.randn(rows.shape, generator=gen)
    delta = f"deltas/{kind}/prompt"
    model.save_pretrained(ROOT / delta)
    (ROOT / delta / "README.md").unlink(missing_ok=True)
    edit = ROOT / delta / "adapter_config.json"
    said = json.loads(edit.read_text())
    said["base_model_name_or_path"] = f"models/{kind}"
    edit.write_text(json.dumps(said, indent=1, sort_keys=True) + "\n")
    ids = torch.randint(2, 64, (2, 9), generator=gen)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
        generated = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)[:, -NEW:]
    name = f"expected/{kind}/prompt.safetensors"
    (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
    tensors = dict(input_ids=ids, attention_mask=mask, logits=logits, generated=generated)
    tensors |= dict(gen_input_ids=ids, gen_attention_mask=mask)
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, ROOT / name)
    return dict(
        id=f"extra/{kind}/prompt", model=kind, delta=delta, task="causal_lm", expected=name, outputs=["logits"], format="peft",
        type="PROMPT_TUNING", tier="core", atol=1e-4, logits_include_virtual=True,
    )


def main():
    shutil.rmtree(ROOT, ignore_errors=True)
    kinds = ["gemma2", "gemma3"]
    cases = [prompt_case(kind, 7 + i) for i, kind in enumerate(kinds)]
    manifest = dict(
        models={k: dict(path=f"models/{k}") for k in kinds}, tolerance=dict(logits_atol=1e-4), cases=cases,
        versions=dict(torch=torch.__version__, transformers=transformers.__version__, peft=peft.__version__),
    )
    (ROOT / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


main()
