"""Starts, sizes and scales against small transcriptions of the authors' rules: what a user feels, where every output
agrees."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lora_lite as ll
from equations.helpers import Box, adapted, randomise
from lora_lite.io.native import read

WIDTHS = (64, 1024)


def fresh(cfg, d_in, d_out=None):
    torch.manual_seed(5)
    model = Box(d_in, d_out or d_in, True, torch.float32)
    ll.attach(model, cfg)
    return model.fc


def kaiming_uniform_bound(fan_in, a):
    """The bound of torch's kaiming_uniform_."""
    return math.sqrt(2 / (1 + a * a)) * math.sqrt(3 / fan_in)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("d", WIDTHS)
def test_ether_starts_with_vectors_of_one_length_at_any_width(d, n):
    """Theirs: kaiming_uniform_(R (n, d/n), a=√5)."""
    bound = kaiming_uniform_bound(d // n, math.sqrt(5))
    fc, plus = fresh(ll.ETHERConfig(n_blocks=n), d), fresh(ll.ETHERPlusConfig(n_blocks=n), d)
    for u in (fc.lora_u, plus.lora_in_u0, plus.lora_out_u0):
        assert 0.9 * bound < u.abs().max() <= bound
        assert u.norm(dim=1).mean().item() == pytest.approx(3**-0.5, rel=0.2)


@pytest.mark.parametrize("r", [2, 8])
def test_hra_turns_as_far_at_any_width(r):
    """Theirs: kaiming_uniform_(u (d, r/2), a=√5), so a step of lr per entry turns û by lr √d/‖u‖."""
    bound = kaiming_uniform_bound(r // 2, math.sqrt(5))
    turns = []
    for d in WIDTHS:
        U0 = fresh(ll.HRAConfig(r=r), d).lora_U0
        assert 0.9 * bound < U0.abs().max() <= bound
        turns.append(float((math.sqrt(d) / U0.norm(dim=1)).mean()))
    assert turns[1] == pytest.approx(turns[0], rel=0.15) and turns[1] == pytest.approx((3 * r / 2) ** 0.5, rel=0.15)


def test_svft_takes_all_triplets_and_a_rate_per_form():
    fc = fresh(ll.SVFTConfig(), 20, 12)
    assert fc.lora_M.shape == (12,) and fc.lora_S.shape == (12,)
    rates = []
    for band in (0, 2):
        model, _, _ = adapted(ll.SVFTConfig(band=band), dtype=torch.float32)
        (group,) = ll.adapters(model)["default"].param_groups(lr=ll.get_variant("svft").lr)
        rates.append(group["lr"])
    assert rates == pytest.approx([5e-2 / 2, 5e-3 / 2])  # theirs, on what sigmoid(0) = ½ halves


def test_ssvd_takes_a_quarter_of_1024():
    assert fresh(ll.SSVDConfig(svd="randomised", niter=0), 1024).lora_S.shape == (1024 // 4,)


@pytest.mark.parametrize("n", [1, 3])
def test_adaloras_penalty_is_a_mean_over_all_matrices(n):
    torch.manual_seed(4)
    model = nn.Sequential(*(nn.Linear(9, 9) for _ in range(n)))
    ll.attach(model, ll.AdaLoRAConfig(r=4, alpha=7, orth_reg=0.3))
    randomise(model)
    total, count = 0.0, 0
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            C = p @ p.T if "lora_A" in name else p.T @ p
            total, count = total + torch.norm(C - torch.eye(len(C)), p="fro"), count + 1
    assert count == 2 * n
    torch.testing.assert_close(ll.penalty(model), 0.3 * total / count)


def test_the_penalty_of_a_fresh_adalora_is_no_larger_than_the_task():
    """At the start the old sum of squares pulled with 4 √r times as much per target."""
    model, fc, x = adapted(ll.AdaLoRAConfig(r=12), dtype=torch.float32)
    fc.lora_E.data.fill_(0.1)
    (task,) = torch.autograd.grad(model(x).square().mean(), fc.lora_A)
    (pull,) = torch.autograd.grad(ll.penalty(model), fc.lora_A)
    want = 0.1 / 2 * 2 * fc.lora_A / 12**0.5  # ∂‖AAᵀ − I‖ = 2 (I − AAᵀ)A/√r where A is small
    assert (pull + want).norm() < 0.05 * want.norm() and pull.norm() < 20 * task.norm()


class Scored(nn.Module):
    """Returns an object with `.loss`."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(20, 12)

    def forward(self, x):
        y = self.fc(x)
        return type("Out", (), {"loss": y.square().mean(), "logits": y})()


def one_adapted(**fields):
    torch.manual_seed(8)
    model, x = Scored().double(), torch.randn(30, 20).double()
    ll.attach(model, ll.LoRAOneConfig(r=3, alpha=7, dtype="float64", **fields), [{"x": x}])
    return model, x


def test_lora_one_has_the_scale_of_its_command():
    """Theirs: peft.use_rslora=True, so alpha/√r; a file without the word holds alpha/r."""
    model, _ = one_adapted()
    (target,) = ll.adapters(model)["default"].record.targets.values()
    assert target.cfg.scale == pytest.approx(7 / 3**0.5)
    other, _ = one_adapted(use_rslora=False)
    factors = [m.fc.lora_B @ m.fc.lora_A for m in (model, other)]
    torch.testing.assert_close(*factors)  # γ sets the factors, the scale multiplies them


def test_an_older_file_of_lora_one_keeps_its_meaning(tmp_path):
    model, x = one_adapted(use_rslora=False)
    want = model(x).logits
    head, tensors = read(ll.save(model, tmp_path / "x"))
    del head["config"]["use_rslora"]
    save_file(tensors, str(tmp_path / "old.safetensors"), {"lora_lite": json.dumps(head)})
    ll.detach(model)
    ll.load(model, tmp_path / "old.safetensors")
    torch.testing.assert_close(model(x).logits, want, atol=0, rtol=0)


@pytest.mark.parametrize("centre", [True, False])
def test_eva_is_the_centred_decomposition_of_the_authors_if_asked(centre):
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(20, 12)).double()
    X = torch.randn(80, 20).double() * torch.linspace(0.3, 2, 20) + 3 * torch.randn(20).double()
    ll.attach(model, ll.EVAConfig(r=3, rho=1, centre=centre, dtype="float64"), [X[:40], X[40:]])
    V = torch.linalg.svd(X - X.mean(0), full_matrices=False).Vh[:3]
    cosine = torch.linalg.svdvals(model[0].lora_A @ V.mT).min().item()
    assert cosine > 1 - 1e-9 if centre else cosine < 0.9
    if not centre:  # the first direction is the mean input
        mean = nn.functional.normalize(X.mean(0), dim=0)
        assert (model[0].lora_A[0] @ mean).abs() > 0.99


def test_lora_on_an_embedding_starts_as_pefts():
    """Theirs: zeros for A, N(0, 1) for B. A token that training never shows keeps its vector."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(50, 12), nn.Linear(12, 9))
    adapter = ll.attach(model, ll.LoRAConfig(r=4, target_kinds=("embedding", "linear"), target_names=("0", "1")))
    assert not model[0].lora_A.any() and model[0].lora_B.std().item() == pytest.approx(1, rel=0.3)
    assert not model[1].lora_B.any() and model[1].lora_A.any()
    every, before = torch.arange(50), model[0](torch.arange(50)).detach()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(every[:20]).square().mean().backward()
        optimizer.step()
    change = (model[0](every) - before).norm(dim=1)
    assert change[:20].min() > 1e-2 and not change[20:].any()


@pytest.mark.parametrize("batches", [1, 4])
def test_cordas_divisor_weighs_batches_and_moves_the_start(batches):
    """Theirs: each batch over its largest entry, then C = Σ xxᵀ. One divisor for all would only scale C."""
    torch.manual_seed(6)
    model, X = Box(64, 48, False, torch.float64), torch.randn(256, 64).double().chunk(batches)
    X = [x * (1 + i) for i, x in enumerate(X)]  # batches of different size, as texts are
    ll.attach(model, ll.CorDAConfig(r=4, alpha=8, whiten="cov", damping=1e-3, dtype="float64"), X)
    W = model.fc.weight.detach()

    def start(rows):
        C = sum(x.mT @ x for x in rows) / 256
        C = C + 1e-3 * C.diagonal().mean() * torch.eye(64).double()
        U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
        return U[:, :4] * S[:4] @ Vh[:4] @ torch.linalg.inv(C)

    ours = 2 * model.fc.lora_B0 @ model.fc.lora_A0
    torch.testing.assert_close(ours, start(X), atol=1e-10, rtol=1e-8)
    moved = (start([x / x.abs().max() for x in X]) - ours).norm() / ours.norm()
    assert moved < 1e-9 if batches == 1 else moved > 0.05
