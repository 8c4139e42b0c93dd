"""An adapter on the vocabulary: resized under it, or multiplied with by somebody else than the head itself."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...core.errors import StateError
from ..model.site import Site
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


def await_head(model: nn.Module, state: ModelState) -> None:
    """Expect the head to be called in this training call, where an acting adapter stands on it."""
    site = _head_site(model)
    if site is not None and any(name in site.slots for name in _acting(state)):
        site.awaited = True


def check_head(model: nn.Module, state: ModelState) -> None:
    """Raise when the head was awaited, and the call multiplied with its weight without calling it.

    Raises:
        StateError: what stands on the head would train nothing.
    """
    site = _head_site(model)
    if site is None or not site.awaited:
        return
    site.awaited = False
    names = ", ".join(repr(name) for name in _acting(state) if name in site.slots)
    raise StateError(
        f"adapter {names} acts on {site.path!r}, which was not called: a fused head (TRL, Liger and cut cross-entropy "
        "have one) multiplies with its weight itself, so the adapter would neither act nor train. Leave the head out: "
        f"exclude_names=({site.path.rsplit('.', 1)[-1]!r},) for an adapter on it, train_modules without it, no token "
        "rows on embeddings that are tied to it. Or compute the loss from logits: transformers' Trainer with "
        "use_liger_kernel=False does."
    )


def _head_site(model: nn.Module) -> Site | None:
    """Where adapters stand on the output head; None where none does."""
    try:
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return None if head is None else head.__dict__.get(SITE)


def _acting(state: ModelState) -> list[str]:
    """The adapters that act on some row."""
    active, rows = state.here.now.selection[:2] if state.here.now.selection else state.choice()
    return [n for n, _ in active] if rows is None else [n for n in dict.fromkeys(rows.names) if n]
