"""Modules that an adapter trains whole beside its method: `train_modules`."""

from __future__ import annotations

import dataclasses

from torch import nn

from ...core.config import AdapterConfig, matches
from ...core.errors import TargetError, did_you_mean, listing
from ...core.registry import holder
from ..layers.linear import dims
from ..layers.read import is_quantised
from ..model.site import adapter_attributes
from .structure import Place, Structure


def whole_config(cfg: AdapterConfig) -> AdapterConfig:
    """The config of the modules that `cfg` trains whole: that of the method which holds them, with the adapter's dtype
    and seed."""
    whole = holder("modules")
    return whole.config(variant=whole.name, dtype=cfg.dtype, seed=cfg.seed)


def whole_places(model: nn.Module, structure: Structure, cfg: AdapterConfig, hits: dict[str, int]) -> list[Place]:
    """Every layer with parameters inside the modules that `train_modules` names; counts the modules in `hits`.

    Raises:
        TargetError: a pattern matches no module, a module without parameters, or one with a parameter outside of the
            layers that can be trained.
    """
    places = {s.path: s for s in structure.places}
    modules = {path: m for path, m in model.named_modules() if path}
    found: dict[str, Place] = {}
    for pattern in cfg.train_modules:
        named = _named_modules(pattern, list(modules))
        hits[f"train_modules {pattern!r}"] = len(named)
        for path in named:
            inside = [p for p, m in modules.items() if (p == path or p.startswith(f"{path}.")) and _has_own(m)]
            _check_inside(inside, places, pattern, path)
            found |= {p: dataclasses.replace(places[p], role="trained whole") for p in inside}
    return list(found.values())


def _named_modules(pattern: str, paths: list[str]) -> list[str]:
    """The modules that a pattern of `train_modules` matches; there must be one."""
    named = [path for path in paths if matches(pattern, path)]
    if not named:
        tails = dict.fromkeys(part for p in paths for part in (p.rsplit(".", 1)[-1], p))
        raise TargetError(
            f"train_modules: {pattern!r} matches none of the {len(paths)} "
            f"modules.{did_you_mean(pattern, list(tails))} print(model) shows their names."
        )
    return named


def _check_inside(inside: list[str], places: dict[str, Place], pattern: str, path: str) -> None:
    """Raise where a module holds nothing to train, or something that no change of weights and biases covers."""
    strange = [p for p in inside if p not in places or not _is_covered(places[p])]
    if inside and not strange:
        return
    what = "has no parameters"
    if strange:
        what = (
            "holds parameters that are no weight or bias of a linear layer, embedding, convolution or norm: "
            f"{listing(strange)}"
        )
    raise TargetError(
        f"train_modules: {pattern!r} names {path!r}, which {what}. Name the layers inside it that can be trained."
    )


def _own(module: nn.Module) -> set[str]:
    return {k for k, p in module._parameters.items() if p is not None} - adapter_attributes(module)


def _has_own(module: nn.Module) -> bool:
    return bool(_own(module)) or dims(module) is not None


def _is_covered(place: Place) -> bool:
    """Its parameters are a weight and a bias, so that a change of both is a change of everything."""
    return _own(place.module) <= {"weight", "bias"} or is_quantised(place.module)
