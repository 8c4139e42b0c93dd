"""Fused experts of mixture models: every method's page on every expert, through a weight that is swapped in around the
call."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers

import lora_lite as ll
from lora_lite.bench import speed
from lora_lite.runtime.layers.bank import banks
from lora_lite.runtime.view import expert
from lora_lite.runtime.view.unformed import Unformed
from lora_lite.testing.case import randomise
from neighbours import fused_experts

COMMON = {
    "hidden_size": 24,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "vocab_size": 50,
}
MODELS = {
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {"num_experts": 5, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 18},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"num_experts": 5, "moe_intermediate_size": 12, "head_dim": 12},
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {"num_local_experts": 4, "head_dim": 12},
    ),  # (E, d_in, d_out), with biases
}
IDS = torch.arange(14).view(2, 7)
KIND = ("experts",)
pytestmark = fused_experts


def build(name="mixtral", **changes):
    config, cls, fields = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**{**COMMON, **fields, **changes}))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "bias" in n:
                p.normal_(std=0.1)
    return model.eval()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def adapted(name="mixtral", cfg=None, seed=1, adapter="default", **changes):
    model = build(name, **changes)
    ll.attach(model, cfg or ll.LoRAConfig(r=3, alpha=7, target_kinds=KIND), name=adapter)
    randomise(model, adapter, seed=seed)
    return model


def trained(variant):
    return variant.trains and variant.site == "linear" and "linear" in variant.config().target_kinds


METHODS = [v for v in ll.variants() if trained(v)]


@pytest.mark.parametrize("variant", METHODS, ids=lambda v: v.name)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_every_method_stands_on_experts_or_is_refused(name, variant, tmp_path):
    """Exact start; forward equals the merged weights; the base's bits, keys and hooks come back."""
    model = build(name)
    keys, weights = list(model.state_dict()), {k: v.clone() for k, v in model.state_dict().items()}
    base = logits(model)
    cfg = variant.config(
        variant=variant.name, target_kinds=KIND, **({"r": 3, "alpha": 7} if variant.needs_data else {})
    )
    try:
        ll.attach(model, cfg, *([[{"input_ids": IDS, "labels": IDS}]] if variant.needs_data else []))
    except ll.LoraLiteError as e:
        assert "experts" in str(e) or "exceed" in str(e) or "divide" in str(e), e
        assert list(model.state_dict()) == keys and torch.equal(logits(model), base)
        return
    assert [k for k in model.state_dict() if "lora_" not in k.rpartition(".")[2]] == keys
    if variant.exact_identity:
        assert torch.equal(logits(model), base)
    randomise(model, seed=3)
    want = logits(model)
    assert (want - base).abs().max() > 1e-4
    assert all(torch.equal(model.state_dict()[k], v) for k, v in weights.items())
    ll.save(model, tmp_path / "a.safetensors")
    report = ll.merge(model)
    assert report.n_layers == 4 and (all(report.change.values()) or variant.name == "bitfit")
    torch.testing.assert_close(logits(model), want, atol=2e-5, rtol=1e-4)
    ll.unmerge(model)
    assert torch.equal(logits(model), want)
    other = build(name)
    ll.load(other, tmp_path / "a.safetensors")
    assert torch.equal(logits(other), want)
    ll.detach(model)
    assert list(model.state_dict()) == keys and torch.equal(logits(model), base)
    experts = model.model.layers[0].mlp.experts
    assert not experts._forward_hooks and not experts._forward_pre_hooks and not list(experts.children())[1:]


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "hra", "oft", "road", "ia3", "delora", "bitfit"])
def test_these_methods_are_taken(method):
    cfg = ll.get_variant(method).config(variant=method, target_kinds=KIND)
    ll.attach(build("gpt_oss"), cfg)
    if method != "bitfit":  # Mixtral's experts have no bias
        ll.attach(build("mixtral"), cfg)


