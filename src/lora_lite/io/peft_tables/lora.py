"""LORA with its switches, and ADALORA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...core.errors import FileError, shown
from ...ops.svd import balanced_factors, bottom_svd
from ..peft_site import Reading, Site

REFUSED = {
    "layer_replication": "layers that PEFT copies: copy them in the model first, and merge the adapter in PEFT",
    "arrow_config": "a router over other adapters",
    "megatron_config": "Megatron's layers",
}
RESIDUAL = ("pissa", "olora", "corda", "lora_ga", "milora")
"""Starts for which PEFT takes the first product off the base weight."""
TRAINING = ("velora_config", "monteclora_config")
"""What changes the gradients alone, or draws around the factors while they are trained."""
Values = dict[str, Tensor]


def lora(site: Site) -> Reading:
    """A and B in the shapes of a layer's matrix, and what the switch that is set adds."""
    for name, what in REFUSED.items():
        if site.config.get(name):
            raise FileError(f"{name} is set, and {what}; it is not read.")
    _check_start(site)
    A, B = _factors(site)
    options: dict[str, Any] = {
        "r": A.shape[0],
        "alpha": site.number("lora_alpha", "alpha_pattern"),
        "use_rslora": site.flag("use_rslora"),
    }
    _check_rank(site, A.shape[0])
    extra = site.maybe("lora_B.bias")
    factor = options["alpha"] / (A.shape[0] ** 0.5 if options["use_rslora"] else A.shape[0])
    site.drop("lora_velora_", "lora_monteclora_")
    start: Callable[..., Reading] = _mica if str(site.config.get("init_lora_weights")).lower() == "mica" else _plain
    switch = next((f for name, f in SWITCHES.items() if site.config.get(name)), start)
    found = switch(site, A, B, options)
    found.same = found.same and not any(site.config.get(name) for name in TRAINING)
    found.bias = None if extra is None else factor * extra
    return found


def _factors(site: Site) -> tuple[Tensor, Tensor]:
    if "lora_embedding_A" in site.tensors:
        return site.take("lora_embedding_A"), site.take("lora_embedding_B")
    A, B = site.take("lora_A.weight").flatten(1), site.take("lora_B.weight").flatten(1)
    if getattr(site.module, "groups", 1) != 1:
        raise FileError(
            f"{site.path} is a convolution with groups={site.module.groups}, and PEFT's LoRA on it reads "
            "all channels in every group, which no weight of such a layer does. Merge the adapter in PEFT and load "
            "the merged model, or leave the layer out."
        )
    return (B.mT, A.mT) if site.transposed else (A, B)


def _check_start(site: Site) -> None:
    start = site.config.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(RESIDUAL):
        raise FileError(
            f"init_lora_weights={start!r} belongs to a base whose weights PEFT changed: the residual W - "
            "s B0 A0 of the start, which the folder does not hold. Save it in PEFT with "
            "path_initial_model_for_weight_conversion, which makes a plain LoRA of it."
        )


def _check_rank(site: Site, r: int) -> None:
    declared = site.number("r", "rank_pattern")
    if r != declared:
        raise FileError(f"{site.path} has rank {r} in the file and {declared} in adapter_config.json.")


def _plain(site: Site, A: Tensor, B: Tensor, options: dict[str, Any]) -> Reading:
    return Reading("lora", options, {"lora_A": A, "lora_B": B})


def _mica(site: Site, A: Tensor, B: Tensor, options: dict[str, Any]) -> Reading:
    """PEFT freezes B too."""
    return Reading("mica", options, {"lora_A": A, "lora_B": B})


def _dora(site: Site, A: Tensor, B: Tensor, options: dict[str, Any]) -> Reading:
    """The magnitude itself there, ‖W‖ (1 + δ) here."""
    name = next((n for n in site.tensors if n.startswith("lora_magnitude_vector")), "lora_magnitude_vector")
    norm = site.weight.norm(dim=1)
    gain = site.take(name).flatten() / norm.clamp_min(1e-20) - 1
    return Reading("dora", options, {"lora_A": A, "lora_B": B, "lora_m": gain, "lora_norm": norm})


