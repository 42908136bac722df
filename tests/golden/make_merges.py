"""Writes fixtures/merges/peft.safetensors: what PEFT's add_weighted_adapter makes of small LoRA adapters.

Needs torch, peft, safetensors:  python tests/golden/make_merges.py
Tensors: `in.<adapter>.<module>.{a,b}` with `scale.<adapter>`, and `out.<case>.<module>.{a,b}` for every case below; `a` is
lora_A.weight, `b` is lora_B.weight, both as PEFT keeps them. DARE draws at random: `mask.<case>.<module>.<adapter>.{a,b}` is
what was drawn.
"""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

WEIGHTS = {"plain": [0.7, 0.3], "negative": [1.2, -0.5]}
CASES = {
    "linear": dict(combination_type="linear"),
    "cat": dict(combination_type="cat"),
    "svd": dict(combination_type="svd"),
    "svd8": dict(combination_type="svd", svd_rank=8),
    "ties": dict(combination_type="ties", density=0.5),
    "ties_frequency": dict(combination_type="ties", density=0.3, majority_sign_method="frequency"),
    "magnitude_prune": dict(combination_type="magnitude_prune", density=0.5),
    "dare_linear": dict(combination_type="dare_linear", density=0.6),
    "dare_ties": dict(combination_type="dare_ties", density=0.6),
}
MODULES = ["first", "second"]


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(12, 10, bias=False)
        self.second = torch.nn.Linear(10, 9, bias=False)

    def forward(self, x):
        return self.second(self.first(x))


drawn = []
bernoulli = torch.bernoulli


def recorded(p):
    drawn.append(bernoulli(p))
    return drawn[-1]


torch.bernoulli = recorded


def main():
    torch.manual_seed(3)
    # the third delta changes one module only, and is not used where ranks must be equal everywhere
    configs = {
        "x": LoraConfig(r=4, lora_alpha=8, target_modules=MODULES),
        "y": LoraConfig(r=4, lora_alpha=2, target_modules=MODULES),
        "z": LoraConfig(r=4, lora_alpha=4, target_modules=["first"]),
    }
    model = get_peft_model(Net(), configs["x"], adapter_name="x")
    for name in ["y", "z"]:
        model.add_adapter(name, configs[name])
    out = {}
    layers = {m: getattr(model.base_model.model, m) for m in MODULES}
    for name, config in configs.items():
        out[f"scale.{name}"] = torch.tensor([config.lora_alpha / config.r])
        for module in config.target_modules:
            for side, part in [("a", layers[module].lora_A), ("b", layers[module].lora_B)]:
                part[name].weight.data = torch.randn_like(part[name].weight)
                out[f"in.{name}.{module}.{side}"] = part[name].weight.data.clone()
    for set_name, weights in WEIGHTS.items():
        for case, options in CASES.items():
            name = f"{case}_{set_name}"
            drawn.clear()
            model.add_weighted_adapter(["x", "y"], weights, name, **options)
            if drawn:
                keys = [(m, d, s) for m in MODULES for s in "ab" for d in "xy"]
                for (module, adapter, side), mask in zip(keys, drawn, strict=True):
                    out[f"mask.{name}.{module}.{adapter}.{side}"] = mask
            for module in MODULES:
                out[f"out.{name}.{module}.a"] = layers[module].lora_A[name].weight.data.clone()
                out[f"out.{name}.{module}.b"] = layers[module].lora_B[name].weight.data.clone()
    # a module that only some deltas change
    for case in ["linear", "ties"]:
        name = f"{case}_some"
        model.add_weighted_adapter(["x", "z"], [0.5, 0.8], name, **CASES[case])
        for module in MODULES:
            out[f"out.{name}.{module}.a"] = layers[module].lora_A[name].weight.data.clone()
            out[f"out.{name}.{module}.b"] = layers[module].lora_B[name].weight.data.clone()
    folder = Path(__file__).parent / "fixtures" / "merges"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in out.items()}, folder / "peft.safetensors")


main()
