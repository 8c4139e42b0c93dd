"""Modules trained whole beside a method (`train_modules`), and norms as targets: from the plan to the file, and back to
the bare base."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import lora_lite as ll
import tiny_models
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import Snapshot, toy

HEAD = ll.LoRAConfig(r=3, alpha=7, train_modules=("lm_head", ".*norm"))


def logits(model, name="llama"):
    with torch.no_grad():
        return model(**tiny_models.batch(name)).logits


def llama(*names, cfg=HEAD, **changes):
    model = tiny_models.build("llama", **changes)
    for i, name in enumerate(names or ("default",)):
        ll.attach(model, cfg, name=name)
        randomise(model, name, seed=i, scale=0.1)
    return model


# ---- norms of many classes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_every_norm_of_an_architecture(name, dtype):
    """Identity, effect, merge, unmerge and detach, on LayerNorm, RMSNorm, T5's, Gemma's (1 + w) and the norms of
    heads."""
    model = tiny_models.build(name).to(dtype)
    for path, p in model.named_parameters():
        if "norm" in path.lower() or ".ln" in path:
            p.data.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(7)).to(p))
    before = Snapshot(model)
    bare = logits(model, name)
    handle = ll.attach(model, ll.WholeConfig(target_kinds=("norm",)))
    assert torch.equal(logits(model, name), bare)
    norms = [p for p, m in model.named_modules() if "norm" in type(m).__name__.lower()]
    assert set(handle.targets) == set(norms) and len(norms) > 2
    randomise(model, scale=0.1)
    for path in norms:  # alone, where rounding has not gone through a whole model
        norm, g = model.get_submodule(path), torch.Generator().manual_seed(3)
        x = torch.randn(4, 5, norm.weight.shape[0], generator=g).to(dtype)
        with torch.no_grad():
            y = norm(x)
            twin = copy.deepcopy(norm)
            twin._forward_hooks.clear()
            twin._forward_pre_hooks.clear()
            twin.double()
            twin.weight.copy_(norm.weight.double() + norm.lora_W[:, 0].double())
            if getattr(norm, "bias", None) is not None:
                twin.bias.copy_(norm.bias.double() + norm.lora_b.double())
            want = twin(x.double())
        assert y.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 0.03
        torch.testing.assert_close(y.double(), want, atol=tolerance, rtol=tolerance)
    y = logits(model, name)
    assert (y - bare).abs().max() > 1e-3
    ll.merge(model)
    torch.testing.assert_close(logits(model, name), y, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=1e-4)
    ll.unmerge(model)
    assert torch.equal(logits(model, name), y)
    ll.detach(model)
    assert not (d := before.difference(model)), d


def test_a_norm_that_is_none():
    class StrangeNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(12)), 1e-6

        def forward(self, x):
            return self.weight * x / x.abs().amax(-1, keepdim=True)

    model = nn.Sequential(nn.Linear(12, 12), StrangeNorm())
    before = Snapshot(model)
    with pytest.raises(ll.TargetError, match="1: this StrangeNorm computes something else"):
        ll.attach(model, ll.LoRAConfig(r=2, train_modules=("1",)))
    assert not (d := before.difference(model)), d


def test_methods_that_cannot_stand_on_a_norm_say_so():
    model = nn.Sequential(nn.Linear(12, 12), nn.LayerNorm(12))
    before = Snapshot(model)
    kinds = ("linear", "norm")
    for variant in ll.variants():
        if variant.site != "linear" or variant.needs_data or variant.norms:
            continue
        roles = {"target_roles": ()} if variant.config(variant=variant.name).target_roles else {}
        with pytest.raises(ll.TargetError, match="cannot stand on a norm"):
            ll.attach(model, variant.config(variant=variant.name, r=4, target_kinds=kinds, **roles))
    assert not (d := before.difference(model)), d
    x = torch.randn(3, 12)
    ll.attach(model, ll.BitFitConfig(target_kinds=kinds))
    randomise(model)
    y = model(x)
    ll.merge(model)
    torch.testing.assert_close(model(x), y)
    no_bias = nn.Sequential(nn.RMSNorm(12))
    ll.attach(no_bias, ll.BitFitConfig(target_kinds=("norm",)))
    randomise(no_bias)
    with pytest.raises(ll.WeightError, match="has none to hold it"):
        ll.merge(no_bias)


def test_a_gate_on_a_norm_that_stores_a_deviation_merges(monkeypatch):
    """y (1 + g) on Gemma's n (1 + w): the merged weight is (1 + w)(1 + g) - 1."""
    from lora_lite.core import registry

    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))

    @ll.register
    class NormGate(ll.Variant):
        """A gain."""

        name = "norm_gate"
        norms = True

        @staticmethod
        def param_specs(d_in, d_out, cfg):
            return {"lora_g": ll.ParamSpec((d_out,))}

        @staticmethod
        def forward(layer, x, y):
            return y + y * layer.lora_g

    model = tiny_models.build("gemma")
    ll.attach(model, ll.AdapterConfig(variant="norm_gate", target_kinds=("norm",)))
    randomise(model)
    norm = model.model.norm
    want = (1 + norm.weight) * (1 + norm.lora_g) - 1
    y = logits(model, "gemma")
    ll.merge(model)
    torch.testing.assert_close(norm.weight, want)
    torch.testing.assert_close(logits(model, "gemma"), y, atol=1e-5, rtol=1e-5)


