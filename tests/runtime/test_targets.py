"""Targets are found by structure: roles, blocks and heads of many architectures, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite as ll
import tiny_models
from lora_lite.runtime.targets.structure import describe, role_of
from lora_lite.testing.toy import Toy, toy
from neighbours import fused_experts

EVERY = [pytest.param(name, marks=fused_experts) if name == "mixtral" else name for name in tiny_models.MODELS]


@pytest.mark.parametrize("name", EVERY)
def test_roles_blocks_and_heads(name):
    model = tiny_models.build(name)
    structure = describe(model)
    want = tiny_models.expected(name)
    prefix = tiny_models.MODELS[name][2]
    linear = [s for s in structure.places if s.kind == "linear"]
    found = {s.path: s.role for s in linear if s.path.startswith(f"{prefix}.0.")}
    if name == "deepseek":
        found = {p: r for p, r in found.items() if ".experts." not in p}
    assert found == want
    assert structure.d_model == 32 and structure.n_layers == 2
    for s in linear:
        inside = [p for p, _, _ in structure.blocks if s.path.startswith(f"{p}.")]
        assert s.layer == (int(inside[0].rsplit(".", 1)[1]) if inside else None)
    paths = {t.path for t in ll.plan(model, ll.LoRAConfig(r=2)).targets}
    assert set(want) <= paths
    heads = [s.path for s in structure.places if s.is_head]
    assert len(heads) == 1 and not set(heads) & paths
    assert all(s.layer is not None for s in structure.places if s.path in paths), "a layer outside of the blocks"


@pytest.mark.parametrize("name", EVERY)
def test_every_target_acts_and_learns(name):
    model, batch = tiny_models.build(name), tiny_models.batch(name)
    with torch.no_grad():
        base = model(**batch)[0]
    handle = ll.attach(model, ll.LoRAConfig(r=2, alpha=3))
    with torch.no_grad():
        assert torch.equal(model(**batch)[0], base)
        for n, p in model.named_parameters():
            if n.endswith("lora_B"):
                p.normal_(std=0.1)
        assert not torch.allclose(model(**batch)[0], base)
    model(**batch)[0].square().sum().backward()
    report = ll.check(model)
    assert report.learning == {"default": len(handle.targets)}
    assert all(p.grad.any() for n, p in model.named_parameters() if "lora_" in n)


def test_roles_by_name_where_the_shape_says_nothing():
    assert role_of("x.to_q", 8, 8, 8) == "reader"
    assert role_of("x.to_out.0", 8, 8, 8) == "writer"
    assert role_of("x.something_new", 8, 8, 8) == "inner"
    assert role_of("x.something_new", 8, 5, 8) == "reader"
    assert role_of("x.something_new", 5, 8, 8) == "writer"
    assert role_of("x.k_proj", 5, 8, 8) == "inner"  # keys from another stream
    assert role_of("x.q_b_proj", 5, 8, 8) == "inner"
    assert role_of("x.q_proj", 5, 6, 8) == role_of("x.q_proj", 8, 8, None) == "inner"


def test_role_filters_choose_exactly_these_layers():
    model = tiny_models.build("llama")
    plan = ll.plan(model, ll.LoRAConfig(target_roles=("writer",)))
    assert {t.path.rsplit(".", 1)[1] for t in plan.targets} == {"o_proj", "down_proj"} and len(plan.targets) == 4
    for nothing in ((), [], None):  # an empty filter is none
        assert len(ll.plan(model, ll.LoRAConfig(target_roles=nothing)).targets) == 14
    plan = ll.plan(model, ll.LoRAConfig(target_roles=("reader",), layers=(-1,)))
    assert {t.path.split(".")[2] for t in plan.targets} == {"1"} and len(plan.targets) == 5
    assert ("lm_head", "output head; name it in target_names to adapt it") in plan.unadapted


@fused_experts
def test_fused_experts_are_listed_not_forgotten():
    plan = ll.plan(tiny_models.build("mixtral"), ll.LoRAConfig())
    fused = {path: why for path, why in plan.unadapted if "experts" in path}
    names = ("lora_gate_up_proj", "lora_down_proj")
    assert set(fused) == {f"model.layers.{i}.mlp.experts.{w}" for i in (0, 1) for w in names}
    assert all("add it with target_kinds" in why for why in fused.values())
    assert "model.layers.0.mlp.gate.weight" in dict(plan.unadapted)
    assert "experts" in str(plan)


def test_names_overrides_and_their_dead_entries():
    model = tiny_models.build("llama")
    cfg = ll.LoRAConfig(
        r=4, alpha=6, target_names=("q_proj", r"mlp\..*"), exclude_names=(r"layers\.1\.mlp\.gate_proj",),
        rank_pattern={"q_proj": 2, r"layers\.1\..*": 3}, alpha_pattern={"down_proj": 5.0},
    )  # fmt: skip
    sizes = {t.path.removeprefix("model.layers."): (t.cfg.r, t.cfg.alpha) for t in ll.plan(model, cfg).targets}
    assert sizes == {
        "0.self_attn.q_proj": (2, 6), "0.mlp.gate_proj": (4, 6), "0.mlp.up_proj": (4, 6), "0.mlp.down_proj": (4, 5),
        "1.self_attn.q_proj": (3, 6), "1.mlp.up_proj": (3, 6), "1.mlp.down_proj": (3, 5),
    }  # fmt: skip
    handle = ll.attach(model, cfg)
    assert {p.removeprefix("model.layers.") for p in handle.targets} == set(sizes)
    assert model.model.layers[1].mlp.down_proj.lora_A.shape[0] == 3
    for field, value, near in (
        ("target_names", ("q_proj", "kproj"), "k_proj"),
        ("exclude_names", ("up_prj",), "up_proj"),
        ("rank_pattern", {"self_attn.qproj": 2}, "q_proj"),
        ("alpha_pattern", {"lm_head": 2.0}, ""),  # a layer of the model, but no target
    ):
        with pytest.raises(ll.TargetError) as e:
            ll.plan(tiny_models.build("llama"), ll.LoRAConfig(**{field: value}))
        assert field in str(e.value) and near in str(e.value) and "ll.plan" in str(e.value)
    with pytest.raises(ll.TargetError, match=r"no block \[2\].*0 to 1"):
        ll.plan(model, ll.LoRAConfig(layers=(0, 2)))
    with pytest.raises(ll.TargetError, match="none of the model's"):
        ll.plan(model, ll.LoRAConfig(target_names=("q_proj",), exclude_names=("q_proj",)))


def test_a_pattern_matches_whole_segments():
    model = nn.ModuleDict({"proj": nn.Linear(4, 4), "o_proj": nn.Linear(4, 4), "proj_out": nn.Linear(4, 4)})
    assert [t.path for t in ll.plan(model, ll.LoRAConfig(target_names=("proj",))).targets] == ["proj"]


def test_a_head_without_blocks_is_left_out_too():
    model = nn.ModuleDict({"fc": nn.Linear(4, 6), "classifier": nn.Linear(6, 2)})
    assert [t.path for t in ll.plan(model, ll.LoRAConfig(r=2)).targets] == ["fc"]
    assert ll.plan(model, ll.LoRAConfig(r=2, target_names=("classifier",))).targets[0].path == "classifier"


def test_the_head_can_be_named():
    model = tiny_models.build("llama")
    assert ll.attach(model, ll.LoRAConfig(target_names=("lm_head",))).targets == ["lm_head"]


def test_a_tied_head_leaves_the_embedding_alone():
    model = tiny_models.build("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = model.model.embed_tokens.weight.detach().clone()
    ll.attach(model, ll.LoRAConfig(target_names=("lm_head",)))
    nn.init.normal_(model.lm_head.lora_B)
    assert torch.equal(model.model.embed_tokens(torch.arange(64)), before)
    with pytest.raises(ll.WeightError, match="tied to 'model.embed_tokens'.*tie_word_embeddings"):
        ll.merge(model)
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_without_config_the_width_is_the_commonest():
    structure = describe(toy())
    assert structure.d_model == 12 and structure.n_layers == 2
    roles = {s.path: s.role for s in structure.places if s.layer is not None}
    assert roles == {f"layers.{i}.{n}": r for i in (0, 1) for n, r in (("up", "reader"), ("down", "writer"))}
    # one wide layer does not become the width
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 64), nn.Linear(64, 8)) for _ in range(2))
    )
    assert describe(model).d_model == 8


def test_a_plain_sequential():
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    assert [t.path for t in ll.plan(model, ll.LoRAConfig(r=2)).targets] == ["0", "2"]
    with pytest.raises(ll.TargetError, match="no stack of blocks"):
        ll.plan(model, ll.LoRAConfig(layers=(0,)))
    handle = ll.attach(model, ll.LoRAConfig(r=2, target_names=("2",)))
    assert handle.targets == ["2"]


def test_the_model_may_be_a_layer_itself(tmp_path):
    layer = nn.Linear(5, 7)
    ll.attach(layer, ll.LoRAConfig(r=2, alpha=3))
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 5)
    y = layer(x)
    want = x @ (layer.weight + 1.5 * layer.lora_B @ layer.lora_A).mT + layer.bias
    torch.testing.assert_close(y, want)
    path = ll.save(layer, tmp_path / "x")
    ll.detach(layer)
    assert not any("lora" in k for k in layer.state_dict()) and not layer._forward_hooks
    ll.load(layer, path)
    assert torch.equal(layer(x), y)
    ll.merge(layer)
    assert torch.allclose(layer(x), y, atol=1e-5)


def test_layers_counts_a_stack_at_the_root():
    """Paths whose first segment is the block's number."""
    blocks = nn.Sequential(*toy().layers)
    plan = ll.plan(blocks, ll.LoRAConfig(r=2, layers=(1,)))
    assert [t.path for t in plan.targets] == ["1.up", "1.down"]
    bare = nn.ModuleList(toy().layers)
    assert [t.path for t in ll.plan(bare, ll.LoRAConfig(r=2, layers=(-2,))).targets] == ["0.up", "0.down"]


