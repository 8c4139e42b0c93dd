"""Where the adapters of a model are at home: on the model itself, or on a module inside, as on the encoder of a
sentence-transformer."""

from __future__ import annotations

from torch import nn

import lora_lite as ll

from ..core.errors import StateError
from ..runtime.model.state import STATE, unwrap
from ..runtime.targets.structure import transformer_inside


def homes(model: nn.Module) -> list[nn.Module]:
    """The modules that adapters were attached to, the model itself or some inside."""
    return [module for module in unwrap(model).modules() if STATE in module.__dict__]


def trainable(model: nn.Module) -> list[tuple[nn.Module, ll.Adapter]]:
    """(home, handle) of every trainable adapter.

    Raises:
        StateError: two of them have one name, so that their files would overwrite each other.
    """
    found = [(home, handle) for home in homes(model) for handle in ll.adapters(home).values() if handle.trainable]
    names = [handle.name for _, handle in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise StateError(
            f"two modules inside the model have an adapter called {twice!r}; give them names of their own: "
            f"ll.rename(module, {twice!r}, 'tower')."
        )
    return found


def new_home(model: nn.Module) -> nn.Module:
    """Where a new adapter belongs: the transformer inside a container, where there is exactly one, else the model.

    Files then name their layers as the transformer does, so that it can load them alone.
    """
    return transformer_inside(model)[1]
