"""A training step through fused experts: the bare base's, ours, and PEFT's `target_parameters`.

One decoder layer's mixture with the routing of Qwen3-MoE (narrow experts, 8 of them act) and of Mixtral (wide ones, 2
act), 8 and 64 experts, at reduced width; r 8, fp32, one thread, gradients to the inputs as in a model. Interleaved in
one process (base, ours, PEFT, repeat), processor time, medians of the paired ratios. "Kept" are the bytes that forward
saves for backward beside the parameters.

    python benchmarks/experts.py --json benchmarks/results/experts.json
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.bench import speed
from lora_lite.testing.case import randomise

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeConfig", {"hidden_size": 1024, "moe_intermediate_size": 384, "num_experts_per_tok": 8}),
    "mixtral": ("MixtralConfig", {"hidden_size": 1024, "intermediate_size": 1792, "num_experts_per_tok": 2}),
}
COUNTS = {"qwen3_moe": "num_experts", "mixtral": "num_local_experts"}
COMMON = {"num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 32}
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def base(shape: str, experts: int, implementation: str) -> nn.Module:
    config, fields = SHAPES[shape]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**{**COMMON, **fields, COUNTS[shape]: experts})
    model = transformers.AutoModelForCausalLM.from_config(made, experts_implementation=implementation)
    return model.requires_grad_(False)


def ours(model: nn.Module, method: str) -> nn.Module:
    ll.attach(model, ll.get_variant(method).config(variant=method, r=8, target_kinds=("experts",)))
    randomise(model, scale=0.02)
    return model


def theirs(model: nn.Module) -> nn.Module:
    cfg = peft.LoraConfig(r=8, target_modules=[], target_parameters=PARAMETERS)
    return peft.get_peft_model(model, cfg)


def step(model: nn.Module, x: Tensor) -> Tensor:
    """Forward and backward from embeddings, so that the base alone has a backward pass too."""
    out = model(inputs_embeds=x, use_cache=False).logits.square().mean()
    out.backward()
    return out


def timed(f: Callable[[], object]) -> float:
    start = time.process_time()
    f()
    return time.process_time() - start


def measure(shape: str, experts: int, implementation: str, method: str, tokens: int, rounds: int) -> dict[str, Any]:
    bare = base(shape, experts, implementation)
    models = {"base": bare, "ours": ours(copy.deepcopy(bare), method)}
    if method == "lora":
        models["peft"] = theirs(copy.deepcopy(bare))
    x = torch.randn(1, tokens, 1024, requires_grad=True)
    times: dict[str, list[float]] = {name: [] for name in models}
    bytes_ = {name: speed.kept_bytes(model, lambda model=model: step(model, x)) for name, model in models.items()}
    for _ in range(rounds):
        for name, model in models.items():
            times[name].append(timed(lambda model=model: step(model, x)))
            model.zero_grad()
    row: dict[str, Any] = {"shape": shape, "experts": experts, "implementation": implementation, "method": method}
    row |= {"tokens": tokens, "rounds": rounds, "base_ms": round(1000 * statistics.median(times["base"]), 1)}
    for name in list(models)[1:]:
        ratios = [a / b for a, b in zip(times[name], times["base"], strict=True)]
        row[f"{name}_step"] = round(statistics.median(ratios), 3)
        row[f"{name}_kept"] = round(bytes_[name] / bytes_["base"], 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--experts", nargs="*", type=int, default=[8, 64])
    parser.add_argument("--implementations", nargs="*", default=["grouped_mm", "eager"])
    parser.add_argument("--methods", nargs="*", default=["lora"])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for shape in args.shapes:
        for experts in args.experts:
            for implementation in args.implementations:
                for method in args.methods:
                    rows.append(measure(shape, experts, implementation, method, args.tokens, args.rounds))
                    print(rows[-1], flush=True)
    if args.json:
        versions = {name: module.__version__ for name, module in (("torch", torch), ("peft", peft))}
        data = {"rows": rows, "threads": 1, "processor": platform.machine(), "transformers": transformers.__version__}
        args.json.write_text(json.dumps(data | versions | {"lora_lite": ll.__version__}, indent=1) + "\n")


if __name__ == "__main__":
    main()
