"""FRoD: layers that play one part share a basis, in which a diagonal and a few places beside it are trained."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Generator, Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Variant, register
from ..ops.linalg import eigenvectors, inverse, precise, thin_qr, thin_svd
from ..ops.sparse import sparse_product


@dataclass(frozen=True, kw_only=True)
class FRoDConfig(AdapterConfig):
    variant: str = "frod"
    sparse_rate: float = 0.01
    """Share of the d_in² places of S that are trained; at least one is."""
    ridge: float = 1e-3
    """What is added to each layer's part before it is inverted."""

    def validate(self) -> None:
        super().validate()
        if not (0 < self.sparse_rate <= 0.5 and 0 < self.ridge < 1e3):
            raise ConfigError(
                f"FRoDConfig: sparse_rate={self.sparse_rate} must lie in (0, 0.5], ridge={self.ridge} above 0."
            )


@register
class FRoD(Variant):
    """Full-rank sparse updates in a basis V that all layers of one name share.

    W_i = U_i diag(l_i) Vᵀ with V (d_in, d_in) from a joint decomposition of the layers with the same last two parts of
    their path, unit columns in U_i; y' = y + U_i (diag(Δl_i) + S_i) Vᵀ drop(x), Δl (d_in) and the entries of S, at
    places drawn once per name, trained from zero. PEFT computes the whole of W' x so, and departs at the start by
    rounding. alpha and r are not used. d_in + rate·d_in² parameters per layer, d_in² + d_in d_out multiply-adds: twice
    the base's. U and V are saved, so a file is larger than the layers. Bai et al. 2026, FRoD: Full-Rank Efficient
    Fine-Tuning with Rotational Degrees, AAAI 2026, doi 10.1609/aaai.v40i31.39813."""

    name = "frod"
    config = FRoDConfig
    paper = "10.1609/aaai.v40i31.39813"
    family = "shared or random bases"
    needs_weight = True
    ignores = ("r", "alpha")
    lr = 1e-3
    width_growth = 0.5

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: FRoDConfig) -> dict[str, ParamSpec]:
        return {
            "lora_l": ParamSpec((d_in,), decay=False),
            "lora_s": ParamSpec((_places(d_in, cfg),), decay=False),
            "lora_U": ParamSpec((d_out, d_in), init="empty", as_buffer=True),
        }

    @staticmethod
    def shared_specs(targets: Any, cfg: FRoDConfig) -> list[tuple[list[Any], dict[str, ParamSpec]]]:
        found: list[tuple[list[Any], dict[str, ParamSpec]]] = []
        for group in _by_name(targets, "d_in"):
            d = group[0].d_in
            square = ParamSpec((d, d), init="empty", as_buffer=True)
            n = _places(d, cfg)
            places = ParamSpec((2, n), init=_draw(d), as_buffer=True, dtype=torch.int64, below=d)
            found.append((group, {"lora_V": square, "lora_at": places}))
        return found

    @staticmethod
    def group_init(model: Any, targets: Any, cfg: FRoDConfig, data: Any) -> None:
        for group in _by_name(targets, "in_features"):
            V = _joint([precise(layer.weight) for layer in group], cfg.ridge)
            group[0].lora_V, across = V, inverse(V).mT
            for layer in group:
                Y = precise(layer.weight) @ across
                layer.lora_U = Y / Y.square().sum(0).sqrt().clamp_min(1e-12)

    @staticmethod
    def forward(layer: Layer[FRoDConfig], x: Tensor, y: Tensor) -> Tensor:
        z = layer.dropout(x) @ layer.lora_V
        rows, columns = layer.lora_at
        S = sparse_product(z, layer.lora_s, rows, columns, layer.in_features).to(z.dtype)
        return y + (S + z * layer.lora_l) @ layer.lora_U.mT


def _places(d: int, cfg: FRoDConfig) -> int:
    return max(1, min(int(d * d * cfg.sparse_rate), d * (d - 1)))


def _draw(d: int) -> Any:
    """Distinct places off the diagonal, rows ascending."""

    def fill(t: Tensor, g: Generator) -> None:
        drawn = torch.randperm(d * (d - 1), generator=g)[: t.shape[1]].sort().values
        rows, columns = drawn // (d - 1), drawn % (d - 1)
        t.copy_(torch.stack((rows, columns + (columns >= rows))))

    return fill


def _by_name(targets: Any, width: str) -> list[list[Any]]:
    """The targets with the same last two parts of their path and the same d_in; numbers in a path do not count."""

    def name(target: Any) -> tuple[str, int]:
        path: str = target.path
        return ".".join([part for part in path.split(".") if not part.isdigit()][-2:]), getattr(target, width)

    return [list(group) for _, group in groupby(sorted(targets, key=name), key=name)]


def _joint(weights: list[Tensor], ridge: float) -> Tensor:
    """V (d_in, d_in) of a hierarchical joint decomposition of weights with the same d_in."""
    stacked = torch.cat(weights)
    d = stacked.shape[1]
    if len(stacked) < d:  # the right singular vectors, completed
        _, _, Vh = thin_svd(torch.cat((stacked, stacked.new_zeros(d - len(stacked), d))))
        return Vh.mT
    Q, R = thin_qr(stacked)
    parts = torch.split(Q, [len(W) for W in weights])
    eye = ridge * torch.eye(d, dtype=R.dtype, device=R.device)
    mean = torch.stack([inverse(part.mT @ part + eye) for part in parts]).mean(0)
    return R.mT @ eigenvectors(mean)
