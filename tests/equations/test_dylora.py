"""DyLoRA against the plain low-rank update of its first b ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.core.errors import ConfigError

R, ALPHA = 6, 7.0


def fresh(dtype="float64", **fields):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 13, bias=False)).double()
    handle = ll.attach(model, ll.DyLoRAConfig(**{"r": R, "alpha": ALPHA, "dtype": dtype, **fields}))
    for p in handle.parameters():
        nn.init.normal_(p)
    return model, handle


def slow(layer, x, b):
    delta = ALPHA / b * layer.lora_B[:, :b] @ layer.lora_A[:b]
    return nn.functional.linear(x, layer.weight + delta, layer.bias)


@pytest.mark.parametrize("b", range(1, R + 1))
@pytest.mark.parametrize("frozen", [False, True])
def test_training_uses_the_first_b_ranks_and_truncation_gives_the_same(b, frozen):
    model, handle = fresh(frozen=frozen)
    x = torch.randn(4, 20).double()
    ll.schedule(model, torch.optim.SGD(handle.parameters(), lr=1), 100)
    torch.testing.assert_close(model[0].eval()(x), slow(model[0], x, R), atol=1e-10, rtol=0)
    for i in (0, 2):
        model[i].lora_b.fill_(b)
    model.train()
    y = model(x)
    torch.testing.assert_close(model[0](x), slow(model[0], x, b), atol=1e-10, rtol=0)
    y.sum().backward()
    rows = model[0].lora_A.grad.abs().sum(1) > 0
    want = [j == b - 1 if frozen else j < b for j in range(R)]
    assert rows.tolist() == want and (model[0].lora_B.grad.abs().sum(0) > 0).tolist() == want
    small = ll.compact(model, rank=b)
    model.eval()
    torch.testing.assert_close(model(x), y, atol=1e-10, rtol=0)
    assert model[0].lora_A.shape == (b, 20) and small.record.targets["0"].cfg.scale == pytest.approx(ALPHA / b)


def test_identity_and_export_form():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 12))
    x = torch.randn(4, 20)
    y = model(x)
    ll.attach(model, ll.DyLoRAConfig(r=R))
    assert torch.equal(model(x), y) and torch.equal(model.eval()(x), y)
    model, handle = fresh()
    model[0].lora_b.fill_(2)
    ll.combine(model, {"default": 1.0}, name="sum")  # reads the factors while the model trains
    x = torch.randn(4, 20).double()
    torch.testing.assert_close(model[0](x), slow(model[0], x, R), atol=1e-6, rtol=1e-6)


def run(steps, seed=0, resume_at=None, path=None):
    model, handle = fresh(seed=seed, r_min=2)
    state, drawn, x = torch.get_rng_state(), [], torch.ones(2, 20).double()

    def optimiser(handle):
        optimizer = torch.optim.SGD(handle.parameters(), lr=1e-3)
        ll.schedule(model, optimizer, steps)
        return optimizer

    optimizer = optimiser(handle)
    for step in range(steps):
        if step == resume_at:
            ll.save(model, path)
            ll.detach(model)
            optimizer = optimiser(ll.load(model, path, trainable=True))
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert model[0].lora_b == model[2].lora_b
        drawn.append(int(model[0].lora_b))
    assert torch.equal(state, torch.get_rng_state())  # not drawn from the global generator
    return drawn, ll.adapter_state_dict(model)


def test_draws_are_even_seeded_and_go_on_after_a_save(tmp_path):
    drawn, end = run(300)
    counts = [drawn.count(b) for b in range(R + 1)]
    assert counts[:2] == [0, 0] and min(counts[2:]) > 35  # 60 expected
    assert run(300, seed=1)[0] != drawn
    again, resumed = run(40, resume_at=17, path=tmp_path / "x.safetensors")
    assert again == drawn[:40]
    straight = run(40)[1]
    assert all(torch.equal(straight[k], resumed[k]) for k in straight)


def test_compiles_once_for_all_ranks():
    model, handle = fresh(dtype="float32")
    model = model.float()
    ll.schedule(model, torch.optim.SGD(handle.parameters(), lr=1), 10)
    compiled, x = torch.compile(model[0], backend="eager", fullgraph=True), torch.randn(4, 20)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for b in (6, 3, 1):
            model[0].lora_b.fill_(b)
            torch.testing.assert_close(compiled(x), slow(model[0], x, b), atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


def test_refusals():
    with pytest.raises(ConfigError, match="r_min"):
        ll.DyLoRAConfig(r=4, r_min=5)
    model, _ = fresh()
    with pytest.raises(ConfigError, match="between 1 and 6"):
        ll.compact(model, rank=7)
    assert model[0].lora_A.shape == (R, 20)
