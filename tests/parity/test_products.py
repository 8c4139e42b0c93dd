"""Hadamard, Kronecker and block products against PEFT: the same tensors, the same outputs and gradients."""

from __future__ import annotations

import peft
import pytest

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
