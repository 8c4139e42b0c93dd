"""Greedy answers to problems, and the loss on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.batches import batches
from ..data.tokens import closing_ids, prompt_ids
from .wordmath import Problem, extract_answer

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


@dataclass
class Answers:
    """What the model said to each problem, and the share of right final numbers."""

    accuracy: float
    completions: list[str]


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[dict[str, Any]]],
    batch_size: int = 50,
    max_new_tokens: int = 48,
    progress: Progress | None = None,
) -> list[str]:
    """Greedy completions of texts, or of turns in the chat template, in the order of `prompts`: batches of like length,
    padded on the left, up to the end token or the one that closes a turn."""
    import torch

    ids = [prompt_ids(prompt, tokenizer) for prompt in prompts]
    ends = closing_ids(tokenizer)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found = [""] * len(prompts)
    was_training = model.training
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(order), batch_size):
                part = order[start : start + batch_size]
                enc = tokenizer.pad({"input_ids": [ids[i] for i in part]}, return_tensors="pt").to(model.device)
                out = model.generate(
                    input_ids=enc["input_ids"],
                    attention_mask=enc["attention_mask"],
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=ends or None,
                )
                for i, text in zip(
                    part,
                    tokenizer.batch_decode(out[:, enc["input_ids"].shape[1] :], skip_special_tokens=True),
                    strict=True,
                ):
                    found[i] = text
                if progress is not None:
                    progress(min(start + batch_size, len(order)), len(order))
    finally:
        model.train(was_training)
        tokenizer.padding_side = side
    return found


def evaluate(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    batch_size: int = 50,
    max_new_tokens: int = 48,
    progress: Progress | None = None,
) -> Answers:
    """Exact match on the final number."""
    said = complete(model, tokenizer, [p.prompt for p in problems], batch_size, max_new_tokens, progress)
    right = sum(extract_answer(s) == p.answer for s, p in zip(said, problems, strict=True))
    return Answers(right / max(1, len(problems)), said)


def mean_loss(
    model: Any, rows: Sequence[dict[str, list[int]]], batch_size: int, pad: int, progress: Progress | None = None
) -> float:
    """Mean loss in nats per learned token."""
    import torch

    was_training = model.training
    model.eval()
    total, tokens, done = 0.0, 0, 0
    try:
        with torch.no_grad():
            for batch in batches(rows, batch_size, pad):
                batch = {k: v.to(model.device) for k, v in batch.items()}
                n = int((batch["labels"][:, 1:] != -100).sum())
                total += float(model(**batch).loss) * n
                tokens += n
                done += batch["input_ids"].shape[0]
                if progress is not None:
                    progress(done, len(rows))
    finally:
        model.train(was_training)
    return total / tokens if tokens else math.nan
