"""B2. A run that trains nothing: every target moves, whatever recomputes its block, or something raises."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_lite as ll
from lora_lite.runtime.model.site import owned_tensors
from lora_lite.runtime.model.state import record_of
from lora_lite.testing.case import train
from lora_lite.testing.toy import batches
from methods import OF_EACH_KIND, every_method, trains


def recomputed(model, reentrant):
    """The toy, with its blocks run again in backward."""

    def through(h, *more):
        if reentrant and h.is_leaf:
            h = h.requires_grad_()  # what `enable_input_require_grads` does
        for layer in model.layers:
            checked = model.gradient_checkpointing and torch.is_grad_enabled()
            h = checkpoint(layer, h, *more, use_reentrant=reentrant) if checked else layer(h, *more)
        return h

    model.through, model.gradient_checkpointing = through, True


@every_method(trains)
def test_every_target_moves_and_the_loss_falls(case):
    learns(case, "plain")


@pytest.mark.parametrize("how", ["reentrant", "non_reentrant"])
@every_method(trains, quick=OF_EACH_KIND)
def test_also_where_blocks_are_recomputed(case, how):
    if how == "reentrant" and case.variant.tokens is not None:
        with pytest.raises(ll.SelectionError, match="use_reentrant=False"):
            learns(case, how)
    else:
        learns(case, how)


def learns(case, how):
    model = case.fresh().train()
    if how != "plain":
        recomputed(model, how == "reentrant")
    before = {k: t.clone() for k, t in ll.adapter_state_dict(model).items()}
    start = loss(model)
    train(case, model, steps=3, lr=1e-2)
    after, idle = ll.adapter_state_dict(model), []
    for target, short, _, t in owned_tensors(model, record_of(model)):
        key = target.key(short)
        if target.specs[short].is_trained:
            assert t.grad is not None and t.grad.isfinite().all(), key
            idle += [key] if torch.equal(before[key], after[key]) else []
    assert not idle, f"did not move: {idle}"
    assert loss(model) < start


@torch.no_grad()
def loss(model):
    """Without the noise of training."""
    found = model.eval()(**batches(n=1)[0]).loss.item()
    model.train()
    return found


class Read(nn.Module):
    """One layer is called, the weight of the other is read by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x):
        return x + F.linear(self.up(x).tanh(), self.down.weight, self.down.bias)


def first_steps(model, handle, folder):
    """What a user does before the first evaluation."""
    opt = torch.optim.AdamW(handle.param_groups(lr=1e-2))
    for _ in range(2):
        opt.zero_grad()
        model(torch.randn(3, 12)).square().sum().backward()
        ll.check(model)
        opt.step()
    ll.save(model, folder / "x")


@every_method(trains, quick=("lora", "dora", "ia3", "hra", "road"))
def test_a_layer_whose_weight_a_function_reads_is_named(case, tmp_path):
    if case.variant.needs_data or case.variant.on_step or not case.linear:
        pytest.skip("needs the toy's batches, a schedule, or blocks")
    torch.manual_seed(0)
    model = nn.Sequential(Read(), Read())
    with (
        pytest.warns(ll.LoraLiteWarning, match=r"0\.down.*never called"),
        pytest.raises(ll.LoraLiteError, match=r"1\.down|0\.down"),
    ):
        first_steps(model, ll.attach(model, case.cfg()), tmp_path)


def test_the_output_projection_of_torchs_attention_is_refused():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(12, 2, batch_first=True)
            self.mlp = nn.Linear(12, 12)

        def forward(self, x):
            return self.mlp(self.mha(x, x, x)[0])

    model = nn.Sequential(Attention(), Attention())
    with pytest.raises(ll.TargetError, match="out_proj"):
        ll.attach(model, ll.LoRAConfig(target_names=("out_proj",)))
    assert not [t.path for t in ll.plan(model, ll.LoRAConfig()).targets if "out_proj" in t.path]
