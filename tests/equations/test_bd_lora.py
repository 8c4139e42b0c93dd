"""BD-LoRA against its shards, one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite as ll
import tiny_llm
from equations.helpers import adapted, dense_change, randomise


@pytest.mark.parametrize("side", ["A", "B"])
def test_forward_and_factors(side):
    n, r = 2, 4
    model, fc, x = adapted(ll.BDLoRAConfig(r=r, alpha=7, blocks=n, side=side, dtype="float64"))
    y = model(x)
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    randomise(model)
    want = torch.zeros(12, 20).double()
    for shard in range(n):
        ranks = slice(shard * r // n, (shard + 1) * r // n)
        ins, outs = slice(shard * 20 // n, (shard + 1) * 20 // n), slice(shard * 12 // n, (shard + 1) * 12 // n)
        if side == "A":  # a shard of the inputs, all outputs
            want[:, ins] += fc.lora_B[:, ranks] @ fc.lora_A[ranks]
        else:
            want[outs] += fc.lora_B[outs] @ fc.lora_A[ranks]
    want = 7 / 4 * want.detach()
    torch.testing.assert_close(dense_change(model), want, atol=1e-10, rtol=0)
    ll.activate(model, None)
    ll.combine(model, {"default": 0.5}, name="half")
    torch.testing.assert_close(dense_change(model), 0.5 * want, atol=1e-10, rtol=0)


def test_the_side_follows_the_role():
    model = tiny_llm.model()
    ll.attach(model, ll.BDLoRAConfig(r=4))
    block: nn.Module = model.model.layers[0]
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        layer = block.get_submodule(name)
        assert layer.lora_A.shape == (4, layer.in_features // 2) and layer.lora_B.shape == (32, 4)
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        layer = block.get_submodule(name)
        assert layer.lora_A.shape == (4, 32) and layer.lora_B.shape == (layer.out_features, 2)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ll.ConfigError, match="blocks=3 does not divide the 20"):
        adapted(ll.BDLoRAConfig(r=3, blocks=3, side="A"))
    with pytest.raises(ll.ConfigError, match="must divide the rank: r=3"):
        ll.BDLoRAConfig(r=3)
