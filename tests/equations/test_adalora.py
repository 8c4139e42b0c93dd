"""AdaLoRA against a slow transcription of its formulas, step by step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.core.errors import ConfigError, StateError
from lora_lite.runtime.view.expert import layer_views
from lora_lite.variants import adalora

R, TARGET, ALPHA, T = 5, 2, 7.0, 12


def fresh(dtype="float64", **fields):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 13, bias=False)).double()
    cfg = ll.AdaLoRAConfig(**{"r": R, "target_r": TARGET, "alpha": ALPHA, "dtype": dtype, **fields})
    return model, ll.attach(model, cfg)


def train(model, optimizer, steps, start=0, after=lambda step: None, penalty=False):
    for step in range(start + 1, start + steps + 1):
        g = torch.Generator().manual_seed(step)
        x, target = (torch.randn(16, n, generator=g, dtype=torch.float64) for n in (20, 13))
        loss = (model(x) - target).square().mean() + (ll.penalty(model) if penalty else 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after(step)


def nonzero(model):
    return sum(int((model[i].lora_E != 0).sum()) for i in (0, 2) if hasattr(model[i], "lora_E"))


def test_forward_and_penalty():
    model, _ = fresh()
    x = torch.randn(4, 20).double()
    y = model[0](x)
    assert torch.equal(y, nn.functional.linear(x, model[0].weight, model[0].bias))
    layer = model[0]
    for p in (layer.lora_A, layer.lora_B, layer.lora_E):
        nn.init.normal_(p)
    W = layer.weight + ALPHA / R * sum(
        layer.lora_E[i] * torch.outer(layer.lora_B[:, i], layer.lora_A[i]) for i in range(R)
    )
    torch.testing.assert_close(layer(x), nn.functional.linear(x, W, layer.bias), atol=1e-10, rtol=0)
    want, eye = 0, torch.eye(R).double()
    for i in (0, 2):
        A, B = model[i].lora_A, model[i].lora_B
        want = want + 0.1 / 4 * (torch.norm(A @ A.mT - eye) + torch.norm(B.mT @ B - eye))
    torch.testing.assert_close(ll.penalty(model), want)


def test_budget_and_importance_at_every_step():
    tinit, tfinal, delta = 2, 3, 2
    model, handle = fresh(tinit=tinit, tfinal=tfinal, delta_t=delta)
    smooth, spread, kept = {}, {}, {}

    def check(step):
        scores = {}
        for i in (0, 2):
            for k in "ABE":
                p, key = getattr(model[i], f"lora_{k}"), (i, k)
                # E was masked after the importance was taken; a masked entry scores by what it was before
                now = (before[key] * p.grad).abs()
                smooth[key] = 0.85 * smooth.get(key, torch.zeros_like(now)) + 0.15 * now
                spread[key] = 0.85 * spread.get(key, torch.zeros_like(now)) + 0.15 * (now - smooth[key]).abs()
                if step <= T - tfinal:
                    torch.testing.assert_close(getattr(model[i], f"lora_sensitivity_{k}"), smooth[key])
                    torch.testing.assert_close(getattr(model[i], f"lora_uncertainty_{k}"), spread[key])
            for j in range(R):
                terms = [smooth[i, k] * spread[i, k] for k in "ABE"]
                scores[i, j] = float(terms[0][j].mean() + terms[1][:, j].mean() + terms[2][j])
        end = T - tfinal
        if tinit < step <= end and (step % delta == 0 or step == end):
            b = int(2 * TARGET + (2 * R - 2 * TARGET) * (1 - (step - tinit) / (end - tinit)) ** 3)
            kept["now"] = set(sorted(scores, key=scores.get, reverse=True)[:b])
            assert nonzero(model) == b == len(kept["now"])
            found = {(i, j) for i in (0, 2) for j in range(R) if model[i].lora_E[j] != 0}
            assert found == kept["now"]
        elif step >= end:
            assert nonzero(model) == 2 * TARGET
            assert {(i, j) for i in (0, 2) for j in range(R) if model[i].lora_E[j] != 0} == kept["now"]
        else:
            assert nonzero(model) == 2 * R

    before = {}

    def note(*_):
        before.update({(i, k): getattr(model[i], f"lora_{k}").detach().clone() for i in (0, 2) for k in "ABE"})

    class Noting(torch.optim.Adam):  # torch runs step hooks for it and again for its super().step()
        def step(self, closure=None):
            super().step(closure)
            note()  # after the update, before the schedule's hook

    torch.optim.Adam(handle.parameters())  # its step carries hooks from the first instance on
    optimizer = Noting(handle.parameters(), lr=0.05)
    ll.schedule(model, optimizer, T)
    train(model, optimizer, T, after=check)


def test_importance_is_sensitivity_times_uncertainty():
    """After two steps with other gradients the product orders triplets otherwise than either factor."""
    model, handle = fresh(beta1=0.8, beta2=0.6)
    g = torch.Generator().manual_seed(7)
    smooth, spread = {}, {}
    for _ in range(2):
        for key, p in handle.named_parameters():
            p.data = torch.randn(p.shape, generator=g, dtype=p.dtype)
            p.grad = torch.randn(p.shape, generator=g, dtype=p.dtype)
            now = (p * p.grad).detach().abs()
            smooth[key] = 0.8 * smooth.get(key, 0) + 0.2 * now
            spread[key] = 0.6 * spread.get(key, 0) + 0.4 * (now - smooth[key]).abs()
        found = [adalora.score(view, handle.cfg) for view in layer_views(model, handle.record)]
    for i, got in zip((0, 2), found, strict=True):
        A, B, E = (smooth[f"{i}.lora_{k}"] * spread[f"{i}.lora_{k}"] for k in "ABE")
        torch.testing.assert_close(got, A.mean(1) + B.mean(0) + E)


def test_the_file_after_the_end_holds_live_triplets_and_the_same_function(tmp_path):
    model, handle = fresh(dtype="float32", tfinal=2)
    optimizer = torch.optim.Adam(handle.parameters(), lr=0.05)
    ll.schedule(model, optimizer, T)
    train(model, optimizer, T, penalty=True)
    x = torch.randn(4, 20).double()
    y = model(x)
    ll.save(model, tmp_path / "checkpoint", compact=False)
    ll.save(model, tmp_path / "x")
    assert hasattr(model[0], "lora_sensitivity_A") and nonzero(model) == 2 * TARGET  # saving changes nothing
    assert (tmp_path / "checkpoint.safetensors").stat().st_size > 2 * (tmp_path / "x.safetensors").stat().st_size
    ranks = {str(i): int((model[i].lora_E != 0).sum()) for i in (0, 2)}
    ll.detach(model)
    loaded = ll.load(model, tmp_path / "x.safetensors", trainable=True)
    assert {p: t.cfg.r for p, t in loaded.record.targets.items()} == {p: r for p, r in ranks.items() if r}
    assert sorted(k.split(".")[-1] for k in ll.adapter_state_dict(model)) == sorted(
        ["lora_A", "lora_B", "lora_E"] * len(loaded.targets)
    )
    torch.testing.assert_close(model(x), y, atol=1e-6, rtol=1e-6)
    optimizer = torch.optim.Adam(loaded.parameters(), lr=0.05)
    ll.schedule(model, optimizer, T)
    train(model, optimizer, 2)  # goes on as plain triplets, nothing is pruned
    assert nonzero(model) == 2 * TARGET


def test_compact_in_place_and_a_target_without_triplets():
    model, handle = fresh(target_r=1, tfinal=1)
    optimizer = torch.optim.Adam(handle.parameters(), lr=0.05)
    ll.schedule(model, optimizer, T)
    with pytest.raises(StateError, match="has not ended"):
        ll.compact(model)
    other = ll.attach(model, ll.LoRAConfig(r=2, dtype="float64"), name="other")
    ll.activate(model, {"default": 0.5, "other": 1.0})
    train(model, optimizer, T - 1)
    with torch.no_grad():  # all the importance on one target
        model[2].lora_sensitivity_E.zero_()
        for i in (0, 2):
            model[i].lora_live.fill_(i == 0)
            model[i].lora_E.mul_(i == 0)
    handle.record.steps = T
    x = torch.randn(4, 20).double()
    y = model(x)
    small = ll.compact(model, "default")
    torch.testing.assert_close(model(x), y, atol=1e-12, rtol=0)
    assert small.targets == ["0"] and small.record.targets["0"].cfg.r == R and not hasattr(model[2], "lora_E")
    assert [a.name for a in ll.adapters(model).values() if a.active] == ["default", "other"], (
        "compacting changed the order"
    )
    assert other.record.steps == 0 and model[0].weight.requires_grad is False
    ll.detach(model)
    assert model[0].weight.requires_grad


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    runs = []
    for cut in (None, 5):
        model, handle = fresh(tinit=1, tfinal=3, delta_t=2)
        optimizer = torch.optim.SGD(handle.parameters(), lr=0.5)
        ll.schedule(model, optimizer, T)
        train(model, optimizer, cut or T)
        if cut:
            ll.save(model, tmp_path / "x")
            ll.detach(model)
            handle = ll.load(model, tmp_path / "x.safetensors", trainable=True)
            optimizer = torch.optim.SGD(handle.parameters(), lr=0.5)
            ll.schedule(model, optimizer, T)
            train(model, optimizer, T - cut, start=cut)
        runs.append(ll.adapter_state_dict(model))
    assert runs[0].keys() == runs[1].keys() and all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])


def test_refusals():
    with pytest.raises(ConfigError, match="target_r"):
        ll.AdaLoRAConfig(r=4, target_r=5)
    with pytest.raises(ConfigError, match="target_r"):
        ll.AdaLoRAConfig(rank_pattern={"0": 3}, target_r=5)
    with pytest.raises(ConfigError, match="beta"):
        ll.AdaLoRAConfig(beta1=1.0)
    model, handle = fresh(tinit=5, tfinal=7)
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.5)
    ll.schedule(model, optimizer, T)
    with pytest.raises(ConfigError, match="leave no step"):
        train(model, optimizer, 1)
    model, handle = fresh()

    class Forgetful(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            self.zero_grad()

    optimizer = Forgetful(handle.parameters(), lr=0.5)
    ll.schedule(model, optimizer, T)
    with pytest.raises(StateError, match="no gradient is left"):
        train(model, optimizer, 1)
