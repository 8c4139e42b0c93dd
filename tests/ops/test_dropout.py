"""The memory-saving dropout against the plain formula."""

from __future__ import annotations

import pytest
import torch

from lora_lite.ops.dropout import dropout, keep_mask
from lora_lite.ops.lowrank import lowrank_update, shrink


def tensors():
    g = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()  # noqa: E731
    return make(2, 5, 12), make(2, 5, 20), make(3, 12), make(20, 3)


def test_values_and_gradients():
    x, y, A, B = tensors()
    d = dropout(x, 0.4)
    _, mask, scale = d.dropped_from
    assert 0.2 < mask.double().mean() < 1
    assert scale == pytest.approx(1 / 0.6)
    out = lowrank_update(y, d, A, B, 1.7)
    plain = y + 1.7 * ((x * mask * scale) @ A.mT) @ B.mT
    torch.testing.assert_close(out, plain, atol=1e-12, rtol=1e-12)
    weight = torch.randn_like(plain)
    ours = torch.autograd.grad((out * weight).sum(), (x, y, A, B))
    theirs = torch.autograd.grad((plain * weight).sum(), (x, y, A, B))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda x, A: shrink(d_of(x, mask, scale), A), (x, A))


def d_of(x, mask, scale):
    d = x * mask * scale
    d.dropped_from = x.detach(), mask, scale
    return d


def test_the_dropped_copy_is_not_kept():
    x, y, A, B = (t.detach().float() for t in tensors())
    A.requires_grad_()
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lowrank_update(y, dropout(x, 0.4), A, B).sum().backward()
    sizes = sorted(kept.values())
    assert x.numel() in sizes, "the mask, one byte per entry"
    assert sizes.count(x.numel() * 4) == 1, "x, which other layers share, and no dropped copy"


def test_share_of_dropped_entries_and_none_without_gradients():
    x = torch.ones(200, 200)
    with torch.no_grad():
        plain = dropout(x, 0.3)
    assert not hasattr(plain, "dropped_from")
    for d in (plain, dropout(x, 0.3)):
        assert abs((d == 0).float().mean() - 0.3) < 0.01
        assert d.max() == pytest.approx(1 / 0.7)


@pytest.mark.parametrize("p", [0.0, 0.002, 0.1, 0.999])
def test_every_entry_is_dropped_with_exactly_p(p):
    """The share of one mask is a multiple of 1/256, or of 1/65536; that of many masks is p."""
    torch.manual_seed(0)
    x = torch.empty(331, 101)
    shares = torch.tensor([1 - keep_mask(x, p).double().mean() for _ in range(200)], dtype=torch.float64)
    sigma = (p * (1 - p) / x.numel() / 200) ** 0.5 + (0.5 / 256 / 200**0.5 if p == 0.1 else 1e-6)
    assert abs(shares.mean() - p) < 4 * sigma
    assert abs(0.1 - 25 / 256) > 4 * sigma, "the share of t = 25 alone would not do"


def test_entries_are_drawn_apart():
    torch.manual_seed(0)
    kept = torch.stack([keep_mask(torch.empty(1003), 0.3) for _ in range(400)]).double()
    assert kept.shape == (400, 1003)
    neighbours = torch.corrcoef(kept[:, :24].mT)
    assert (neighbours - torch.eye(24)).abs().max() < 0.25
    assert not torch.equal(kept[0], kept[1])


def test_autocast_takes_the_plain_path():
    x, y, A, B = (t.detach().float().requires_grad_() for t in tensors())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = lowrank_update(y, dropout(x, 0.4), A, B)
    out.float().sum().backward()
    assert all(t.grad is not None for t in (x, y, A, B))
