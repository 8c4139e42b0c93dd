"""Sparse products against the dense matrix: values, both gradients, both ways to the entries' gradient."""

from __future__ import annotations

import pytest
import torch

from lora_lite.ops import sparse


@pytest.mark.parametrize("sampled", [1, 10**6], ids=["entry by entry", "dense"])
def test_product_and_gradients(sampled, monkeypatch):
    monkeypatch.setattr(sparse, "SAMPLED", sampled)
    at = torch.tensor([3, 4, 17, 40, 41, 59])  # row 1 has no entry
    rows, columns = at // 10, at % 10
    x = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    values = torch.randn(6, dtype=torch.float64, requires_grad=True)
    dense = torch.zeros(7, 10, dtype=torch.float64).index_put((rows, columns), values)
    y, want = sparse.sparse_product(x, values, rows, columns, 7), x @ dense.mT
    torch.testing.assert_close(y, want)
    for mine, other in zip(
        torch.autograd.grad((y**2).sum(), (x, values)), torch.autograd.grad((want**2).sum(), (x, values)), strict=True
    ):
        torch.testing.assert_close(mine, other)
    with torch.no_grad():
        torch.testing.assert_close(sparse.sparse_product(x, values, rows, columns, 7), want)
    assert torch.autograd.gradgradcheck(lambda x, v: sparse.sparse_product(x, v, rows, columns, 7), (x, values))
