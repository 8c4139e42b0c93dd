"""Methods whose layers share tensors, and Super-Tuning, against PEFT: the same tensors, outputs and gradients."""

from __future__ import annotations

from operator import attrgetter

import peft
import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.runtime.view.expert import layer_views
from parity.against_peft import pair, relative

PATHS = ("up", "down")


def compare(mine, theirs, shared, own, tolerance=1e-9):
    """Copy our tensors into PEFT's, then compare outputs, input gradients and those of trained tensors by name.

    `shared`: PEFT's name on the tuner -> ours; `own`: PEFT's name on a layer -> ours.
    """
    views = {v.path: v for v in layer_views(mine, ll.adapters(mine)["default"].record)}
    pairs = []
    for path, view in views.items():
        for there, here in own.items():
            pairs.append((view.master(here), attrgetter(there)(theirs.get_submodule(path))))
        for there, here in shared.items():
            pairs.append((view.master(here), attrgetter(there)(theirs.get_submodule(path))))
    for value, tensor in pairs:
        assert tensor.numel() == value.numel(), f"{tuple(tensor.shape)}, not {tuple(value.shape)}"
        tensor.data.copy_(value.detach().view(tensor.shape))
    x = torch.randn(2, 5, mine.up.in_features, dtype=mine.up.weight.dtype, requires_grad=True)
    y, z = mine(x), theirs(x)
    with ll.active(mine, None):
        assert (mine(x) - y).abs().max() > 1e-4, "the adapter does nothing"
    weights = torch.randn_like(y)
    trained = list({id(a): (a, b) for a, b in pairs if a.requires_grad}.values())
    got = torch.autograd.grad((y * weights).sum(), [x, *(a for a, _ in trained)])
    want = torch.autograd.grad((z * weights).sum(), [x, *(b for _, b in trained)])
    errors = [relative(y, z), *(relative(a, b.view(a.shape)) for a, b in zip(got, want, strict=True))]
    assert len(trained) > 0 and max(errors) <= tolerance, errors


def test_vera():
    mine, theirs = pair(ll.VeRAConfig(r=6, dtype="float64"), peft.VeraConfig(r=6))
    shared = {"vera_A.default": "lora_A", "vera_B.default": "lora_B"}
    compare(mine, theirs, shared, {"vera_lambda_b.default": "lora_b", "vera_lambda_d.default": "lora_d"})


def test_pvera():
    """The mean: in training both draw."""
    mine, theirs = pair(ll.PVeRAConfig(r=6, dtype="float64"), peft.PveraConfig(r=6))
    mine.eval(), theirs.eval()
    shared = {"pvera_A.default": "lora_A", "pvera_B.default": "lora_B"}
    compare(mine, theirs, shared, {"pvera_lambda_b.default": "lora_b", "pvera_lambda_d.default": "lora_d"})


def test_pvera_draws_as_peft_does():
    mine, theirs = pair(ll.PVeRAConfig(r=6, dtype="float64"), peft.PveraConfig(r=6))
    view = layer_views(mine, ll.adapters(mine)["default"].record)[0]
    for there, here in {"A": "lora_A", "B": "lora_B", "lambda_b": "lora_b", "lambda_d": "lora_d"}.items():
        tensor = getattr(theirs.up, f"pvera_{there}")["default"]
        tensor.data.copy_(view.master(here).detach().view(tensor.shape))
    x, found = torch.randn(4000, 24, dtype=torch.float64)[:1].expand(4000, -1), []
    for layer in (mine.up, theirs.up):
        torch.manual_seed(5)
        y = layer(x)
        found.append((y.mean(0), y.std(0)))
    (mean, std), (their_mean, their_std) = found
    assert std.min() > 1e-4
    torch.testing.assert_close(std, their_std, atol=0, rtol=0.1)
    assert ((mean - their_mean).abs() < 6 * std / 4000**0.5).all()


