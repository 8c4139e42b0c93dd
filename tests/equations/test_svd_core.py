"""Methods with a trained core between frozen singular vectors, against dense products."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lora_lite as ll
from equations.helpers import Box, adapted, dense_change, randomise
from lora_lite.core.errors import ConfigError

R, ALPHA = 5, 7.0


def eye(k):
    return torch.eye(k, dtype=torch.float64)


def cayley(theta, k):
    """(I + Q)(I − Q)⁻¹ of the skew matrix with theta above its diagonal, entry by entry."""
    Q, values = torch.zeros(k, k, dtype=torch.float64), iter(theta.detach().double())
    for i in range(k):
        for j in range(i + 1, k):
            Q[i, j] = next(values)
            Q[j, i] = -Q[i, j]
    return (eye(k) + Q) @ torch.linalg.inv(eye(k) - Q)


def lora_xs(fc, s):
    return fc.lora_S.diag() + s * fc.lora_R @ fc.lora_S.diag()


def svft(fc, band):
    k, values = len(fc.lora_S), iter(fc.lora_M)
    M = torch.zeros(k, k, dtype=torch.float64)
    for o in range(-band, band + 1):
        for i in range(max(0, -o), min(k, k - o)):
            M[i, i + o] = next(values)
    return fc.lora_S.diag() + M


def ssvd(fc):
    return (fc.lora_S + fc.lora_dS).diag() @ cayley(fc.lora_Q, len(fc.lora_S))


def psoft(fc):
    return fc.lora_S.diag() @ (1 + fc.lora_b).diag() @ cayley(fc.lora_Q, len(fc.lora_S)) @ (1 + fc.lora_a).diag()


def antipasto(fc, alpha, b, max_angle):
    blocks, t = [], math.tan(max_angle / 2)
    for q in fc.lora_Q:
        q = alpha * q
        blocks.append(cayley(q / math.sqrt(1 + q.square().sum().item() / t**2), b))
    return (fc.lora_S + alpha * fc.lora_dS).diag() @ torch.block_diag(*blocks)


CASES = {
    "lora_xs": (ll.LoRAXSConfig(r=R, alpha=ALPHA, dtype="float64"), lambda fc: lora_xs(fc, ALPHA / R)),
    "svft": (ll.SVFTConfig(r=R, alpha=ALPHA, dtype="float64"), lambda fc: svft(fc, 0)),
    "svft_all": (ll.SVFTConfig(r=99, band=1, dtype="float64"), lambda fc: svft(fc, 1)),
    "svft_band": (ll.SVFTConfig(r=R, band=2, dtype="float64"), lambda fc: svft(fc, 2)),
    "svft_wide": (ll.SVFTConfig(r=3, band=9, dtype="float64"), lambda fc: svft(fc, 2)),
    "ssvd": (ll.SSVDConfig(r=R, alpha=ALPHA, dtype="float64"), ssvd),
    "psoft": (ll.PSOFTConfig(r=R, alpha=ALPHA, dtype="float64"), psoft),
    "antipasto": (
        ll.AntiPaSTOConfig(r=6, alpha=ALPHA, block=3, max_angle=1.0, dtype="float64"),
        lambda fc: antipasto(fc, 1.0, 3, 1.0),
    ),
}


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (13, 7)])
@pytest.mark.parametrize("case", CASES)
def test_forward(case, shape):
    cfg, core = CASES[case]
    model, fc, x = adapted(cfg, *shape)
    y = model(x)
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    k = len(fc.lora_S)
    torch.testing.assert_close(fc.lora_U.mT @ fc.lora_U, eye(k), atol=1e-10, rtol=0)
    torch.testing.assert_close(fc.lora_V @ fc.lora_V.mT, eye(k), atol=1e-10, rtol=0)
    torch.testing.assert_close(fc.lora_S, torch.linalg.svdvals(fc.weight)[:k], atol=1e-10, rtol=0)
    randomise(model, 0.5)
    W = fc.weight - fc.lora_U @ fc.lora_S.diag() @ fc.lora_V + fc.lora_U @ core(fc) @ fc.lora_V
    torch.testing.assert_close(model(x), nn.functional.linear(x, W, fc.bias), atol=1e-10, rtol=0)
    change = dense_change(model, shape[0])  # stays between the two spans
    assert change.norm() > 0.1
    torch.testing.assert_close(fc.lora_U @ (fc.lora_U.mT @ change), change, atol=1e-10, rtol=0)
    torch.testing.assert_close((change @ fc.lora_V.mT) @ fc.lora_V, change, atol=1e-10, rtol=0)


def test_ssvd_rotates_the_inputs_only():
    model, fc, _ = adapted(ll.SSVDConfig(r=R, dtype="float64"))
    randomise(model, 3.0)
    part = fc.lora_U.mT @ (fc.weight + dense_change(model))
    want = (fc.lora_S + fc.lora_dS).abs().sort().values
    torch.testing.assert_close(torch.linalg.svdvals(part).sort().values, want, atol=1e-8, rtol=0)


def core_of(model, fc, alpha):
    with ll.active(model, {"default": alpha}):
        return fc.lora_U.mT @ (fc.weight + dense_change_now(model)) @ fc.lora_V.mT


def dense_change_now(model):
    one, zero = torch.eye(20, dtype=torch.float64), torch.zeros(1, 20, dtype=torch.float64)
    with torch.no_grad():
        return (model(one) - model(zero)).mT - model.fc.weight


@pytest.mark.parametrize("block", [2, 3, 6])
@pytest.mark.parametrize("scale", [0.3, 30.0])
def test_antipasto_steers_both_ways_within_the_angle(block, scale):
    model, fc, x = adapted(ll.AntiPaSTOConfig(r=6, block=block, max_angle=0.5, dtype="float64"))
    randomise(model, scale)
    fc.lora_dS.data.zero_()
    inverse = (1 / fc.lora_S).diag()
    for alpha in (0.3, 1.0, 4.0):
        R, back = inverse @ core_of(model, fc, alpha), inverse @ core_of(model, fc, -alpha)
        torch.testing.assert_close(R @ back, eye(6), atol=1e-8, rtol=0)
        torch.testing.assert_close(R @ R.mT, eye(6), atol=1e-8, rtol=0)
        angles = torch.linalg.eigvals(R).angle().abs()
        assert 1e-3 < angles.max() <= 0.5 + 1e-8
    fc.lora_dS.data.normal_()
    with ll.active(model, None):
        y = model(x)
    with ll.active(model, {"default": 0.0}):
        assert torch.equal(model(x), y)
    W = fc.weight - fc.lora_U @ fc.lora_S.diag() @ fc.lora_V + fc.lora_U @ antipasto(fc, -0.7, block, 0.5) @ fc.lora_V
    ll.activate(model, {"default": -0.7})
    torch.testing.assert_close(model(x), nn.functional.linear(x, W, fc.bias), atol=1e-10, rtol=0)
    before = model(x)
    ll.merge(model)
    torch.testing.assert_close(model(x), before, atol=1e-10, rtol=0)


def test_antipasto_weighs_a_triplet_by_what_comes_out_of_it():
    """Singular value times the root of its inputs' mean square."""
    torch.manual_seed(11)
    model = Box(20, 12, True, torch.float64)
    _, S, Vh = torch.linalg.svd(model.fc.weight.detach(), full_matrices=False)
    data = [torch.randn(50, 20, dtype=torch.float64) * torch.linspace(0.2, 2, 20) for _ in range(3)]
    weight = S * (torch.cat(data) @ Vh.mT).square().mean(0).sqrt()
    best = weight.argsort(descending=True)[:5].sort().values
    assert best.tolist() != [0, 1, 2, 3, 4]
    ll.attach(model, ll.AntiPaSTOConfig(r=5, block=1, dtype="float64", target_names=("fc",)), data)
    torch.testing.assert_close(model.fc.lora_S, S[best], atol=1e-10, rtol=0)


