"""Gradient checkpointing recomputes a forward inside backward: later, elsewhere, and still under the selection of that
forward."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_lite as ll
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import Toy, toy

CFG = ll.LoRAConfig(r=3, alpha=7)
pytestmark = pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad:UserWarning"
)  # torch's own, of reentrant checkpoints


class Checkpointed(Toy):
    """The toy with its blocks checkpointed."""

    reentrant = False
    times = 1

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


def pair(reentrant):
    """(checkpointed, plain) models with adapters a and b, of the same values."""
    found = []
    for kind in (Checkpointed, Toy):
        model = toy()
        model.__class__ = kind
        model.reentrant = reentrant
        for i, name in enumerate("ab"):
            ll.attach(model, CFG, name=name)
            randomise(model, name, seed=i)
        for handle in ll.adapters(model).values():
            handle.trainable = True
        found.append(model.train())
    return found


def x(grad=True):
    return torch.randn(4, 5, 12, generator=torch.Generator().manual_seed(2)).requires_grad_(grad)


def grads(model):
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters() if "lora_" in n}


def in_thread(call):
    errors = []

    def run():
        try:
            call()
        except BaseException as e:
            errors.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def agree(one, other):
    a, b = grads(one), grads(other)
    for name in a:
        assert (a[name] is None) == (b[name] is None), name
        if a[name] is not None:
            torch.testing.assert_close(a[name], b[name], atol=1e-6, rtol=1e-5)
    assert any(g is not None and g.any() for g in a.values())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["same_thread", "other_thread"])
@pytest.mark.parametrize("choice", ["a", ["a", "b"], {"a": 0.5}, ("rows", "a", None, "b", "a")])
def test_backward_after_the_block(reentrant, elsewhere, choice):
    scope = (lambda m: ll.rows(m, choice[1:])) if isinstance(choice, tuple) else (lambda m: ll.active(m, choice))
    models = pair(reentrant)
    for model in models:
        ll.activate(model, None)
        with scope(model):
            loss = model(x()).square().sum()
        in_thread(loss.backward) if elsewhere else loss.backward()
        ll.activate(model, "b")  # and the next selection is not disturbed
    agree(*models)
    for model in models:
        model.zero_grad()
        model(x()).square().sum().backward()
    agree(*models)


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_pending_selections_raise(reentrant):
    model, _ = pair(reentrant)
    with ll.active(model, "a"):
        one = model(x()).square().sum()
    with ll.active(model, "b"):
        two = model(x()).square().sum()
    with pytest.raises(ll.SelectionError, match=r"several adapter selections.*\['a'\], \['b'\].*torch.no_grad"):
        (one + two).backward()
    with ll.active(model, "a"):  # and training goes on
        loss = model(x()).square().sum()
    loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_accumulation_and_reference_passes_do_not_raise(reentrant):
    models = pair(reentrant)
    for model in models:
        with ll.active(model, "a"):
            for _ in range(2):  # two pending forwards under one selection
                with torch.no_grad(), ll.active(model, None):
                    model(x())
            loss = model(x()).square().sum() + model(2 * x()).square().sum()
        with torch.no_grad(), ll.active(model, "b"):
            model(x())
        loss.backward()
        model(x()).square().sum().backward()  # the selection outside: b
    agree(*models)


def test_reentrant_without_an_input_gradient_says_what_to_do():
    model, _ = pair(True)
    with pytest.raises(ll.SelectionError, match="enable_input_require_grads.*use_reentrant=False"):
        model(x(grad=False))
    with torch.no_grad():
        model(x(grad=False))
    model.eval()(x(grad=False))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_transformers_model(reentrant):
    tiny_models = pytest.importorskip("tiny_models")
    found = []
    for on in (True, False):
        model, batch = tiny_models.build("llama").train(), tiny_models.batch("llama")
        ll.attach(model, CFG)
        randomise(model, seed=1)
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with ll.active(model, "default"):
            loss = model(**batch, labels=batch["input_ids"]).loss
        ll.activate(model, None)
        loss.backward()
        found.append(model)
    agree(*found)


def test_a_dead_selection_is_not_kept(recwarn):
    """A forward whose graph is thrown away does not disturb the next one of the same selection."""
    model, plain = pair(False)
    for m in (model, plain):
        with ll.active(m, "a"):
            m(x())
        with ll.active(m, "a"):
            loss = m(x()).square().sum()
        loss.backward()
    agree(model, plain)
    assert isinstance(model, nn.Module)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks at it
def test_blocks_compiled_inside_a_checkpoint_are_warned_about():
    """They are run again in backward under the selection of that moment, which no hook inside compiled code can
    notice."""

    def step(change):
        torch.compiler.reset()
        model = toy().train()
        for i, name in enumerate(("a", "b")):
            ll.attach(model, ll.LoRAConfig(r=3, alpha=7), name=name)
            randomise(model, name, seed=i)
        ll.activate(model, "a")
        h = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
        for layer in model.layers:
            h = checkpoint(torch.compile(layer, backend="eager"), h, use_reentrant=False)
        if change:
            with pytest.warns(ll.LoraLiteWarning, match="call backward before the selection"):
                ll.activate(model, "b")
        h.square().sum().backward()
        if not change:
            with pytest.warns(ll.LoraLiteWarning, match="compile the whole model"), ll.active(model, "b"):
                pass
        return model.get_parameter("layers.1.up.lora_A@a").grad

    assert step(False) is not None
    step(True)
    torch.compiler.reset()


@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_called_without_their_model(reentrant):
    """No hook of the model marks the call, and the recomputation still has the selection of its forward."""

    def grads(checkpointed):
        model = toy().train()
        for i, name in enumerate(("a", "b")):
            ll.attach(model, CFG, name=name)
            ll.adapters(model)[name].trainable = True
            randomise(model, name, seed=i)
        h = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.no_grad():  # an evaluation before it is no checkpoint
            for layer in model.layers:
                layer(h)
        with ll.active(model, "a"):
            for layer in model.layers:
                h = checkpoint(layer, h, use_reentrant=reentrant) if checkpointed else layer(h)
        h.square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if "lora_" in n}

    want, got = grads(False), grads(True)
    for name, g in want.items():
        assert (g is None) == (got[name] is None), name
        if g is not None:
            torch.testing.assert_close(got[name], g)
    assert want["layers.0.up.lora_A@a"] is not None and want["layers.0.up.lora_A@b"] is None
