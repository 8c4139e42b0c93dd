"""Modules that an adapter trains whole beside its method (`train_modules`), and what a plan says of shared weights."""

from __future__ import annotations

import dataclasses

from torch import nn

from ...core.config import AdapterConfig, matches
from ...core.errors import TargetError, did_you_mean, listing
from ...core.registry import holder
from ..layers.kinds import dims, is_quantised
from ..model.site import adapter_attributes
from .structure import Place, Structure


def whole_config(cfg: AdapterConfig) -> AdapterConfig:
    """The config of the modules that `cfg` trains whole: that of the method which holds them, with the adapter's dtype
    and seed."""
    whole = holder("modules")
    return whole.config(variant=whole.name, dtype=cfg.dtype, seed=cfg.seed)


def whole_sites(model: nn.Module, structure: Structure, cfg: AdapterConfig, hits: dict[str, int]) -> list[Place]:
    """Every layer with parameters inside the modules that `train_modules` names; counts the modules in `hits`.

    Raises:
        TargetError: a pattern matches no module, a module without parameters, or one with a parameter outside of the
            layers that can be trained.
    """
    if not cfg.train_modules:
        return []
    sites = {s.path: s for s in structure.sites}
    modules = {path: m for path, m in model.named_modules() if path}
    found: dict[str, Place] = {}
    for pattern in cfg.train_modules:
        named = [path for path in modules if matches(pattern, path)]
        hits[f"train_modules {pattern!r}"] = len(named)
        if not named:
            tails = dict.fromkeys(part for p in modules for part in (p.rsplit(".", 1)[-1], p))
            raise TargetError(
                f"train_modules: {pattern!r} matches none of the {len(modules)} "
                f"modules.{did_you_mean(pattern, list(tails))} print(model) shows their names."
            )
        for path in named:
            inside = [p for p, m in modules.items() if (p == path or p.startswith(f"{path}.")) and _has_own(m)]
            strange = [p for p in inside if p not in sites or not _is_covered(sites[p])]
            if strange or not inside:
                what = (
                    "holds parameters that are no weight or bias of a linear layer, embedding, convolution or norm: "
                    f"{listing(strange)}"
                    if strange
                    else "has no parameters"
                )
                raise TargetError(
                    f"train_modules: {pattern!r} names {path!r}, which {what}. Name the layers inside it that can be "
                    "trained."
                )
            found |= {p: dataclasses.replace(sites[p], role="trained whole") for p in inside}
    return list(found.values())


def _own(module: nn.Module) -> set[str]:
    return {k for k, p in module._parameters.items() if p is not None} - adapter_attributes(module)


def _has_own(module: nn.Module) -> bool:
    return bool(_own(module)) or dims(module) is not None


def _is_covered(site: Place) -> bool:
    """Its parameters are a weight and a bias, so that a change of both is a change of everything."""
    return _own(site.module) <= {"weight", "bias"} or is_quantised(site.module)