# ---- the plan


def test_the_plan_shows_them_and_touches_nothing():
    model = tiny_models.build("llama")
    before = Snapshot(model)
    plan = ll.plan(model, HEAD)
    text = str(plan)
    assert (
        "trained whole" in text and "train_modules 'lm_head': 1 targets" in text and "train_modules '.*norm': 5" in text
    )
    own = ll.plan(model, ll.LoRAConfig(r=3, alpha=7))
    assert plan.trainable == own.trainable + 64 * 32 + 5 * 32
    assert not (d := before.difference(model)), d
    with torch.device("meta"):
        assert ll.plan(tiny_models.build("llama"), HEAD).trainable == plan.trainable


def test_patterns_that_hit_nothing_or_too_much():
    model = tiny_models.build("llama")
    before = Snapshot(model)
    for patterns, words in (
        (("lm_haed",), "train_modules: 'lm_haed' matches none.*lm_head"),
        (("rotary_emb",), "'model.rotary_emb', which has no parameters"),
    ):
        with pytest.raises(ll.TargetError, match=words):
            ll.attach(model, ll.LoRAConfig(train_modules=patterns))
    with pytest.raises(ll.ConfigError, match="train_modules"):
        ll.LoRAConfig(train_modules=("(",))
    assert not (d := before.difference(model)), d
    strange = toy()
    strange.head.register_parameter("extra", nn.Parameter(torch.ones(3)))
    with pytest.raises(ll.TargetError, match="holds parameters that are no weight or bias.*'head'"):
        ll.attach(strange, ll.LoRAConfig(r=3, train_modules=("head",)))


def test_a_module_with_layers_inside_is_trained_in_all_of_them():
    model = tiny_models.build("bert")
    handle = ll.attach(model, ll.LoRAConfig(r=3, train_modules=("classifier", "encoder.layer.1.output")))
    whole = [t.path for t in handle.record.beside]
    assert whole == [
        "bert.encoder.layer.1.output.dense", "bert.encoder.layer.1.output.LayerNorm", "classifier",
    ]  # fmt: skip
    lora = [p for p in handle.targets if p not in whole]
    assert "bert.encoder.layer.0.output.dense" in lora and len(lora) == 11
    assert hasattr(model.classifier, "lora_b") and not hasattr(model.bert.encoder.layer[1].output.dense, "lora_A")


# ---- the life of an adapter


def test_exact_from_start_to_detach(tmp_path):
    model = tiny_models.build("llama")
    before, bare = Snapshot(model), logits(model)
    handle = ll.attach(model, HEAD)
    assert torch.equal(logits(model), bare)
    randomise(model, scale=0.1)
    y = logits(model)
    own = ll.adapter_state_dict(model)
    assert tuple(own["lm_head.lora_W"].shape) == (64, 32) and tuple(own["model.norm.lora_W"].shape) == (32, 1)
    path = ll.save(model, tmp_path / "x")
    ll.merge(model)
    torch.testing.assert_close(logits(model), y, atol=1e-5, rtol=1e-5)
    ll.unmerge(model)
    ll.rename(model, "default", "other")
    assert torch.equal(logits(model), y) and handle.name == "other"
    assert torch.equal(logits(copy.deepcopy(model)), y) and torch.equal(logits(pickle.loads(pickle.dumps(model))), y)
    ll.detach(model)
    assert not (d := before.difference(model)), d
    loaded = ll.load(model, path, trainable=True)
    assert torch.equal(logits(model), y) and loaded.cfg == HEAD and loaded.num_parameters() == handle._plan.trainable
    again = ll.adapter_state_dict(model)
    assert again.keys() == own.keys() and all(torch.equal(again[k], own[k]) for k in own)


