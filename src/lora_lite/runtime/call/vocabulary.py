"""A vocabulary that was resized under an adapter."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...core.errors import StateError
from ..model.state import SITE, ModelState

VOCABULARY = ("get_input_embeddings", "get_output_embeddings")


def vocabulary_of(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, int]:
    """Path -> rows of the weight, for those of these adapted modules that `resize_token_embeddings` would change."""
    resized = []
    for method in VOCABULARY:
        try:
            resized.append(getattr(model, method)())
        except (AttributeError, NotImplementedError):  # no language model
            continue
    return {
        path: module.weight.shape[0]  # type: ignore[union-attr]
        for path, module in modules.items()
        if any(module is m for m in resized) and getattr(module, "weight", None) is not None
    }


def watch_vocabulary(model: nn.Module, state: ModelState) -> None:
    """Raise when the vocabulary was resized under an adapter that acts on it.

    Raises:
        StateError: its tensors have the old number of rows, or the module was replaced and the adapter is gone from it.
    """
    for path, rows in state.vocabulary.items():
        module: Any = model.get_submodule(path)
        now = module.weight.shape[0]
        if SITE in module.__dict__ and now == rows:
            continue
        names = [r.name for r in state.records.values() if path in r.targets]
        if names:
            raise StateError(
                f"{path} has {now} rows and had {rows} when {', '.join(map(repr, names))} was attached to it: "
                "resize_token_embeddings leaves an adapter's tensors behind. Resize first, then attach: "
                f"ll.detach(model); model.resize_token_embeddings({now}); ll.attach(model, cfg). An adapter that does "
                "not act on the vocabulary may stay attached."
            )
