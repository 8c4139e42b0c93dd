"""Rows as token ids and labels, made by TRL's SFTTrainer itself."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from ..core.errors import ConfigError, FileError
from .forms import Message, Row, answer

IGNORED = -100
"""Label of tokens that do not count in the loss."""
Turns = Literal["every", "last"]
Tokens = dict[str, list[int]]
"""`input_ids` and `labels` of one row."""
PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}assistant:{% generation %} {{ m['content'] }}"
    "{{ eos_token }}{% endgeneration %}{{ '\n' }}{% else %}{{ m['role'] }}: {{ m['content'] }}{{ '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""The template of tokenizers without one: "role: content" lines."""


@dataclass
class Prepared:
    """What became of the rows."""

    rows: list[Tokens]
    kept: list[int]
    """Index of each among the given rows."""
    cut: int = 0
    """Rows that lost tokens to the longest length, and kept some to learn."""
    lost: int = 0
    """Rows left out, since nothing to learn was left of them."""
    empty: int = 0
    """Rows whose answer is empty: they teach the end alone."""
    notes: list[str] = field(default_factory=list)
    """What TRL warned of."""

    def remarks(self, max_length: int | None) -> list[str]:
        """A sentence on everything that a user should know."""
        said = []
        if self.lost:
            said.append(f"{self.lost} rows are left out: --max-length {max_length} cuts off all of their answer")
        if self.cut:
            said.append(f"{self.cut} rows are cut to --max-length {max_length}")
        if self.empty:
            said.append(f"{self.empty} rows have an empty answer and teach the end token alone")
        return said + self.notes


def tokenised(
    rows: Sequence[Row],
    tokenizer: Any,
    max_length: int | None = None,
    turns: Turns = "every",
    truncation: Literal["keep_start", "keep_end"] = "keep_start",
) -> Prepared:
    """What SFTTrainer would train on: prompts are labelled -100, and so is everything but the assistant's turns.

    Args:
        rows: in TRL's forms, see `forms`.
        max_length: longest row; what `truncation` does not keep is cut, and rows without anything to learn left out.
        turns: of `messages`, learn every turn of the assistant, or the last.

    Raises:
        ConfigError: the tokenizer has no end token, or a wrong length.
        FileError: the chat template refuses the rows, or cannot mask earlier turns.
    """
    if max_length is not None and max_length < 2:
        raise ConfigError(f"--max-length must be at least 2, got {max_length}.")
    if tokenizer.eos_token is None:
        raise ConfigError("the tokenizer has no end token, so answers would never end; set tokenizer.eos_token.")
    with _warnings() as notes:
        whole = _whole(rows, tokenizer, turns)
    made = Prepared([], [], empty=sum(not answer(row).strip() for row in rows), notes=notes)
    keep = slice(None, max_length) if truncation == "keep_start" else slice(-(max_length or 0), None)
    for i, row in enumerate(whole):
        short = {name: ids[keep] for name, ids in row.items()}
        if all(label == IGNORED for label in short["labels"]):
            made.lost += 1
            continue
        made.cut += len(short["labels"]) < len(row["labels"])
        made.rows.append(short)
        made.kept.append(i)
    return made


def _whole(rows: Sequence[Row], tokenizer: Any, turns: Turns) -> list[Tokens]:
    """Every row uncut, in order. TRL takes rows of one form at a time."""
    found: list[Any] = [None] * len(rows)
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(tuple((k, type(v)) for k, v in sorted(row.items())), []).append(i)
    for places in groups.values():
        part = [rows[i] for i in places]
        if "messages" not in part[0]:
            made = _by_trl(part, tokenizer)
        elif turns == "last":
            made = _by_trl([_split(row, len(row["messages"]) - 1) for row in part], tokenizer)
        else:
            made = _every_turn(part, tokenizer)
        for i, row in zip(places, made, strict=True):
            found[i] = row
    return found


