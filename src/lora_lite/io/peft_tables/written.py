"""The other way: a method's tensors in the variables of its own PEFT type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...core.errors import StateError
from ...ops.orthogonal import shorten, skew
from ..adapted import Adapted, uniform
from .products import drawn

Layers = list[Adapted]


@dataclass
class Written:
    """An adapter in PEFT's variables."""

    config: dict[str, Any]
    """Fields of adapter_config.json, `peft_type` among them."""
    layers: dict[str, dict[str, Tensor]]
    """Path -> tensors by what stands behind the path."""
    shared: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Those of the whole model."""


def dora(layers: Layers) -> Written:
    """‖W‖ (1 + δ) itself; one rank, the scale in B."""
    r = max(layer.cfg.r for layer in layers)
    found = {}
    for layer in layers:
        A, B = padded(layer["lora_A"], layer.cfg.scale * layer["lora_B"], r)
        magnitude = layer["lora_norm"] * (1 + layer["lora_m"])
        names = lora_names(layer, A, B)
        if (kernel := names.get("lora_B.weight", A).dim() - 2) > 0:
            magnitude = magnitude.view(1, -1, *(1,) * kernel)
        found[layer.path] = {**names, "lora_magnitude_vector.weight": magnitude}
    return Written({"peft_type": "LORA", "r": r, "lora_alpha": r, "use_dora": True}, found)


def lora_names(layer: Adapted, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """A (r, d_in) and B (d_out, r) as PEFT stores them for this kind of layer.

    Raises:
        StateError: PEFT means something else by factors on such a layer.
    """
    if layer.kind.by_number:
        return {"lora_embedding_A": A, "lora_embedding_B": B}
    if getattr(layer.module, "groups", 1) != 1:
        raise StateError(f"{layer.path} is a convolution in groups, on which PEFT's LoRA reads all channels")
    kernel: tuple[int, ...] = () if layer.kind.plain_vectors else tuple(layer.kind.stored(layer.module).shape[2:])
    A = A.view(len(A), -1, *kernel) if kernel else A
    return {"lora_A.weight": A, "lora_B.weight": B.view(*B.shape, *(1,) * len(kernel))}


def padded(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Factors of rank r, with zeros behind."""
    n = r - A.shape[0]
    return torch.cat((A, A.new_zeros(n, A.shape[1]))), torch.cat((B, B.new_zeros(B.shape[0], n)), 1)


def alora(layers: Layers) -> Written:
    """LoRA with the token ids of its invocation."""
    text = uniform(layers, "positions")
    if not text.startswith("from:"):
        raise StateError(f"positions={text!r} is no invocation")
    r = max(layer.cfg.r for layer in layers)
    pairs = {x.path: padded(x["lora_A"], x.cfg.scale * x["lora_B"], r) for x in layers}
    tokens = [int(t) for t in text.removeprefix("from:").split(",")]
    config = {"peft_type": "LORA", "r": r, "lora_alpha": r, "alora_invocation_tokens": tokens, "task_type": "CAUSAL_LM"}
    return Written(config, {x.path: lora_names(x, *pairs[x.path]) for x in layers})


def ia3(layers: Layers) -> Written:
    """The gain itself; those of inputs are found by their layers' names."""
    found, inputs = {}, []
    for layer in layers:
        gain = 1 + layer["lora_g"]
        if getattr(layer.cfg, "side", "input") == "input":
            inputs.append(layer.path)
        found[layer.path] = {"ia3_l": gain[None] if layer.path in inputs else gain[:, None]}
    return Written({"peft_type": "IA3", "feedforward_modules": inputs}, found)


def bitfit(layers: Layers) -> Written:
    """The same bias."""
    return Written({"peft_type": "BEFT"}, {x.path: {"beft_bias": x["lora_b"][None]} for x in layers})


