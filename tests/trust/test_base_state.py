"""State of the base that is no parameter does not move under an adapter, or it is said before the first step: what is
loaded is what was trained, and detaching gives the base back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

import lora_lite as ll

NORMS = {
    "batch": lambda: nn.BatchNorm1d(6),
    "cumulative": lambda: nn.BatchNorm1d(6, momentum=None),
    "without weights": lambda: nn.BatchNorm1d(6, affine=False),
    "sync": lambda: nn.SyncBatchNorm(6),
}
METHODS = [v for v in ll.variants() if v.trains and v.site == "linear" and v.needs_data != "pairs"]
X = torch.randn(8, 3, 9, generator=torch.Generator().manual_seed(0)) * 3 + 2


class Net(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.c, self.bn, self.mid, self.fc = nn.Conv1d(3, 6, 3), norm, nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        h = torch.relu(self.bn(self.c(x)))
        return self.fc(torch.tanh(self.mid(h.mT)))


def train(model: nn.Module, steps: int = 5) -> None:
    handle = ll.adapters(model)["default"]
    optimizer = torch.optim.SGD(handle.param_groups(lr=0.1))
    if handle.record.variant.on_step is not None:
        ll.schedule(model, optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def trips(base: nn.Module, cfg: ll.AdapterConfig, tmp_path, steps: int = 5, between=lambda m: None) -> nn.Module:
    """Train, then compare with a reload, and with the base after a detach."""
    model = copy.deepcopy(base)
    data = [{"x": X, "labels": torch.zeros(1)}] if ll_needs(cfg) else None
    ll.attach(model, cfg, data)
    model.train()
    between(model)
    train(model, steps)
    file = ll.save(model, tmp_path / "a")
    again = copy.deepcopy(base)
    ll.load(again, file)
    model.eval()
    assert torch.equal(model(X), again(X))
    assert not torch.equal(model(X), base(X))
    ll.detach(model)
    assert torch.equal(model(X), base(X))
    state = base.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    return model


def ll_needs(cfg: ll.AdapterConfig) -> bool:
    return next(v for v in ll.variants() if v.name == cfg.variant).needs_data != ""


@pytest.mark.parametrize("name", [n for n in NORMS if n != "sync"])
def test_running_figures_are_held(name, tmp_path):
    torch.manual_seed(0)
    base = Net(NORMS[name]())
    base.train()
    base(X * 0.3)  # figures of its own
    model = trips(base.eval(), ll.LoRAConfig(r=2), tmp_path)
    before = model.bn.running_mean.clone()
    model.train()(X)
    assert not torch.equal(model.bn.running_mean, before), "after a detach they move as ever"


@pytest.mark.parametrize("variant", METHODS, ids=lambda v: v.name)
def test_under_every_method(variant, tmp_path):
    torch.manual_seed(0)
    base = Net(NORMS["batch"]()).eval()
    names = {"target_names": ("mid", "fc")}
    for r in (2, 3, 4, 6):
        try:
            cfg = variant.config(variant=variant.name, r=r, **names)
            ll.plan(base, cfg)
        except ll.LoraLiteError:
            continue
        if variant.needs_data:
            pytest.skip("starts from a language model's data")
        trips(base, cfg, tmp_path, steps=12 if variant.on_step else 3)
        return
    pytest.skip("takes none of the sizes")


def test_training_normalises_by_the_batch_as_before():
    base = Net(NORMS["batch"]())
    model = copy.deepcopy(base)
    ll.attach(model, ll.LoRAConfig(r=2))
    assert torch.equal(model.train()(X), base.train()(X))


def test_held_through_checkpoints_and_copies(tmp_path):
    """A recomputation in backward would count the batch twice."""

    class Checkpointed(Net):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    torch.manual_seed(0)
    trips(Checkpointed(NORMS["batch"]()).eval(), ll.LoRAConfig(r=2), tmp_path)
    model = Net(NORMS["batch"]())
    ll.attach(model, ll.LoRAConfig(r=2))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        train(other.train(), 1)
        assert not other.bn.num_batches_tracked
        ll.detach(other)
        assert other.bn.track_running_stats is True


def test_until_the_last_adapter_is_gone():
    model = Net(NORMS["batch"]())
    for name in "ab":
        ll.attach(model, ll.LoRAConfig(r=2), name=name)
    ll.detach(model, "a")
    model.train()(X)
    assert not model.bn.num_batches_tracked
    ll.detach(model, "b")
    model(X)
    assert model.bn.num_batches_tracked == 1


def test_what_does_not_track_stays_so():
    model = Net(nn.BatchNorm1d(6, track_running_stats=False))
    ll.attach(model, ll.LoRAConfig(r=2))
    ll.detach(model)
    assert model.bn.track_running_stats is False


def test_the_plan_says_so():
    (note,) = ll.plan(Net(NORMS["batch"]()), ll.LoRAConfig(r=2)).notes
    assert "bn" in note and "held" in note


# ---- what cannot be held


class OwnNorm(nn.Module):
    """Averages by itself, into another tensor each time."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6, 1))

    def forward(self, h):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean((0, 2))[:, None]
        return h - self.mean


class Codebook(nn.Module):
    """Moves its codes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(6, 1))
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, h):
        self.cache.add_(1)
        if self.training:
            self.codes.lerp_(h.detach().mean((0, 2))[:, None], 0.1)
        return h + self.codes


class Instance(nn.InstanceNorm1d):
    def __init__(self) -> None:
        super().__init__(6, affine=True, track_running_stats=True)


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = spectral_norm(nn.Conv1d(6, 6, 1))

    def forward(self, h):
        return self.conv(h)


@pytest.mark.parametrize("norm", [OwnNorm, Codebook, Instance, Spectral])
def test_other_buffers_are_named_before_the_first_step(norm, tmp_path):
    torch.manual_seed(0)
    model = Net(norm())
    ll.attach(model, ll.LoRAConfig(r=2, target_names=("mid", "fc")))
    model.train()
    with pytest.warns(ll.LoraLiteWarning, match=r"'bn\..*moved in a training call.*get_submodule\('bn.*'\)\.eval\(\)"):
        model(X)
    model(X)  # once

    def still(model: nn.Module) -> None:
        model.bn.eval()

    trips(Net(norm()).eval(), ll.LoRAConfig(r=2, target_names=("mid", "fc")), tmp_path, between=still)


def test_an_adapters_own_buffers_may_move():
    """AdaLoRA averages importances into buffers of its own."""
    model = Net(nn.Identity())
    cfg = next(v for v in ll.variants() if v.name == "adalora").config(r=3, target_r=2)
    ll.attach(model, cfg)
    train(model.train(), 12)
