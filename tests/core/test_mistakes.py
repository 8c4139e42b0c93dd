"""What people pass by mistake: one sentence that names the line to type instead."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.core import registry


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 7))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ll.LoRAConfig(lora_alpha=16), "has no field 'lora_alpha'. Here it is called 'alpha'"),
        (lambda: ll.LoRAConfig(target_modules=["q"]), "Here it is called 'target_names'"),
        (lambda: ll.LoRAConfig(alhpa=16), "Did you mean 'alpha'"),
        (lambda: ll.LoRAConfig(8), r"by name: LoRAConfig\(r=8\)"),
        (lambda: ll.AdapterConfig("lora", 8, 16.0), r"AdapterConfig\(variant='lora', r=8, alpha=16.0\)"),
        (lambda: ll.DeLoRAConfig(lambda0=15.0), "Here it is called 'strength'"),
        (lambda: ll.RoadConfig(road_variant="road_2"), "per_pair=1, 2, 4 of RoadConfig"),
        (lambda: ll.AntiPaSTOConfig(rotate_basis="none"), "block=1 turns nothing"),
        (lambda: ll.AntiPaSTOConfig(max_rotation_angle=0.5), "Here it is called 'max_angle'"),
        (lambda: ll.AntiPaSTOConfig(block_size=4), "Here it is called 'block'"),
        (lambda: ll.AdapterConfig.from_dict({"variant": "delora", "lambda0": 1.0}), "Here it is called 'strength'"),
        (lambda: ll.ParamSpec((2, 3), init="near_zero"), "write 'normal:1e-4'"),
        (lambda: ll.ParamSpec((2, 3), init="near_one"), "use 1 [+] the tensor"),
        (lambda: setattr(ll.LoRAConfig(), "r", 4), r"stays as it was made.*dataclasses.replace\(cfg, r=4\)"),
        (lambda: setattr(ll.PiSSAConfig(), "rr", 4), "stays as it was made"),
        (lambda: delattr(ll.LoRAConfig(), "r"), "stays as it was made"),
        (lambda: ll.LoRAConfig(target_names="all-linear"), "'all-linear' is what None, the default, means"),
        (lambda: ll.attach(model(), {"r": 8}), r"got dict"),
        (lambda: ll.attach(model(), "dora"), r"lora_lite.DoRAConfig\(\), got the name 'dora'"),
        (lambda: ll.attach(model(), ll.LoRAConfig), r"LoRAConfig\(r=8\), got the class"),
        (lambda: ll.attach(ll.LoRAConfig(), model()), "first argument is the model"),
        (lambda: ll.plan(object(), ll.LoRAConfig()), "first argument is the model, a torch.nn.Module, got object"),
        (lambda: ll.load("tokenizer", "a.safetensors"), "first argument is the model"),
        (lambda: ll.merge("tokenizer"), "first argument is the model"),
        (lambda: ll.save("tokenizer", "a.safetensors"), "first argument is the model"),
    ],
)
def test_a_mistake_is_one_sentence(call, says):
    with pytest.raises(ll.ConfigError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_configs_are_still_copied_and_pickled():
    cfg = ll.LoRAConfig(r=3, alpha=5)
    assert copy.deepcopy(cfg) == pickle.loads(pickle.dumps(cfg)) == cfg


def test_what_has_no_effect_or_is_too_large_is_said_by_the_plan():
    notes = "\n".join(ll.plan(model(), ll.IA3Config(alpha=16, target_names="0")).notes)
    assert "alpha=16.0 has no effect: ia3 does not use it" in notes
    assert "above the width" in "\n".join(ll.plan(model(), ll.LoRAConfig(r=64, target_names=".*")).notes)
    assert ll.plan(model(), ll.LoRAConfig(r=2, alpha=5, target_names=".*")).notes == []


@pytest.mark.parametrize("name", ["REGISTRY", "register_config", "LoraLiteConfig"])
def test_names_of_the_original_say_what_to_type(name):
    with pytest.raises(AttributeError, match="lora_lite has no .*(ll|lora_lite)[.]"):
        getattr(ll, name)


def test_a_dict_gives_the_config_of_its_method():
    said = {"variant": "lora", "r": 3, "alpha": 6.0, "dtype": "bfloat16", "target_roles": [], "layers": None}
    cfg = ll.AdapterConfig.from_dict(said)
    assert cfg == ll.LoRAConfig(r=3, alpha=6, dtype="bfloat16") and type(cfg) is ll.LoRAConfig
    cfg = ll.DeLoRAConfig(r=3, strength=5, rank_pattern={"0": 2})
    assert ll.AdapterConfig.from_dict(cfg.to_dict()) == cfg
    with pytest.raises(ll.ConfigError, match="no variant is called 'lorra'.*'lora'"):
        ll.attach(model(), ll.AdapterConfig.from_dict({"variant": "lorra"}))


class Tree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"attn": nn.ModuleDict({"q_proj": nn.Linear(12, 20)})})])
        self.head = nn.Linear(20, 7)


@pytest.mark.parametrize(
    ("pattern", "instead"),
    [
        ("attn", ".*attn.*"),
        ("q_", ".*q_.*"),
        (r"^layers\.0\.", r"layers\.0\..*"),
        ("_proj|hea", ".*(?:_proj|hea).*"),
    ],
)
def test_a_pattern_that_stands_inside_paths_says_what_finds_them(pattern, instead):
    with pytest.raises(ll.TargetError) as caught:
        ll.plan(Tree(), ll.LoRAConfig(target_names=pattern, target_roles=()))
    assert f"target_names=({instead!r},) matches those" in str(caught.value)
    ll.plan(Tree(), ll.LoRAConfig(target_names=instead))


def test_no_names_at_all_are_told_from_none():
    with pytest.raises(ll.TargetError, match="names no layer; leave it out"):
        ll.attach(model(), ll.LoRAConfig(target_names=()))


def test_a_page_that_reads_the_config_of_the_original_is_told():
    @ll.register
    class Original:
        name = "original_page"

        @staticmethod
        def param_specs(d_in, d_out, cfg):
            return {"lora_A": ll.ParamSpec((cfg.r, d_in), init=lambda t: t.normal_(0, 0.1))}

        @staticmethod
        def forward(layer, x, y):
            return y * layer._lora_cfg.alpha

    try:
        net = model()
        ll.attach(net, ll.AdapterConfig(variant="original_page", r=2, target_names=".*"))
        with pytest.raises(AttributeError, match="layer's config is layer.cfg; layer.cfg.scale"):
            net(torch.randn(2, 12))
    finally:
        registry._TABLE.pop("original_page")


def test_a_start_of_one_argument_depends_on_the_adapters_seed_alone():
    spec, more = ll.ParamSpec((3, 4), init=lambda t: t.normal_(0, 2)), ll.ParamSpec((3, 4), init=nn.init.xavier_normal_)
    drawn = []
    for seed, loud in ((1, 0), (1, 5), (2, 0)):
        torch.manual_seed(loud)
        before = torch.get_rng_state()
        for one in (spec, more):
            drawn.append(torch.empty(3, 4))
            one.fill(drawn[-1], torch.Generator().manual_seed(seed))
        assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[3])
    assert not torch.equal(drawn[0], drawn[4]) and not torch.equal(drawn[1], drawn[5])


def test_no_seed_draws_one_from_torchs_global_generator():
    def started(loud, cfg):
        torch.manual_seed(loud)
        net = model()
        handle = ll.attach(net, cfg)
        return handle, ll.adapter_state_dict(net)["0.lora_A"]

    free, fixed = ll.LoRAConfig(r=2, seed=None, target_names=".*"), ll.LoRAConfig(r=2, target_names=".*")
    assert torch.equal(started(0, fixed)[1], started(1, fixed)[1])
    assert not torch.equal(started(0, free)[1], started(1, free)[1])
    handle, A = started(1, free)
    assert torch.equal(started(1, free)[1], A)
    again = ll.LoRAConfig(r=2, seed=handle.cfg.seed, target_names=".*")
    assert torch.equal(started(7, again)[1], A)
    net, before = model(), torch.get_rng_state()
    with pytest.raises(ll.TargetError):
        ll.attach(net, ll.LoRAConfig(seed=None, target_names="no"))
    assert torch.equal(before, torch.get_rng_state())
