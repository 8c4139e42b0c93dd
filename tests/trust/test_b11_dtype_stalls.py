"""B11. Training that a dtype stalls or drifts: small steps arrive on a half-precision base, and dtypes stay."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from lora_lite.io.native import read
from lora_lite.runtime.model.site import owned_tensors
from lora_lite.runtime.model.state import record_of
from lora_lite.testing.case import Case, run
from lora_lite.testing.toy import batches
from methods import OF_EACH_KIND, every_method, plain

REACHED = {"p_tuning": 0.7, "unilora": 0.7, "vblora": 0.02}
"""Share of the elements that a gradient reaches at all, where it is not 99 %: hidden units that are shut, entries that
no layer draws, vectors of a bank that are not among the chosen ones."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_method(plain, quick=("lora", "dora", "ia3"))
def test_fifty_steps_of_a_small_learning_rate_move_everything(case, dtype):
    """99 % of the elements, at a rate that half-precision tensors of the size of weights do not notice."""
    case = Case(case.variant, dtype, True, case.options)
    model = case.random(scale=0.05).train()
    before = ll.adapter_state_dict(model)
    opt = torch.optim.AdamW(ll.adapters(model)["default"].param_groups(lr=2.5e-5), eps=1e-12)
    data = batches(dtype, 4)
    trained = {t.key(s): p for t, s, _, p in owned_tensors(model, record_of(model)) if t.specs[s].is_trained}
    reached = {k: torch.zeros_like(p, dtype=torch.bool) for k, p in trained.items()}
    for i in range(50):
        opt.zero_grad()
        model(**data[i % 4]).loss.backward()
        for k, p in trained.items():
            reached[k] |= p.grad != 0
        opt.step()
    after = ll.adapter_state_dict(model)
    moved, learning = (
        sum(int(t.sum()) for t in found.values()) for found in ({k: before[k] != after[k] for k in trained}, reached)
    )
    assert moved >= 0.99 * learning
    assert learning >= REACHED.get(case.variant.name, 0.99) * sum(p.numel() for p in trained.values())
    assert all(before[k].dtype == torch.float32 for k in trained)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@every_method(quick=OF_EACH_KIND)
def test_the_output_has_the_bases_dtype(case, dtype):
    case = Case(case.variant, dtype, True, case.options)
    assert run(case.random(), case.x()).dtype == run(case.model(), case.x()).dtype == dtype


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@every_method(plain, quick=OF_EACH_KIND)
def test_autocast_trains(case, low):
    model = case.random(scale=0.05).train()
    with torch.autocast("cpu", low):
        loss = model(**batches()[0]).loss
    loss.backward()
    for p in ll.adapters(model)["default"].parameters():
        assert p.dtype == torch.float32 and p.grad is not None and p.grad.isfinite().all() and p.grad.any()


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@every_method(quick=OF_EACH_KIND)
def test_a_file_keeps_the_dtype(case, stored, tmp_path):
    model = case.random(dtype=stored)
    own = ll.adapter_state_dict(model)
    found = read(ll.save(model, tmp_path / "x"))[1]
    assert {k: t.dtype for k, t in found.items()} == {k: t.dtype for k, t in own.items()}
    fresh = case.model()
    ll.load(fresh, tmp_path / "x.safetensors")
    assert {k: t.dtype for k, t in ll.adapter_state_dict(fresh).items()} == {k: t.dtype for k, t in own.items()}
