"""Layers that share a weight with another: what a plan says of them, and where an embedding's tensors act too."""

from __future__ import annotations

import dataclasses

from torch import nn

from ...core.errors import TargetError, listing
from .structure import Place, Structure


def tied_notes(model: nn.Module, chosen: list[Place]) -> list[str]:
    """A sentence for each target whose weight another module uses too: the adapter changes the target's output
    alone."""
    users: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        w = module._parameters.get("weight")
        if w is not None:
            users.setdefault(id(w), []).append(path)
    mine = {s.path for s in chosen}
    notes = []
    for site in chosen:
        others = [
            p for p in users.get(id(site.module._parameters.get("weight")), []) if p != site.path and p not in mine
        ]
        if others:
            notes.append(
                f"{site.path} shares its weight with {listing(others)}, which stays as it is: only {site.path} is "
                "adapted"
            )
    return notes


def tied_sites(structure: Structure, chosen: list[Place]) -> list[tuple[int, Place]]:
    """(number of a chosen embedding, linear layer that shares its weight)."""
    linear = [s for s in structure.sites if s.kind == "linear"]
    return [
        (i, dataclasses.replace(other, role="tied"))
        for i, site in enumerate(chosen)
        if site.kind == "embedding"
        for other in linear
        if other.module._parameters.get("weight") is site.module._parameters.get("weight") is not None
    ]


def only_input_embedding(model: nn.Module, sites: list[Place]) -> list[Place]:
    """The sites without embeddings other than the input embedding (those of positions, say).

    Raises:
        TargetError: the model does not say which of several it is.
    """
    embeddings = [s for s in sites if s.kind == "embedding"]
    if len(embeddings) < 2:
        return sites
    get = getattr(model, "get_input_embeddings", None)
    try:
        module = get() if callable(get) else None
    except (NotImplementedError, AttributeError):
        module = None
    if not any(s.module is module for s in embeddings):
        raise TargetError(
            f"the model has {len(embeddings)} embeddings ({listing([s.path for s in embeddings])}) and does not say "
            "which one holds the tokens; name it in target_names."
        )
    return [s for s in sites if s.kind != "embedding" or s.module is module]
