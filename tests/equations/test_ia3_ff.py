"""IA3 before the layer, against a loop over features."""

from __future__ import annotations

import torch

import lora_lite as ll
from equations.helpers import adapted, randomise


def test_forward():
    model, fc, x = adapted(ll.IA3FFConfig(dtype="float64"))
    randomise(model)
    want = [
        [sum(fc.weight[j, i] * (1 + fc.lora_g[i]) * row[i] for i in range(20)) + fc.bias[j] for j in range(12)]
        for row in x
    ]
    torch.testing.assert_close(model(x), torch.stack([torch.stack(row) for row in want]), atol=1e-10, rtol=0)


def test_beside_an_output_gain():
    """Two adapters, one on each side, act together in either order."""
    model, fc, x = adapted(ll.IA3FFConfig(dtype="float64"))
    ll.attach(model, ll.IA3Config(dtype="float64"), name="out")
    randomise(model)
    ll.activate(model, ["default", "out"])
    want = torch.nn.functional.linear(x * (1 + fc.lora_g), fc.weight, fc.bias) * (1 + getattr(fc, "lora_g@out"))
    torch.testing.assert_close(model(x), want, atol=1e-10, rtol=0)