def hra(layers: Layers) -> Written:
    """Columns, the first of a pair and its difference added; an odd one meets its own start."""
    if uniform(layers, "side") != "input":
        raise StateError("PEFT's HRA reflects inputs only")
    found = {}
    for layer in layers:
        change, first = layer["lora_U"], layer["lora_U0"]
        if len(change) % 2:
            change = torch.cat((change[:-1], torch.zeros_like(change[:1]), change[-1:]))
        found[layer.path] = {"hra_u": (change + first.repeat_interleave(2, 0)).mT}
    r = {t["hra_u"].shape[1] for t in found.values()}
    if len(r) > 1:
        raise StateError(f"layers differ in r ({', '.join(map(str, sorted(r)))})")
    return Written({"peft_type": "HRA", "r": r.pop(), "apply_GS": False}, found)


def oft(layers: Layers) -> Written:
    """The exact map turns the other way; a bound is applied."""
    b, terms = uniform(layers, "block_size"), uniform(layers, "neumann_terms")
    found = {}
    for layer in layers:
        if layer.d_in % b:
            raise StateError(f"{layer.path} has {layer.d_in} inputs, and PEFT's blocks of {b} must fill them")
        theta, bound = layer["lora_Q"], layer.cfg.max_norm  # type: ignore[attr-defined]
        theta = theta if bound is None else shorten(theta, bound / 2**0.5)
        found[layer.path] = {"oft_R.weight": theta if terms else -theta}
    config = {"peft_type": "OFT", "r": 0, "oft_block_size": b, "use_cayley_neumann": bool(terms)}
    return Written({**config, **({"num_cayley_neumann_terms": terms} if terms else {})}, found)


def boft(layers: Layers) -> Written:
    """X with Q = −(X − Xᵀ)/2, and 1 + s."""
    b, m = uniform(layers, "block_size"), uniform(layers, "n_factors")
    found = {}
    for layer in layers:
        if layer.d_in % (b << (m - 1)):
            raise StateError(f"{layer.path} has {layer.d_in} inputs, no multiple of {b << (m - 1)}")
        X = torch.stack([-skew(layer[f"lora_Q{i}"], b) for i in range(1, m + 1)])
        found[layer.path] = {"boft_R": X, "boft_s": 1 + layer["lora_s"][:, None]}
    return Written({"peft_type": "BOFT", "boft_block_size": b, "boft_n_butterfly_factor": m}, found)


