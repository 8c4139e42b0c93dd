"""S-steer: amplify the singular coordinates in which contrast pairs differ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core import ConfigError, Layer, ParamSpec, Role, Targets, Variant, register
from ..ops.linalg import precise, thin_svd
from ..ops.lowrank import add_lowrank
from ._steering import FittedConfig, check_difference, contrast


@dataclass(frozen=True, kw_only=True)
class SSteerConfig(FittedConfig):
    variant: str = "s_steer"
    target_roles: tuple[Role, ...] | None = ("writer",)
    """Layers that write to the residual stream, whose outputs' coordinates mean something to the blocks after them."""


@register
class SSteer(Variant):
    """Steering in the singular coordinates of a weight, fitted from contrast pairs.

    With the top r triplets of W = U S Vᵀ an output has the coordinates x_S = Uᵀ(y − b)/√S (they equal (V√S)ᵀ x), and y'
    = y + α (U√S)(δ_S ∘ x_S), δ_S = mean(x_S⁺) − mean(x_S⁻) over the rows of (positive batch, negative batch) pairs at
    their last token. √S cancels: y' = y + α U(δ_S ∘ Uᵀ(y − b)), so U (d_out, r) and δ_S (r) are all that is kept, and
    small r keeps the noise of 1/√S out of δ_S. U holds every column with the sign in which the rows' mean coordinate is
    positive: δ_S changes its sign with U and the update with it, so that signs as they come would push one machine's
    outputs forward and another's back. α is `strength` times the weight in `ll.active(model, {name: w})`. Acts on every
    token, is affine, so it can be merged. After the description of wassname's ssteer (2025), without gates; its code
    leaves the signs to chance, weighs by √S, normalises δ and takes all triplets, so strengths do not carry over.
    2r d_out multiply-adds per token.
    """

    name = "s_steer"
    config = SSteerConfig
    paper = "wassname 2025, ssteer"
    family = "interventions in the stream"
    ignores = ("alpha", "dropout")
    needs_weight = True
    needs_data = "pairs"
    identity_bound = math.inf

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: SSteerConfig) -> dict[str, ParamSpec]:
        if cfg.r > min(d_in, d_out):
            raise ConfigError(f"r = {cfg.r} is more than the {min(d_in, d_out)} singular values.")
        return {
            "lora_U": ParamSpec((d_out, cfg.r), init="empty", as_buffer=True),
            "lora_delta": ParamSpec((cfg.r,), init="empty", as_buffer=True),
        }

    @staticmethod
    def group_init(model: nn.Module, targets: Targets[SSteerConfig], cfg: SSteerConfig, calibration_data: Any) -> None:
        for view, positive, negative in contrast(targets, calibration_data, cfg.token):
            U, S = (t[..., : view.cfg.r] for t in thin_svd(precise(view.weight))[:2])
            if not bool(S[-1] > S[0] * torch.finfo(S.dtype).eps):
                raise ConfigError(f"{view.path}: its weight has a rank below r = {view.cfg.r}; lower r.")
            difference = positive.mean(0) - negative.mean(0)  # in which the bias cancels
            check_difference(view, difference)
            sides = (positive.mean(0) + negative.mean(0)).to(U)
            middle = sides if view.bias is None else sides - 2 * view.bias.to(U)
            left = torch.where(middle @ U < 0, -U, U)
            view.lora_U, view.lora_delta = left, difference.to(U) @ left / S.sqrt()

    @staticmethod
    def forward(layer: Layer[SSteerConfig], x: Tensor, y: Tensor) -> Tensor:
        Wx = y if layer.bias is None else y - layer.bias
        return add_lowrank(y, layer.cfg.strength * layer.lora_delta * (Wx @ layer.lora_U), layer.lora_U)
