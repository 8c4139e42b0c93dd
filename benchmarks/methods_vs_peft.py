"""What the methods that PEFT has too cost against PEFT, by themselves.

Square layers after one another with a SiLU between, fp32, one thread: forward and backward of two at width 768 with 256
tokens, and one token of a generation with a cache through six at width 1024. Both stand in one process and are timed by
turns (ours, PEFT, ours, ...) by processor time; the figures are medians of paired ratios with quartiles. Methods that
need more than an input stand in a Llama of two blocks of width 512: forward and backward of 256 tokens, and 8 tokens of
`generate`. One JSON per run, and docs/results/methods_vs_peft.md made of it.

python benchmarks/methods_vs_peft.py                     # benchmarks/results/methods_vs_peft.json
python benchmarks/methods_vs_peft.py --only loha hira    # these again, the others as they stand in the JSON
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.bench import goals
from lora_lite.bench.pairs import IN_A_MODEL, INVOCATION, OF_A_TASK, PAIRS, config, data, peft_config, peft_model
from lora_lite.bench.speed import machine, paired

OUT = Path(__file__).parent / "results" / "methods_vs_peft.json"
RANKS = {"miss": 64, "miss_bat": 64} | dict.fromkeys(
    ("gralora", "hira", "lily", "peanut", "psoft", "randlora", "shira"), 32
)
"""Of the others: 8."""
NAMES = sorted([*(name for name in PAIRS if "+" not in name), *IN_A_MODEL])
LAYERS = ("up", "down")
STEP, TOKEN = {"width": 768, "pairs": 1, "tokens": 256}, {"width": 1024, "pairs": 3, "tokens": 1}
LLAMA: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 2,
    "intermediate_size": 1376,
    "num_attention_heads": 8,
    "vocab_size": 1024,
}
TEXT, PROMPT, NEW = 256, 32, 8
"""Tokens of a step, and those before and in a generation."""
PAGE = Path(__file__).parents[1] / "docs" / "results" / "methods_vs_peft.md"


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

    r = RANKS.get(method, 8)
    mine = Layers(width, pairs)
    ll.attach(mine, config(method, r))
    theirs = peft.get_peft_model(Layers(width, pairs), peft_config(method, r, LAYERS))
    return mine, theirs.base_model.model


def step(model: nn.Module, x: Tensor) -> None:
    model(x).square().sum().backward()
    for p in model.parameters():
        p.grad = None


@torch.no_grad()
def token(model: nn.Module, x: Tensor, cache: Cache) -> None:
    for _ in range(5):
        model(x, past_key_values=cache)


def timed(method: str, width: int, pairs: int, tokens: int, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Our time over PEFT's, and that of the bare layers: a step, or without gradients where there is one token."""
    cache = Cache()
    all_three = [m.train(tokens > 1) for m in (*models(method, width, pairs), Layers(width, pairs))]
    x = torch.randn(1, tokens, width, requires_grad=tokens > 1)
    found: list[list[float]] = [[], [], []]
    for i in range(rounds + 2):
        for model, times in zip(all_three, found, strict=True):
            start = time.process_time()
            step(model, x) if tokens > 1 else token(model, x, cache)
            if i > 1:
                times.append(time.process_time() - start)
    gc.collect()
    mine, theirs, bare = found
    return paired(mine, theirs), paired(bare, theirs)


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA)).requires_grad_(False)


def timed_in_a_model(method: str, rounds: int) -> dict[str, dict[str, float]]:
    """The same in a Llama: a step, and a generation of several tokens."""
    mine, bare = llama(), llama()
    adapter = ll.attach(mine, config(method, 8), calibration_data=data(method, mine))
    if ll.get_variant(method).on_step is not None:
        ll.schedule(mine, torch.optim.SGD(adapter.param_groups(lr=0.0)), 1000)
    three = [mine, peft_model(method, 8, llama()), bare]
    ids = torch.randint(20, LLAMA["vocab_size"], (1, TEXT))
    ids[0, PROMPT // 2 : PROMPT // 2 + len(INVOCATION)] = torch.tensor(INVOCATION)
    tasks = {"task_ids": torch.tensor([1])} if method in OF_A_TASK else {}
    ours = ll.context(mine, **tasks) if tasks else contextlib.nullcontext()

    def a_step(model: Any, more: Any) -> None:
        model(input_ids=ids, labels=ids, **more).loss.backward()

    def some_tokens(model: Any, more: Any) -> None:
        model.generate(input_ids=ids[:, :PROMPT], max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **more)

    found: dict[str, dict[str, float]] = {}
    with ours:
        for what, run in (("step", a_step), ("token", some_tokens)):
            times: list[list[float]] = [[], [], []]
            for i in range(rounds + 2):
                for j, model in enumerate(three[: 2 if what == "step" else 3]):
                    model.train(what == "step")
                    start = time.process_time()
                    run(model, tasks if j == 1 else {})
                    if i > 1:
                        times[j].append(time.process_time() - start)
            found[what] = paired(times[0], times[1])
        found["bare"] = paired(times[2], times[1])
    gc.collect()
    return found


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
        "1,024; beside it what these layers take without any adapter, below which no adapter can be: LoHa's goal 0.05 "
        "is missed by the bare base. The same function at the same size on both sides. Missed: the lower quartile lies "
        "above the goal. Measured on a loaded machine with two shared cores: what differs by a tenth is noise. Starred "
        f"methods need more than an input and stand in a Llama of two blocks of 512: a step of {TEXT} tokens, and in "
        f"the place of a token a generation of {NEW} behind {PROMPT}, prompt included, as each library generates "
        "(PEFT's prefix tuning and Cartridge leave their prefix out there). Lily routes every token, PEFT the batch: "
        "that is one more product of rank E r. Not here: QA-LoRA, which PEFT has on GPTQ layers only; X-LoRA, which "
        "runs the model twice there and reads a hidden state of the caller's here; AdaMSS needs scikit-learn in PEFT.",
        "",
        "| method | step | token | token of the bare base |",
        "|---|---|---|---|",
    ]
    for method in data["rows"]:
        steps, tokens = goals.STEP.get(method, 1.0), goals.TOKEN.get(method, 1.0)
        base = f"{data['rows'][method]['bare']['median']:.2f}"
        star = "*" if method in IN_A_MODEL else ""
        lines.append(f"| `{method}`{star} | {cell(method, 'step', steps)} | {cell(method, 'token', tokens)} | {base} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=NAMES)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    data: dict[str, Any] = json.loads(OUT.read_text()) if OUT.is_file() else {"rows": {}}
    data["machine"] = machine()
    for method in args.only:
        try:
            if method in IN_A_MODEL:
                row = timed_in_a_model(method, args.rounds)
            else:
                row = {"step": timed(method, **STEP, rounds=args.rounds)[0]}
                row["token"], row["bare"] = timed(method, **TOKEN, rounds=args.rounds)
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