def road(layers: Layers) -> Written:
    """α itself; angles in the order of the outputs, group by group."""
    k, group = uniform(layers, "per_pair"), uniform(layers, "group_size")

    def theirs(t: Tensor) -> Tensor:
        g = t.view(k, -1, group // 2)
        if k < 4:
            return g.transpose(0, 1).flatten()
        return torch.stack((torch.stack((g[0], g[3]), 1), torch.stack((g[1], g[2]), 1)), 1).flatten()

    for layer in layers:
        if layer.d_out % group:
            raise StateError(f"{layer.path} has {layer.d_out} outputs, no multiple of group_size={group}")
    found = {x.path: {"road_theta": theirs(x["lora_theta"]), "road_alpha": 1 + theirs(x["lora_alpha"])} for x in layers}
    return Written({"peft_type": "ROAD", "variant": f"road_{k}", "group_size": group}, found)


def token_rows(layers: Layers) -> Written:
    """The rows themselves; one list of tokens."""
    lists = {tuple(layer["lora_ids"].tolist()) for layer in layers}
    if len(lists) > 1:
        raise StateError("layers train the rows of different tokens")
    found = {x.path: {"trainable_tokens_delta": trained_rows(x)} for x in layers}
    return Written({"peft_type": "TRAINABLE_TOKENS", "token_indices": list(lists.pop())}, found)


def trained_rows(layer: Adapted) -> Tensor:
    """The rows of the embedding with the change added."""
    return layer.stored.mT[layer["lora_ids"]] + layer["lora_rows"]


def whole(layers: Layers) -> Written:
    """The trained copy of the layer."""
    found = {}
    for layer in layers:
        new = layer.kind.as_stored(layer.module, layer.stored + layer["lora_W"])
        found[layer.path] = {"ln_tuning_layers.weight": new}
        if layer.bias is not None:
            found[layer.path]["ln_tuning_layers.bias"] = layer.bias + layer.tensors.get("lora_b", 0.0)
    return Written({"peft_type": "LN_TUNING"}, found)


def lokr(layers: Layers) -> Written:
    """The same factors where PEFT would factor the same matrices at one rank, else the two matrices."""
    factor, r = uniform(layers, "factor"), {layer.cfg.r for layer in layers}
    same = len(r) == 1 and all(_factored_alike(x) for x in layers)
    found = {}
    for layer in layers:
        t = {k.removeprefix("lora_W"): v for k, v in layer.tensors.items()}
        if not same:
            t = {k: t[k] if k in t else t[f"{k}_a"] @ t[f"{k}_b"] for k in ("1", "2")}
        first = "1_a" if "1_a" in t else "1"
        t[first] = t[first] * layer.cfg.scale
        found[layer.path] = {f"lokr_w{k}": v for k, v in t.items()}
    rank = r.pop() if same else max(max(x.d_in, x.d_out) for x in layers)
    both = same and any("lora_W1_a" in x.tensors for x in layers)
    config = {"peft_type": "LOKR", "r": rank, "alpha": rank, "decompose_factor": factor, "decompose_both": both}
    return Written(config, found)


def _factored_alike(layer: Adapted) -> bool:
    wide = layer["lora_W2"] if "lora_W2" in layer.tensors else None
    k, n = wide.shape if wide is not None else (len(layer["lora_W2_a"]), layer["lora_W2_b"].shape[1])
    return (wide is None) == (2 * layer.cfg.r < max(k, n))


def c3a(layers: Layers) -> Written:
    """The same kernels; blocks of another size by the layer's name."""
    sizes = {x.path: x["lora_w"].shape[-1] for x in layers}
    most = max(sizes.values())
    others = {path: b for path, b in sizes.items() if b != most}
    config = {"peft_type": "C3A", "block_size": most, "block_size_pattern": others, "init_weights": True}
    return Written(config, {x.path: {"c3a_kernel": x["lora_w"]} for x in layers})


def shira(layers: Layers) -> Written:
    """The same numbers at the same places."""
    found = {x.path: {"shira_weight": x["lora_values"], "shira_indices": x["lora_at"].int()} for x in layers}
    return Written({"peft_type": "SHIRA", "r": uniform(layers, "r"), "mask_type": "random"}, found)


def fourierft(layers: Layers) -> Written:
    """The same coefficients, in PEFT's order, where they stand at PEFT's places."""
    config = {"n_frequency": uniform(layers, "n"), "scaling": uniform(layers, "strength"), "random_loc_seed": SEED}
    found = {x.path: {"fourierft_spectrum": _in_order(x, drawn(x, x["lora_values"].numel(), SEED))} for x in layers}
    return Written({"peft_type": "FOURIERFT", **config}, found)


def waveft(layers: Layers) -> Written:
    """As `fourierft`, with the two mixed quadrants exchanged."""
    config = {"n_frequency": uniform(layers, "n"), "scaling": uniform(layers, "strength"), "random_loc_seed": SEED}
    found = {}
    for layer in layers:
        h, w = (layer.d_out + 1) // 2, (layer.d_in + 1) // 2
        i, j = drawn(layer, layer["lora_values"].numel(), SEED)
        at = torch.stack((i % h + h * (j >= w), j % w + w * (i >= h)))
        found[layer.path] = {"waveft_spectrum": _in_order(layer, at)}
    return Written({"peft_type": "WAVEFT", "wavelet_family": "db1", **config}, found)


SEED = 777
"""PEFT's own seed of places that no file holds."""


def _in_order(layer: Adapted, at: Tensor) -> Tensor:
    order = (at[0] * layer.d_in + at[1]).argsort()
    if not torch.equal(at[:, order], layer["lora_at"].long()):
        raise StateError("its coefficients stand at other places than PEFT draws")
    return torch.empty_like(layer["lora_values"]).index_copy(0, order, layer["lora_values"])


def deft(layers: Layers) -> Written:
    """P and R themselves."""
    how, r, s = uniform(layers, "projection"), uniform(layers, "r"), {x.cfg.scale for x in layers}
    if len(s) > 1:
        raise StateError("layers differ in their scale")
    scale, found = s.pop(), {}
    for layer in layers:
        P0 = layer["lora_P0"]
        T0 = P0.relu() if how == "relu" else torch.linalg.qr(P0).Q
        found[layer.path] = {"deft_P": P0 + layer["lora_P"], "deft_R": layer["lora_R"] + T0.mT @ layer.weight / scale}
    return Written({"peft_type": "DEFT", "r": r, "alpha": scale * r, "decomposition_method": how}, found)


def hira(layers: Layers) -> Written:
    """The same factors at one rank."""
    r = max(x.cfg.r for x in layers)
    found = {}
    for layer in layers:
        if not layer.kind.plain_vectors:
            raise StateError(f"{layer.path} is no linear layer")
        A, B = padded(layer["lora_A"], layer["lora_B"], r)
        found[layer.path] = {"hira_A": A, "hira_B": B}
    return Written({"peft_type": "HIRA", "r": r}, found)


def pvera(layers: Layers) -> Written:
    """The same; means before variances."""
    r = uniform(layers, "r")
    found = {x.path: {"pvera_lambda_d": x["lora_d"].flatten(), "pvera_lambda_b": x["lora_b"]} for x in layers}
    A, B = layers[0]["lora_A"], layers[0]["lora_B"]
    config = {"peft_type": "PVERA", "r": r, "save_projection": True, "projection_prng_key": 0}
    return Written(config, found, {"pvera_A": A.flatten(0, 1), "pvera_B": B})


def supertuning(layers: Layers) -> Written:
    """The same numbers at flat places; RoSA is Supra."""
    sizes = {x.path: (x.d_in * x.d_out, x["lora_values"].numel()) for x in layers}
    low, high = max(n / numel for numel, n in sizes.values()), min((n + 1) / numel for numel, n in sizes.values())
    sparsity = 1 - (low + high) / 2
    if any(int(numel * (1 - sparsity)) != n for numel, n in sizes.values()):
        raise StateError("layers train different shares of their weights")
    config: dict[str, Any] = {"peft_type": "SUPERTUNING", "sparsity": sparsity}
    found = {}
    r = max(len(x.tensors.get("lora_A", ())) for x in layers)
    for layer in layers:
        i, j = layer["lora_at"].long()
        t = {"supertuning_values": layer["lora_values"], "supertuning_indices": i * layer.d_in + j}
        if r:
            A, B = padded(layer["lora_A"], layer.cfg.scale * layer["lora_B"], r)
            t |= {"supertuning_lora_A.weight": A, "supertuning_lora_B.weight": B}
        found[layer.path] = t
    return Written(config | ({"r": r, "lora_alpha": r} if r else {}), found)


def poly(layers: Layers) -> Written:
    """Factors the other way round, those of the outputs with the scale beyond 1/r."""
    names = {"r": "r", "n_tasks": "tasks", "n_skills": "skills", "n_splits": "splits"}
    config = {theirs: uniform(layers, ours) for theirs, ours in names.items()}
    found = {}
    for x in layers:
        own = {"poly_lora_A": x["lora_A"].mT, "poly_lora_B": (x.cfg.scale * x.cfg.r) * x["lora_B"].mT}
        found[x.path] = own | {"poly_router.module_logits": x["lora_l"].flatten(1)}
    return Written({"peft_type": "POLY", **config}, found)


WRITERS: dict[str, Callable[[Layers], Written]] = {
    "dora": dora,
    "alora": alora,
    "ia3": ia3,
    "ia3_ff": ia3,
    "bitfit": bitfit,
    "hra": hra,
    "oft": oft,
    "boft": boft,
    "road": road,
    "token_rows": token_rows,
    "whole": whole,
    "lokr": lokr,
    "c3a": c3a,
    "shira": shira,
    "fourierft": fourierft,
    "waveft": waveft,
    "deft": deft,
    "hira": hira,
    "pvera": pvera,
    "supertuning": supertuning,
    "rosa": supertuning,
    "poly": poly,
}
"""Method -> how it is written; those of low rank need none."""
EVERYWHERE = ("LN_TUNING", "TRAINABLE_TOKENS", "LORA")
"""Types that stand on other layers than linear ones."""
TRANSPOSED = ("LORA", "IA3", "HIRA", "DEFT", "FOURIERFT", "WAVEFT", "PVERA", "LN_TUNING")
"""Types that know transformers' Conv1D."""
