"""QA-LoRA: LoRA on sums of groups of inputs."""

# torch leaves what these methods of a tensor return undeclared
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import ConfigError, Layer, ParamSpec, Variant, register
from ..ops.lowrank import lowrank_update
from ._lowrank import ScaledConfig


@dataclass(frozen=True, kw_only=True)
class QALoRAConfig(ScaledConfig):
    variant: str = "qa_lora"
    group: int = 0
    """G, the inputs that share a scale and a zero point in the quantised weight; 0: 16, or the largest divisor of d_in
    below."""

    def validate(self) -> None:
        super().validate()
        if self.group < 0:
            raise ConfigError(f"QALoRAConfig.group must not be negative, got {self.group}.")


@register
class QALoRA(Variant):
    """Quantisation-aware low-rank update: inputs of one quantisation group share their column of A.

    y' = y + s (x̄ Aᵀ) Bᵀ, x̄ (d_in/G) the sums over groups of G inputs, A (r, d_in/G) ~ U(±1/√(d_in/G)), B (d_out, r) =
    0: an exact zero is added at the start; s = alpha/r, or alpha/√r with `use_rslora`. r(d_in/G + d_out) parameters.
    Every group of a row changes by one number, so the update could go into the zero points of a group-wise quantised
    weight; `ll.merge` writes it into dense weights. PEFT multiplies the means by d_in/G instead of G, so that its A is
    another one (A G²/d_in). d_in + r(d_in/G + d_out) multiply-adds per token. Xu et al. 2023, QA-LoRA:
    Quantization-Aware Low-Rank Adaptation of Large Language Models, arXiv 2309.14717.
    """

    name = "qa_lora"
    config = QALoRAConfig
    paper = "2309.14717"
    family = "low rank"
    lr = 1e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: QALoRAConfig) -> dict[str, ParamSpec]:
        G = cfg.group or max(g for g in range(1, 17) if d_in % g == 0)
        if d_in % G:
            raise ConfigError(f"group={G} does not divide the {d_in} inputs of a layer; choose a divisor, or 0.")
        return {"lora_A": ParamSpec((cfg.r, d_in // G), init="kaiming"), "lora_B": ParamSpec((d_out, cfg.r))}

    @staticmethod
    def forward(layer: Layer[QALoRAConfig], x: Tensor, y: Tensor) -> Tensor:
        A = layer.lora_A
        groups: Tensor = layer.dropout(x).unflatten(-1, (A.shape[1], -1))
        return lowrank_update(y, groups.sum(-1), A, layer.lora_B, layer.cfg.scale)

    @staticmethod
    def factors(layer: Layer[QALoRAConfig]) -> tuple[Tensor, Tensor]:
        A = layer.lora_A
        return A.repeat_interleave(layer.in_features // A.shape[1], 1), layer.cfg.scale * layer.lora_B
