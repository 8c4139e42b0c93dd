"""LoKr, and KronA: an update that is a Kronecker product."""

# torch leaves what these methods of a tensor return undeclared
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Variant, register
from ..ops.lowrank import add_lowrank


@dataclass(frozen=True, kw_only=True)
class LoKrConfig(AdapterConfig):
    variant: str = "lokr"
    factor: int = -1
    """A width d splits into (factor, d/factor), or, where factor does not divide it, into the two numbers nearest √d of
    which the smaller one is at most factor; -1: nearest √d."""
    factored: bool | None = None
    """W2 = W2_a W2_b of rank r, or W2 as it is (KronA); None factors it where r is below half of its larger side."""
    factor_both: bool = False
    """W1 = W1_a W1_b too, where r is below half of its larger side."""

    def validate(self) -> None:
        super().validate()
        if self.factor != -1 and self.factor < 1:
            raise ConfigError(f"LoKrConfig.factor must be -1 or positive, got {self.factor}.")


@register
class LoKr(Variant):
    """Kronecker product of two small matrices (LoKr; with both unfactored: KronA).

    y' = y + s (W1 ⊗ W2) x with d_out = p k, d_in = m n, W1 (p, m) and W2 (k, n) = W2_a W2_b of rank r, s = alpha/r: x
    as (m, n) gives s W1 x W2ᵀ as (p, k), and the product is never built. W1 = 0, the others U(±1/√last dim): an exact
    zero is added at the start. pm + r(k + n) parameters. LyCORIS puts the smaller of two numbers first always (PEFT and
    this page: `factor` where it divides), starts from W2_b = 0 and takes s = 1 without factors. PEFT drops rows of the
    matrix instead of inputs. r(d_in + pm + d_out) multiply-adds per token, without factors p(d_in + n k). Yeh et al.
    2023, Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation, arXiv 2309.14859;
    Edalati et al. 2022, KronA: Parameter Efficient Tuning with Kronecker Adapter, arXiv 2212.10650.
    """

    name = "lokr"
    config = LoKrConfig
    paper = "2309.14859"
    family = "products"
    also = {"KronA": "factored=False"}
    lr = 1e-3
    width_growth = 0.5

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: LoKrConfig) -> dict[str, ParamSpec]:
        (p, k), (m, n) = split(d_out, cfg.factor), split(d_in, cfg.factor)
        second = cfg.factored if cfg.factored is not None else 2 * cfg.r < max(k, n)
        return {
            **matrix("lora_W1", p, m, cfg.r, cfg.factor_both and 2 * cfg.r < max(p, m), "zeros"),
            **matrix("lora_W2", k, n, cfg.r, second, "kaiming"),
        }

    @staticmethod
    def forward(layer: Layer[LoKrConfig], x: Tensor, y: Tensor) -> Tensor:
        specs = LoKr.param_specs(layer.in_features, layer.out_features, layer.cfg)
        W1 = layer.lora_W1 if "lora_W1" in specs else layer.once("W1", lambda: layer.lora_W1_a @ layer.lora_W1_b)
        z: Tensor = layer.dropout(x).unflatten(-1, (W1.shape[1], -1))
        if "lora_W2" in specs:
            right = layer.lora_W2
        else:
            z, right = z @ layer.lora_W2_b.mT, layer.lora_W2_a
        # one product of two matrices: torch's own choice would round otherwise where W1 is frozen
        columns: Tensor = (z.mT.flatten(0, -2) @ W1.mT).unflatten(0, z.mT.shape[:-1])
        rows: Tensor = y.unflatten(-1, (W1.shape[0], -1))
        return add_lowrank(rows, columns.mT, right, layer.cfg.scale).flatten(-2)


def matrix(name: str, rows: int, columns: int, r: int, factored: bool, start: str) -> dict[str, ParamSpec]:
    """`name`, or its factors `name_a` and `name_b`; `start` is that of the first."""
    if not factored:
        return {name: ParamSpec((rows, columns), init=start)}
    return {f"{name}_a": ParamSpec((rows, r), init=start), f"{name}_b": ParamSpec((r, columns), init="kaiming")}


def split(d: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is d."""
    if factor > 0 and d % factor == 0:
        return factor, d // factor
    bound = d if factor == -1 else factor
    small = max(i for i in range(1, int(d**0.5) + 1) if d % i == 0 and (i <= bound or i == 1))
    return small, d // small
