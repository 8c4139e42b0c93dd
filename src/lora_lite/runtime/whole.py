"""Modules that an adapter trains whole beside its method (`train_modules`), and what a plan says of shared weights."""

from __future__ import annotations

import dataclasses

from torch import nn

from ..core.config import AdapterConfig, matches
from ..core.errors import ConfigError, TargetError, did_you_mean, listing
from ..core.registry import variants
from . import weights
from .state import adapter_attributes
from .structure import Site, Structure


def whole_config(cfg: AdapterConfig) -> AdapterConfig:
    """The config of the modules that `cfg` trains whole: the method that declares it, with the adapter's dtype and seed."""
    holder = next((v for v in variants() if v.whole), None)
    if holder is None:
        raise ConfigError("train_modules: no registered method trains whole modules (none declares `whole = True`).")
    return holder.config(variant=holder.name, dtype=cfg.dtype, seed=cfg.seed)


def whole_sites(model: nn.Module, structure: Structure, cfg: AdapterConfig, hits: dict[str, int]) -> list[Site]:
    """Every layer with parameters inside the modules that `train_modules` names; counts the modules in `hits`.

    Raises:
        TargetError: a pattern matches no module, a module without parameters, or one with a parameter outside of the layers that can be trained.
    """
    if not cfg.train_modules:
        return []
    sites = {s.path: s for s in structure.sites}
    modules = {path: m for path, m in model.named_modules() if path}
    found: dict[str, Site] = {}
    for pattern in cfg.train_modules:
        named = [path for path in modules if matches(pattern, path)]
        hits[f"train_modules {pattern!r}"] = len(named)
        if not named:
            tails = dict.fromkeys(part for p in modules for part in (p.rsplit(".", 1)[-1], p))
            raise TargetError(
                f"train_modules: {pattern!r} matches none of the {len(modules)} modules.{did_you_mean(pattern, list(tails))} print(model) shows their names."
            )
        for path in named:
            inside = [p for p, m in modules.items() if (p == path or p.startswith(f"{path}.")) and _has_own(m)]
            strange = [p for p in inside if p not in sites or not _is_covered(sites[p])]
            if strange or not inside:
                what = (
                    f"holds parameters that are no weight or bias of a linear layer, embedding, convolution or norm: {listing(strange)}"
                    if strange
                    else "has no parameters"
                )
                raise TargetError(
                    f"train_modules: {pattern!r} names {path!r}, which {what}. Name the layers inside it that can be trained."
                )
            found |= {p: dataclasses.replace(sites[p], role="trained whole") for p in inside}
    return list(found.values())


def tied_notes(model: nn.Module, chosen: list[Site]) -> list[str]:
    """A sentence for each target whose weight another module uses too: the adapter changes the target's output alone."""
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
                f"{site.path} shares its weight with {listing(others)}, which stays as it is: only {site.path} is adapted"
            )
    return notes


def tied_sites(structure: Structure, chosen: list[Site]) -> list[tuple[int, Site]]:
    """(number of a chosen embedding, linear layer that shares its weight)."""
    linear = [s for s in structure.sites if s.kind == "linear"]
    return [
        (i, dataclasses.replace(other, role="tied"))
        for i, site in enumerate(chosen)
        if site.kind == "embedding"
        for other in linear
        if other.module._parameters.get("weight") is site.module._parameters.get("weight") is not None
    ]


def only_input_embedding(model: nn.Module, sites: list[Site]) -> list[Site]:
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
            f"the model has {len(embeddings)} embeddings ({listing([s.path for s in embeddings])}) and does not say which one holds the tokens; name it in target_names."
        )
    return [s for s in sites if s.kind != "embedding" or s.module is module]


def _own(module: nn.Module) -> set[str]:
    return {k for k, p in module._parameters.items() if p is not None} - adapter_attributes(module)


def _has_own(module: nn.Module) -> bool:
    return bool(_own(module)) or weights.dims(module) is not None


def _is_covered(site: Site) -> bool:
    """Its parameters are a weight and a bias, so that a change of both is a change of everything."""
    return _own(site.module) <= {"weight", "bias"} or weights.is_quantised(site.module)
