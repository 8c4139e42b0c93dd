"""What a method costs against PEFT and against the least possible: forward, training step, memory saved for backward.

All runs of one method live in one process and are interleaved (bare base, limit, PEFT, ours, repeat); one thread, process time. The
limit of a step is the frozen base with a backward pass through its activations only. Figures are medians of paired ratios with
quartiles; a goal counts as missed when the lower quartile lies above it.

    python benchmarks/speed.py --methods lora dora --sizes S4 --shapes 4x128 --json benchmarks/results/speed.json
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_lite as ll

SIZES = {
    "S4": {"hidden_size": 384, "num_hidden_layers": 4, "intermediate_size": 1536, "num_attention_heads": 6},
    "M3": {"hidden_size": 768, "num_hidden_layers": 3, "intermediate_size": 2048, "num_attention_heads": 12},
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# method -> (our config, PEFT config class and arguments), both at rank r
PAIRS: dict[str, Callable[[int], tuple[dict, tuple[str, dict] | None]]] = {
    "lora": lambda r: ({"r": r, "alpha": 2 * r}, ("LoraConfig", {"r": r, "lora_alpha": 2 * r})),
    "lora+dropout": lambda r: (
        {"r": r, "alpha": 2 * r, "dropout": 0.1},
        ("LoraConfig", {"r": r, "lora_alpha": 2 * r, "lora_dropout": 0.1}),
    ),
    "dora": lambda r: ({"r": r, "alpha": 2 * r}, ("LoraConfig", {"r": r, "lora_alpha": 2 * r, "use_dora": True})),
    "hra": lambda r: ({"r": r}, ("HRAConfig", {"r": r})),
    "boft": lambda r: ({}, ("BOFTConfig", {"boft_block_size": 4})),
    "oft": lambda r: ({}, ("OFTConfig", {"oft_block_size": 32, "use_cayley_neumann": True})),
    "road": lambda r: ({}, ("RoadConfig", {"variant": "road_1"})),
    "delora": lambda r: ({"r": r}, ("DeloraConfig", {"r": r})),
    "ia3": lambda r: ({}, ("IA3Config", {"feedforward_modules": []})),
    "pissa": lambda r: ({"r": r}, None),
    "eva": lambda r: ({"r": r}, None),
}
GOALS = {  # forward vs PEFT, step vs PEFT, step vs limit
    "lora": (0.97, 1.00, 1.18),
    "dora": (0.62, 0.75, 1.22),
    "hra": (0.20, 0.20, 1.18),
    "boft": (0.20, 0.20, 1.38),
    "oft": (0.96, 0.88, 1.10),
    "road": (0.85, 0.86, 1.26),
    "delora": (0.90, 0.97, None),
    "ia3": (0.98, 1.00, None),
}


def base(size: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=8192, **SIZES[size])).requires_grad_(False)


def ours(size: str, method: str, r: int, ids: Tensor) -> nn.Module:
    model = base(size)
    variant = ll.get_variant(method.split("+")[0])
    cfg = variant.config(variant=variant.name, **PAIRS[method](r)[0])
    ll.attach(model, cfg, calibration_data=[ids] if variant.needs_data else None)
    return model


def theirs(size: str, method: str, r: int) -> nn.Module | None:
    import peft

    pair = PAIRS[method](r)[1]
    if pair is None:
        return None
    config = getattr(peft, pair[0])(target_modules=ALL, **pair[1])
    return peft.get_peft_model(base(size), config)


def forward(model: nn.Module, ids: Tensor) -> None:
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)


def step(model: nn.Module, ids: Tensor) -> None:
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    model(inputs_embeds=embeds, labels=ids, use_cache=False).loss.backward()
    for p in model.parameters():
        p.grad = None


def saved_bytes(model: nn.Module, ids: Tensor) -> int:
    """Bytes that autograd keeps between forward and backward: unique storages, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    embeds = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(inputs_embeds=embeds, labels=ids, use_cache=False).loss
    loss.backward()
    for p in model.parameters():
        p.grad = None
    return sum(seen.values())


def summary(values: list[float]) -> dict[str, float]:
    q1, q2, q3 = statistics.quantiles(values, n=4)
    return {"median": round(q2, 3), "q1": round(q1, 3), "q3": round(q3, 3)}


def measure(method: str, size: str, shape: str, r: int, rounds: int) -> dict:
    rows, length = map(int, shape.split("x"))
    ids = torch.randint(0, 8192, (rows, length), generator=torch.Generator().manual_seed(0))
    models = {"base": base(size), "peft": theirs(size, method, r), "ours": ours(size, method, r, ids)}
    models = {k: m.train() for k, m in models.items() if m is not None}
    times = {k: {"forward": [], "step": []} for k in models}
    for i in range(rounds + 1):
        for name, model in models.items():
            for what, run in (("forward", forward), ("step", step)):
                start = time.process_time()
                run(model, ids)
                if i:  # the first round warms up
                    times[name][what].append(time.process_time() - start)
    extra = {k: saved_bytes(m, ids) for k, m in models.items()}
    row = {"method": method, "size": size, "shape": shape, "r": r}
    for what in ("forward", "step"):
        for name in list(models)[1:]:
            row[f"{name}_{what}_vs_base"] = summary(
                [a / b for a, b in zip(times[name][what], times["base"][what], strict=True)]
            )
        if "peft" in models:
            row[f"{what}_vs_peft"] = summary(
                [a / b for a, b in zip(times["ours"][what], times["peft"][what], strict=True)]
            )
    for name in list(models)[1:]:
        row[f"{name}_extra_saved_mb"] = round((extra[name] - extra["base"]) / 2**20, 1)
    row["trained"] = sum(p.numel() for p in models["ours"].parameters() if p.requires_grad)
    del models
    gc.collect()
    return row


def verdict(row: dict) -> str:
    goals = GOALS.get(row["method"])
    if goals is None:
        return ""
    found = (row.get("forward_vs_peft"), row.get("step_vs_peft"), row.get("ours_step_vs_base"))
    missed = [
        n
        for n, goal, got in zip(("forward", "step", "limit"), goals, found, strict=True)
        if goal and got and got["q1"] > goal
    ]
    return "missed: " + ", ".join(missed) if missed else "met"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--sizes", nargs="+", default=["S4"], choices=list(SIZES))
    parser.add_argument("--shapes", nargs="+", default=["4x128"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for method in args.methods:
        for size in args.sizes:
            for shape in args.shapes:
                for r in args.ranks:
                    row = measure(method, size, shape, r, args.rounds)
                    row["verdict"] = verdict(row)
                    rows.append(row)
                    cells = [f"{k} {v['median']:.2f}" if isinstance(v, dict) else f"{k} {v}" for k, v in row.items()]
                    print("  ".join(cells), flush=True)
    if args.json:
        import peft
        import transformers

        machine = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "lora_lite": ll.__version__,
            "threads": 1,
            "cpu": platform.machine(),
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": machine, "rounds": args.rounds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