def test_a_head_equals_a_head_that_was_replaced():
    """The same gradient steps on our deviation and on a copied head give the same model."""
    mine, copied = llama(), llama()
    head = copied.lm_head
    with torch.no_grad():
        head.weight += head.lora_W
        head.lora_W.zero_().requires_grad_(False)
    head.weight.requires_grad_(True)
    ids = tiny_models.batch("llama")["input_ids"]
    for model, p in ((mine, mine.lm_head.lora_W), (copied, head.weight)):
        optimizer = torch.optim.SGD([p], lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
    torch.testing.assert_close(logits(mine), logits(copied), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mine.lm_head.weight + mine.lm_head.lora_W, head.weight, atol=1e-5, rtol=1e-5)


def test_each_adapter_has_its_own_copy():
    model = llama("a", "b")
    bare_head = tiny_models.build("llama").lm_head.weight
    y = {}
    for choice in ("a", "b", None):
        ll.activate(model, choice)
        y[choice] = logits(model)
    assert torch.equal(y[None], logits(tiny_models.build("llama"))) and torch.equal(model.lm_head.weight, bare_head)
    ids = tiny_models.batch("llama", rows=4)["input_ids"]
    with torch.no_grad():
        alone = {}
        for choice in ("a", "b", None):
            with ll.active(model, choice):
                alone[choice] = model(ids).logits
        with ll.rows(model, ["b", None, "a", "b"]):
            mixed = model(ids).logits
    for i, name in enumerate(["b", None, "a", "b"]):
        torch.testing.assert_close(mixed[i], alone[name][i], atol=2e-5, rtol=1e-5)
    assert torch.equal(mixed[1], alone[None][1])
    ll.activate(model, {"a": 0.5, "b": -0.3})
    y = logits(model)
    ll.merge(model)
    torch.testing.assert_close(logits(model), y, atol=1e-5, rtol=1e-5)
    ll.unmerge(model)
    ll.detach(model, "a")
    with ll.active(model, "b"):
        assert not hasattr(model.lm_head, "lora_W") and hasattr(model.lm_head, "lora_W@b")


def test_training_reaches_them():
    model = tiny_models.build("llama")
    handle = ll.attach(model, ll.PiSSAConfig(r=2, train_modules=("lm_head", "norm")))
    model.train()
    ids = tiny_models.batch("llama")["input_ids"]
    model(ids, labels=ids).loss.backward()
    assert ll.check(model).learning == {"default": 14 + 2}
    held = {id(p) for g in handle.param_groups(lr=1e-3, weight_decay=0.1) for p in g["params"]}
    assert id(model.lm_head.lora_W) in held and id(model.model.norm.lora_W) in held
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)
    assert model.lm_head.lora_W.grad.any() and model.model.norm.lora_W.grad.any()


@pytest.mark.parametrize("method", [v.name for v in ll.variants() if not v.needs_data])
def test_beside_every_method(method, tmp_path):
    variant = ll.get_variant(method)
    model = tiny_models.build("llama")
    bare = logits(model)
    ll.attach(model, variant.config(variant=method, r=4, train_modules=("lm_head",)))
    if variant.exact_identity:
        assert torch.equal(logits(model), bare)
    model.lm_head.lora_W.data.normal_(generator=torch.Generator().manual_seed(0))
    y = logits(model)
    assert (y - bare).abs().max() > 0.1
    path = ll.save(model, tmp_path / "x")
    ll.detach(model)
    ll.load(model, path)
    assert torch.equal(logits(model), y)
    if variant.affine and variant.site != "block":
        ll.merge(model)
        torch.testing.assert_close(logits(model), y, atol=1e-4, rtol=1e-4)


def test_beside_a_method_that_starts_from_data():
    model = tiny_models.build("llama")
    handle = ll.attach(
        model, ll.EVAConfig(r=2, rho=2.0, train_modules=("lm_head",)), [tiny_models.batch("llama", tokens=20)]
    )
    assert hasattr(model.lm_head, "lora_W") and handle.record.beside[0].path == "lm_head"


def test_a_head_at_a_rate_of_its_own():
    """Without one, the groups are what they were: those of checkpoints."""
    model = tiny_models.build("llama")
    handle = ll.attach(model, ll.LoRAConfig(r=3, lr_ratio_B=4.0, train_modules=("lm_head",)))
    head = model.lm_head.lora_W
    plain = handle.param_groups(lr=1e-3)
    assert [g["lr"] for g in plain] == [1e-3, 4e-3] and any(p is head for p in plain[0]["params"])
    groups = handle.param_groups(lr=1e-3, modules_lr=2e-2)
    (own,) = [g for g in groups if any(p is head for p in g["params"])]
    assert own["lr"] == 2e-2 and len(own["params"]) == 1 and [g["lr"] for g in groups if g is not own] == [1e-3, 4e-3]
    assert sum(len(g["params"]) for g in groups) == sum(len(g["params"]) for g in plain)
    assert len(handle.param_groups(lr=0.0, modules_lr=0.0)) == 3
    with pytest.raises(ll.ConfigError, match="modules_lr is a number"):
        handle.param_groups(lr=1e-3, modules_lr=-1)


