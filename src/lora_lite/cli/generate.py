"""`lora-lite generate`: answers to a file of prompts, as JSONL."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import lora_lite as ll

from ..data.forms import ALPACA, SPEAKERS, Message, column_map
from ..data.read import Located, read_rows
from . import _folder as folder
from ._base import BaseFlags, check_base, load_base, quiet
from ._console import Bar, say
from ._rows import RowFlags, check_data, reader_of
from .eval import with_template


@dataclass(frozen=True, kw_only=True)
class Generate(RowFlags, BaseFlags):
    """Answer the prompts of a file greedily: one JSON object a line, {"prompt": ..., "answer": ...}."""

    data: str
    """Rows with prompt (text or turns), messages or instruction; an answer that they hold is left out. - is JSONL on
    standard input."""
    model: str | None = None  # type: ignore[assignment]
    """demo, a local model directory, or a hub id; None: the one that the adapter's run was trained on, or demo."""
    adapter: Path | None = None
    """Adapter file, the folder of a run, or a folder in PEFT's layout; None: the bare base."""
    out: Path | None = None
    """JSONL file to write; None: standard output."""
    rows: int | None = None
    """At most so many rows."""
    batch_size: int = 16
    """Rows per forward pass."""
    max_new_tokens: int = 256
    """Longest answer in tokens."""
    json: bool = False
    """Print one JSON object, {"answers": [...]}, instead of a line for each."""


def run(args: Generate) -> int:
    check_base(args)
    if args.batch_size < 1 or args.max_new_tokens < 1:
        raise ll.ConfigError("--batch-size and --max-new-tokens must be positive.")
    check_data(args.data)
    if args.out is not None:
        folder.check_writable(args.out.parent)
    quiet(args.debug)
    from ..demo.evaluate import complete

    args = with_template(args)
    name = folder.model_of(args.model, args.adapter)
    reader = reader_of(args, name)
    columns = column_map(args.columns)
    prompts = [prompt_of(row, columns, reader.chat) for row in read_rows(args.data, args.rows)]
    model, tokenizer = load_base(args, name)
    tokenizer.chat_template = reader.tokenizer.chat_template
    if args.adapter is not None:
        ll.load(model, folder.adapter_path(args.adapter))
    with Bar("answering", len(prompts)) as bar:
        said = complete(model, tokenizer, prompts, args.batch_size, args.max_new_tokens, bar.hook)
    if args.json:
        answers = [{"prompt": p, "answer": s} for p, s in zip(prompts, said, strict=True)]
        print(json.dumps({"model": name, "adapter": str(args.adapter or "") or None, "answers": answers}))
        return 0
    lines = [json.dumps({"prompt": p, "answer": s}, ensure_ascii=False) for p, s in zip(prompts, said, strict=True)]
    if args.out is None:
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        return 0
    args.out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    say(f"{len(lines)} answers in {args.out}")
    return 0


def prompt_of(located: Located, columns: dict[str, str], chat: bool) -> str | list[Message]:
    """The question of a row as training asks it; a last turn by the assistant is what is asked for.

    Raises:
        FileError: the row asks nothing.
    """
    row, where = located
    row = {**row, **{target: row.get(source) for target, source in columns.items()}}
    turns = row.get("messages", row.get("conversations"))
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
        said = [turn_of(turn) for turn in turns]
        return said[:-1] if said[-1]["role"] == "assistant" else said
    if isinstance(row.get("prompt"), (str, list)) and row["prompt"]:
        return row["prompt"]
    if isinstance(row.get("instruction"), str):
        extra = row.get("input") or ""
        if not chat:
            return ALPACA[bool(extra)].format(instruction=row["instruction"], input=extra)
        return [{"role": "user", "content": f"{row['instruction']}\n\n{extra}" if extra else row["instruction"]}]
    raise ll.FileError(f"{where}: a row needs a prompt, messages or an instruction; it has {sorted(row)}.")


def turn_of(turn: Message) -> Message:
    """A turn, also one in ShareGPT's words."""
    if "from" not in turn:
        return turn
    return {"role": SPEAKERS.get(turn["from"], turn["from"]), "content": turn.get("value", "")}
