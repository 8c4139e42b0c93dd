"""What compilers and exporters make of the hooks: one graph, and every change of selection is seen."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tempfile

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import lora_lite as ll
from lora_lite.ops import lowrank
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import toy
from neighbours import strict_export_of_hooks

CFG = ll.LoRAConfig(r=3, alpha=7)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """As in a process that has attached nothing: the first attach makes compiled code look for hooks."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        yield
    torch.compiler.reset()


def adapted(*names, cfg=CFG):
    model = toy()
    for i, name in enumerate(names or ("default",)):
        ll.attach(model, cfg, name=name)
        randomise(model, name, seed=i)
    return model


def compiled(model):
    return torch.compile(model, backend="eager", fullgraph=True)


def x(n=3):
    return torch.randn(n, 5, 12, generator=torch.Generator().manual_seed(2))


def same(a, b):
    torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


def test_selection_weights_and_rows_are_seen():
    model = adapted("a", "b")
    fast = compiled(model)
    names = ["b", None, "a"]
    for _ in range(2):  # the second round runs cached graphs
        for choice in ("a", None, "b", ["a", "b"], {"a": 0.5}, {"a": -1.5, "b": 0.25}):
            ll.activate(model, choice)
            same(fast(x()), model(x()))
            with ll.active(model, "b"):
                same(fast(x()), model(x()))
            same(fast(x()), model(x()))
        with ll.rows(model, names):
            want, got = model(x()), fast(x())
        same(got, want)
        ll.activate(model, None)
        assert torch.equal(got[1], model(x())[1]) and not torch.allclose(got[0], model(x())[0])


@pytest.mark.parametrize(
    "first, second",
    [
        (None, CFG),
        (CFG, None),
        (ll.LoRAConfig(r=3, alpha=7, layers=(0,)), CFG),
        (CFG, ll.LoRAConfig(r=3, alpha=7, layers=(1,))),
        (CFG, ll.LoRAConfig(r=3, alpha=5)),
        (CFG, ll.LoRAConfig(r=2, alpha=7)),
        (CFG, ll.LoRAConfig(r=3, alpha=7, use_rslora=True)),
        (CFG, ll.IA3Config()),
        (ll.IA3Config(), ll.VeRAConfig(r=3)),
    ],
)
def test_models_of_one_class_do_not_run_each_others_code(first, second):
    """Both are made before either is compiled, and both are frozen: only the hooks tell them apart."""
    models = [toy().requires_grad_(False) for _ in range(2)]
    for model, cfg in zip(models, (first, second), strict=True):
        if cfg is not None:
            ll.attach(model, cfg)
            randomise(model)
            ll.adapters(model)["default"].trainable = False
    with torch.no_grad():
        for model in models * 2:
            same(compiled(model)(x()), model(x()))
        assert not torch.allclose(models[0](x()), models[1](x()))


def test_blocks_that_are_compiled_one_by_one():
    """The code of the first block, which has no adapter, is not that of the second."""
    model = toy()
    ll.attach(model, ll.LoRAConfig(r=3, alpha=7, layers=(1,)))
    randomise(model)
    want = model(x())
    for block in model.layers:
        block.compile(backend="eager", fullgraph=True)
    same(model(x()), want)


def test_a_model_that_was_unpickled_is_told_from_its_base():
    """In a process that has attached nothing."""
    code = """
import sys, torch, lora_lite as ll
from lora_lite.testing.toy import toy
torch.manual_seed(0)
model, x = torch.load(sys.argv[1], weights_only=False)
for one in (toy().requires_grad_(False), model):
    torch.testing.assert_close(torch.compile(one, backend="eager", fullgraph=True)(x), one(x))
"""
    model = adapted().requires_grad_(False)
    with tempfile.NamedTemporaryFile(suffix=".pt") as f:
        torch.save((model, x()), f.name)
        subprocess.run([sys.executable, "-c", code, f.name], check=True)


def test_attach_and_detach_after_a_compiled_call():
    """Code that was compiled before the first attach does not look for hooks, so attach and detach reset the
    compiler. The base is frozen: else torch would see that its weights stop training."""
    model = toy().requires_grad_(False)
    fast = compiled(model)
    base = fast(x())
    ll.attach(model, CFG)
    randomise(model)
    same(fast(x()), model(x()))
    assert not torch.allclose(fast(x()), base)
    ll.attach(model, CFG, name="second")
    randomise(model, "second", seed=4)
    same(fast(x()), model(x()))
    ll.rename(model, "second", "third")
    same(fast(x()), model(x()))
    ll.detach(model, "third")
    ll.activate(model, "default")
    same(fast(x()), model(x()))
    ll.merge(model)
    same(fast(x()), model(x()))
    ll.unmerge(model)
    same(fast(x()), model(x()))
    ll.detach(model)
    assert torch.equal(fast(x()), base)
    ll.attach(fast, CFG)  # through the wrapper
    randomise(fast)
    same(fast(x()), model(x()))
    assert not torch.allclose(fast(x()), base) and list(ll.adapters(model)) == ["default"]


