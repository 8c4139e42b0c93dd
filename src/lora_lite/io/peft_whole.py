"""Modules trained whole in PEFT's layout (`modules_to_save`): full weights there, differences here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import AdapterConfig
from ..core.errors import FileError
from ..runtime.layers.kinds import extent
from ..runtime.layers.linear import is_conv1d
from ..runtime.layers.norm import read_norm
from ..runtime.layers.read import read_weight
from ..runtime.layers.tensors import bias_of, stored_weight
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
        module, found = modules[path], extent(modules[path])
        there = {k: p for k, p in module._parameters.items() if p is not None}
        if found is None or {k: p.shape for k, p in there.items()} != {k: t.shape for k, t in own.items()}:
            raise FileError(
                f"{where}: {path} holds { ({k: tuple(t.shape) for k, t in own.items()}) } in the file and "
                f"{ ({k: tuple(p.shape) for k, p in there.items()}) } in this model."
            )
        kind, d_in, d_out = found
        if kind == "norm":
            read_norm(module, path)
        targets[path] = make_target(path, d_in, d_out, whole_config(cfg).for_layer("bias" in own), kind)
        with torch.no_grad():
            new, old = own["weight"].float().cpu(), stored_weight(module).detach().float().cpu()
            change = new - old
            values[path] = {"lora_W": _matrix(change, module, kind, d_in, d_out)}
            if "bias" in own:
                values[path]["lora_b"] = own["bias"].float().cpu() - there["bias"].detach().float().cpu()
    return targets, values


def full_values(model: nn.Module, record: Record) -> dict[str, Tensor]:
    """Path of a parameter -> base + difference, of every module trained whole."""
    found: dict[str, Tensor] = {}
    for target in record.beside:
        module: Any = model.get_submodule(target.path)
        change = {k: tensor_on(module, stored_name(k, record.name)).detach().float() for k in target.specs}  # type: ignore[union-attr]
        w = stored_weight(module).detach()
        if target.kind == "linear":
            w = read_weight(module, target.path, torch.float32)
            new = w + change["lora_W"]
            new = new.mT if is_conv1d(module) else new
        else:
            new = w.float() + (change["lora_W"].mT if target.kind == "embedding" else change["lora_W"]).reshape(w.shape)
        found[f"{target.path}.weight"] = new.cpu().contiguous()
        bias = bias_of(module)
        if "lora_b" in change and bias is not None:
            found[f"{target.path}.bias"] = (bias.detach().float() + change["lora_b"]).cpu().contiguous()
        elif bias is not None:
            found[f"{target.path}.bias"] = bias.detach().float().cpu().contiguous()
    return found


def called(path: str, names: list[str]) -> bool:
    """PEFT's rule: the path of the module, or of one that holds it, ends with a name."""
    parts = path.split(".")
    above = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(p.endswith(name) for p in above for name in names)


def patterns(names: list[str]) -> tuple[str, ...]:
    """The names as patterns of `train_modules`."""
    return tuple(re.escape(name) for name in names)


def _matrix(change: Tensor, module: nn.Module, kind: str, d_in: int, d_out: int) -> Tensor:
    """(d_out, d_in) from the layout in which the layer stores its weight."""
    transposed = kind == "embedding" or is_conv1d(module)
    return change.mT if transposed else change.reshape(d_out, d_in)
