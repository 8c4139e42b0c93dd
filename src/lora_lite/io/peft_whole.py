"""Modules trained whole in PEFT's layout (`modules_to_save`): full weights there, differences here."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.config import AdapterConfig
from ..core.errors import FileError
from ..runtime.layers.kinds import kind_named, kind_of
from ..runtime.layers.read import read_weight
from ..runtime.layers.tensors import bias_of, stored_weight
from ..runtime.model.kind import Kind
from ..runtime.model.record import Record, Target
from ..runtime.model.site import stored_name, tensor_on
from ..runtime.targets.beside import whole_config
from ..runtime.targets.choose import make_target

Values = dict[str, dict[str, Tensor]]


def split_whole(
    names: list[str], modules: dict[str, nn.Module], tensors: dict[str, Tensor], prefix: str
) -> tuple[Values, dict[str, Tensor]]:
    """Path -> parameter name -> value of what lies inside a module called by one of `names`, and the other tensors."""
    whole: Values = {}
    rest: dict[str, Tensor] = {}
    for key, t in tensors.items():
        path, _, attribute = key.removeprefix(prefix).rpartition(".")
        if called(path, names) and path in modules and attribute in ("weight", "bias"):
            whole.setdefault(path, {})[attribute] = t
        else:
            rest[key] = t
    return whole, rest


def whole_targets(
    whole: Values, modules: dict[str, nn.Module], cfg: AdapterConfig, where: Path
) -> tuple[dict[str, Target], Values]:
    """Targets and their tensors: what the file holds minus what the model has.

    Raises:
        FileError: a module is no layer that can be trained whole, or its parameters are others than the file's.
    """
    targets: dict[str, Target] = {}
    values: Values = {}
    for path, own in whole.items():
        module = modules[path]
        kind = kind_of(module)
        there = {k: p for k, p in module._parameters.items() if p is not None}
        if kind is None or {k: p.shape for k, p in there.items()} != {k: t.shape for k, t in own.items()}:
            raise FileError(
                f"{where}: {path} holds { ({k: tuple(t.shape) for k, t in own.items()}) } in the file and "
                f"{ ({k: tuple(p.shape) for k, p in there.items()}) } in this model."
            )
        if strange := [k for k, t in own.items() if not t.is_floating_point()]:
            raise FileError(f"{where}: {path}.{strange[0]} holds {own[strange[0]].dtype}, expected floating numbers.")
        kind.inspect(module, path)
        _check_is_its_weight(kind, module, f"{where}: {path}")
        d_in, d_out = kind.size(module) or (0, 0)
        targets[path] = make_target(path, d_in, d_out, whole_config(cfg).for_layer("bias" in own), kind.name)
        change = {k: own[k].float().cpu() - there[k].detach().float().cpu() for k in own}
        values[path] = {"lora_W": kind.as_matrix(module, change["weight"])}
        if "bias" in own:
            values[path]["lora_b"] = change["bias"]
    return targets, values


def _check_is_its_weight(kind: Kind, module: nn.Module, where: str) -> None:
    """Raise where a change of the weight is not the same change of what the layer does."""
    if kind.replaceable and not kind.is_plain(module) and not kind.is_quantised(module):
        raise FileError(
            f"{where}: this {type(module).__name__} has a forward of its own, so this layout, which holds its whole "
            "weight, would mean something else. Keep it in this library's own format: ll.save."
        )


def full_values(model: nn.Module, record: Record) -> dict[str, Tensor]:
    """Path of a parameter -> base + difference, of every module trained whole."""
    found: dict[str, Tensor] = {}
    for target in record.beside:
        if vars(target.variant).get("holds") != "modules":
            continue
        module, kind = model.get_submodule(target.path), kind_named(target.kind)
        _check_is_its_weight(kind, module, target.path)
        change = {k: tensor_on(module, stored_name(k, record.name)).detach().float() for k in target.specs}  # type: ignore[union-attr]
        if kind.is_quantised(module):
            w = read_weight(module, target.path, torch.float32)
        else:
            w = kind.as_matrix(module, stored_weight(module).detach()).float()
        found[f"{target.path}.weight"] = kind.as_stored(module, w + change["lora_W"]).cpu().contiguous()
        bias = bias_of(module)
        if bias is not None:
            new = bias.detach().float() + change.get("lora_b", 0.0)
            found[f"{target.path}.bias"] = new.cpu().contiguous()
    return found


def called(path: str, names: list[str]) -> bool:
    """PEFT's rule: the path of the module, or of one that holds it, ends with a name."""
    parts = path.split(".")
    above = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(p.endswith(name) for p in above for name in names)


def patterns(names: list[str]) -> tuple[str, ...]:
    """The names as patterns of `train_modules`."""
    return tuple(re.escape(name) for name in names)
