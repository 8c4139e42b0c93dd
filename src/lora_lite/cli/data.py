"""`lora-lite data`: the first rows of a file as the model will see them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

import tyro

import lora_lite as ll

from ._base import quiet
from ._console import say
from ._rows import RowFlags, check_data, reader_of
from ._shown import show_tokens


@dataclass(frozen=True, kw_only=True)
class Data(RowFlags):
    """Show rows as the model will see them: the chat template written out, and what is learned marked.

    A wrong template or mask is the most frequent fault of a training that nobody notices.
    """

    file: Annotated[str, tyro.conf.Positional] = "wordmath"
    """wordmath; a JSONL, JSON, CSV or Parquet file; - for JSONL on standard input; or a data set of the hub."""
    model: str = "demo"
    """demo, a local model directory, or a hub id; only its tokenizer and config are read."""
    rows: int | None = None
    """Rows to show; None: three, or all with --json."""
    json: bool = False
    """Print one JSON object: {"rows": [{"input_ids": [...], "labels": [...]}, ...]}."""
    debug: bool = False
    """Show tracebacks and other libraries' messages."""


def run(args: Data) -> int:
    if args.rows is not None and args.rows < 1:
        raise ll.ConfigError(f"--rows must be at least 1, got {args.rows}.")
    check_data(args.file)
    quiet(args.debug)
    reader = reader_of(args, args.model)
    made = reader.tokens(reader.rows(args.file, "train", args.rows if args.json else None))
    if args.json:
        print(json.dumps({"rows": made.rows}))
        return 0
    show_tokens(made.rows[: 3 if args.rows is None else args.rows], reader.tokenizer)
    longest = max((len(row["input_ids"]) for row in made.rows), default=0)
    say()
    say(f"{len(made.rows):,} rows, {sum(len(row['input_ids']) for row in made.rows):,} tokens, the longest {longest}")
    for line in reader.remarks(made):
        say(f"note: {line}")
    return 0
