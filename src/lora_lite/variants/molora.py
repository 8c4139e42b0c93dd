"""MoLORA: a mixture of LoRA experts behind a router, all of them or the best few."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import ConfigError, Layer, ParamSpec, Variant, register
from ..ops.lowrank import add_lowrank
from ._lowrank import ScaledConfig


@dataclass(frozen=True, kw_only=True)
class MoLORAConfig(ScaledConfig):
    variant: str = "molora"
    experts: int = 4
    """Number of pairs."""
    top: int = 0
    """Only so many experts act on a token (MixLoRA: 2); 0: all, by their weights (MoLORA, LoRAMoE)."""
    temperature: float = 1.0
    """The router's logits are divided by it."""
    balance: float = 0.0
    """Share in `ll.penalty` of a loss that keeps all experts in use (MixLoRA: 0.01)."""
    kinds: float = 0.0
    """δ of LoRAMoE's loss, which takes the place of the other: `ll.context(model, kinds=[0, 1, ...])` says of each row
    whether it is for the first half of the experts or the second, whose use counts 1 + δ then and 1 − δ otherwise."""

    def validate(self) -> None:
        super().validate()
        if self.balance < 0 or not 0 <= self.kinds < 1:
            raise ConfigError(f"MoLORAConfig: balance={self.balance} begins at 0, kinds={self.kinds} lies in [0, 1).")
        if self.experts < 2 or not 0 <= self.top <= self.experts or not 1e-3 <= self.temperature <= 1e3:
            raise ConfigError(
                f"MoLORAConfig: experts={self.experts} begins at 2, top={self.top} lies between 0 and experts, "
                f"temperature={self.temperature} between 0.001 and 1000."
            )


@register
class MoLORA(Variant):
    """Mixture of LoRA experts (MoLORA, LoRAMoE, MixLoRA): E low-rank pairs, weighed token by token by a router on the
    layer's input.

    y' = y + s Σ_e p_e B_e A_e drop(x), p = softmax(R x / T), of which the `top` largest are kept and add to 1; A (E, r,
    d_in) and R (E, d_in) kaiming, B (E, d_out, r) = 0, s = alpha/r. As in MoLORA (Zadouri et al. 2023, arXiv
    2309.05444) and LoRAMoE (2312.09979); top=2 is the router of MixLoRA (2404.15159) on each layer, without its experts
    over whole feed-forward networks. `balance` times E Σ_e f_e m_e joins `ll.penalty`, f_e the share of tokens that e
    acts on, over `top`, m_e its mean p (f = m where all act); with `kinds`, LoRAMoE's variance over mean of the load Z,
    Z of e and a row Σ p_e over its tokens, times 1 ± δ. E r(d_in + d_out) + E d_in parameters and multiply-adds: the
    experts that a token does not use are computed too."""

    name = "molora"
    config = MoLORAConfig
    paper = "2309.05444"
    family = "mixtures and tasks"
    also = {"LoRAMoE": "", "MixLoRA": "top=2"}
    affine = False
    lr = 2e-4

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: MoLORAConfig) -> dict[str, ParamSpec]:
        return {
            "lora_A": ParamSpec((cfg.experts, cfg.r, d_in), init="kaiming"),
            "lora_B": ParamSpec((cfg.experts, d_out, cfg.r)),
            "lora_R": ParamSpec((cfg.experts, d_in), init="kaiming"),
        }

    @staticmethod
    def forward(layer: Layer[MoLORAConfig], x: Tensor, y: Tensor) -> Tensor:
        cfg = layer.cfg
        p = (x @ layer.lora_R.mT / cfg.temperature).softmax(-1)
        chosen = p
        if cfg.top:
            least = p.topk(cfg.top, -1).values[..., -1:]
            chosen = (p >= least).to(p.dtype)
        if cfg.balance and layer.training:
            layer.add_penalty(cfg.balance * imbalance(layer, p, chosen))
        if cfg.top:
            p = p * chosen
            p = p / p.sum(-1, keepdim=True)
        z = layer.dropout(x) @ layer.lora_A.flatten(0, 1).mT
        z = z.view(*z.shape[:-1], cfg.experts, cfg.r)
        return add_lowrank(y, (p[..., None] * z).flatten(-2), layer.lora_B.transpose(0, 1).flatten(1), cfg.scale)


def imbalance(layer: Layer[MoLORAConfig], p: Tensor, chosen: Tensor) -> Tensor:
    """How unevenly the experts are used, 1 at the least (LoRAMoE's: 0), for p (..., E) before the choice."""
    cfg = layer.cfg
    if not cfg.kinds:
        used = chosen.flatten(0, -2).mean(0) / (cfg.top or 1)
        return cfg.experts * (used * p.flatten(0, -2).mean(0)).sum()
    second = torch.arange(cfg.experts, device=p.device) >= (cfg.experts + 1) // 2
    meant = layer.context("kinds").to(p.device)[:, None].bool() == second
    load = p.reshape(len(p), -1, cfg.experts).sum(1) * (1 + cfg.kinds * (2 * meant.to(p.dtype) - 1))
    return load.var(correction=0) / load.mean()
