"""What the methods that PEFT has too cost against PEFT, by themselves.

Square layers after one another with a SiLU between, fp32, one thread: forward and backward of two at width 768 with 256
tokens, and one token of a generation with a cache through six at width 1024. Both stand in one process and are timed by
turns (ours, PEFT, ours, ...) by processor time; the figures are medians of paired ratios with quartiles. One JSON per
run, and docs/results/methods_vs_peft.md made of it.

python benchmarks/methods_vs_peft.py                     # benchmarks/results/methods_vs_peft.json
python benchmarks/methods_vs_peft.py --only loha hira    # these again, the others as they stand in the JSON
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.bench.speed import machine, paired

OUT = Path(__file__).parent / "results" / "methods_vs_peft.json"
R = 8
Row = tuple[dict[str, Any], str, dict[str, Any]]
METHODS: dict[str, Row] = {
    "bitfit": ({}, "BeftConfig", {}),
    "boft": ({"n_factors": 1}, "BOFTConfig", {"boft_block_size": 4}),
    "c3a": ({"block": 256}, "C3AConfig", {"block_size": 256}),
    "deft": ({"r": R}, "DeftConfig", {"r": R}),
    "delora": ({"r": R}, "DeloraConfig", {"r": R}),
    "dora": ({"r": R, "alpha": 16}, "LoraConfig", {"r": R, "lora_alpha": 16, "use_dora": True}),
    "fourierft": ({"n": 1000}, "FourierFTConfig", {"n_frequency": 1000}),
    "frod": ({}, "FrodConfig", {}),
    "glora": ({"r": R}, "GloraConfig", {"r": R}),
    "gralora": ({"r": 32, "k": 2}, "GraloraConfig", {"r": 32, "gralora_k": 2}),
    "hira": ({"r": 32}, "HiraConfig", {"r": 32}),
    "hra": ({"r": R}, "HRAConfig", {"r": R}),
    "ia3": ({}, "IA3Config", {"feedforward_modules": []}),
    "kasa": ({"r": R}, "LoraConfig", {"r": R, "kasa_config": ("KasaConfig", {})}),
    "lily": ({"r": 32}, "LilyConfig", {"r": 32, "num_B": 2}),
    "loha": ({"r": R}, "LoHaConfig", {"r": R, "alpha": R}),
    "lokr": ({"r": R}, "LoKrConfig", {"r": R, "alpha": R}),
    "lora": ({"r": R, "alpha": 16}, "LoraConfig", {"r": R, "lora_alpha": 16}),
    "mica": ({"r": R}, "LoraConfig", {"r": R, "init_lora_weights": "mica"}),
    "miss": ({"r": 64}, "MissConfig", {"r": 64}),
    "miss_bat": ({"r": 64}, "MissConfig", {"r": 64, "init_weights": "bat"}),
    "monteclora": ({"r": R}, "LoraConfig", {"r": R, "monteclora_config": ("MontecloraConfig", {})}),
    "oft": ({}, "OFTConfig", {"oft_block_size": 32, "use_cayley_neumann": False}),
    "osf": ({"r": 384}, "OSFConfig", {"effective_rank": 384}),
    "peanut": ({"r": 32}, "PeanutConfig", {"r": 32}),
    "psoft": ({"r": 32}, "PsoftConfig", {"r": 32}),
    "pvera": ({"r": 256}, "PveraConfig", {"r": 256}),
    "randlora": ({"r": 32}, "RandLoraConfig", {"r": 32}),
    "road": ({}, "RoadConfig", {"variant": "road_1"}),
    "shira": ({"r": 32}, "ShiraConfig", {"r": 32}),
    "supertuning": ({}, "SupertuningConfig", {}),
    "tinylora": ({}, "TinyLoraConfig", {}),
    "unilora": ({}, "UniLoraConfig", {}),
    "vblora": ({}, "VBLoRAConfig", {"vector_length": 256}),
    "velora": ({"r": R}, "LoraConfig", {"r": R, "velora_config": ("VeloraConfig", {})}),
    "vera": ({"r": 256}, "VeraConfig", {"r": 256}),
    "waveft": ({}, "WaveFTConfig", {}),
}
"""Method -> (our fields, PEFT's config and its arguments): the same function at the same size."""
STEP, TOKEN = {"width": 768, "pairs": 1, "tokens": 256}, {"width": 1024, "pairs": 3, "tokens": 1}
PAGE = Path(__file__).parents[1] / "docs" / "results" / "methods_vs_peft.md"
GOALS = {
    "loha": 0.5,
    "lokr": 0.5,
    "fourierft": 0.5,
    "waveft": 0.5,
    "peanut": 0.5,
    "c3a": 0.7,
    "hira": 0.62,
    "shira": 1.2,
}
"""Goals of a step; 1.0 for all others, and for a token 0.05 for LoHa and FourierFT, 1.0 for the others."""


class Pair(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.up(x)))


