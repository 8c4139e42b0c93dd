"""What `attach` would refuse is refused in files too."""

from __future__ import annotations

from collections.abc import Iterable

from ..model.record import Target
from .choose import check_place
from .structure import Structure


def check_loaded(structure: Structure, targets: Iterable[Target]) -> None:
    """Raise where a target of a file cannot act, or would act elsewhere too.

    Raises:
        TargetError: a layer that is never called as a module, one module at two paths, a kind of layer that the method
            cannot stand on.
    """
    places = {s.path: s for s in structure.places}
    for target in targets:
        if target.path in places and not target.tied:
            check_place(places[target.path], structure, target.cfg)
