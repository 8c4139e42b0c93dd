"""`layer.add_penalty`: regularisers that have seen the activations, such as the load of a router."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
import tiny_llm
from equations.helpers import adapted, randomise


def routed(**fields):
    model = tiny_llm.model().train()
    ll.attach(model, ll.MoLORAConfig(r=2, alpha=3, experts=3, balance=0.5, **fields))
    randomise(model)
    return model


def tokens(*shape, seed=0):
    return torch.randint(4, 80, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model, x):
    model.zero_grad()
    loss = model(input_ids=x, labels=x).loss
    (loss + 3 * ll.penalty(model)).backward()
    return torch.cat([p.grad.flatten() for p in ll.adapters(model)["default"].parameters()])


@pytest.mark.parametrize("top", [0, 2])
def test_balance_of_mixlora(top):
    """a E Σ f_e m_e, f the share of the tokens that have e among their best."""
    cfg = ll.MoLORAConfig(r=2, alpha=3, experts=3, top=top, balance=0.5, dtype="float64")
    model, fc, x = adapted(cfg)
    randomise(model)
    model.train()(x)
    p = (x @ fc.lora_R.mT).softmax(-1)
    used = p.mean(0) if not top else (p > p.min(-1, keepdim=True).values).double().mean(0) / top
    want = 0.5 * 3 * (used * p.mean(0)).sum()
    torch.testing.assert_close(ll.penalty(model), want)
    (at_router,) = torch.autograd.grad(ll.penalty(model), fc.lora_R)
    assert at_router.abs().max() > 1e-4
    before = ll.penalty(model)
    model.eval()(x)
    with torch.no_grad():
        model.train()(x[:2])
    assert ll.penalty(model) == before > 0  # evaluation and reference passes say nothing new
    model(x[:2])
    assert ll.penalty(model) != before


def test_balance_of_loramoe_reads_the_kind_of_each_row():
    cfg = ll.MoLORAConfig(r=2, alpha=3, experts=4, balance=0.5, kinds=0.3, dtype="float64")
    model, fc, _ = adapted(cfg)
    randomise(model)
    x = torch.randn(3, 6, 20, dtype=torch.float64)
    with ll.context(model, kinds=[0, 1, 1]):
        model.train()(x)
    p = (x @ fc.lora_R.mT).softmax(-1).sum(1)  # (rows, experts)
    weights = torch.tensor([[1.3, 1.3, 0.7, 0.7], [0.7, 0.7, 1.3, 1.3], [0.7, 0.7, 1.3, 1.3]]).double()
    Z = p * weights
    torch.testing.assert_close(ll.penalty(model), 0.5 * Z.var(correction=0) / Z.mean())
    with pytest.raises(ll.SelectionError, match="kinds"):
        model(x)


def test_checkpointing_and_a_second_call():
    model, x = routed(top=2), tokens(2, 6)
    want = gradients(model, x)
    torch.testing.assert_close(gradients(model, x), want)  # nothing of the first call is left
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(model, x), want, atol=1e-7, rtol=1e-4)
    model.zero_grad()
    model(input_ids=x, labels=x).loss.backward()
    without = torch.cat([p.grad.flatten() for p in ll.adapters(model)["default"].parameters()])
    assert (without - want).abs().max() > 1e-4
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ll.SelectionError, match="use_reentrant=False"):
        model(input_ids=x)


@pytest.mark.slow
def test_compiled_code_is_refused():
    model = routed(top=2)
    with pytest.raises(Exception, match="compiled code cannot hand"):
        torch.compile(model, backend="eager", fullgraph=True)(input_ids=tokens(2, 6))


def test_each_adapter_has_its_own():
    model = routed()
    ll.attach(model, ll.MoLORAConfig(r=2, alpha=3, balance=0.1), name="other")
    x = tokens(2, 6)
    parts = []
    for name in ("default", "other"):
        with ll.active(model, name):
            model(input_ids=x)
            parts.append(ll.penalty(model, name))
            assert ll.penalty(model) == parts[-1]
    with ll.rows(model, ["default", "other"]):
        model(input_ids=x)
        assert ll.penalty(model, "default") > 0 and ll.penalty(model, "other") > 0
    assert parts[0] > parts[1] > 0


def test_mole_keeps_its_experts_in_use():
    model, _, x = adapted(ll.LoRAConfig(r=2, alpha=3, dtype="float64"))
    randomise(model)
    ll.attach(model, ll.MoLEConfig(balance=0.2, dtype="float64"), [ll.factors(model, "default")] * 3, name="mix")
    model.train()(x)
    torch.testing.assert_close(ll.penalty(model), -0.2 * torch.tensor(1 / 3).double().log() * 3)
