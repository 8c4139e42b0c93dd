"""One step of AdamW at the recommended rate, on a narrow layer and on a wide one."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...runtime.attach import attach
from ...runtime.schedule import schedule
from ..case import Case
from ..toy import Output, Toy, experts, toy
from .suite import check, full_precision, trains

NARROW, WIDE = 64, 1024
BATCH, LENGTH, CLASSES = 2, 2, 17
SLACK = 0.25
"""How far the exponent may lie from the declared one: a factor of two between the two widths."""


class Square(nn.Module):
    """One block of one linear layer d -> d, and a head."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(d, d))])
        self.head = nn.Linear(d, CLASSES, bias=False)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Output | Tensor:
        h = self.layers[0](x)
        if labels is None:
            return h
        logits = self.head(h)
        return Output(loss=F.cross_entropy(logits.flatten(0, -2), labels.flatten()), logits=logits)


@check("training", lambda case: trains(case) and full_precision(case) and case.bias)
def a_step_is_as_long_at_any_width(case: Case) -> None:
    """The outputs of the tokens that a first step was made on change, relative to their size, as width**p with the p
    that `width_growth` declares: 0 unless said otherwise."""
    declared = case.variant.width_growth
    narrow, wide = (first_step(case, d) for d in (NARROW, WIDE))
    p = math.log(wide / narrow) / math.log(WIDE / NARROW)
    case.expect(
        abs(p - declared) < SLACK,
        f"one step of AdamW at lr={case.variant.lr} changes the outputs by {narrow:.1e} at width {NARROW} and by "
        f"{wide:.1e} at width {WIDE}: it grows with the width to the power {p:.2f}, and width_growth is {declared}. "
        "Choose a start or a unit in which a step does not depend on the width.",
    )


def first_step(case: Case, d: int) -> float:
    """‖change of the outputs‖ / ‖outputs‖ on the tokens of a first step at the recommended rate."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = Square(d) if case.toy is Toy else toy(cls=case.toy, width=d)
        length = LENGTH if case.toy is Toy else 2 * LENGTH
        batches = [
            {"x": torch.randn(BATCH, length, d), "labels": torch.randint(0, CLASSES, (BATCH, length))} for _ in "ab"
        ]
    data: Any = batches
    if case.variant.needs_data == "adapters":
        data = experts(sizes={"layers.0.0": (d, d)})
    adapter = attach(model, case.cfg(), data if case.variant.needs_data else None)
    optimizer = torch.optim.AdamW(adapter.param_groups(lr=case.variant.lr, weight_decay=0.0), eps=1e-20)
    if case.variant.on_step is not None:
        schedule(model, optimizer, 4)
    with torch.no_grad():
        start = model(batches[0]["x"])
    model(**batches[0]).loss.backward()
    optimizer.step()
    with torch.no_grad():
        return float((model(batches[0]["x"]) - start).norm() / start.norm())
