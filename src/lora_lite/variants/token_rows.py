"""Token rows: a trained change of chosen rows of an embedding, and of the same rows of a tied head."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Variant, register


@dataclass(frozen=True, kw_only=True)
class TokenRowsConfig(AdapterConfig):
    variant: str = "token_rows"
    target_kinds: tuple[str, ...] = ("embedding",)
    token_ids: tuple[int, ...] = ()
    """The tokens whose rows are trained. Empty: the last r rows, where `resize_token_embeddings` puts new tokens."""
    side: Literal["input", "output"] = "input"
    """Rows of the matrix that reads one-hot tokens, or of the head that scores them; attach sets it for a tied head."""

    def validate(self) -> None:
        super().validate()
        if len(set(self.token_ids)) < len(self.token_ids) or min(self.token_ids, default=0) < 0:
            raise ConfigError(f"TokenRowsConfig.token_ids must be distinct and not negative, got {self.token_ids}.")


@register
class TokenRows(Variant):
    """Trained rows for k tokens: e' = e + Δ_t for a token t of the list, e otherwise; a tied head's logit of t gets Δ_t
    · h.

    Δ (k, d) = 0 and the list of tokens (k) is saved with it. k·d parameters however large the vocabulary; no dense V x
    d difference is built, forward or backward. A head that shares the embedding's weight has the same rows, so the same
    Δ acts there too and a merge writes it once; on linear layers it trains the columns of chosen inputs. PEFT's
    trainable_token_indices (TrainableTokens) is the same function.
    """

    name = "token_rows"
    config = TokenRowsConfig
    paper = "PEFT's TrainableTokens"
    family = "gains and biases"
    also = {"TrainableTokens": ""}
    ignores = ("alpha", "dropout")
    site = "embedding"
    lr = 1e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: TokenRowsConfig) -> dict[str, ParamSpec]:
        if cfg.side == "output":
            return {}  # the embedding owns them
        ids = cfg.token_ids or tuple(range(max(0, d_in - cfg.r), d_in))
        if max(ids) >= d_in:
            raise ConfigError(f"token_ids holds {max(ids)}, and there are {d_in} rows, 0 to {d_in - 1}.")
        return {
            "lora_rows": ParamSpec((len(ids), d_out)),
            "lora_ids": ParamSpec(
                (len(ids),), init=lambda t, _: t.copy_(torch.tensor(ids)), as_buffer=True, dtype=torch.int64, below=d_in
            ),
        }

    @staticmethod
    def tied(cfg: TokenRowsConfig) -> AdapterConfig:
        return dataclasses.replace(cfg, side="output")

    @staticmethod
    def forward(layer: Layer[TokenRowsConfig], x: Tensor, y: Tensor) -> Tensor:
        if layer.cfg.side == "output":
            return y.index_add(-1, layer.lora_ids, (x @ layer.lora_rows.mT).to(y.dtype))
        return y + x.index_select(-1, layer.lora_ids) @ layer.lora_rows