@pytest.mark.parametrize("name", MODELS)
def test_lora_by_hand(name):
    """W_e + s B_e A_e written into a copy of the model: the same logits, and the gradients of A and B by the chain
    rule."""
    model, s = adapted(name), 7 / 3
    copied = build(name)
    model.train(), copied.train()
    params = {}
    for i, block in enumerate(model.model.layers):
        mine, theirs = block.mlp.experts, copied.model.layers[i].mlp.experts
        for p in ("gate_up_proj", "down_proj"):
            bank = getattr(mine, f"lora_{p}")
            BA = torch.stack([s * B @ A for A, B in zip(bank.lora_A, bank.lora_B, strict=True)]).detach()
            w = getattr(theirs, p)
            w.data += BA.mT if name == "gpt_oss" else BA
            params[i, p] = bank, w
    assert len(params) == 4
    one, two = (m(input_ids=IDS, labels=IDS) for m in (model, copied))
    torch.testing.assert_close(one.logits, two.logits, atol=1e-5, rtol=1e-5)
    one.loss.backward(), two.loss.backward()
    for bank, w in params.values():
        g = w.grad.mT if name == "gpt_oss" else w.grad
        for e in range(bank.n_experts):
            torch.testing.assert_close(bank.lora_A.grad[e], s * bank.lora_B[e].T @ g[e], atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(bank.lora_B.grad[e], s * g[e] @ bank.lora_A[e].T, atol=1e-6, rtol=1e-4)
        assert bank.weight.grad is None and not bank.weight.requires_grad


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_of_the_experts(implementation):
    want = logits(adapted())
    model = adapted()
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(logits(model), want, atol=1e-5, rtol=1e-5)


class StrangersExperts(torch.nn.Module):
    """Two experts 6 -> 5 -> 6 that do not say how they store their weights."""

    def __init__(self, other_way):
        super().__init__()
        self.num_experts = 2
        up, down = torch.randn(2, 5, 6), torch.randn(2, 6, 5)
        self.w1 = torch.nn.Parameter(up.mT.contiguous() if other_way else up)
        self.w2 = torch.nn.Parameter(down.mT.contiguous() if other_way else down)


@pytest.mark.parametrize("other_way", [False, True])
def test_a_bank_stored_the_other_way_is_told_by_the_models_width(other_way):
    found = banks(torch.nn.ModuleDict({"experts": StrangersExperts(other_way)}), d_model=6)
    sizes = {path: (bank.transposed, bank.d_out, bank.d_in) for path, bank in found.items()}
    assert sizes == {"experts.lora_w1": (other_way, 5, 6), "experts.lora_w2": (other_way, 6, 5)}


def test_beside_linear_layers_and_by_name():
    model = build()
    cfg = ll.LoRAConfig(r=3, alpha=7, target_kinds=("linear", "experts"), target_names=("q_proj", "experts.down_proj"))
    plan = ll.plan(model, cfg)
    assert plan.hits["target_names 'experts.down_proj'"] == 2 and len(plan.targets) == 4
    assert plan.trainable == 2 * (3 * (24 + 24)) + 2 * 4 * 3 * (24 + 16)
    ll.attach(model, cfg)
    assert sum(p.numel() for p in ll.adapters(model)["default"].parameters()) == plan.trainable
    assert "adapted weights" not in str(plan)  # thin products need none
    dense = ll.plan(model, ll.HRAConfig(r=2, target_kinds=KIND, target_names=("experts.down_proj",)))
    assert f"adapted weights ({2 * 4 * 24 * 16 * 4 / 1024:.1f} KiB" in str(dense)
    left = dict(ll.plan(build(), ll.LoRAConfig()).unadapted)
    assert left["model.layers.0.mlp.experts.lora_down_proj"] == "experts; add it with target_kinds"


def test_the_kaiming_start_counts_one_experts_inputs():
    A = build_and_attach().model.layers[0].mlp.experts.lora_down_proj.lora_A
    assert A.abs().max() <= 16**-0.5 and A.abs().max() > 0.9 * 16**-0.5
    assert not torch.equal(A[0], A[1])


def build_and_attach():
    model = build()
    ll.attach(model, ll.LoRAConfig(r=3, alpha=7, target_kinds=KIND))
    return model


def two_adapters():
    model = adapted(adapter="a")
    ll.attach(model, ll.HRAConfig(r=2, target_kinds=("linear", "experts")), name="b")
    randomise(model, "b", seed=2)
    return model


def test_several_adapters_weights_and_merge():
    model = two_adapters()
    seen = []
    for choice in (None, "a", "b", {"a": 0.5}, ["a", "b"], {"a": -1.0, "b": 0.3}):
        ll.activate(model, choice)
        seen.append(logits(model))
        if choice is not None:
            ll.merge(model)
            torch.testing.assert_close(logits(model), seen[-1], atol=2e-5, rtol=1e-4)
            ll.unmerge(model)
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(seen) for b in seen[:i])
    assert torch.equal(seen[0], logits(build()))
    ll.rename(model, "b", "c")
    torch.testing.assert_close(logits(model), seen[-1])
    ll.detach(model, "c")
    ll.activate(model, "a")
    torch.testing.assert_close(logits(model), seen[1])


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_no_expert_is_formed(name, implementation, monkeypatch):
    model = adapted(name)
    model.set_experts_implementation(implementation)
    want = logits(model)
    monkeypatch.setattr(Unformed, "formed", None)
    assert torch.equal(logits(model), want)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in ll.adapters(model)["default"].parameters())


