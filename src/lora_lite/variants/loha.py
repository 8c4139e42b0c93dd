"""LoHa: the Hadamard product of two low-rank products."""

from __future__ import annotations

from dataclasses import dataclass

from ..core import AdapterConfig, ParamSpec, register
from ._hadamard import Hadamard


@dataclass(frozen=True, kw_only=True)
class LoHaConfig(AdapterConfig):
    variant: str = "loha"


@register
class LoHa(Hadamard):
    """Elementwise product of two low-rank updates: rank up to r² for the price of 2r.

    y' = y + s ((B1 A1) ∘ (B2 A2)) x, A1, A2 (r, d_in), B1, B2 (d_out, r), s = alpha/r. A1 ~ U(±1/√d_in), B1, B2 ~
    U(±1/√r), A2 = 0: an exact zero is added at the start. 2r(d_in + d_out) parameters. The product is a plain low-rank
    update of rank r² with the factors A[(i, k)] = A1_i ∘ A2_k and B[:, (i, k)] = B1_i ∘ B2_k, computed so while that is
    cheaper than the dense matrix. PEFT builds the dense matrix always, and drops its rows instead of inputs. LyCORIS
    draws A1, A2 ~ N(0, 1), B2 ~ N(0, 0.1²) and starts from B1 = 0. Hyeon-Woo et al. 2021, FedPara: Low-rank Hadamard
    Product for Communication-Efficient Federated Learning, arXiv 2108.06098.
    """

    name = "loha"
    config = LoHaConfig
    paper = "2108.06098"
    family = "products"
    lr = 3e-3
    width_growth = 0.5

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: LoHaConfig) -> dict[str, ParamSpec]:
        return {
            "lora_A1": ParamSpec((cfg.r, d_in), init="kaiming"),
            "lora_B1": ParamSpec((d_out, cfg.r), init="kaiming"),
            "lora_A2": ParamSpec((cfg.r, d_in)),
            "lora_B2": ParamSpec((d_out, cfg.r), init="kaiming"),
        }
