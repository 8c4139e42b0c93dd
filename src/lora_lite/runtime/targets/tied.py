"""Layers that share a weight with another: what a plan says of them, and where an embedding's tensors act too."""

from __future__ import annotations

import dataclasses

from torch import nn

from ...core.errors import listing
from ..layers.kinds import kind_named
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


def tied_places(structure: Structure, chosen: list[Place]) -> list[tuple[int, Place]]:
    """(number of a chosen embedding, layer that multiplies with the same weight)."""
    others = [s for s in structure.places if not kind_named(s.kind).by_number]
    return [
        (i, dataclasses.replace(other, role="tied"))
        for i, place in enumerate(chosen)
        if kind_named(place.kind).by_number
        for other in others
        if other.module._parameters.get("weight") is place.module._parameters.get("weight") is not None
    ]
