"""What a plan counts is what an attach makes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.testing.toy import toy


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(17, 12)
        self.inner = nn.Linear(12, 12)
        self.head = nn.Linear(12, 17, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize(
    "cfg",
    [
        ll.LoRAConfig(r=3, dtype="bfloat16"),
        ll.PiSSAConfig(r=2),
        ll.DyLoRAConfig(r=3, dtype="float16"),  # a whole number of 8 bytes per layer
        ll.DoRAConfig(r=2, dtype="bfloat16"),  # norms in fp32
        ll.AdaLoRAConfig(r=3, target_r=2),  # a mask of bytes
    ],
    ids=lambda cfg: cfg.variant,
)
def test_sizes(cfg):
    model = toy()
    plan = ll.plan(model, cfg)
    assert plan.base_params == sum(p.numel() for p in model.parameters())
    handle = ll.attach(model, cfg)
    tensors = ll.adapter_state_dict(model).values()
    assert plan.bytes == sum(t.numel() * t.element_size() for t in tensors)
    assert plan.params == sum(t.numel() for t in tensors)
    assert plan.trainable == handle.num_parameters()
    assert plan.optimizer_bytes == 2 * 4 * handle.num_parameters()
    assert ll.plan(model, cfg).base_params == plan.base_params, "adapters are no part of the base"


def test_a_tied_parameter_counts_once():
    model = Tied()
    plan = ll.plan(model, ll.LoRAConfig(r=2, target_names=("inner",)))
    assert plan.base_params == 17 * 12 + 12 * 12 + 12 == sum(p.numel() for p in model.parameters())


def test_exclusion_wins_over_naming():
    names = [
        t.path for t in ll.plan(toy(), ll.LoRAConfig(target_names=("up", "down"), exclude_names=("down",))).targets
    ]
    assert names == ["layers.0.up", "layers.1.up"]


def test_negative_layers_count_from_the_end():
    model = nn.Module()
    model.layers = nn.ModuleList(toy().layers[i % 2] for i in range(2))
    model.layers.append(toy().layers[0])
    names = [t.path for t in ll.plan(model, ll.LoRAConfig(layers=(-1, 0))).targets]
    assert names == ["layers.0.up", "layers.0.down", "layers.2.up", "layers.2.down"]


def test_whole_modules_have_the_adapters_dtype_and_seed():
    plan = ll.plan(toy(), ll.LoRAConfig(r=2, dtype="bfloat16", seed=5, train_modules=("head",)))
    (head,) = (t for t in plan.targets if t.path == "head")
    assert (head.cfg.dtype, head.cfg.seed) == ("bfloat16", 5)


def test_a_module_is_named_whole_not_by_its_beginning():
    model = toy()
    model.head2 = nn.Linear(12, 3)
    plan = ll.plan(model, ll.LoRAConfig(r=2, train_modules=("head",)))
    assert [t.path for t in plan.targets if t.cfg.variant == "whole"] == ["head"]


def test_gradients_of_zeros_are_reported():
    model = toy()
    ll.attach(model, ll.LoRAConfig(r=2))
    model(torch.randn(3, 12)).square().sum().backward()
    for p in model.layers[1].up.parameters():
        if p.grad is not None:
            p.grad.zero_()
    report = ll.check(model)
    assert report.zero == {"default": ["layers.1.up"]} and report.learning == {"default": 4}