def _every_turn(rows: Sequence[Row], tokenizer: Any) -> list[Tokens]:
    """By the marks of the template where it has them or TRL knows a version that has; turn by turn otherwise."""
    try:
        return _by_trl(rows, tokenizer, assistant_only_loss=True)
    except ValueError as e:
        if isinstance(e, FileError):
            raise
    parts = [(i, k) for i, row in enumerate(rows) for k in _learned(row["messages"])]
    made = _by_trl([_split(rows[i], k) for i, k in parts], tokenizer)
    found: list[Tokens] = [{} for _ in rows]
    for (i, _), part in reversed(list(zip(parts, made, strict=True))):
        row = found[i]
        if not row:  # the last turn holds the whole conversation
            row.update(part)
            continue
        if row["input_ids"][: len(part["input_ids"])] != part["input_ids"]:
            raise FileError(
                "the chat template writes a turn otherwise once another follows, so earlier turns cannot be learned as "
                "they were said. Learn the last one: --turns last"
            )
        for at, label in enumerate(part["labels"]):
            if label != IGNORED:
                row["labels"][at] = label
    return found


def _learned(messages: Sequence[Message]) -> list[int]:
    """The turns of the assistant; one that opens a conversation answers nothing."""
    return [k for k, m in enumerate(messages) if m["role"] == "assistant" and k > 0] or [len(messages) - 1]


def _split(row: Row, k: int) -> Row:
    """The turns before k as the prompt of turn k."""
    others = {name: value for name, value in row.items() if name != "messages"}
    return {"prompt": row["messages"][:k], "completion": [row["messages"][k]], **others}


def _by_trl(rows: Sequence[Row], tokenizer: Any, assistant_only_loss: bool = False) -> list[Tokens]:
    """`input_ids` and `labels` as SFTTrainer prepares a data set. It is left as soon as that is done."""
    from datasets import Dataset, disable_progress_bars
    from jinja2 import TemplateError
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    disable_progress_bars()

    class Preparation(SFTTrainer):
        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            raise _Done(super()._prepare_dataset(*args, **kwargs))

    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            max_length=None,
            assistant_only_loss=assistant_only_loss,
            gradient_checkpointing=False,
            bf16=False,
            report_to=[],
        )
        try:
            trainer = Preparation(
                model=_stub(),
                args=args,
                data_collator=_no_batches,
                train_dataset=Dataset.from_list(list(rows)),
                processing_class=tokenizer,
            )
            made: Any = trainer.train_dataset
        except _Done as done:
            made = done.data
        except TemplateError as e:
            raise FileError(f"the chat template refuses these rows: {e}") from None
        except RuntimeError as e:
            raise FileError(f"TRL cannot prepare these rows: {str(e).splitlines()[0]}") from None
    return [_labelled(row) for row in made]


def _no_batches(rows: list[Any]) -> dict[str, Any]:
    """A collator that is never called: with one, the trainer looks for no padding token."""
    raise NotImplementedError


class _Done(Exception):
    """Carries the prepared rows out of the trainer's constructor."""

    def __init__(self, data: Any) -> None:
        super().__init__()
        self.data = data


def _labelled(row: Row) -> Tokens:
    """Older TRL masks in its collator: the masks stand beside the ids."""
    masks = [row[name] for name in ("completion_mask", "assistant_masks") if row.get(name) is not None]
    labels = row.get("labels")
    if labels is None:
        columns = zip(row["input_ids"], *masks, strict=True)
        labels = [token if all(bits) else IGNORED for token, *bits in columns]
    return {"input_ids": list(row["input_ids"]), "labels": list(labels)}


def _stub() -> Any:
    """The smallest model that a trainer accepts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, head_dim=4, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What TRL logs as warnings, instead of its lines on stderr."""
    found: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logger, handler = logging.getLogger("trl"), Collect(logging.WARNING)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def prompt_ids(prompt: str | Sequence[Message], tokenizer: Any, template: str | None = None) -> list[int]:
    """The tokens before an answer: text as it is, turns in the chat template (the tokenizer's where none is given) with
    its opening of the next answer."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    made = tokenizer.apply_chat_template(
        list(prompt), chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return list(made["input_ids"])


def closing_ids(tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the end token, and the one that closes a turn of the chat template."""
    ends = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        talk = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
        made = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=True)["input_ids"]
        special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
        last = next((token for token in reversed(made) if token in special), None)
        if last is not None and not tokenizer.decode(made[len(made) - made[::-1].index(last) :]).strip():
            ends.add(last)
    return sorted(ends - {None})
