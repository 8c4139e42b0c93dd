"""Rows as the commands take them: wordmath, files, columns, the chat template, and a held-out part."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lora_lite as ll

from ..data.forms import Row, column_map, formed
from ..data.read import check_source, read_rows
from ..data.tokens import PLAIN, Prepared, Turns, tokenised
from ..demo.data import wordmath_rows
from ..demo.wordmath import Split
from . import _folder as folder
from ._base import length_of, positions_of


@dataclass(frozen=True, kw_only=True)
class RowFlags:
    """How rows are read and become tokens."""

    columns: tuple[str, ...] = ()
    """Names of columns that are called otherwise, such as: --columns prompt=question completion=answer."""
    template: Path | None = None
    """Chat template, a Jinja file; None: the tokenizer's, or "role: content" lines if it has none."""
    turns: Turns = "every"
    """Of a conversation, learn every turn of the assistant, or the last one."""
    max_length: int | None = None
    """Longest row in tokens; None: 1024, or what the model was made for if that is less."""
    truncation: Literal["keep_start", "keep_end"] = "keep_start"
    """What to keep of a longer row."""


class Reader:
    """Reads rows for one model: its tokenizer with the chat template that is used, and the longest row."""

    def __init__(self, args: RowFlags, tokenizer: Any, positions: int | None) -> None:
        self.args, self.tokenizer = args, tokenizer
        self.max_length = length_of(args.max_length, positions)
        self.columns = column_map(args.columns)
        self.chat = args.template is not None or bool(tokenizer.chat_template)
        if args.template is not None:
            tokenizer.chat_template = read_template(args.template)
        elif not tokenizer.chat_template:
            tokenizer.chat_template = PLAIN

    def rows(self, source: str, split: Split = "train", n: int | None = None, seed: int = 0) -> list[Row]:
        """The rows of wordmath (2,000 unless n is given), a file, standard input or a data set, in TRL's forms."""
        if source == "wordmath":
            return wordmath_rows(split, 2000 if n is None else n, seed)
        return formed(read_rows(source, n), self.columns, self.chat)

    def tokens(self, rows: Sequence[Row]) -> Prepared:
        """Their tokens, and what is to be said of them."""
        a = self.args
        made = tokenised(rows, self.tokenizer, self.max_length, a.turns, a.truncation)
        if not self.chat and any(isinstance(row.get("messages", row.get("prompt")), list) for row in rows):
            made.notes.append(
                "the tokenizer has no chat template: turns are written as 'role: content' lines (--template names one)"
            )
        return made

    def remarks(self, made: Prepared) -> list[str]:
        return made.remarks(self.max_length)


def reader_of(args: RowFlags, model: str) -> Reader:
    """The reader of a model, of which the tokenizer and the config are loaded."""
    from ..demo.data import load_tokenizer

    positions = positions_of(model)
    return Reader(args, load_tokenizer(model), positions)


def layout_of_run(given: Path | None, tokenizer: Any, adapter: Path | None) -> str:
    """The chat template for talking with an adapter: the one of a flag, the one by which turns read as the prompts of
    its run, the tokenizer's, or "role: content" lines."""
    if given is not None:
        return read_template(given)
    return folder.facts_of(adapter).get(folder.LAYOUT) or tokenizer.chat_template or PLAIN


def check_data(source: str) -> None:
    """Refuse a source that is not there before anything is loaded."""
    if source != "wordmath":
        check_source(source)


def read_template(path: Path) -> str:
    """The text of a template file.

    Raises:
        FileError: it cannot be read, or is no Jinja.
    """
    from jinja2 import Environment, TemplateSyntaxError

    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise ll.FileError(f"--template {path} cannot be read: {getattr(e, 'strerror', None) or e}.") from None
    try:
        plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", text)  # transformers' own tag
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except TemplateSyntaxError as e:
        raise ll.FileError(f"--template {path}:{e.lineno}: not Jinja ({e.message}).") from None
    return text


def held_out(rows: list[Row], wanted: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(rows to train on, rows to evaluate on): a share below 1, or at most so many rows and a tenth of all."""
    n = round(wanted * len(rows)) if wanted < 1 else min(int(wanted), len(rows) // 10)
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    held = set(order[:n])
    return [r for i, r in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]


def fingerprint(rows: Sequence[dict[str, Any]]) -> str:
    """A short hash of all tokens and labels, or of whole preference pairs: other data, another template or another mask
    give another one."""
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        decides = [row["input_ids"], row["labels"]] if "labels" in row else sorted(row.items())
        digest.update(json.dumps(decides).encode())
    return digest.hexdigest()
