"""DoRA against the dense formula, on plain, Conv1D-like and packed layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite as ll
from equations.helpers import Box, adapted, dense_change, randomise

R, ALPHA = 3, 7.0


def dense(fc, s):
    """The paper's W', row by row, with the norm outside of the graph."""
    rows = []
    for j in range(fc.weight.shape[0]):
        v = fc.weight[j] + s * fc.lora_B[j] @ fc.lora_A
        m = fc.weight[j].norm() * (1 + fc.lora_m[j])
        rows.append(m * v / v.detach().norm())
    return torch.stack(rows)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_forward_and_gradients(bias, use_rslora):
    model, fc, x = adapted(ll.DoRAConfig(r=R, alpha=ALPHA, use_rslora=use_rslora, dtype="float64"), bias=bias)
    y = model(x)
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    randomise(model)
    s = ALPHA / (R**0.5 if use_rslora else R)
    x.requires_grad_()
    want = nn.functional.linear(x, dense(fc, s), fc.bias)
    torch.testing.assert_close(model(x), want, atol=1e-10, rtol=0)
    tensors = (x, fc.lora_A, fc.lora_B, fc.lora_m)
    for mine, other in zip(
        torch.autograd.grad((model(x) ** 2).sum(), tensors), torch.autograd.grad((want**2).sum(), tensors), strict=True
    ):
        torch.testing.assert_close(mine, other, atol=1e-9, rtol=1e-9)
    m = fc.weight.norm(dim=1) * (1 + fc.lora_m)
    torch.testing.assert_close((fc.weight + dense_change(model)).norm(dim=1), m.abs(), atol=1e-10, rtol=0)


def test_a_large_bias_costs_no_digits():
    """Scaling y instead of y − b would move a bias of 200 by the relative change of a row's length."""
    model, fc, x = adapted(ll.DoRAConfig(r=R, alpha=ALPHA), dtype=torch.float32)
    randomise(model, scale=1e-3)
    fc.bias.data.fill_(200.0)
    s = ALPHA / R
    want = x.double() @ dense(fc, s).double().mT + 200
    torch.testing.assert_close(model(x).double(), want, atol=5e-5, rtol=0)


def test_dropout_leaves_the_base_term_whole():
    """With B = 0 only the row lengths act: dropout must not be seen."""
    model, fc, x = adapted(ll.DoRAConfig(r=R, dropout=0.5, dtype="float64"))
    fc.lora_m.data.normal_()
    model.train()
    want = nn.functional.linear(x, fc.weight * (1 + fc.lora_m[:, None]), fc.bias)
    torch.testing.assert_close(model(x), want, atol=1e-10, rtol=0)
    fc.lora_B.data.normal_()
    assert not torch.equal(model(x), model(x))


class Packed(nn.Module):
    """A layer whose weight is no float matrix: int8 codes and one scale."""

    def __init__(self, fc: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = fc.in_features, fc.out_features
        self.scales = nn.Parameter(fc.weight.abs().max() / 127)
        self.weight = nn.Parameter((fc.weight / self.scales).round().to(torch.int8), requires_grad=False)
        self.bias = fc.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scales, self.bias)


def test_packed_layers_need_no_dense_weight():
    torch.manual_seed(11)
    model, x = (
        Box(700, 12, True, torch.float64),
        torch.randn(5, 700, dtype=torch.float64),
    )  # more than one block of columns
    W = Packed(model.fc)
    model.fc = W
    ll.attach(model, ll.DoRAConfig(r=R, alpha=ALPHA, dtype="float64"))
    randomise(model)
    plain = nn.Linear(700, 12).double()
    plain.weight.data, plain.bias.data = W.weight.double() * W.scales.detach(), W.bias.detach()
    plain.lora_A, plain.lora_B, plain.lora_m = W.lora_A, W.lora_B, W.lora_m
    want = nn.functional.linear(x, dense(plain, ALPHA / R), plain.bias)
    torch.testing.assert_close(model(x), want, atol=1e-5, rtol=0)  # ‖W‖ was read in fp32


def test_a_zero_row_and_the_largest_temporary():
    model, fc, x = adapted(ll.DoRAConfig(r=R, alpha=ALPHA, dtype="float64"))
    ll.detach(model)
    fc.weight.data[3] = 0
    ll.attach(model, ll.DoRAConfig(r=R, alpha=ALPHA, dtype="float64"))
    randomise(model)
    y = model(x)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y[:, 3], fc.bias[3].expand(5), atol=1e-8, rtol=0)  # m = ‖0‖ (1 + δ) = 0
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != fc.weight.data_ptr():
                sizes.append(out.numel())
            return out

    with Watch():
        model(x).sum().backward()
    assert 0 < max(sizes) < fc.weight.numel()
