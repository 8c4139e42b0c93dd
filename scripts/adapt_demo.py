"""Train one LoRA on wordmath and print the accuracy of base and adapter as a line of JSON: the proof of the bundled
base.

python scripts/adapt_demo.py --seed 0                      # this package's LoRA
python scripts/adapt_demo.py --seed 0 --library peft       # the same figures without this package's code
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from typing import Any

import torch

from lora_lite.data.batches import collate
from lora_lite.data.tokens import tokenised
from lora_lite.demo.data import load_model, wordmath_rows
from lora_lite.demo.evaluate import evaluate
from lora_lite.demo.wordmath import extract_answer, generate


def bucketed(rows: list[dict[str, list[int]]], size: int, seed: int) -> Iterator[list[dict[str, list[int]]]]:
    """Endless batches of rows of like length, in a seeded order."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(rows, len(rows))
        for start in range(0, len(order) - size * 16 + 1, size * 16):
            part = sorted(order[start : start + size * 16], key=lambda row: len(row["input_ids"]))
            batches = [part[i : i + size] for i in range(0, len(part), size)]
            rng.shuffle(batches)
            yield from batches


def adapted(model: Any, library: str, r: int, alpha: float, seed: int) -> tuple[Any, list[torch.nn.Parameter]]:
    """(model, its trained parameters): LoRA on every linear layer of the blocks."""
    if library == "peft":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        config = LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        return model, [p for p in model.parameters() if p.requires_grad]
    import lora_lite as ll

    return model, list(ll.attach(model, ll.LoRAConfig(r=r, alpha=alpha, seed=seed)).parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--library", choices=("lora-lite", "peft"), default="lora-lite")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the adapter, of the training problems and of their order"
    )
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rows", type=int, default=8000, help="different training problems")
    parser.add_argument("--problems", type=int, default=300, help="test problems, the same for every seed")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model, tokenizer = load_model(args.model)
    problems = generate("test", args.problems)
    base = evaluate(model, tokenizer, problems)
    rows = tokenised(wordmath_rows("train", args.rows, args.seed), tokenizer, 256).rows
    model, trained = adapted(model, args.library, args.r, args.alpha, args.seed)
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    warmup = max(1, args.steps // 20)
    model.train()
    wall, cpu = time.monotonic(), time.process_time()
    for step, batch in zip(range(args.steps), bucketed(rows, args.batch, args.seed), strict=False):
        lr = args.lr * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = model(**collate(batch, tokenizer.pad_token_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    after = evaluate(model, tokenizer, problems)
    right = [extract_answer(said) == p.answer for said, p in zip(after.completions, problems, strict=True)]

    def share(wanted: Any) -> float:
        chosen = [ok for ok, p in zip(right, problems, strict=True) if wanted(p)]
        return round(sum(chosen) / len(chosen), 3)

    facts = {
        "library": args.library,
        "seed": args.seed,
        "lr": args.lr,
        "steps": args.steps,
        "batch": args.batch,
        "threads": args.threads,
        "trained": sum(p.numel() for p in trained),
        "wall_s": round(wall, 1),
        "cpu_s": round(cpu, 1),
        "loss": round(loss.item(), 4),
        "problems": len(problems),
        "base": round(base.accuracy, 3),
        "adapter": round(after.accuracy, 3),
        "known_phrases": share(lambda p: not p.new_phrase),
        "new_phrases": share(lambda p: p.new_phrase),
        "by_steps": {n: share(lambda p, n=n: p.completion.count("=") == n) for n in (1, 2, 3)},
    }
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
