"""LoRA's relatives and DEFT against PEFT: the same tensors, outputs and gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import nn

import lora_lite as ll
from equations.helpers import adapted, randomise
from parity.against_peft import compare, pair


def lora(layer):
    return {"lora_A.default.weight": layer.lora_A, "lora_B.default.weight": layer.lora_B}


def test_mica():
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights="mica")
    mine, theirs = pair(ll.MiCAConfig(r=4, alpha=6), config)
    for path in ("up", "down"):
        ours, other = mine.get_submodule(path).lora_B, theirs.get_submodule(path).lora_B["default"].weight
        torch.testing.assert_close(ours @ ours.mT, other @ other.mT, atol=1e-5, rtol=0)
    compare(mine, theirs, lora, tolerance=1e-5)


def test_kasa():
    """PEFT truncates its copy of the base weight; our page subtracts the same triplets. PEFT decomposes in fp32."""
    mine, theirs = pair(
        ll.KaSAConfig(r=4, alpha=6),
        peft.LoraConfig(r=4, lora_alpha=6, kasa_config=peft.tuners.lora.config.KasaConfig()),
    )
    compare(mine, theirs, lambda layer: lora(layer) | {"lora_diag.default": layer.lora_values}, tolerance=1e-5)


@pytest.mark.parametrize("side", ["A", "B"])
def test_bd_lora(side):
    bd = peft.tuners.lora.config.BdLoraConfig(**{f"target_modules_bd_{side.lower()}": ["up", "down"]}, nblocks=2)
    mine, theirs = pair(
        ll.BDLoRAConfig(r=4, alpha=6, blocks=2, side=side, dtype="float64"),
        peft.LoraConfig(r=4, lora_alpha=6, use_bdlora=bd),
    )
    compare(mine, theirs, lora)


def test_qa_lora():
    """PEFT has it for GPTQ layers only, so its forward is run on a stand-in for the layer."""
    model, fc, x = adapted(ll.QALoRAConfig(r=3, alpha=6, group=4, dtype="float64"))
    randomise(model)
    A, B = nn.Linear(5, 3, bias=False).double(), nn.Linear(3, 12, bias=False).double()
    A.weight.data.copy_(fc.lora_A * 4**2 / 20)
    B.weight.data.copy_(fc.lora_B)
    layer: Any = SimpleNamespace(
        lora_A={"default": A},
        lora_B={"default": B},
        lora_dropout={"default": nn.Identity()},
        scaling={"default": 2.0},
        qalora_group_size={"default": 4},
        in_features=20,
        training=False,
    )
    x.requires_grad_()
    base = nn.functional.linear(x, fc.weight, fc.bias)
    y, z = model(x), QALoraLinearVariant.forward(layer, "default", x, base)
    torch.testing.assert_close(y, z, atol=1e-10, rtol=0)
    mine = torch.autograd.grad((y**2).sum(), (x, fc.lora_A, fc.lora_B))
    other = torch.autograd.grad((z**2).sum(), (x, A.weight, B.weight))
    for a, b in zip(mine, (other[0], other[1] * 4**2 / 20, other[2]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("depth", "activation"), [(0, "relu"), (0, "tanh"), (2, "tanh")])
def test_peanut(depth, activation):
    mine, theirs = pair(
        ll.PEANuTConfig(r=4, alpha=6, depth=depth, activation=activation, dtype="float64"),
        peft.PeanutConfig(r=4, depth=depth, act_fn=activation, scaling=1.5),
    )

    def link(layer):
        found = {"peanut_A.default.weight": layer.lora_A, "peanut_B.default.weight": layer.lora_B}
        for i in range(depth):
            found[f"peanut_encoders.default.{i}.weight"] = getattr(layer, f"lora_E{i}")
            found[f"peanut_decoders.default.{i}.weight"] = getattr(layer, f"lora_D{i}")
        return found

    compare(mine, theirs, link)


def test_hira():
    mine, theirs = pair(ll.HiRAConfig(r=4, dtype="float64"), peft.HiraConfig(r=4))
    compare(mine, theirs, lambda layer: {"hira_A.default": layer.lora_A, "hira_B.default": layer.lora_B})


@pytest.mark.parametrize("projection", ["relu", "qr"])
def test_deft(projection):
    """PEFT computes in fp32."""
    mine, theirs = pair(
        ll.DEFTConfig(r=4, alpha=6, projection=projection),
        peft.DeftConfig(r=4, alpha=6, decomposition_method=projection),
    )

    def link(layer):
        T0 = layer.lora_P0.relu() if projection == "relu" else torch.linalg.qr(layer.lora_P0).Q
        R = T0.mT @ layer.weight.detach() / 1.5 + layer.lora_R
        return {"deft_P.default": layer.lora_P0 + layer.lora_P, "deft_R.default": R}

    compare(mine, theirs, link, tolerance=2e-5)