def test_a_small_update_acts_on_a_bf16_weight():
    """W + ΔW in bf16 would be W."""
    model = build().to(torch.bfloat16)
    base = logits(model)
    handle = ll.attach(model, ll.LoRAConfig(r=3, alpha=7, target_kinds=KIND))
    with torch.no_grad():
        for p in handle.parameters():
            p.normal_(std=0.01)
    assert not torch.equal(logits(model), base)


@pytest.mark.parametrize("method", ["oft", "boft", "dora", "lokr"])
def test_the_way_to_a_dense_weight_is_not_kept(method, monkeypatch):
    """What a step keeps is W' itself, and the gradients are those of keeping everything."""
    size = {"hidden_size": 64, "intermediate_size": 48}
    model = adapted("mixtral", ll.get_variant(method).config(variant=method, target_kinds=KIND), **size).train()
    weights = sum(p.nbytes for n, p in model.named_parameters() if "experts" in n and "lora_" not in n)
    adapter = ll.adapters(model)["default"]

    def grads():
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad.clone() for p in adapter.parameters()]

    with ll.active(model, None):
        bare = speed.saved_bytes(model, IDS)
    kept, got = speed.saved_bytes(model, IDS) - bare, grads()
    monkeypatch.setattr(expert, "checkpoint", lambda build, **_: build())
    everything, want = speed.saved_bytes(model, IDS) - bare, grads()
    assert kept < 1.15 * weights < 1.5 * weights < everything
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b) and a.any()


def test_a_step_between_forward_and_backward_is_noticed():
    model = adapted("mixtral", ll.DoRAConfig(r=3, alpha=7, target_kinds=KIND)).train()
    loss = model(input_ids=IDS, labels=IDS).loss
    with torch.no_grad():
        next(ll.adapters(model)["default"].parameters()).mul_(2)
    with pytest.raises((ll.StateError, RuntimeError), match="between the forward pass|inplace operation"):
        loss.backward()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_rows_of_a_batch(implementation):
    model = two_adapters()
    model.set_experts_implementation(implementation)
    ids = torch.arange(28).view(4, 7)
    alone = {}
    for name in (None, "a", "b"):
        with ll.active(model, name):
            alone[name] = logits(model, ids)
    with ll.rows(model, ["b", None, "a", "b"]):
        mixed = logits(model, ids)
    assert torch.equal(mixed[1], alone[None][1])
    for i, name in enumerate(["b", None, "a", "b"]):
        torch.testing.assert_close(mixed[i], alone[name][i], atol=1e-5, rtol=1e-5)
    with ll.rows(model, ["b", "a"]):
        out = model.generate(IDS, max_new_tokens=4, do_sample=False, num_beams=2)
    for i, name in enumerate(["b", "a"]):
        with ll.active(model, name):
            assert torch.equal(
                model.generate(IDS[i : i + 1], max_new_tokens=4, do_sample=False, num_beams=2)[0], out[i]
            )