def test_antipasto_takes_the_triplets_that_the_data_uses(tmp_path):
    torch.manual_seed(11)
    model = Box(20, 12, True, torch.float64)
    U, S, Vh = torch.linalg.svd(model.fc.weight.detach())
    used = torch.tensor([2, 5, 7, 11])
    data = [torch.randn(50, 4, dtype=torch.float64) @ Vh[used] for _ in range(3)]
    cfg = ll.AntiPaSTOConfig(r=4, dtype="float64", target_names=("fc",))
    ll.attach(model, cfg, data)
    torch.testing.assert_close(model.fc.lora_S, S[used], atol=1e-10, rtol=0)
    torch.testing.assert_close((model.fc.lora_V @ Vh[used].mT).abs(), eye(4), atol=1e-10, rtol=0)
    randomise(model)
    ll.save(model, tmp_path / "a.safetensors")
    fresh = Box(20, 12, True, torch.float64)
    fresh.fc.load_state_dict({"weight": model.fc.weight, "bias": model.fc.bias})
    ll.load(fresh, tmp_path / "a.safetensors")  # needs no data
    assert torch.equal(fresh(data[0]), model(data[0]))


def test_refusals():
    for bad in ({"max_angle": 3.2}, {"max_angle": 0.0}, {"block": 0}):
        with pytest.raises(ConfigError):
            ll.AntiPaSTOConfig(**bad)
    with pytest.raises(ConfigError, match="does not divide"):
        adapted(ll.AntiPaSTOConfig(r=6, block=4))
    with pytest.raises(ConfigError, match="band"):
        ll.SVFTConfig(band=-1)