def test_towers_have_widths_of_their_own():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision = nn.Module()
            self.vision.layers = nn.ModuleList(
                nn.ModuleDict({"fc1": nn.Linear(6, 10), "fc2": nn.Linear(10, 6)}) for _ in range(3)
            )
            self.text = Toy()
            self.config = {"hidden_size": 12}

    structure = describe(Both())
    roles = {s.path: s.role for s in structure.places}
    assert roles["vision.layers.0.fc1"] == roles["text.layers.0.up"] == "reader"
    assert roles["vision.layers.0.fc2"] == roles["text.layers.1.down"] == "writer"
    only = ll.plan(Both(), ll.LoRAConfig(r=2, target_names=(r"vision\..*",)))
    assert len(only.targets) == 6 and all(t.path.startswith("vision.") for t in only.targets)


class WithAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 3, batch_first=True)
        self.fc = nn.Linear(12, 12)

    def forward(self, x):
        return self.fc(self.attn(x, x, x)[0])


def test_multihead_attention():
    """Its out_proj is never called as a module: left out and reported by default, refused when named."""
    model = WithAttention()
    plan = ll.plan(model, ll.LoRAConfig(r=2))
    assert [t.path for t in plan.targets] == ["fc"]
    assert "never called" in dict(plan.unadapted)["attn.out_proj"]
    assert "attn.in_proj_weight" in dict(plan.unadapted)
    with pytest.raises(ll.TargetError, match="attn.out_proj.*exclude_names"):
        ll.plan(model, ll.LoRAConfig(r=2, target_names=(r".*",)))
    ll.attach(model, ll.LoRAConfig(r=2, target_names=(r".*",), exclude_names=(r"attn\.out_proj",)))


