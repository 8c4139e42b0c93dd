"""One batch, many adapters: LoRA r=8, 16 rows, K adapters, against PEFT's adapter_names and the bare base.

Interleaved in one process, one thread, process time; medians and quartiles of the paired ratios to the base.
`python benchmarks/mixed_batch.py [--tokens 32 1] [--adapters 1 4 16] [--rounds 9] [--json FILE] [--no-peft]`
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lora_lite as ll

ROWS = 16


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {
        "hidden_size": 384,
        "num_hidden_layers": 4,
        "intermediate_size": 1536,
        "vocab_size": 8192,
        "num_attention_heads": 6,
    }
    return LlamaForCausalLM(LlamaConfig(**size)).eval()


def randomise(model: torch.nn.Module, key: str) -> None:
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if key in name:
            p.data.normal_(std=0.02, generator=g)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 1])
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-peft", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bare, ours = base(), base()
    for i in range(max(args.adapters)):
        ll.attach(ours, ll.LoRAConfig(r=8, alpha=16), name=f"a{i}")
    randomise(ours, "lora_")
    runs = {"base": (bare, lambda k: nullcontext(), lambda k: {})}
    runs["lora_lite"] = (ours, lambda k: ll.rows(ours, [f"a{i % k}" for i in range(ROWS)]), lambda k: {})
    if not args.no_peft:
        import peft

        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        theirs = peft.get_peft_model(base(), config, adapter_name="a0").eval()
        for i in range(1, max(args.adapters)):
            theirs.add_adapter(f"a{i}", config)
        randomise(theirs, "lora_")
        runs["peft"] = (
            theirs,
            lambda k: nullcontext(),
            lambda k: {"adapter_names": [f"a{i % k}" for i in range(ROWS)]},
        )
    rows = []
    with torch.no_grad():
        for tokens in args.tokens:
            ids = torch.randint(0, 8192, (ROWS, tokens))
            repeat = 1 if tokens > 4 else 8
            for k in args.adapters:
                times: dict[str, list[float]] = {name: [] for name in runs}
                for i in range(args.rounds + 1):
                    for name, (model, scope, kwargs) in runs.items():
                        with scope(k):
                            start = time.process_time()
                            for _ in range(repeat):
                                model(input_ids=ids, use_cache=False, **kwargs(k))
                            elapsed = (time.process_time() - start) / repeat
                        if i:
                            times[name].append(elapsed)
                for name in list(runs)[1:]:
                    ratios = [t / b for t, b in zip(times[name], times["base"], strict=True)]
                    q1, q2, q3 = statistics.quantiles(ratios, n=4)
                    rows.append(
                        {
                            "tokens": tokens,
                            "adapters": k,
                            "run": name,
                            "ratio_to_base": round(q2, 3),
                            "quartiles": [round(q1, 3), round(q3, 3)],
                        }
                    )
                    print(f"tokens {tokens:3}  K {k:3}  {name:10} {q2:6.3f} x base  [{q1:.3f}, {q3:.3f}]", flush=True)
    if args.json:
        machine = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": 1,
            "cpu": platform.machine(),
        }
        args.json.write_text(
            json.dumps({"machine": machine, "rounds": args.rounds, "batch_rows": ROWS, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
