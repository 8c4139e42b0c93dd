"""`lora-lite eval`: accuracy and loss, with an adapter or of the bare base."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lora_lite as ll

from . import _session as session
from ._console import Bar, say, table

if TYPE_CHECKING:
    from ..demo.data import Example

Answer = tuple[str, str, str]
"""Prompt, what the model said, what is right."""


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
    check(args)
    session.quiet(args.debug)
    from ..demo.data import load_examples

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
    answers = answered(args, model, tokenizer, examples)
    if answers:
        result["accuracy"] = sum(right(said, reference) for _, said, reference in answers) / len(answers)
    result["loss"] = loss_of(args, model, tokenizer, examples)
    result["perplexity"] = math.exp(min(result["loss"], 700.0))
    show(args, result, answers[: args.samples])
    return 0


def check(args: Eval) -> None:
    """Values that no later step would catch with a good sentence."""
    if args.rows < 1 or args.batch_size < 1 or args.samples < 0 or args.max_new_tokens < 0:
        raise ll.ConfigError("--rows and --batch-size must be positive, --samples and --max-new-tokens 0 or more.")
    if args.data != "wordmath" and args.split != "test":
        raise ll.ConfigError(f"--split chooses a split of wordmath; {args.data} has none. Leave the flag out.")


def answered(args: Eval, model: Any, tokenizer: Any, examples: list[Example]) -> list[Answer]:
    """(prompt, the model's answer, the right one) of every row that asks something."""
    from ..demo.evaluate import complete

    asked = [e for e in examples if e.prompt]
    if not asked or not args.max_new_tokens:
        return []
    with Bar("answering", len(asked)) as bar:
        said = complete(model, tokenizer, [e.prompt for e in asked], args.batch_size, args.max_new_tokens, bar.hook)
    return [(e.prompt, s, e.completion) for e, s in zip(asked, said, strict=True)]


def loss_of(args: Eval, model: Any, tokenizer: Any, examples: list[Example]) -> float:
    """Mean loss per trained token."""
    from ..demo.evaluate import mean_loss

    rows = session.encoded(examples, tokenizer, args.max_length)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    with Bar("loss", len(rows)) as bar:
        return mean_loss(model, rows, args.batch_size, pad, bar.hook)


def show(args: Eval, result: dict[str, Any], samples: list[Answer]) -> None:
    """A table and some answers, or one JSON object."""
    if args.json:
        told = [{"prompt": prompt, "answer": said, "right": reference} for prompt, said, reference in samples]
        print(json.dumps({**result, "samples": told}))
        return
    table(("what", "value"), [(k, cell(k, v)) for k, v in result.items()])
    show_samples(samples)


def cell(key: str, value: Any) -> Any:
    """A value as the table shows it."""
    if value is None:
        return "the bare base"
    if isinstance(value, float):
        return f"{value:.1%}" if key == "accuracy" else f"{value:.4f}"
    return value


def final_number(text: str) -> str | None:
    """The number after the first `####`, without thousands separators, as text."""
    found = re.search(r"####\s*(-?[\d,]*\.?\d+)", text)
    return found.group(1).replace(",", "") if found else None


def right(said: str, reference: str) -> bool:
    """Whether an answer agrees with its reference: on the number after ####, else wholly, but for outer white space."""
    number = final_number(reference)
    return final_number(said) == number if number is not None else said.strip() == reference.strip()


def show_samples(samples: list[Answer]) -> None:
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
