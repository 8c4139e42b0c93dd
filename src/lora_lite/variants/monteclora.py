"""MonteCLoRA: LoRA whose first factor is drawn from a trained distribution while it trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import ConfigError, Layer, ParamSpec, register
from ..ops.lowrank import lowrank_update
from ._lowrank import LowRank, ScaledConfig


@dataclass(frozen=True, kw_only=True)
class MonteCLoRAConfig(ScaledConfig):
    variant: str = "monteclora"
    samples: int = 8
    """Number of draws that are mixed."""
    noise: float = 1e-4
    """Factor of the draws."""
    prior: float = 0.1
    """Concentration of the Dirichlet prior of the mixture."""
    kl: float = 1e-5
    """Share of the divergences from the priors in `ll.penalty`."""

    def validate(self) -> None:
        super().validate()
        if self.samples < 1 or min(self.noise, self.kl) < 0 or self.prior <= 0:
            raise ConfigError(
                f"MonteCLoRAConfig: samples={self.samples} begins at 1, noise={self.noise} and kl={self.kl} at 0, "
                f"prior={self.prior} is positive."
            )


@register
class MonteCLoRA(LowRank):
    """Bayesian LoRA: in training A is a mixture of Gaussian draws around its mean, whose spread is learned too.

    y' = y + s (drop(x) A'ᵀ) Bᵀ, in training A' = A + noise Σ_n p_n diag(√v) Z_n, Z_n ~ N(0, 1) (r, d_in), v = e^(2σ) ∘
    w, w the diagonal of a Wishart draw (χ² with r degrees), at least 1e-3; p = softmax(l − mean l + √c ∘ ε), the
    softmax of a Gaussian that stands for Dirichlet(e^l), c its variances. As Σ p_n Z_n is one Gaussian of variance Σ
    p_n², one Z is drawn, the same law. Afterwards A' = A, and merging folds that in. σ (r), l (n) ~ U(0, 1); A, B as in
    LoRA. `ll.penalty`: kl · (Dirichlet + Wishart + Gaussian divergence), the last as its mean over w; PEFT takes the
    last draw's, and its Dirichlet term has the sign of Σ log Γ turned. r(d_in + d_out + 1) + n parameters. The rate is
    LoRA's, a guess. Sengupta et al. 2024, Robust and Efficient Fine-tuning of LLMs with Bayesian Reparameterization of
    Low-Rank Adaptation, arXiv 2411.04358."""

    name = "monteclora"
    config = MonteCLoRAConfig
    paper = "2411.04358"
    family = "low rank"
    noisy = True
    lr = 1e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: MonteCLoRAConfig) -> dict[str, ParamSpec]:
        return {
            "lora_A": ParamSpec((cfg.r, d_in), init="kaiming"),
            "lora_B": ParamSpec((d_out, cfg.r)),
            "lora_sigma": ParamSpec((cfg.r,), init=_unit, decay=False),
            "lora_l": ParamSpec((cfg.samples,), init=_unit, decay=False),
        }

    @staticmethod
    def forward(layer: Layer[MonteCLoRAConfig], x: Tensor, y: Tensor) -> Tensor:
        A = layer.lora_A + drawn(layer).to(y.dtype) if layer.training else layer.lora_A
        return lowrank_update(y, layer.dropout(x), A, layer.lora_B, layer.cfg.scale)

    @staticmethod
    def penalty(layer: Layer[MonteCLoRAConfig]) -> Tensor:
        cfg, sigma, a = layer.cfg, layer.lora_sigma, layer.lora_l.exp()
        n, r, b = len(a), len(sigma), torch.full_like(a, cfg.prior)
        logs = torch.lgamma(a.sum()) - torch.lgamma(b.sum()) - (torch.lgamma(a) - torch.lgamma(b)).sum()
        dirichlet = logs + ((a - b) * (torch.digamma(a) - torch.digamma(a.sum()))).sum()
        v = (2 * sigma).exp()
        wishart = r / 2 * (v - 2 * sigma - 1).sum()
        log_w = torch.digamma(torch.full_like(v, r / 2)) + torch.log(torch.full_like(v, 2.0))
        gaussian = n / 2 * (r * v - 2 * sigma - log_w - 1).sum()
        return cfg.kl * (dirichlet + wishart + gaussian)


def drawn(layer: Layer[MonteCLoRAConfig]) -> Tensor:
    """noise · Σ_n p_n diag(√v) Z_n: (r, d_in), from torch's own generator."""
    A, sigma, logits = layer.tiny("lora_A"), layer.tiny("lora_sigma"), layer.tiny("lora_l")
    n, inverse = len(logits), (-logits).exp()
    c = (inverse * (1 - 2 / n) + inverse.sum() / n**2).clamp_min(1e-6)
    p = (logits - logits.mean() + c.sqrt() * torch.randn_like(logits)).softmax(-1)
    w = torch.randn(len(sigma), len(sigma), dtype=A.dtype, device=A.device).square().sum(0)
    v = ((2 * sigma).exp() * w).clamp_min(1e-3)
    return layer.cfg.noise * p.square().sum().sqrt() * v.sqrt()[:, None] * torch.randn_like(A)


def _unit(t: Tensor, g: torch.Generator) -> None:
    t.uniform_(generator=g)
