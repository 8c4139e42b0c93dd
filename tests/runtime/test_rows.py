"""Rows of a batch in models whose calls hold more than one tensor."""

from __future__ import annotations

import torch
from torch import nn

import lora_lite as ll
from lora_lite.testing.case import randomise


class Flattening(nn.Module):
    """Flattens (batch, tokens, d) before its layer, and takes a table of another length beside the input."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(12, 20)

    def forward(self, x, table=None):
        return self.up(x.flatten(0, 1)).view(*x.shape[:2], -1) + (0 if table is None else table.sum())


def test_the_batch_is_that_of_the_first_tensor():
    torch.manual_seed(0)
    model, x = Flattening(), torch.randn(4, 3, 12)
    for i, name in enumerate("ab"):
        ll.attach(model, ll.LoRAConfig(r=2, alpha=5), name=name)
        randomise(model, name, seed=i)
    alone = {}
    for name in ("a", "b", None):
        with ll.active(model, name):
            alone[name] = model(x)
    names = ["b", None, "a", "b"]
    with ll.rows(model, names):
        mixed = model(x, table=torch.zeros(5, 2))
    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i], alone[name][i])