def test_randlora():
    """In PEFT's pairing, which its files need."""
    mine, theirs = pair(
        ll.RandLoRAConfig(r=5, alpha=7, pairing="peft", dtype="float64"),
        peft.RandLoraConfig(r=5, randlora_alpha=7),
    )
    for path in PATHS:  # theirs are larger, and cut as ours
        layer, view = theirs.get_submodule(path), layer_views(mine, ll.adapters(mine)["default"].record)[0]
        layer.randlora_A["default"][:, 0, :24] = view.lora_A
        layer.randlora_B["default"][:36, :5] = view.lora_B
    compare(mine, theirs, {}, {"randlora_lambda.default": "lora_lambda", "randlora_gamma.default": "lora_gamma"})


def test_vblora():
    mine, theirs = pair(
        ll.VBLoRAConfig(r=3, vectors=9, length=6, topk=3, dtype="float64"),
        peft.VBLoRAConfig(r=3, num_vectors=9, vector_length=6, topk=3),
    )
    own = {"vblora_logits_A.default": "lora_logits_A", "vblora_logits_B.default": "lora_logits_B"}
    compare(mine, theirs, {"vblora_vector_bank.default": "lora_bank"}, own)


def test_unilora():
    mine, theirs = pair(ll.UniLoRAConfig(r=3, length=11, dtype="float64"), peft.UniLoraConfig(r=3, theta_d_length=11))
    for view in layer_views(mine, ll.adapters(mine)["default"].record):
        layer = theirs.get_submodule(view.path)
        for side in "AB":
            at = view.master(f"lora_at_{side}").long()
            getattr(layer, f"unilora_indices_{side}")["default"] = at
            getattr(layer, f"unilora_scales_{side}")["default"] = view.master("lora_unit")[at]
    compare(mine, theirs, {"unilora_theta_d.default": "lora_theta"}, {})


def test_unilora_weighs_entries_as_peft_does():
    """Its balanced deal of indices gives every number 1/√count, as ours."""
    base = nn.Sequential(nn.Linear(24, 36))
    theirs = peft.get_peft_model(base, peft.UniLoraConfig(r=3, theta_d_length=11, target_modules=["0"]))
    layer = theirs.base_model.model[0]
    at = torch.cat([getattr(layer, f"unilora_indices_{s}")["default"].flatten() for s in "AB"]).long()
    unit = torch.cat([getattr(layer, f"unilora_scales_{s}")["default"].flatten() for s in "AB"])
    torch.testing.assert_close(unit, torch.bincount(at, minlength=11).float().rsqrt()[at])


@pytest.mark.parametrize("tying", [0.0, 1.0])
def test_tinylora(tying):
    mine, theirs = pair(
        ll.TinyLoRAConfig(r=3, u=5, tying=tying, dtype="float64"), peft.TinyLoraConfig(r=3, u=5, weight_tying=tying)
    )
    own = {"tinylora_A.default": "lora_A", "tinylora_B.default": "lora_B", "tinylora_P.default": "lora_P"}
    for i, view in enumerate(layer_views(mine, ll.adapters(mine)["default"].record)):
        theirs.get_submodule(view.path).v = theirs.get_submodule(view.path).tinylora_v["default"][
            str(0 if tying else i)
        ]
    compare(mine, theirs, {"v": "lora_v"}, own, tolerance=1e-8)


@pytest.mark.parametrize("low_rank", [False, True])
def test_supertuning(low_rank):
    mine, theirs = pair(
        ll.SuperTuningConfig(share=0.05, r=3, alpha=7, low_rank=low_rank, dtype="float64"),
        peft.SupertuningConfig(sparsity=0.95, r=3 if low_rank else None, lora_alpha=7 if low_rank else None),
    )
    own = {"supertuning_values.default": "lora_values"}
    if low_rank:
        own |= {f"supertuning_lora_{s}.default.weight": f"lora_{s}" for s in "AB"}
    for path in PATHS:
        ours, layer = mine.get_submodule(path), theirs.get_submodule(path)
        rows, columns = ours.lora_at.long()
        flat = rows * ours.in_features + columns
        assert set(flat.tolist()) == set(layer.supertuning_indices["default"].tolist())
        layer.supertuning_indices["default"] = flat.int()
    compare(mine, theirs, {}, own)