def test_a_schedule_leaves_them_alone(tmp_path):
    model = tiny_models.build("llama").train()
    handle = ll.attach(model, ll.AdaLoRAConfig(r=3, target_r=1, train_modules=("lm_head",)))
    optimizer = torch.optim.AdamW(handle.param_groups(lr=1e-2))
    ll.schedule(model, optimizer, 6)
    ids = tiny_models.batch("llama")["input_ids"]
    for _ in range(6):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval()
    y = logits(model)
    path = ll.save(model, tmp_path / "x")
    fresh = tiny_models.build("llama")
    ll.load(fresh, path)
    torch.testing.assert_close(logits(fresh), y, atol=1e-5, rtol=1e-5)
    assert torch.equal(fresh.lm_head.lora_W, model.lm_head.lora_W)
    ll.compact(model)
    torch.testing.assert_close(logits(model), y, atol=1e-5, rtol=1e-5)


def test_checkpointing_and_compile():
    ids = tiny_models.batch("llama")["input_ids"]
    grads = []
    for reentrant in (None, True, False):
        model = llama().train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad for p in ll.adapters(model)["default"].parameters()])
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            torch.testing.assert_close(a, b)
    torch.compiler.reset()
    block = nn.Sequential(nn.Linear(12, 12), nn.RMSNorm(12), nn.LayerNorm(12))
    ll.attach(block, ll.LoRAConfig(r=2, train_modules=("1", "2")))
    randomise(block)
    x = torch.randn(3, 12)
    fast = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(fast(x), block(x))
    ll.activate(block, None)
    torch.testing.assert_close(fast(x), block(x))
    torch.compiler.reset()


def test_autocast_and_bf16():
    model = llama()
    y = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        low = logits(model)
    assert (low - y).abs().max() < 0.1 * y.abs().max()
    model = tiny_models.build("llama").to(torch.bfloat16)
    bare = logits(model)
    ll.attach(model, HEAD)
    assert torch.equal(logits(model), bare) and model.lm_head.lora_W.dtype == torch.float32


def test_a_model_that_gets_its_weights_after_attaching():
    """What a norm does is read when it is first called; on paper any norm costs the same."""
    with torch.device("meta"):
        model = tiny_models.build("bert")
    ll.attach(model, ll.WholeConfig(target_kinds=("norm",)))
    real = tiny_models.build("bert")
    model.to_empty(device="cpu")
    state = real.state_dict() | {k: v.normal_() for k, v in model.state_dict().items() if "lora_" in k}
    model.load_state_dict(state, strict=False)
    ll.attach(real, ll.WholeConfig(target_kinds=("norm",)))
    real.load_state_dict(state)
    for buffer in ("position_ids", "token_type_ids"):
        setattr(model.bert.embeddings, buffer, getattr(real.bert.embeddings, buffer))
    assert torch.equal(logits(model.eval(), "bert"), logits(real, "bert"))
    assert (
        ll.cost(tiny_models.build("llama"), HEAD, 2, 16).trained == ll.plan(tiny_models.build("llama"), HEAD).trainable
    )


# ---- what is refused


def test_sums_refuse():
    model = llama("a", "b")
    with pytest.raises(ll.StateError, match="'a' trains 'model.layers.0.input_layernorm' whole"):
        ll.combine(model, {"a": 1.0, "b": 1.0}, name="ab")


def test_a_damaged_entry_of_the_file(tmp_path):
    from lora_lite.testing.checks.suite import read_file, write_file

    path = ll.save(llama(), tmp_path / "x")
    head, tensors = read_file(path)
    assert head["requires"] == ["target_variants"]
    model = tiny_models.build("llama")
    before = Snapshot(model)
    for value in ("nobody", 7, [], None):
        head["targets"]["lm_head"]["variant"] = value
        bad = write_file(tmp_path / "bad.safetensors", head, tensors)
        with pytest.raises(ll.FileError):
            ll.load(model, bad)
    head["targets"]["lm_head"]["variant"] = "whole"
    head["requires"] = ["target_variants", "more"]
    with pytest.raises(ll.FileError, match="newer version"):
        ll.load(model, write_file(tmp_path / "bad.safetensors", head, tensors))
    assert not (d := before.difference(model)), d


def test_a_quantised_head():
    from lora_lite.testing.toy import FakeQuantLinear

    model = toy(kind=FakeQuantLinear)
    x = torch.randn(2, 3, 12)
    bare = model(x)
    ll.attach(model, ll.LoRAConfig(r=3, train_modules=("layers.1.down",)))
    assert torch.equal(model(x), bare)
    model.layers[1].down.lora_W.data.normal_()
    want = bare + (model.layers[1].up(model.layers[0](x))).tanh() @ model.layers[1].down.lora_W.T
    torch.testing.assert_close(model(x), want)
