"""What happens to adapters when the whole model is cast."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import lora_lite as ll


def test_a_cast_of_the_model_is_said_once_and_can_be_undone():
    model = nn.Sequential(nn.Linear(6, 5))
    handle = ll.attach(model, ll.LoRAConfig(r=2))
    same = list(handle.parameters())
    model.to(torch.bfloat16).train()
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    with pytest.warns(ll.LoraLiteWarning, match="restore_dtype"):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
        handle.restore_dtype()
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in handle.parameters())
    assert all(a is b for a, b in zip(handle.parameters(), same, strict=True))


def test_serving_in_sixteen_bits_is_silent():
    model = nn.Sequential(nn.Linear(6, 5))
    ll.attach(model, ll.LoRAConfig(r=2))
    model.to(torch.bfloat16).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(3, 6, dtype=torch.bfloat16))


def test_tensors_that_have_a_dtype_of_their_own_get_it_back():
    model = nn.Sequential(nn.Linear(12, 20))
    handle = ll.attach(model, ll.DoRAConfig(r=2, dtype="bfloat16"))
    before = {k: t.dtype for k, t in ll.adapter_state_dict(model).items()}
    assert set(before.values()) == {torch.bfloat16, torch.float32}
    model.double()
    handle.restore_dtype()
    assert {k: t.dtype for k, t in ll.adapter_state_dict(model).items()} == before
