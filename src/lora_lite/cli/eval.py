"""`lora-lite eval`: accuracy and loss, with an adapter or of the bare base."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lora_lite as ll

from ..core.errors import did_you_mean
from ..data.choices import Choice, choices_in, pick
from . import _folder as folder
from ._base import BaseFlags, check_base, check_seed, load_base, quiet
from ._console import Bar, say, table
from ._rows import Reader, RowFlags, check_data, reader_of
from ._session import pad_of
from ._shown import one_line, prompt_text, right, taught

Answer = tuple[str, str, str]
"""Prompt, what the model said, what is right."""


@dataclass(frozen=True, kw_only=True)
class Eval(RowFlags, BaseFlags):
    """Measure exact-match accuracy, loss and perplexity.

    An answer is right if its number after #### is; where the reference has none, if the whole completion agrees.
    """

    model: str | None = None  # type: ignore[assignment]
    """demo, a local model directory, or a hub id; None: the one that the adapter's run was trained on, or demo."""
    data: str = "wordmath"
    """wordmath; a JSONL, JSON, CSV or Parquet file; - for JSONL on standard input; or a data set of the hub. Rows with
    choices (a list) and answer (number, letter or text) are multiple choice: the likeliest one counts."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-eval (EleutherAI's harness) by name instead of data, where that package is installed."""
    adapter: Path | None = None
    """Adapter file, the folder of a run, or a folder in PEFT's layout; None: the bare base."""
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
    samples: int = 3
    """Answers to show beside the right ones."""
    seed: int = 0
    """Seed of the wordmath problems."""
    json: bool = False
    """Print one JSON object instead of text."""


def run(args: Eval) -> int:
    check(args)
    quiet(args.debug)
    name = folder.model_of(args.model, args.adapter)
    args = with_template(args)
    if args.tasks:
        return run_tasks(args, name)
    reader = reader_of(args, name)
    if args.data != "wordmath" and (choices := choices_in(args.data, args.rows, args.columns)):
        return run_choices(args, name, reader, choices)
    rows = reader.rows(args.data, args.split, args.rows, args.seed)
    made = reader.tokens(rows)
    if not args.json:
        for line in reader.remarks(made):
            say(f"note: {line}")
    model, tokenizer = loaded(args, name)
    tokenizer.chat_template = reader.tokenizer.chat_template
    result: dict[str, Any] = {**heading(args, name), "rows": len(rows)}
    answers = answered(args, model, tokenizer, rows)
    if answers:
        result["accuracy"] = sum(right(said, reference) for _, said, reference in answers) / len(answers)
    result["loss"] = loss_of(args, model, tokenizer, made.rows)
    result["perplexity"] = math.exp(min(result["loss"], 700.0))
    show(args, result, answers[: args.samples])
    return 0


def loaded(args: Eval, name: str) -> tuple[Any, Any]:
    """(model, tokenizer), the adapter attached."""
    model, tokenizer = load_base(args, name, args.seed)
    if args.adapter is not None:
        ll.load(model, folder.adapter_path(args.adapter), base_check=args.base_check)
    return model, tokenizer


def heading(args: Eval, name: str) -> dict[str, Any]:
    """What is measured, and on what."""
    adapter = None if args.adapter is None else str(args.adapter)
    return {"model": name, "adapter": adapter, "data": " ".join(args.tasks) or args.data}


def run_choices(args: Eval, name: str, reader: Reader, choices: list[Choice]) -> int:
    """Multiple choice: the share of questions whose right answer is the likeliest one."""
    model, tokenizer = loaded(args, name)
    tokenizer.chat_template = reader.tokenizer.chat_template
    with Bar("choosing", len(choices)) as bar:
        picked = pick(model, tokenizer, choices, args.batch_size, bar.hook)
    n = len(choices)
    shares = {key: sum(p[key] == c.right for p, c in zip(picked, choices, strict=True)) / n for key in picked[0]}
    samples = [
        (prompt_text(c.prompt), c.choices[p["accuracy"]], c.choices[c.right])
        for c, p in zip(choices, picked, strict=True)
    ]
    show(args, {**heading(args, name), "rows": n, **shares}, samples[: args.samples])
    return 0


def run_tasks(args: Eval, name: str) -> int:
    """Tasks of EleutherAI's harness on the adapted model.

    Raises:
        ConfigError: it knows no such task.
    """
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    known = TaskManager()
    for task in args.tasks:
        if task not in known.all_tasks:
            raise ll.ConfigError(f"--tasks {task}: lm-eval has no such task.{did_you_mean(task, known.all_tasks)}")
    model, tokenizer = loaded(args, name)
    model.eval()
    served = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size)
    found = lm_eval.simple_evaluate(served, tasks=list(args.tasks), limit=args.rows, task_manager=known)
    plain = {
        task: {k.partition(",")[0]: v for k, v in figures.items() if isinstance(v, float)}
        for task, figures in found["results"].items()
    }
    if args.json:
        print(json.dumps({**heading(args, name), "results": plain}))
        return 0
    table(("task", "figure", "value"), [(t, k, f"{v:.4f}") for t, row in plain.items() for k, v in row.items()])
    return 0


def with_template(args: Any) -> Any:
    """The flags with the chat template of the adapter's run, where none is given."""
    kept = folder.facts_of(args.adapter).get("template")
    return dataclasses.replace(args, template=Path(kept)) if kept and args.template is None else args


def check(args: Eval) -> None:
    """Values that no later step would catch with a good sentence."""
    check_base(args)
    check_seed(args.seed)
    check_data(args.data)
    if args.rows < 1 or args.batch_size < 1 or args.samples < 0 or args.max_new_tokens < 0:
        raise ll.ConfigError("--rows and --batch-size must be positive, --samples and --max-new-tokens 0 or more.")
    if args.data != "wordmath" and args.split != "test":
        raise ll.ConfigError(f"--split chooses a split of wordmath; {args.data} has none. Leave the flag out.")
    if args.adapter is not None and not args.adapter.exists():
        raise ll.FileError(f"--adapter {args.adapter}: there is no such file or folder.")


def answered(args: Eval, model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> list[Answer]:
    """(prompt, the model's answer, the right one) of every row that asks something."""
    from ..data.forms import answer, question
    from ..demo import evaluate

    asked = [row for row in rows if question(row)]
    if not asked or not args.max_new_tokens:
        return []
    prompts = [question(row) for row in asked]
    with Bar("answering", len(asked)) as bar:
        said = evaluate.complete(model, tokenizer, prompts, args.batch_size, args.max_new_tokens, bar.hook)
    return [(prompt_text(p), s, taught(answer(row), tokenizer)) for p, s, row in zip(prompts, said, asked, strict=True)]


def loss_of(args: Eval, model: Any, tokenizer: Any, rows: list[dict[str, list[int]]]) -> float:
    """Mean loss per trained token."""
    from ..demo.evaluate import mean_loss

    with Bar("loss", len(rows)) as bar:
        return mean_loss(model, rows, args.batch_size, pad_of(tokenizer), bar.hook)


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
        return "none: the bare base" if key == "adapter" else "none"
    if isinstance(value, float):
        return f"{value:.1%}" if key.startswith("accuracy") else f"{value:.4f}"
    return value


def show_samples(samples: list[Answer]) -> None:
    """Question, the model's answer and the right one, each on one line."""
    for prompt, said, reference in samples:
        ok = right(said, reference)
        say()
        say(one_line(prompt, 400))
        say(f"  model  {one_line(said, 160)}", "green" if ok else "yellow")
        say(f"  right  {one_line(reference, 160)}")
