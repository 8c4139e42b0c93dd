"""MiSS's bat form: each row of blocks of the weight is multiplied by a block of its own, and added to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Variant, register


@dataclass(frozen=True, kw_only=True)
class MiSSBatConfig(AdapterConfig):
    variant: str = "miss_bat"


@register
class MiSSBat(Variant):
    """Block affine transformation (MiSS's `bat` form): blocks of the weight times trained ones, plus these.

    W'_og = W_og (1 + M_o) + M_o over the r x r blocks of the weight, o counting those of the outputs and g those of the
    inputs, M (d_out/r, r, r) = 0 trained: W' is W bit for bit at the start. r must divide both widths; PEFT's default
    is 64. r d_out parameters, an update of full rank; alpha is not used. W' is made in every call, r d_in d_out
    multiply-adds, and the layer multiplies with it once. Kang and Yin 2024, MiSS: Revisiting the Trade-off in LoRA with
    an Efficient Shard-Sharing Structure, arXiv 2409.15371."""

    name = "miss_bat"
    config = MiSSBatConfig
    paper = "2409.15371"
    family = "with the weight"
    also = {"Bat": "", "Bone bat": ""}
    ignores = ("alpha", "dropout")
    lr = 2e-4
    width_growth = 0.5

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: MiSSBatConfig) -> dict[str, ParamSpec]:
        if d_in % cfg.r or d_out % cfg.r:
            raise ConfigError(
                f"r={cfg.r} does not divide a {d_in}->{d_out} layer; choose a divisor, or use rank_pattern."
            )
        return {"lora_M": ParamSpec((d_out // cfg.r, cfg.r, cfg.r))}

    @staticmethod
    def weight(layer: Layer[MiSSBatConfig], W: Tensor) -> Tensor:
        M, r = layer.lora_M.to(W.dtype), layer.cfg.r
        blocks = W.view(len(M), r, -1, r).transpose(1, 2)  # (d_out/r, d_in/r, r, r)
        change = blocks @ M[:, None] + M[:, None]
        return W + change.transpose(1, 2).reshape(W.shape)
