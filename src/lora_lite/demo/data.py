"""Training text from the word `wordmath`, or from any JSONL of `text`, `prompt`/`completion` or chat `messages`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import FileError
from .wordmath import Split, generate

IGNORED = -100
"""Label of tokens that do not count in the loss."""
BASE = Path(__file__).parent / "base"


@dataclass(frozen=True)
class Example:
    """One row: the completion is learned; an empty prompt means that all of the text is."""

    prompt: str
    completion: str


def model_path(name: str) -> str:
    """`demo` is the bundled base; anything else is a local folder or a hub id, returned as it is."""
    return str(BASE) if name == "demo" else name


def load_model(name: str = "demo", dtype: str = "float32") -> tuple[Any, Any]:
    """(model, tokenizer) of the bundled base ("demo"), a local folder or any hub id.

    The tokenizer pads on the left, and gets the end token for padding if it has none.

    Raises:
        FileError: nothing can be loaded under that name.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = model_path(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as e:
        raise FileError(
            f"no model can be loaded from {name!r}: {str(e).splitlines()[0]} Give 'demo', a local folder or a hub id."
        ) from None
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def load_examples(
    source: str, split: Split = "train", n: int | None = None, seed: int = 0, tokenizer: Any = None
) -> list[Example]:
    """The rows of `source`.

    Args:
        source: "wordmath", or the path of a JSONL file whose rows hold `text`, `prompt` and `completion`, or
            `messages`.
        split, seed: of wordmath.
        n: at most so many rows; 2,000 of wordmath by default.
        tokenizer: needed for `messages`: its chat template is used, or "role: content" lines if it has none.

    Raises:
        FileError: no such file, no rows, or a malformed row; file and line are named.
    """
    if source == "wordmath":
        return [Example(p.prompt, p.completion) for p in generate(split, 2000 if n is None else n, seed)]
    path = Path(source)
    if not path.is_file():
        raise FileError(
            f"{source!r} is neither 'wordmath' nor a file. Give a JSONL file with text, prompt/completion or messages."
        )
    examples = []
    with path.open(encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if n is not None and len(examples) >= n:
                break
            if line.strip():
                examples.append(_example(line, f"{path}:{number}", tokenizer))
    if not examples:
        raise FileError(f"{path} holds no rows.")
    return examples


def _example(line: str, where: str, tokenizer: Any) -> Example:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as e:
        raise FileError(f"{where}: not JSON ({e}).") from None
    if not isinstance(row, dict):
        raise FileError(f"{where}: a row is a JSON object, got {type(row).__name__}.")
    if "messages" in row:
        return _chat(row["messages"], where, tokenizer)
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return Example(row["prompt"], row["completion"])
    if isinstance(row.get("text"), str):
        return Example("", row["text"])
    raise FileError(
        f"{where}: a row needs the string 'text', the strings 'prompt' and 'completion', or the list 'messages'; it "
        f"has {sorted(row)}."
    )


def _chat(messages: Any, where: str, tokenizer: Any) -> Example:
    """All turns but the last are the prompt; the last, by the assistant, is learned."""
    good = (
        isinstance(messages, list)
        and messages
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
    )
    if not good:
        raise FileError(f"{where}: messages is a list of objects with the strings 'role' and 'content'.")
    if messages[-1]["role"] != "assistant":
        raise FileError(
            f"{where}: the last message is by {messages[-1]['role']!r}; it must be the assistant's, since that is "
            "what is learned."
        )
    if tokenizer is not None and getattr(tokenizer, "chat_template", None):
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        if whole.startswith(prompt):
            return Example(prompt, whole[len(prompt) :])
    lines = [f"{m['role']}: {m['content']}\n" for m in messages[:-1]]
    return Example("".join(lines) + "assistant:", " " + messages[-1]["content"])


def encode(example: Example, tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """`input_ids` and `labels`; prompt tokens are labelled -100. An end token is learned after the completion.

    A text that is too long is cut at its end, but a prompt is cut at its beginning, so that something is left to learn.
    """
    prompt = tokenizer(example.prompt, add_special_tokens=True)["input_ids"] if example.prompt else []
    completion = tokenizer(example.completion, add_special_tokens=not example.prompt)["input_ids"]
    if tokenizer.eos_token_id is not None and completion[-1:] != [tokenizer.eos_token_id]:
        completion = [*completion, tokenizer.eos_token_id]
    if prompt and prompt[-1] == tokenizer.eos_token_id:
        prompt = prompt[:-1]
    completion = completion[:max_length]
    prompt = prompt[max(0, len(prompt) + len(completion) - max_length) :]
    return {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}


def collate(rows: Sequence[dict[str, list[int]]], pad: int) -> dict[str, Any]:
    """Right-padded `input_ids`, `attention_mask` and `labels` as tensors."""
    import torch

    width = max(len(r["input_ids"]) for r in rows)

    def padded(key: str, value: int) -> Any:
        return torch.tensor([r[key] + [value] * (width - len(r[key])) for r in rows])

    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows])
    return {"input_ids": padded("input_ids", pad), "attention_mask": mask, "labels": padded("labels", IGNORED)}


def batches(rows: Sequence[dict[str, list[int]]], size: int, pad: int) -> Iterator[dict[str, Any]]:
    """Collated batches in order, for evaluation and calibration."""
    for start in range(0, len(rows), size):
        yield collate(rows[start : start + size], pad)
