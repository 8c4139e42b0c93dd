"""`lora-lite eval`: accuracy and loss, with an adapter or of the bare base."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lora_lite as ll

from . import _session as session
from ._console import Bar, say, table


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure exact-match accuracy, loss and perplexity.

    An answer is right if its number after #### is; where the reference has none, if the whole completion agrees.
    """

    model: str = "demo"
    """demo (the bundled base), a local model directory, or a hub id."""
    data: str = "wordmath"
    """wordmath, or a JSONL file with text, prompt and completion, or messages."""
    adapter: Path | None = None
    """Adapter file, or a folder in PEFT's layout; None: the bare base."""
    base_check: Literal["error", "warn", "ignore"] = "error"
    """What to do if the adapter was trained on other base weights."""
    split: Literal["train", "validation", "test"] = "test"
    """Split of wordmath."""
    rows: int = 200
    """At most so many rows."""
    batch_size: int = 50
    """Rows per forward pass."""
    max_new_tokens: int = 48
    """Longest answer in tokens; 0: measure the loss only."""
    max_length: int = 512
    """Longest row in tokens, for the loss."""
    samples: int = 3
    """Answers to show beside the right ones."""
    seed: int = 0
    """Seed of the wordmath problems."""
    base_dtype: session.BaseDtype = "float32"
    """Storage of the base weights."""
    threads: int = 0
    """CPU threads; 0: torch's choice."""
    json: bool = False
    """Print one JSON object instead of text."""
    debug: bool = False
    """Show tracebacks and other libraries' messages."""


def run(args: Eval) -> int:
    if args.rows < 1 or args.batch_size < 1 or args.samples < 0 or args.max_new_tokens < 0:
        raise ll.ConfigError("--rows and --batch-size must be positive, --samples and --max-new-tokens 0 or more.")
    if args.data != "wordmath" and args.split != "test":
        raise ll.ConfigError(f"--split chooses a split of wordmath; {args.data} has none. Leave the flag out.")
    session.quiet(args.debug)
    from ..demo.data import load_examples
    from ..demo.evaluate import complete, mean_loss

    model, tokenizer = session.prepare(args.model, args.base_dtype, args.threads, args.seed)
    if args.adapter is not None:
        ll.load(model, args.adapter, base_check=args.base_check)
    examples = load_examples(args.data, args.split, args.rows, args.seed, tokenizer)
    result: dict[str, Any] = {
        "model": args.model,
        "adapter": None if args.adapter is None else str(args.adapter),
        "data": args.data,
        "rows": len(examples),
    }
    said: list[str] = []
    asked = [e for e in examples if e.prompt]
    if asked and args.max_new_tokens:
        with Bar("answering", len(asked)) as bar:
            said = complete(model, tokenizer, [e.prompt for e in asked], args.batch_size, args.max_new_tokens, bar.hook)
        result["accuracy"] = sum(map(right, said, (e.completion for e in asked))) / len(asked)
    rows = session.encoded(examples, tokenizer, args.max_length)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    with Bar("loss", len(rows)) as bar:
        result["loss"] = mean_loss(model, rows, args.batch_size, pad, bar.hook)
    result["perplexity"] = math.exp(min(result["loss"], 700.0))
    if args.json:
        samples = [{"prompt": e.prompt, "answer": s, "right": e.completion} for e, s in zip(asked, said, strict=False)]
        print(json.dumps({**result, "samples": samples[: args.samples]}))
        return 0
    shown = [
        (k, f"{v:.1%}" if k == "accuracy" else f"{v:.4f}" if isinstance(v, float) else v) for k, v in result.items()
    ]
    table(("what", "value"), [(k, "the bare base" if v is None else v) for k, v in shown])
    show_samples([(e.prompt, s, e.completion) for e, s in zip(asked, said, strict=False)][: args.samples])
    return 0


def final_number(text: str) -> str | None:
    """The number after the first `####`, without thousands separators, as text."""
    found = re.search(r"####\s*(-?[\d,]*\.?\d+)", text)
    return found.group(1).replace(",", "") if found else None


def right(said: str, reference: str) -> bool:
    """Whether an answer agrees with its reference: on the number after ####, else wholly, but for outer white space."""
    number = final_number(reference)
    return final_number(said) == number if number is not None else said.strip() == reference.strip()


def show_samples(samples: list[tuple[str, str, str]]) -> None:
    """Question, the model's answer and the right one, each on one line."""
    for prompt, said, reference in samples:
        ok = right(said, reference)
        say()
        say(one_line(prompt, 400))
        say(f"  model  {one_line(said, 160)}", "green" if ok else "yellow")
        say(f"  right  {one_line(reference, 160)}")


def one_line(text: str, limit: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