class Cache:
    """Stands for the key-value cache of a generation, of which these layers need nothing."""

    def get_seq_length(self) -> int:
        return 1


class Layers(nn.Module):
    config = {"model_type": "layers"}

    def __init__(self, width: int, pairs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pairs = nn.Sequential(*(Pair(width) for _ in range(pairs)))

    def forward(self, x: Tensor, past_key_values: Cache | None = None) -> Tensor:
        return self.pairs(x)


def models(method: str, width: int, pairs: int) -> tuple[nn.Module, nn.Module]:
    """Ours and PEFT's."""
    import peft
    from peft.tuners.lora import config as lora_config

    fields, name, arguments = METHODS[method]
    mine = Layers(width, pairs)
    ll.attach(mine, ll.get_variant(method).config(variant=method, **fields))
    made = {k: getattr(lora_config, v[0])(**v[1]) if isinstance(v, tuple) else v for k, v in arguments.items()}
    theirs = peft.get_peft_model(Layers(width, pairs), getattr(peft, name)(target_modules=["up", "down"], **made))
    return mine, theirs.base_model.model


def step(model: nn.Module, x: Tensor) -> None:
    model(x).square().sum().backward()
    for p in model.parameters():
        p.grad = None


@torch.no_grad()
def token(model: nn.Module, x: Tensor, cache: Cache) -> None:
    for _ in range(5):
        model(x, past_key_values=cache)


def timed(method: str, width: int, pairs: int, tokens: int, rounds: int) -> dict[str, float]:
    """Our time over PEFT's: a step, or without gradients where there is one token."""
    cache = Cache()
    both = [m.train(tokens > 1) for m in models(method, width, pairs)]
    x = torch.randn(1, tokens, width, requires_grad=tokens > 1)
    found: list[list[float]] = [[], []]
    for i in range(rounds + 2):
        for model, times in zip(both, found, strict=True):
            start = time.process_time()
            step(model, x) if tokens > 1 else token(model, x, cache)
            if i > 1:
                times.append(time.process_time() - start)
    gc.collect()
    return paired(*found)


def page(data: dict[str, Any]) -> str:
    """The table of a JSON, with a word where the lower quartile lies above the goal."""

    def cell(method: str, what: str, goal: float) -> str:
        q = data["rows"][method][what]
        missed = f" **missed** ({goal:g})" if q["q1"] > goal else ""
        return f"{q['median']:.2f} [{q['q1']:.2f}, {q['q3']:.2f}]{missed}"

    m = data["machine"]
    lines = [
        "# The methods that PEFT has too, by themselves",
        "",
        f"Our time over PEFT's, from `benchmarks/methods_vs_peft.py`: one {m['processor']} thread, processor time, by "
        f"turns, medians of paired ratios with [quartiles]; torch {m['torch']}, peft {m['peft']}. Step: forward and "
        "backward of two square layers of 768, 256 tokens. Token: one of a generation with a cache, six layers of "
        "1,024. The same function at the same size on both sides. Measured on a loaded machine with two shared cores: "
        "what differs by a tenth is noise.",
        "",
        "| method | step | token |",
        "|---|---|---|",
    ]
    for method in data["rows"]:
        few = 0.05 if method in ("loha", "fourierft") else 1.0
        step_cell, token_cell = cell(method, "step", GOALS.get(method, 1.0)), cell(method, "token", few)
        lines.append(f"| `{method}` | {step_cell} | {token_cell} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    data: dict[str, Any] = json.loads(OUT.read_text()) if OUT.is_file() else {"rows": {}}
    data["machine"] = machine()
    for method in args.only:
        try:
            row = {
                "step": timed(method, **STEP, rounds=args.rounds),
                "token": timed(method, **TOKEN, rounds=args.rounds),
            }
        except Exception as e:  # what one method says must not end the run of the others
            print(f"{method}: {type(e).__name__}: {e}", flush=True)
            continue
        data["rows"][method] = row
        data["rows"] = dict(sorted(data["rows"].items()))
        print(f"{method:12} step {row['step']['median']:.2f}   token {row['token']['median']:.2f}", flush=True)
        OUT.write_text(json.dumps(data, indent=1) + "\n")
        PAGE.write_text(page(data))


if __name__ == "__main__":
    main()