def test_an_exception_inside_the_experts_restores_the_weights():
    model = adapted()
    experts = model.model.layers[1].mlp.experts
    want, act = logits(model), experts.act_fn

    class Fail(torch.nn.Module):
        def forward(self, x):
            assert "gate_up_proj" in experts.__dict__  # the adapted weight stands before the stored one
            raise ZeroDivisionError

    experts.act_fn = Fail()
    with pytest.raises(ZeroDivisionError):
        logits(model)
    assert "gate_up_proj" not in experts.__dict__ and "down_proj" not in experts.__dict__
    experts.act_fn = act
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    grads = []
    for checkpoint in (False, True):
        model = adapted().train()
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in ll.adapters(model)["default"].parameters()])
    assert len(grads[0]) == 8
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("variant", ["lora", pytest.param("hra", marks=pytest.mark.slow)])
@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_one_graph(implementation, variant):
    torch.compiler.reset()
    model = adapted(cfg=ll.get_variant(variant).config(variant=variant, r=2, target_kinds=KIND))
    model.set_experts_implementation(implementation)
    fast = torch.compile(model, backend="eager", fullgraph=True)
    grads = []
    for call in (model, fast):
        call(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        parameters = list(ll.adapters(model)["default"].parameters())
        grads.append([p.grad for p in parameters])
        for p in parameters:
            p.grad = None
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(fast(input_ids=IDS, use_cache=False).logits, logits(model), atol=1e-6, rtol=1e-5)
        ll.activate(model, None)
        assert torch.equal(fast(input_ids=IDS, use_cache=False).logits, logits(model))
    torch.compiler.reset()


@pytest.mark.parametrize("variant", ["lora", "hra", "dora"])
def test_autocast_sees_weights_of_the_base_dtype(variant):
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        base = logits(model)
    ll.attach(model, ll.get_variant(variant).config(variant=variant, r=2, target_kinds=KIND))
    experts, seen = model.model.layers[0].mlp.experts, []
    experts.register_forward_pre_hook(lambda m, a: seen.append(m.__dict__["down_proj"].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        fresh = logits(model)
        if ll.get_variant(variant).exact_identity:
            assert torch.equal(fresh, base)
        randomise(model, seed=2)
        low = logits(model)
    assert set(seen) == {torch.float32}
    torch.testing.assert_close(low.float(), logits(model), atol=0.03, rtol=0.1)


def test_a_merged_model_is_saved_as_a_plain_one(tmp_path):
    model = adapted()
    want = logits(model)
    ll.merge(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path).eval()), want, atol=1e-6, rtol=1e-5)


def test_bf16_and_training():
    model = build(dtype="bfloat16").to(torch.bfloat16)
    base = logits(model)
    handle = ll.attach(model, ll.LoRAConfig(r=3, alpha=7, target_kinds=KIND))
    assert torch.equal(logits(model), base) and {p.dtype for p in handle.parameters()} == {torch.float32}
    optimizer = torch.optim.AdamW(handle.param_groups(lr=1e-2))
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0] and logits(model).dtype == torch.bfloat16
    ll.check(model)


def test_copies_have_their_own_experts():
    model = adapted()
    want = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), want)
        bank = other.model.layers[0].mlp.experts.lora_down_proj
        assert bank.weight is other.model.layers[0].mlp.experts.down_proj
        with torch.no_grad():
            bank.lora_B.zero_()
        assert not torch.equal(logits(other), want) and torch.equal(logits(model), want)