def test_changed_tensors_need_no_recompilation(monkeypatch):
    monkeypatch.setattr(lowrank, "FEW", 0)  # the products that a compiler sees: these tensors are large
    model = adapted()
    fast = compiled(model)
    fast(x())
    with torch.compiler.set_stance("fail_on_recompile"):
        randomise(model, seed=9)
        got = fast(x())
        ll.load_adapter_state_dict(model, None, {k: 2 * v for k, v in ll.adapter_state_dict(model).items()})
        again = fast(x())
    assert not torch.allclose(got, again)
    same(again, model(x()))


def test_a_selection_is_compiled_once():
    """Adapters of equal shape, weights and rows: a graph for each selection at its first call, none at a later one."""
    model, counter = adapted("a", "b"), CompileCounter()
    fast = torch.compile(model, backend=counter, fullgraph=True)
    choices = ("a", "b", {"a": 0.5}, None)
    rows = (["a", None, "b"], ["b", "b", None])

    def each():
        for choice in choices:
            ll.activate(model, choice)
            same(fast(x()), model(x()))
        for names in rows:
            with ll.rows(model, names):
                same(fast(x()), model(x()))

    each()
    assert counter.frame_count == len(choices) + len(rows)
    each()
    randomise(model, "a", seed=5)
    each()
    assert counter.frame_count == len(choices) + len(rows), "switching back, and other numbers, compile nothing"


def test_another_weight_compiles_nothing():
    """One graph without weights, one with: 1 costs nothing, and the values of others are no part of a graph."""
    model, counter = adapted("a", "b"), CompileCounter()
    fast = torch.compile(model, backend=counter, fullgraph=True)
    graphs = []
    for choice in ("a", {"a": 0.5}, {"a": -1.5}, {"a": 3}, {"a": 0.5, "b": 2.0}, {"a": 0.7, "b": -0.3}, "a"):
        ll.activate(model, choice)
        same(fast(x()), model(x()))
        with ll.active(model, choice):
            same(fast(x()), model(x()))
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 2, 2, 3, 3, 3]
    with torch.inference_mode():
        ll.activate(model, {"a": 0.25})
    fast(x()).square().sum().backward()
    got = [p.grad.clone() for p in ll.adapters(model)["a"].parameters()]
    model.zero_grad()
    model(x()).square().sum().backward()
    for grad, p in zip(got, ll.adapters(model)["a"].parameters(), strict=True):
        same(grad, p.grad)


@pytest.mark.slow
@pytest.mark.skipif("recompile_limit" not in inspect.signature(torch.compile).parameters, reason="a newer torch's word")
def test_more_adapters_than_torch_keeps_graphs_by_itself():
    names = [f"a{i}" for i in range(10)]
    model, counter = adapted(*names), CompileCounter()
    fast = torch.compile(model, backend=counter, fullgraph=True, recompile_limit=64)
    for name in (*names, *names):
        ll.activate(model, name)
        same(fast(x()), model(x()))
    assert counter.frame_count == len(names)


def test_training_compiled_equals_training_eager():
    losses = []
    for wrap in (lambda m: m, compiled):
        torch.manual_seed(0)
        model = adapted()
        optimizer = torch.optim.AdamW(ll.adapters(model)["default"].param_groups(lr=1e-2))
        fast = wrap(model.train())
        for _ in range(3):
            optimizer.zero_grad()
            loss = fast(x()).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        assert ll.check(model).learning == {"default": 4}
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_compiling_in_place():
    model = adapted("a", "b")
    model.compile(backend="eager", fullgraph=True)
    for choice in ("a", "b", None):
        ll.activate(model, choice)
        same(model(x()), model.forward(x()))
    assert not any("_orig_mod" in k for k in ll.adapter_state_dict(model, "a"))


@pytest.mark.slow
def test_the_default_backend():
    model = adapted("a", "b")
    fast = torch.compile(model, fullgraph=True)
    for choice in ("a", None, {"a": 0.5, "b": 2.0}):
        ll.activate(model, choice)
        torch.testing.assert_close(fast(x()), model(x()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=strict_export_of_hooks)])
def test_export(strict):
    model = adapted()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x(),), dynamic_shapes=({0: batch}, *[None] * 0), strict=strict)
    for n in (2, 7):
        same(program.module()(x(n)), model(x(n)))
    ll.activate(model, None)
    assert not torch.allclose(program.module()(x()), model(x())), "the exported program holds the adapter"


LINEAR = [v.name for v in ll.variants() if v.site == "linear" and v.trains and not v.needs_data]


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("method", LINEAR)
def test_functional_calls_and_transforms(method):
    variant = ll.get_variant(method)
    model = toy()
    ll.attach(model, variant.config(variant=method, r=4))
    randomise(model)
    params = {k: v.detach() for k, v in model.named_parameters()}

    def loss(p, v):
        return torch.func.functional_call(model, p, (v,)).square().sum()

    grads = torch.func.grad(loss)(params, x())
    model(x()).square().sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            own = torch.zeros_like(p) if p.grad is None else p.grad  # what a page reads in training only
            torch.testing.assert_close(grads[name], own, atol=1e-4, rtol=1e-4)
    per_row = torch.func.vmap(lambda v: model(v))(x())
    largest = model(x()).abs().max().clamp_min(1)  # outputs may be large, and are rounded where they are
    same(per_row / largest, model(x()) / largest)
