"""Hadamard, Kronecker and block products against PEFT: the same tensors, the same outputs and gradients."""

from __future__ import annotations

import peft
import pytest
import torch

import lora_lite as ll
from parity.against_peft import compare, pair

R, ALPHA = 3, 7.5


@pytest.mark.parametrize("r", [2, 5], ids=["factors", "dense"])
def test_loha(r):
    mine, theirs = pair(ll.LoHaConfig(r=r, alpha=ALPHA, dtype="float64"), peft.LoHaConfig(r=r, alpha=ALPHA))
    compare(
        mine,
        theirs,
        lambda layer: {
            "hada_w1_a.default": layer.lora_B1,
            "hada_w1_b.default": layer.lora_A1,
            "hada_w2_a.default": layer.lora_B2,
            "hada_w2_b.default": layer.lora_A2,
        },
    )


@pytest.mark.parametrize(
    ("r", "ours", "theirs"),
    [
        (2, {}, {}),
        (2, {"factor": 4}, {"decompose_factor": 4}),
        (2, {"factor": 12, "factor_both": True}, {"decompose_factor": 12, "decompose_both": True}),
        (2, {"factor": 5}, {"decompose_factor": 5}),
        (4, {}, {}),
    ],
    ids=["balanced", "4", "12-both", "5", "full"],
)
def test_lokr(r, ours, theirs):
    config = peft.LoKrConfig(r=r, alpha=1.5 * r, **theirs)
    mine, other = pair(ll.LoKrConfig(r=r, alpha=1.5 * r, dtype="float64", **ours), config)

    def link(layer):
        names = [k for k, _ in layer.named_parameters() if k.startswith("lora_")]
        return {f"lokr_w{name[6:]}.default": getattr(layer, name) for name in names}

    compare(mine, other, link)


@pytest.mark.parametrize("r", [4, 5])
def test_miss(r):
    mine, theirs = pair(ll.MiSSConfig(r=r, dtype="float64"), peft.MissConfig(r=r))
    compare(mine, theirs, lambda layer: {"miss_block.default": layer.lora_D})


def test_mini_miss():
    mine, theirs = pair(
        ll.MiSSConfig(r=4, mini=6, dtype="float64"), peft.MissConfig(r=4, mini_r=6, init_weights="mini")
    )
    compare(mine, theirs, lambda layer: {"miss_block.default": layer.lora_D})


@pytest.mark.parametrize("general", [0, 2])
def test_gralora(general):
    mine, theirs = pair(
        ll.GraLoRAConfig(r=6, alpha=9, k=3, general=general, dtype="float64"),
        peft.GraloraConfig(r=6, alpha=9, gralora_k=3, hybrid_r=general),
    )

    def link(layer):
        found = {"gralora_A.default": layer.lora_A.mT, "gralora_B.default": layer.lora_B.mT}
        if general:
            found["gralora_A_general.default.weight"] = layer.lora_A_general
            found["gralora_B_general.default.weight"] = layer.lora_B_general
        return found

    compare(mine, theirs, link)


def test_c3a():
    """PEFT's input gradient is wrong: ours agrees with finite differences of PEFT's output."""
    mine, theirs = pair(ll.C3AConfig(block=6, dtype="float64"), peft.C3AConfig(block_size=6))
    with torch.no_grad():
        mine.up.lora_w *= 20
        mine.down.lora_w *= 20
    link = lambda layer: {"c3a_kernel.default": layer.lora_w}  # noqa: E731
    compare(mine, theirs, link, tolerance=1e-3, wrong_backward=True)  # PEFT computes in fp32
    with pytest.raises(AssertionError):
        compare(mine, theirs, link, tolerance=1e-2)
