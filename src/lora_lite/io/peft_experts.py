"""Fused experts in PEFT's layout (`target_parameters`): lora_A (E·r, d_in) expert by expert, lora_B (d_out, r·E) with
the experts running fastest.

Where one module has several adapted parameters PEFT wraps it once for each, in the order in which they are registered:
the last one is found under the module's own path, the one before it under `base_layer`, and so on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import AdapterConfig
from ..core.errors import FileError, did_you_mean
from ..core.variant import Variant
from ..runtime.layers.bank import PREFIX, Bank, banks
from ..runtime.layers.read import known_kind
from ..runtime.model.record import Target
from ..runtime.targets.choose import make_target
from ..runtime.targets.structure import describe
from ..runtime.view.expert import matrix_views
from ..runtime.view.layer import LayerView
from .peft_whole import Values

WRAPPED = ".base_layer"
Pair = tuple[Tensor, Tensor]


def expert_factors(variant: type[Variant], views: list[LayerView]) -> dict[str, list[Pair]]:
    """Path of a bank -> (A (k, d_in), s B (d_out, k)) of every expert, on the CPU in fp32."""
    return {
        view.path: [
            tuple(t.detach().float().cpu() for t in variant.factors(one))  # type: ignore[misc]
            for one in matrix_views(view)
        ]
        for view in views
    }


def packed(model: nn.Module, factors: dict[str, list[Pair]], r: int) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors by PEFT's names, zero-padded to rank r; the names of the parameters for `target_parameters`)."""
    tensors: dict[str, Tensor] = {}
    names = []
    for path, pairs in factors.items():
        owner, parameter, depth = _place(model, path, list(factors))
        A = torch.cat([torch.cat((A, A.new_zeros(r - A.shape[0], A.shape[1]))) for A, _ in pairs])
        B = torch.stack([torch.cat((B, B.new_zeros(B.shape[0], r - B.shape[1])), 1) for _, B in pairs], 2)
        tensors[f"{owner}{WRAPPED * depth}.lora_A.weight"] = A.contiguous()
        tensors[f"{owner}{WRAPPED * depth}.lora_B.weight"] = B.flatten(1).contiguous()
        names.append(f"{owner}.{parameter}")
    return tensors, names


def _place(model: nn.Module, path: str, adapted: list[str]) -> tuple[str, str, int]:
    """(path of the experts' module, name of the parameter, number of wrappers around its own)."""
    owner, _, name = path.rpartition(".")
    mine = [p for p in model.get_submodule(owner)._parameters if f"{owner}.{PREFIX}{p}" in adapted]
    parameter = name.removeprefix(PREFIX)
    return owner, parameter, len(mine) - 1 - mine.index(parameter)


def unpacked(
    model: nn.Module, config: dict[str, Any], pairs: Values, cfg: AdapterConfig, folder: Path
) -> tuple[dict[str, Target], Values]:
    """Targets and lora_A (E, r, d_in), lora_B (E, d_out, r) of the fused experts of a file; takes them out of `pairs`.

    Raises:
        FileError: a name hits no fused experts, or the tensors do not fit.
    """
    wanted = _wanted(config, folder)
    if not wanted:
        return {}, {}
    chosen = _chosen(banks(model, describe(model).d_model), wanted, folder)
    targets: dict[str, Target] = {}
    values: Values = {}
    for path, bank in chosen.items():
        owner, _, depth = _place(model, path, list(chosen))
        pair = pairs.pop(f"{owner}{WRAPPED * depth}", {})
        if len(pair) != 2:
            raise FileError(f"{folder}: the file holds no lora_A and lora_B for {_name(path)}.")
        values[path] = _split(pair["lora_A"], pair["lora_B"], bank, config["r"], _name(path), folder)
        targets[path] = make_target(path, bank.d_in, bank.d_out, cfg, known_kind(bank).name, bank.n_experts)
    return targets, values


def _wanted(config: dict[str, Any], folder: Path) -> list[str]:
    wanted = config.get("target_parameters") or []
    if not isinstance(wanted, list) or not all(isinstance(n, str) and n for n in wanted):
        raise FileError(f"{folder}: target_parameters must be a list of names, got {wanted!r}.")
    return wanted


def _chosen(found: dict[str, Bank], wanted: list[str], folder: Path) -> dict[str, Bank]:
    """The banks that some name hits; each name must hit one."""
    hits = {n: [path for path in found if f".{_name(path)}".endswith(f".{n}")] for n in wanted}
    for n, paths in hits.items():
        if not paths:
            raise FileError(
                f"{folder}: target_parameters names {n!r}, which are no fused experts of this "
                f"model.{did_you_mean(n, [_name(path) for path in found])}"
            )
    return {path: bank for path, bank in found.items() if any(path in paths for paths in hits.values())}


def _name(path: str) -> str:
    """PEFT's name of a bank: the path of the parameter."""
    return path.replace(f".{PREFIX}", ".")


def _split(A: Tensor, B: Tensor, bank: Bank, r: int, name: str, folder: Path) -> dict[str, Tensor]:
    E = bank.n_experts
    if tuple(A.shape) != (E * r, bank.d_in) or tuple(B.shape) != (bank.d_out, r * E):
        raise FileError(
            f"{folder}: {name} is {E} x ({bank.d_in}->{bank.d_out}), but its factors of rank {r} are {tuple(A.shape)} "
            f"and {tuple(B.shape)}."
        )
    return {"lora_A": A.view(E, r, bank.d_in), "lora_B": B.view(bank.d_out, r, E).permute(2, 0, 1)}
