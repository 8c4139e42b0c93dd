"""What people look at: rows as the model sees them, and answers side by side."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from ..data.forms import Row, answer, question
from ..data.tokens import IGNORED, Tokens
from ._console import say, stream, styled

LONGEST = 48
"""Tokens of an answer that is shown or scored."""


def show_tokens(rows: Sequence[Tokens], tokenizer: Any) -> None:
    """Each row as text, special tokens included; what is trained stands in green, or between « and » in a pipe."""
    for number, row in enumerate(rows, 1):
        learned = sum(label != IGNORED for label in row["labels"])
        say(f"row {number}: {len(row['input_ids'])} tokens, {learned} of them learned")
        pieces = []
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        for trained, part in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
            text = visible(tokenizer.decode([token for token, _ in part]))
            if not stream().isatty():
                text = f"«{text}»" if trained else text
            pieces.append((text, "green" if trained else "dim"))
        styled(pieces)


def visible(text: str) -> str:
    """Text with its line ends as \\n, on one line."""
    return text.replace("\r", "\\r").replace("\n", "\\n").replace("\t", "\\t")


def compare(model: Any, tokenizer: Any, rows: Sequence[Row], samples: int, score: int) -> dict[str, Any]:
    """Show what the base and the adapter answer to the same questions, and how many each has right where short answers
    can be compared; returns the same as plain data."""
    import lora_lite as ll

    from ..demo.evaluate import complete
    from ._console import Bar

    asked = [row for row in rows if question(row)]
    can_score = scorable(asked[:score], tokenizer)
    asked = asked[: max(samples, score if can_score else 0)]
    if not asked:
        return {}
    prompts = [question(row) for row in asked]
    references = [taught(answer(row), tokenizer) for row in asked]
    with Bar("answering", 2 * len(asked)) as bar:

        def said(selection: str | None) -> list[str]:
            done = 0 if selection is None else len(asked)
            with ll.active(model, selection):
                return complete(
                    model, tokenizer, prompts, max_new_tokens=LONGEST, progress=lambda n, _: bar.update(done + n)
                )

        before, after = said(None), said(next(iter(ll.adapters(model))))
    answers = list(zip(prompts, before, after, references, strict=True))
    for prompt, base, adapted, reference in answers[:samples]:
        say()
        say(one_line(prompt_text(prompt), 400))
        say(f"  base     {one_line(base, 160)}", "dim")
        say(f"  adapted  {one_line(adapted, 160)}", "green" if right(adapted, reference) else "yellow")
        say(f"  right    {one_line(reference, 160)}")
    names = ("prompt", "base", "adapted", "right")
    facts: dict[str, Any] = {"answers": [dict(zip(names, a, strict=True)) for a in answers[:samples]]}
    if can_score:
        scored = references[:score]
        hits = [sum(map(right, side, scored)) for side in (before, after)]
        say()
        say(f"right answers: {hits[0]} of {len(scored)} before, {hits[1]} of {len(scored)} after")
        facts |= {"accuracy_before": hits[0] / len(scored), "accuracy": hits[1] / len(scored)}
    return facts


def scorable(rows: Sequence[Row], tokenizer: Any) -> bool:
    """Whether agreeing with the answers of these rows means something: short ones, or ones with a number after ####."""
    references = [answer(row) for row in rows]
    return bool(rows) and all(
        final_number(r) is not None or len(tokenizer(r, add_special_tokens=False)["input_ids"]) <= LONGEST
        for r in references
    )


def prompt_text(prompt: Any) -> str:
    """A prompt for people: the text, or the last turn of a conversation."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def taught(reference: str, tokenizer: Any) -> str:
    """A reference as the model could say it: special tokens that close it are never shown in an answer."""
    ids = tokenizer(reference, add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids)
    return tokenizer.decode(ids, skip_special_tokens=True) if special & set(ids) else reference


def final_number(text: str) -> str | None:
    """The number after the first `####`, without thousands separators, as text."""
    found = re.search(r"####\s*(-?[\d,]*\.?\d+)", text)
    return found.group(1).replace(",", "") if found else None


def right(said: str, reference: str) -> bool:
    """Whether an answer agrees with its reference: on the number after ####, else wholly, but for outer white space."""
    number = final_number(reference)
    return final_number(said) == number if number is not None else said.strip() == reference.strip()


def one_line(text: str, limit: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