def test_torch_transformer_runs_the_hooks_in_eval_mode():
    """Its fast path would call no submodule."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 20, batch_first=True), 2).eval()
    x = torch.randn(2, 4, 12)
    handle = ll.attach(encoder, ll.LoRAConfig(r=2))
    assert handle.targets == [f"layers.{i}.linear{k}" for i in (0, 1) for k in (1, 2)]
    with torch.no_grad():
        base = encoder(x)
        for p in handle.parameters():
            p.normal_()
        assert not torch.allclose(encoder(x), base)


def test_one_module_at_two_paths():
    shared = nn.Linear(12, 12)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(12, 12)})
    with pytest.raises(ll.TargetError, match=r"2 paths \('a', 'b'\).*exclude_names"):
        ll.plan(model, ll.LoRAConfig(r=2))
    assert ll.attach(model, ll.LoRAConfig(r=2, exclude_names=("a",))).targets == ["c"]


def test_a_shared_block_is_noticed():
    block = toy().layers[0]
    model = nn.Sequential(block, block)
    with pytest.raises(ll.TargetError, match="2 paths"):
        ll.plan(model, ll.LoRAConfig(r=2))


def test_nothing_linear_at_all():
    with pytest.raises(ll.TargetError, match="this model has none"):
        ll.plan(nn.Sequential(nn.ReLU(), nn.LayerNorm(3)), ll.LoRAConfig())


def test_the_plan_is_what_attach_does_and_touches_nothing():
    model = tiny_models.build("gpt2")
    with torch.device("meta"):
        empty = type(model)(model.config)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = ll.plan(empty, ll.LoRAConfig(r=3))
    assert str(plan) == str(ll.plan(model, ll.LoRAConfig(r=3)))
    assert list(model.state_dict()) == list(before) and all(p.requires_grad for p in model.parameters())
    handle = ll.attach(model, ll.LoRAConfig(r=3))
    assert handle.targets == [t.path for t in plan.targets]
    assert handle.num_parameters() == plan.trainable
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plan.trainable
    size = sum(t.numel() * t.element_size() for t in ll.adapter_state_dict(model).values())
    assert size == plan.bytes and plan.optimizer_bytes == 8 * plan.trainable
    distinct = {v.data_ptr(): v for v in model.state_dict().values()}
    assert plan.base_params == sum(v.numel() for v in distinct.values()) - plan.trainable
    assert plan.base_params == ll.plan(model, ll.LoRAConfig(r=3)).base_params, "adapters are no part of the base"


def test_conv1d_is_a_linear_layer_with_its_sizes():
    model = tiny_models.build("gpt2")
    sizes = {s.path.rsplit(".", 1)[1]: (s.d_in, s.d_out) for s in describe(model).places if ".0.mlp" in s.path}
    assert sizes == {"c_fc": (32, 128), "c_proj": (128, 32)}
    seen = {}
    lora = ll.get_variant("lora")
    init, lora.init = lora.init, staticmethod(lambda layer, cfg: seen.update({layer.path: layer.weight.clone()}))
    try:
        ll.attach(model, ll.LoRAConfig(r=2))
    finally:
        lora.init = init
    assert torch.equal(seen["transformer.h.0.mlp.c_fc"], model.transformer.h[0].mlp.c_fc.weight.mT)
    assert seen["transformer.h.0.attn.c_attn"].shape == (96, 32)


def test_wrapped_layers_are_their_inner_layer():
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 6)
            self.in_features, self.out_features = 4, 6

        def forward(self, x):
            return self.inner(x)

    assert [s.path for s in describe(nn.Sequential(Wrapper())).places] == ["0.inner"]


def test_a_named_layer_of_another_kind_is_told_how_to_be_adapted():
    model = nn.ModuleDict({"table": nn.Embedding(7, 5), "up": nn.Linear(5, 3)})
    with pytest.raises(
        ll.TargetError, match=r"'table' matches layers of the kind embedding only.*'linear', 'embedding'"
    ):
        ll.plan(model, ll.LoRAConfig(target_names=("table", "up")))
    both = ll.LoRAConfig(target_names=("table", "up"), target_kinds=("linear", "embedding"))
    assert {t.path for t in ll.plan(model, both).targets} == {"table", "up"}
    with pytest.raises(ll.TargetError, match="'table' matches none of the 1 layers"):
        ll.plan(model, ll.LoRAConfig(exclude_names=("table",)))