def test_another_base_or_another_number_of_experts_is_noticed(tmp_path):
    model = adapted()
    ll.save(model, tmp_path / "a.safetensors")
    other = build()
    with torch.no_grad():
        other.model.layers[1].mlp.experts.down_proj.mul_(1.5)
    with pytest.raises(ll.BaseMismatchError, match="experts.lora_down_proj"):
        ll.load(other, tmp_path / "a.safetensors")
    with pytest.raises(ll.FileError, match="holds 6 experts in this model and 4 in the file"):
        ll.load(build(num_local_experts=6), tmp_path / "a.safetensors")


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ll.TargetError, match="dropout has nothing to act on"):
        ll.attach(build(), ll.LoRAConfig(r=3, dropout=0.1, target_kinds=KIND))
    with pytest.raises(ll.TargetError, match="adds a bias, and these experts have none"):
        ll.attach(build(), ll.BitFitConfig(target_kinds=KIND))
    model = two_adapters()
    with pytest.raises(ll.StateError, match="stands on fused experts"):
        ll.combine(model, {"a": 0.5}, name="c")
    with pytest.raises(ll.StateError, match="no pair of low-rank factors"):
        ll.export(model, tmp_path, name="b")


# ---- PEFT's target_parameters


@pytest.mark.parametrize("cfg", ["lora", "pissa"])
@pytest.mark.parametrize("names", [("q_proj", "experts.*"), ("experts.down_proj",), ("experts.*",)], ids="-".join)
@pytest.mark.parametrize("name", MODELS)
def test_peft_reads_what_we_write_and_we_what_peft_writes(name, names, cfg, tmp_path):
    import peft

    variant = ll.get_variant(cfg)
    kinds = ("linear", "experts") if "q_proj" in names else KIND
    model = adapted(name, variant.config(variant=cfg, r=3, alpha=7, target_kinds=kinds, target_names=names))
    want = logits(model)
    assert (want - logits(build(name))).abs().max() > 1e-3
    ll.export(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs), want, atol=1e-5, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        ours = build(name)
        ll.load(ours, tmp_path / folder)
        torch.testing.assert_close(logits(ours), want, atol=1e-5, rtol=1e-4)


def test_folders_of_peft_that_do_not_fit_are_refused(tmp_path):
    import json

    ll.export(adapted(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    with pytest.raises(ll.FileError, match=r"gate_up_proj is 6 x \(24->32\), but its factors of rank 3 are \(12, 24\)"):
        ll.load(build(num_local_experts=6), tmp_path)

    def written(**changes):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        return tmp_path

    with pytest.raises(ll.FileError, match="'experts.nothing', which are no fused experts"):
        ll.load(build(), written(target_parameters=["experts.nothing"]))
    with pytest.raises(
        ll.FileError, match="holds no lora_A and lora_B|but its factors|has no module|is no layer of this model"
    ):
        ll.load(build(), written(target_parameters=config["target_parameters"][1:]))


def test_nothing_stays_on_the_experts_after_a_detach():
    model = adapted()
    carriers = [m for m in model.modules() if any("lora_" in name for name in m._modules)]
    assert carriers and all(m._forward_hooks and m._forward_pre_hooks for m in carriers)
    ll.detach(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in carriers)
    assert not any("lora_" in name for name in model.state_dict())


def test_another_base_is_seen_in_every_expert(tmp_path):
    model = adapted()
    path = ll.save(model, tmp_path / "experts")
    other = build()
    target = next(iter(ll.adapters(model)["default"].targets))
    owner, _, name = target.rpartition(".")
    with torch.no_grad():
        other.get_submodule(owner)._parameters[name.removeprefix("lora_")][-1].mul_(1.2)
    with pytest.raises(ll.BaseMismatchError):
        ll.load(other, path)
    ll.load(build(), path)
