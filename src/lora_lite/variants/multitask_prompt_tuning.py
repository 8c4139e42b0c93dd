"""MPT: one prompt of all tasks, times a low-rank factor of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import ConfigError, Layer, ParamSpec, Variant, register
from ._prompt import PromptConfig, words


@dataclass(frozen=True, kw_only=True)
class MultitaskPromptTuningConfig(PromptConfig):
    variant: str = "multitask_prompt_tuning"
    tasks: int = 1
    """Number of tasks; with several, `ll.context(model, task_ids=...)` says that of each row."""
    ranks: int = 1
    """Rank k of a task's factor."""

    def validate(self) -> None:
        super().validate()
        if min(self.tasks, self.ranks) < 1:
            raise ConfigError(f"MultitaskPromptTuningConfig: tasks={self.tasks} and ranks={self.ranks} begin at 1.")


@register
class MultitaskPromptTuning(Variant):
    """Multitask prompt tuning: virtual tokens P shared by all tasks, times a rank-k factor of the row's task.

    model(x) = model([P_t; E x]) at the text's positions, P_t = P ∘ (U_t V_t), P (r, d) starts as words, U_t (r, k) and
    V_t (k, d) per task t, which `ll.context(model, task_ids=[0, 2, ...])` names for each row. U_t = 1/k and V_t = 1 +
    N(0, 0.02²), so that every task starts at the prompt: PEFT and the authors draw both from N(0, 0.02²), which begins
    four hundredths of a percent away from no prompt at all. The paper first distils P from prompts of source tasks:
    here that is `ll.load` and training on. r·d + tasks·k(r + d) parameters in all. Wang et al. 2023, Multitask Prompt
    Tuning Enables Parameter-Efficient Transfer Learning, arXiv 2303.02861."""

    name = "multitask_prompt_tuning"
    config = MultitaskPromptTuningConfig
    paper = "2303.02861"
    family = "before the text"
    also = {"MPT": ""}
    site = "attention"
    affine = False
    identity_bound = torch.inf
    ignores = ("alpha", "dropout")
    lr = 1e-2

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: MultitaskPromptTuningConfig) -> dict[str, ParamSpec]:
        return {}

    @staticmethod
    def shared_specs(targets: Any, cfg: MultitaskPromptTuningConfig) -> dict[str, ParamSpec]:
        d = targets[0].d_in
        return {
            "lora_P": ParamSpec((cfg.r, d), decay=False),
            "lora_U": ParamSpec((cfg.tasks, cfg.r, cfg.ranks), init=f"constant:{1 / cfg.ranks}", decay=False),
            "lora_V": ParamSpec((cfg.tasks, cfg.ranks, d), init=_around_one, decay=False),
        }

    @staticmethod
    def group_init(model: Any, targets: Any, cfg: MultitaskPromptTuningConfig, data: Any) -> None:
        targets[0].lora_P = words(model, targets, cfg)

    @staticmethod
    def tokens(layer: Layer[MultitaskPromptTuningConfig]) -> Tensor:
        each = layer.lora_P * (layer.lora_U @ layer.lora_V)
        return each[0] if layer.cfg.tasks == 1 else each[layer.context("task_ids")]


def _around_one(t: Tensor, g: torch.Generator) -> None:
    t.normal_(1, 0.02, generator=g)
