"""Token rows: an embedding some of whose rows are others, and a tied head with the same rows."""

from __future__ import annotations

import torch
from torch import nn

import lora_lite as ll
from equations.helpers import randomise


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(23, 12), nn.Linear(12, 23)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids).tanh())


def test_forward():
    torch.manual_seed(0)
    model, ids = Tied().double(), torch.randint(0, 23, (4, 9))
    ids[0, :3] = torch.tensor([7, 2, 22])
    bare = model(ids)
    ll.attach(model, ll.TokenRowsConfig(token_ids=(7, 2, 22), dtype="float64"))
    assert torch.equal(model(ids), bare)
    randomise(model)
    E = model.embed.weight.detach().clone()
    for k, t in enumerate((7, 2, 22)):
        E[t] += model.embed.lora_rows[k].detach()
    want = E[ids].tanh() @ E.T + model.head.bias
    torch.testing.assert_close(model(ids), want, atol=1e-10, rtol=0)
    ll.merge(model)
    assert model.head.weight is model.embed.weight
    torch.testing.assert_close(model.embed.weight, E, atol=1e-12, rtol=0)
