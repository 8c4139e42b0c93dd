"""W + L R gives what the formed matrix gives, whatever is asked of it, and products do not form it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lora_lite.runtime.view.unformed import Unformed
from neighbours import fused_experts

E, P, Q, K = 4, 8, 12, 3
IDS = torch.tensor([0, 3, 3, 1, 2])
OFFSETS = torch.tensor([1, 3, 3, 5], dtype=torch.int32)


def parts(dtype=torch.float64):
    g = torch.Generator().manual_seed(2)
    W = torch.randn(E, P, Q, generator=g, dtype=dtype)
    L, R = torch.randn(E, P, K, generator=g, dtype=dtype), torch.randn(E, K, Q, generator=g, dtype=dtype)
    return W, L.requires_grad_(), R.requires_grad_(), torch.randn(5, Q, generator=g, dtype=dtype)


PRODUCTS = {
    "linear with one of them": lambda t, x: F.linear(x, t[2]),
    "linear with a bias": lambda t, x: F.linear(x, t[1], torch.arange(P, dtype=x.dtype)),
    "linear with an index tensor": lambda t, x: F.linear(x, t[torch.tensor(3)]),
    "a stack from the left": lambda t, x: torch.bmm(t[IDS], x.unsqueeze(-1)),
    "a stack from the right": lambda t, x: torch.bmm(x.unsqueeze(1), t.mT[IDS]),
    "matmul": lambda t, x: x @ t.transpose(-1, -2),
    "mm": lambda t, x: torch.mm(x, t[1].t()),
    "one of them, transposed": lambda t, x: x.matmul(t[1].T),
    "transposed twice": lambda t, x: F.linear(x, t.mT.transpose(1, 2)[0]),
}
OTHERS = {
    "sum": lambda t, x: t.sum(0),
    "add": lambda t, x: t + 1,
    "einsum": lambda t, x: torch.einsum("epq,bq->ebp", t, x),
    "rows": lambda t, x: t[:, 1:3],
    "unbind": lambda t, x: t.unbind(0)[1],
    "mask": lambda t, x: t[torch.tensor([True, False, True, False])],
    "cast": lambda t, x: t.float(),
    "other axes": lambda t, x: t.transpose(0, 1),
    "linear with itself": lambda t, x: F.linear(t[0], t[1]),
}


@pytest.mark.parametrize("name", [*PRODUCTS, *OTHERS])
def test_values_and_gradients(name, monkeypatch):
    W, L, R, x = parts()
    x.requires_grad_()
    formed = []
    plain = Unformed.formed
    monkeypatch.setattr(Unformed, "formed", lambda self: formed.append(1) or plain(self))
    act = (PRODUCTS | OTHERS)[name]
    found = []
    for t in (Unformed.of(W, L, R), W + L @ R):
        y = act(t, x)
        assert type(y) is torch.Tensor
        grads = torch.autograd.grad(y.square().sum(), (L, R, x), allow_unused=True)
        found.append((y, *(g if g is not None else torch.zeros(()) for g in grads)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert bool(formed) == (name in OTHERS)


def test_facts_are_those_of_the_weight(monkeypatch):
    monkeypatch.setattr(Unformed, "formed", None)
    W, L, R, _ = parts()
    t = Unformed.of(W, L, R)
    assert (t.shape, t.dtype, t.device, t.ndim, t.size(1), len(t)) == (W.shape, W.dtype, W.device, 3, P, E)
    assert t.data_ptr() == W.data_ptr() and t.is_contiguous() and t.mT.shape == (E, Q, P)


@fused_experts
@pytest.mark.parametrize("p, q", [(8, 12), (12, 8)])
def test_grouped_products(p, q):
    """Of torch, whose kernels want aligned rows, and of transformers; a rank of 3 is not aligned."""
    import transformers.integrations.moe  # noqa: F401  (registers its operator)

    g = torch.Generator().manual_seed(2)
    W, x = torch.randn(E, p, q, generator=g), torch.randn(5, q, generator=g, requires_grad=True)
    L, R = (torch.randn(E, *s, generator=g, requires_grad=True) for s in ((p, K), (K, q)))
    for grouped in (F.grouped_mm, torch.ops.transformers.grouped_mm_fallback):
        found = []
        for t in (Unformed.of(W, L, R), W + L @ R):
            y = grouped(x, t.transpose(-2, -1), offs=OFFSETS)
            found.append((y, *torch.autograd.grad(y.square().sum(), (L, R, x))))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)