def _qa_lora(site: Site, A: Tensor, B: Tensor, options: dict[str, Any]) -> Reading:
    """Means of groups times their number there, sums over √(their size) here."""
    group = site.count("qalora_group_size", default=16)
    A = A * (site.d_in / group**2)
    return Reading("qa_lora", {**options, "group": group}, {"lora_A": A, "lora_B": B})


def _kasa(site: Site, A: Tensor, B: Tensor, options: dict[str, Any]) -> Reading:
    """The base without its r smallest triplets, which PEFT takes off when it loads."""
    A0, B0 = balanced_factors(*bottom_svd(site.weight, A.shape[0]), 1.0)
    diagonal = site.take("lora_diag").flatten()
    options = {k: v for k, v in options.items() if k != "use_rslora"} | {"use_rslora": options["use_rslora"]}
    values = {"lora_A": A, "lora_B": B, "lora_values": diagonal, "lora_A0": A0, "lora_B0": B0}
    return Reading("kasa", options, values)


def _bd_lora(site: Site, A: Tensor, B: Tensor, options: dict[str, Any]) -> Reading:
    """The side whose factor is narrower than the layer is the block-diagonal one."""
    blocks = int(site.config["use_bdlora"].get("nblocks", 1))
    side = "A" if A.shape[1] < site.d_in else "B"
    if A.shape[1] == site.d_in and B.shape[1] == A.shape[0]:
        return _plain(site, A, B, options)
    return Reading("bd_lora", {**options, "blocks": blocks, "side": side}, {"lora_A": A, "lora_B": B})


def _alora(site: Site, A: Tensor, B: Tensor, options: dict[str, Any]) -> Reading:
    """From the last place on where the prompt holds these tokens."""
    tokens = site.config["alora_invocation_tokens"]
    if not isinstance(tokens, list) or not all(type(t) is int and t >= 0 for t in tokens):
        raise FileError(f"alora_invocation_tokens must be a list of token ids, got {shown(tokens)}.")
    positions = "from:" + ",".join(map(str, tokens))
    return Reading("alora", {**options, "positions": positions}, {"lora_A": A, "lora_B": B})


SWITCHES: dict[str, Callable[[Site, Tensor, Tensor, dict[str, Any]], Reading]] = {
    "use_dora": _dora,
    "use_qalora": _qa_lora,
    "kasa_config": _kasa,
    "use_bdlora": _bd_lora,
    "alora_invocation_tokens": _alora,
}
"""Field of adapter_config.json -> what it makes of A and B."""


def adalora(site: Site) -> Reading:
    """The triplets that are left; PEFT divides by their number and 1e-5."""
    A, B, E = site.take("lora_A"), site.take("lora_B"), site.take("lora_E").flatten()
    r = A.shape[0]
    alpha = site.number("lora_alpha") or r
    values = {"lora_A": A, "lora_B": B, "lora_E": E}
    return Reading("adalora", {"r": r, "alpha": alpha * r / (r + 1e-5), "target_r": r, "done": True}, values)


def token_rows(site: Site) -> Reading:
    """The rows themselves there, their difference from the base here."""
    rows = site.take(next(iter(site.tensors)))
    ids = site.option("token_indices") or _indices(site)
    if not isinstance(ids, list) or len(ids) != rows.shape[0]:
        raise FileError(f"{site.path} holds {rows.shape[0]} token rows for the tokens {ids!r}.")
    order = torch.tensor(ids)
    stored = site.kind.as_matrix(site.module, site.kind.stored(site.module)).detach().float().cpu()
    base = stored.mT[order]
    return Reading(
        "token_rows",
        {"token_ids": tuple(ids)},
        {"lora_rows": rows - base, "lora_ids": order},
    )


def _indices(site: Site) -> Any:
    found = site.option("trainable_token_indices")
    if isinstance(found, dict):
        return next((v for name, v in found.items() if site.match.named([name], site.path)), None)
    return found
