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


def test_a_cache_position_before_the_tokens_is_no_batch():
    """transformers 4.56 passes (tokens,) first, and other models name their input as they like."""

    class Decoder(Flattening):
        main_input_name = "frames"

        def forward(self, cache_position=None, table=None, frames=None):
            return super().forward(frames)

    torch.manual_seed(0)
    model, x = Decoder(), torch.randn(4, 3, 12)
    ll.attach(model, ll.LoRAConfig(r=2, alpha=5), name="a")
    randomise(model, "a", seed=1)
    whole, none = model(frames=x), None
    with ll.active(model, None):
        none = model(frames=x)
    for before in ({"cache_position": torch.arange(6)}, {"table": torch.zeros(6, 2)}):
        with ll.rows(model, [None, "a"]):
            mixed = model(**before, frames=x)
        torch.testing.assert_close(mixed, torch.cat((none[:2], whole[2:])))

    class Plain(Flattening):
        def forward(self, cache_position, y):
            return super().forward(y)

    model = Plain()
    ll.attach(model, ll.LoRAConfig(r=2, alpha=5), name="a")
    randomise(model, "a", seed=1)
    with ll.rows(model, [None, "a"]):
        assert model(torch.arange(5), x).shape == (4, 3, 20)  # 5 are no rows of two
