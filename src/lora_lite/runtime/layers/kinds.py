"""All kinds of layers. A new one is one file, and one word here or a call of `register_kind`."""

from __future__ import annotations

from torch import nn

from ...core.errors import ConfigError, did_you_mean
from ..model.kind import Kind
from .attention import Attention
from .block import Block
from .conv import Conv
from .embedding import Embedding
from .experts import Experts
from .linear import LINEAR
from .norm import NormKind
from .whole_module import WholeModule

ALL = (LINEAR, Experts(), Embedding(), Conv(), NormKind(), Block(), Attention(), WholeModule())
KINDS: dict[str, Kind] = {kind.name: kind for kind in ALL}
"""Name -> kind, in the order in which a module is asked for its kind."""
DEFAULT_KIND = LINEAR.name
"""What a file means that names none."""


def register_kind(kind: Kind) -> Kind:
    """Enter a kind of your own; it is asked first. `target_kinds=(name,)` chooses its layers."""
    others = {name: one for name, one in KINDS.items() if name != kind.name}
    KINDS.clear()
    KINDS.update({kind.name: kind, **others})
    return kind


def kind_named(name: str) -> Kind:
    """The kind called `name`; raises `ConfigError` with the nearest names otherwise."""
    if name not in KINDS:
        raise ConfigError(
            f"there is no kind of layer {name!r}.{did_you_mean(name, KINDS)} Known: {', '.join(sorted(KINDS))}."
        )
    return KINDS[name]


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module; None for one that no kind knows."""
    return next((kind for kind in KINDS.values() if kind.size(module) is not None), None)
