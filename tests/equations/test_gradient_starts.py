"""LoRA-GA and LoRA-One against the gradient that autograd finds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.core.errors import ConfigError

R, ALPHA = 3, 7.0


class Net(nn.Module):
    """Returns an object with `.loss`, as models with labels do."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(20, 12), nn.Linear(12, 13, bias=False)

    def forward(self, x, target):
        out = self.fc2(torch.tanh(self.fc1(x)))
        return type("Out", (), {"loss": ((out - target) ** 2).mean(), "logits": out})()


def fresh():
    torch.manual_seed(8)
    model = Net().double()
    data = [{"x": torch.randn(30, 20).double(), "target": torch.randn(30, 13).double()} for _ in range(3)]
    return model, data


def loss_of(model, data):
    return sum(model(**batch).loss for batch in data) / len(data)


def gradients(model, data):
    grads = torch.autograd.grad(loss_of(model, data), [model.fc1.weight, model.fc2.weight])
    return dict(zip(("fc1", "fc2"), grads, strict=True))


def test_lora_ga_start_and_forward():
    model, data = fresh()
    G, before = gradients(model, data), model(**data[0]).logits
    ll.attach(model, ll.LoRAGAConfig(r=R, alpha=ALPHA, gamma=9, dtype="float64"), data)
    assert torch.equal(model(**data[0]).logits, before)
    s = ALPHA / R**0.5
    for path, g in G.items():
        layer = model.get_submodule(path)
        U, _, Vh = torch.linalg.svd(g)
        c = g.shape[0] ** 0.25 / 3
        torch.testing.assert_close(layer.lora_A0.abs(), c * Vh[:R].abs(), atol=1e-10, rtol=0)
        torch.testing.assert_close(layer.lora_B0.abs(), c * U[:, R : 2 * R].abs(), atol=1e-10, rtol=0)
        for p in (layer.lora_A, layer.lora_B):
            nn.init.normal_(p)
        A, B = layer.lora_A0 + layer.lora_A, layer.lora_B0 + layer.lora_B
        x = torch.randn(5, layer.in_features).double()
        W = layer.weight - s * layer.lora_B0 @ layer.lora_A0 + s * B @ A
        torch.testing.assert_close(layer(x), nn.functional.linear(x, W, layer.bias), atol=1e-10, rtol=0)


@pytest.mark.parametrize("config", [ll.LoRAGAConfig, ll.LoRAConfig])
def test_first_small_step_goes_along_the_gradient(config):
    model, data = fresh()
    G = gradients(model, data)
    handle = ll.attach(model, config(r=R, alpha=ALPHA, dtype="float64"), data if config is ll.LoRAGAConfig else None)
    optimizer = torch.optim.SGD(handle.parameters(), lr=1e-6)
    loss_of(model, data).backward()
    optimizer.step()
    for path, g in G.items():
        layer = model.get_submodule(path)
        eye = torch.eye(layer.in_features).double()
        with torch.no_grad():
            on = layer(eye)
            with ll.active(model, None):
                step = (on - layer(eye)).mT
        U, S, Vh = torch.linalg.svd(g, full_matrices=False)
        best = U[:, : 2 * R] @ torch.diag(S[: 2 * R]) @ Vh[: 2 * R]
        cosine = float(-(step * best).sum() / step.norm() / best.norm())
        assert cosine > 1 - 1e-6 if config is ll.LoRAGAConfig else cosine < 0.9


def test_lora_one_is_one_step_and_lowers_the_loss():
    model, data = fresh()
    G, before = gradients(model, data), loss_of(model, data)
    ll.attach(model, ll.LoRAOneConfig(r=R, alpha=ALPHA, dtype="float64"), data)
    assert loss_of(model, data) < before
    s = ALPHA / R**0.5
    for path, g in G.items():
        layer = model.get_submodule(path)
        U, S, Vh = torch.linalg.svd(g)
        want = -s / 128 * sum(S[k] / S[0] * torch.outer(U[:, k], Vh[k]) for k in range(R))
        x = torch.randn(5, layer.in_features).double()
        slow = nn.functional.linear(x, layer.weight + want, layer.bias)
        torch.testing.assert_close(layer(x), slow, atol=1e-10, rtol=0)
        torch.testing.assert_close(layer.lora_A.norm(), layer.lora_B.norm())


def test_rosa_trains_where_the_gradient_is_largest():
    model, data = fresh()
    G, before = gradients(model, data), model(**data[0]).logits
    adapter = ll.attach(model, ll.RoSAConfig(r=R, alpha=ALPHA, share=0.1, dtype="float64"), data)
    assert torch.equal(model(**data[0]).logits, before)
    rates = {
        name.rpartition(".")[2]: group["lr"]
        for group in adapter.param_groups(lr=2e-4)
        for name in names(adapter, group)
    }
    assert rates == pytest.approx({"lora_A": 7e-4, "lora_B": 7e-4, "lora_values": 2e-4})
    for path, g in G.items():
        layer = model.get_submodule(path)
        rows, columns = layer.lora_at.long()
        chosen = torch.zeros_like(g, dtype=torch.bool)
        chosen[rows, columns] = True
        assert chosen.sum() == int(0.1 * g.numel()) and g.abs()[chosen].min() >= g.abs()[~chosen].max()
        for p in (layer.lora_A, layer.lora_B, layer.lora_values):
            nn.init.normal_(p)
        S = torch.zeros_like(g)
        for k, (i, j) in enumerate(layer.lora_at.mT.tolist()):
            S[i, j] = layer.lora_values[k]
        x = torch.randn(5, layer.in_features).double()
        want = nn.functional.linear(x, layer.weight + S + ALPHA / R * layer.lora_B @ layer.lora_A, layer.bias)
        torch.testing.assert_close(layer(x), want, atol=1e-10, rtol=0)


def names(adapter, group):
    ids = {id(p) for p in group["params"]}
    return [name for name, p in adapter.named_parameters() if id(p) in ids]


def test_refusals():
    model, data = fresh()
    with pytest.raises(ConfigError, match="needs 14 directions"):
        ll.attach(model, ll.LoRAGAConfig(r=7), data)
    with pytest.raises(ConfigError, match="gamma"):
        ll.LoRAGAConfig(gamma=0.0)
    with pytest.raises(ConfigError, match="no gradient there"):
        ll.attach(model, ll.LoRAOneConfig(r=2, target_names=("fc1",)), [{**b, "x": b["x"] * 0} for b in data])
    assert ll.adapters(model) == {}
