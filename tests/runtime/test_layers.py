"""What kinds of layers, their tensors and the calls that they see answer, asked one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.runtime.layers.kinds import kind_named
from lora_lite.runtime.layers.norm import NormCell
from lora_lite.runtime.layers.read import fingerprint
from lora_lite.runtime.layers.tensors import is_packed
from lora_lite.runtime.model.call import Call
from lora_lite.runtime.view.cache import cache_of
from lora_lite.testing.toy import FakeQuantLinear


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_floating_tensor_of_the_right_size_is_not_packed(dtype):
    w = nn.Parameter(torch.zeros(4, 3, dtype=dtype))
    assert not is_packed(w, 12)
    assert is_packed(w, 24)
    assert is_packed(torch.zeros(4, 3, dtype=torch.int8), 12)
    assert is_packed(None, 12)


def test_the_sample_of_a_packed_layer_is_that_of_its_matrix():
    torch.manual_seed(0)
    packed, dense = FakeQuantLinear(37, 41), nn.Linear(37, 41)
    with torch.no_grad():
        dense.weight.copy_(packed.dequantised())
    got, want = (torch.tensor(fingerprint(m)["sample"]) for m in (packed, dense))
    torch.testing.assert_close(got, want)


def test_a_convolution_with_a_forward_of_its_own_is_not_written():
    class Own(nn.Conv1d):
        def forward(self, input):
            return 2 * super().forward(input)

    conv = kind_named("conv")
    assert conv.writable(nn.Conv1d(4, 3, 2))
    assert not conv.writable(Own(4, 3, 2))


def test_an_embedding_that_changes_its_weight_is_refused():
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=1.0))
    with pytest.raises(ll.TargetError, match="max_norm"):
        ll.plan(model, ll.LoRAConfig(r=2, target_kinds=("embedding",)))


def test_a_start_from_data_needs_an_input():
    model = nn.Sequential(nn.Embedding(9, 4))
    with pytest.raises(ll.TargetError, match="starts from data, which an embedding does not offer"):
        ll.plan(model, ll.EVAConfig(r=2, target_kinds=("embedding",)))


def test_a_norm_without_a_bias_takes_none():
    norm = nn.RMSNorm(6)
    cell = NormCell(kind_named("norm"), norm, "norm")
    with pytest.raises(ll.WeightError, match="adds a bias"):
        cell.write_bias(torch.ones(6))
    assert list(norm._parameters) == ["weight"]


def test_calls_are_the_same_where_their_positions_are():
    def call(*columns: int) -> Call:
        return Call((1, 4), {"p1+s1": (torch.tensor([columns]), torch.tensor([[True, True]]), 1)})

    assert call(0, 3) == call(0, 3)
    assert call(0, 3) != call(0, 2)


class Counting:
    def get_seq_length(self) -> int:
        return 3


def test_which_argument_is_the_cache():
    key = torch.zeros(1, 2, 3, 4)
    older, new = ((key, key),), Counting()
    assert cache_of({"states": older, "past": new}) is new
    assert cache_of({"x": torch.zeros(1, 3), "past": older}) is older
    assert cache_of({"sizes": ((torch.zeros(2, 3), torch.zeros(2, 3)),)}) is None
