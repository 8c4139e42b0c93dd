"""What stands before the text: the configs of prompts and prefixes, and prompts that start as words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import AdapterConfig, ConfigError
from ..core.errors import WeightError


@dataclass(frozen=True, kw_only=True)
class PrefixConfig(AdapterConfig):
    r: int = 20
    """Number of virtual tokens."""


@dataclass(frozen=True, kw_only=True)
class OnePromptConfig(PrefixConfig):
    def validate(self) -> None:
        super().validate()
        if self.rank_pattern:
            raise ConfigError(f"{type(self).__name__}.rank_pattern: one prompt stands before the whole model; set r.")


@dataclass(frozen=True, kw_only=True)
class PromptConfig(OnePromptConfig):
    start_tokens: tuple[int, ...] = ()
    """Token ids whose embeddings the prompt starts with, repeated up to r; none: r random rows of the vocabulary."""

    def validate(self) -> None:
        super().validate()
        if min(self.start_tokens, default=0) < 0:
            raise ConfigError(f"{type(self).__name__}.start_tokens are token ids, got {min(self.start_tokens)}.")


def words(model: Any, targets: Any, cfg: PromptConfig) -> Tensor:
    """(r, d) embeddings of the start tokens, or of random ones, in fp32."""
    table: Tensor = model.get_input_embeddings().weight.detach()
    if table.is_meta:
        raise WeightError("the prompt starts as words, and the embeddings are on the meta device: load them first.")
    if max(cfg.start_tokens, default=0) >= len(table):
        raise ConfigError(f"start_tokens: the vocabulary has {len(table)} tokens, got {max(cfg.start_tokens)}.")
    if cfg.start_tokens:
        ids = torch.tensor(cfg.start_tokens).repeat(-(-cfg.r // len(cfg.start_tokens)))[: cfg.r]
    else:
        ids = torch.randint(len(table), (cfg.r,), generator=targets[0].generator("words"))
    return table[ids.to(table.device)].float()
