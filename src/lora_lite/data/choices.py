"""Multiple choice: questions whose answers are compared by how likely a model finds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import FileError
from .batches import batches
from .forms import Message, column_map
from .read import read_rows
from .tokens import IGNORED, prompt_ids

QUESTIONS = ("prompt", "question", "instruction", "messages")


@dataclass(frozen=True)
class Choice:
    """One question."""

    prompt: str | list[Message]
    choices: list[str]
    right: int
    """Number of the right choice."""


def choices_in(source: str, limit: int | None, columns: Sequence[str] = ()) -> list[Choice]:
    """The questions of a file; empty where its first row has no `choices`.

    Raises:
        FileError: a row has no question, no choices, or an answer that is none of them; its place is named.
    """
    if source == "-":  # standard input is read once, by who knows its rows
        return []
    rows = read_rows(source, limit)
    if "choices" not in rows[0][0] and "choices" not in column_map(columns):
        return []
    names = column_map(columns)
    return [_choice({**row, **{to: row.get(name) for to, name in names.items()}}, where) for row, where in rows]


def _choice(row: dict[str, Any], where: str) -> Choice:
    prompt = next((row[name] for name in QUESTIONS if row.get(name)), None)
    choices: Any = row.get("choices")
    if isinstance(choices, dict) and isinstance(choices.get("text"), list):  # as in ARC
        labels, choices = choices.get("label"), choices["text"]
        row = {**row, "answer": _number_of(row.get("answer", row.get("answerKey")), labels)}
    if prompt is None or not isinstance(choices, list) or len(choices) < 2:
        raise FileError(f"{where}: a question needs {', '.join(QUESTIONS[:-1])} or messages, and choices, a list.")
    choices = [str(c) for c in choices]
    return Choice(prompt, choices, _right(row.get("answer", row.get("label")), choices, where))


def _number_of(answer: Any, labels: Any) -> Any:
    return labels.index(answer) if isinstance(labels, list) and answer in labels else answer


def _right(answer: Any, choices: list[str], where: str) -> int:
    """The number of the right choice, from a number, a letter or its text."""
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    text = str(answer).strip()
    number = ord(text.upper()) - ord("A") if len(text) == 1 and text.isalpha() else None
    if text.lstrip("-").isdigit() and not isinstance(answer, bool):
        number = int(text)
    if number is None or not 0 <= number < len(choices):
        raise FileError(f"{where}: answer {answer!r} is no number from 0, no letter and no text of the choices.")
    return number


def pick(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Choice],
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, int]]:
    """Per question the likeliest choice: by the sum of log-probabilities (`accuracy`) and by their mean per character
    (`accuracy_norm`), as EleutherAI's harness counts."""
    import torch

    found = []
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for done, question in enumerate(questions, 1):
                scores = _scores(model, tokenizer, question, batch_size)
                lengths = torch.tensor([max(1, len(c)) for c in question.choices])
                found.append({"accuracy": int(scores.argmax()), "accuracy_norm": int((scores / lengths).argmax())})
                if progress is not None:
                    progress(done, len(questions))
    finally:
        model.train(was_training)
    return found


def _scores(model: Any, tokenizer: Any, question: Choice, batch_size: int) -> Any:
    """The log-probability of every choice after the question."""
    import torch

    before = prompt_ids(question.prompt, tokenizer)
    glue = "" if not isinstance(question.prompt, str) or question.prompt[-1:].isspace() else " "
    rows = []
    for choice in question.choices:
        ids = list(tokenizer(glue + choice, add_special_tokens=False)["input_ids"])
        rows.append({"input_ids": before + ids, "labels": [IGNORED] * len(before) + ids})
    scores = []
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    for batch in batches(rows, batch_size, pad):
        batch = {k: v.to(model.device) for k, v in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        logs = model(**batch).logits[:, :-1].float().log_softmax(-1)
        taken = logs.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
        scores.append(torch.where(labels != IGNORED, taken, 0).sum(1).cpu())
    return torch.cat(scores)
