"""S-steer against y + α (U√S)(δ_S ∘ x_S), with x_S = (V√S)ᵀ x."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from steering import contrast_pairs, row_vectors


def test_forward():
    pairs, model = contrast_pairs(), ll.testing.toy(dtype=torch.float64)
    path, r = "layers.0.down", 4
    P, N = row_vectors(model, path, pairs)
    ll.attach(
        model, ll.SSteerConfig(r=r, alpha=7, strength=1.7, target_names=(r"layers\.0\.down",), dtype="float64"), pairs
    )
    layer = model.get_submodule(path)
    W, b = layer.weight.detach(), layer.bias.detach()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    U, S, V = U[:, :r], S[:r], Vh[:r].mT
    sign = ((P - b) @ U + (N - b) @ U).mean(0).sign()  # the rows' mean coordinate is positive
    U, V = U * sign, V * sign
    delta = ((P - b) @ U / S.sqrt()).mean(0) - ((N - b) @ U / S.sqrt()).mean(0)
    x = torch.randn(5, 20, dtype=torch.float64)
    want = []
    for row in x:
        y, coordinates = W @ row + b, (V * S.sqrt()).mT @ row
        want.append(y + 1.7 * (U * S.sqrt()) @ (delta * coordinates))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), torch.stack(want), atol=1e-10, rtol=0)


def test_writers_by_default_and_ranks():
    model = ll.testing.toy()
    adapter = ll.attach(model, ll.SSteerConfig(r=4), contrast_pairs(dtype=torch.float32))
    assert adapter.targets == ["layers.0.down", "layers.1.down"]
    with pytest.raises(ll.ConfigError, match="13 is more than the 12 singular values"):
        ll.plan(ll.testing.toy(), ll.SSteerConfig(r=13))
    flat = ll.testing.toy()
    with torch.no_grad():
        flat.layers[1].down.weight[:] = flat.layers[1].down.weight[:1]
    with pytest.raises(ll.ConfigError, match="layers.1.down: its weight has a rank below r = 4"):
        ll.attach(flat, ll.SSteerConfig(r=4), contrast_pairs(dtype=torch.float32))
