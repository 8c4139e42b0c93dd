"""Gradients, steps, dropout, penalties."""

from __future__ import annotations

import warnings

import torch

from ...runtime.model.site import owned_tensors
from ...runtime.model.state import record_of
from ...runtime.schedule import penalty
from ...runtime.select import activate, active
from ..case import Case, run, train
from .suite import check, full_precision, relative, trains


@check("training", lambda case: trains(case))
def gradients_reach_the_adapter_only(case: Case) -> None:
    """Every trained tensor gets a finite nonzero gradient, no base parameter gets any, and x gets one."""
    model = case.random().train(case.variant.noisy)
    x = case.x().requires_grad_()
    model(x).float().square().sum().backward()
    for target, short, _, t in owned_tensors(model, record_of(model)):
        if target.specs[short].is_trained:
            case.expect(t.grad is not None, f"{target.path}.{short} gets no gradient.")
            case.expect(t.grad.isfinite().all(), f"{target.path}.{short} gets a gradient that is not finite.")  # type: ignore[union-attr]
            case.expect(t.grad.any(), f"{target.path}.{short} gets a zero gradient from random tensors.")  # type: ignore[union-attr]
        else:
            case.expect(t.grad is None and not t.requires_grad, f"the frozen {target.path}.{short} gets a gradient.")
    strangers = [n for n, p in model.named_parameters() if p.grad is not None and "lora_" not in n]
    case.expect(not strangers, f"base parameters get gradients: {strangers}.")
    case.expect(x.grad is not None and x.grad.any(), "no gradient flows back to the input.")


@check("training", lambda case: trains(case) and full_precision(case))
def first_step_scales_with_the_learning_rate(case: Case) -> None:
    """From a fresh adapter, one step with twice the learning rate changes the output twice as much: ‖ΔW‖ is of the
    order of lr."""
    exact = Case(case.variant, torch.float64, case.bias, case.options, case.data)
    x = exact.x(8, 4)
    moved = []
    for lr in (1e-6, 2e-6):
        model = exact.fresh(dtype="float64")
        start = run(model, x)
        train(exact, model.train(), steps=1, lr=lr)
        moved.append(float((run(model.eval(), x) - start).norm() / start.norm()))
    case.expect(
        moved[0] > 1e-12,
        f"one step of AdamW from the start changes nothing ({moved[0]:.1e}): the start is a saddle, nothing learns.",
    )
    case.expect(
        1.9 < moved[1] / moved[0] < 2.1,
        f"one step with twice the learning rate moves the output {moved[1] / moved[0]:.2f} times as far, not twice; "
        "‖ΔW‖ does not scale with lr.",
    )


@check("training", lambda case: trains(case))
def training_lowers_the_loss(case: Case) -> None:
    model = case.fresh().train()
    losses = train(case, model, steps=12, lr=1e-2)
    case.expect(
        losses[-1] < losses[0],
        f"12 steps of AdamW at 1e-2 on one batch go from loss {losses[0]:.4f} to {losses[-1]:.4f}.",
    )


@check("training", lambda case: full_precision(case))
def dropout_acts_in_training_only(case: Case) -> None:
    model, x = case.random(dropout=0.5), case.x()
    case.expect(torch.equal(run(model, x), run(model, x)), "in eval mode two calls differ.")
    plain = case.random()
    case.expect(torch.equal(run(model, x), run(plain, x)), "in eval mode dropout changes the output.")
    moved = relative(run(plain.train(), x), run(plain.eval(), x)) > 1e-6
    case.expect(
        moved == case.variant.noisy,
        f"without dropout, training mode {'changes' if moved else 'keeps'} the "
        f"output, and the page says noisy = {case.variant.noisy}.",
    )


@check("training", lambda case: case.variant.penalty is not None and full_precision(case))
def penalty_is_a_differentiable_scalar(case: Case) -> None:
    model = case.random()
    value = penalty(model)
    case.expect(
        value.dim() == 0 and bool(value.isfinite()), f"the penalty has shape {tuple(value.shape)} or is not finite."
    )
    if value == 0:  # its coefficient is 0 by default
        return
    case.expect(value.requires_grad, "the penalty has no gradient.")
    value.backward()
    case.expect(
        any(p.grad is not None and bool(p.grad.any()) for p in model.parameters()), "the penalty's gradient is zero."
    )


@check("training", lambda case: trains(case))
def weights_between_adapters_interpolate(case: Case) -> None:
    """Weight w means y + w (f(x, y) - y), on outputs and inputs: between 0 and 1 for one layer of an affine method."""
    model, x = case.random(), case.x()
    with active(model, {"default": 0.5}):
        half = run(model, x)
    full = run(model, x)
    with active(model, None):
        base = run(model, x)
    case.expect(
        relative(half, full) > 1e-3 and relative(half, base) > 1e-3,
        "weight 0.5 does not lie between the base and the adapter.",
    )


@check("compiled", lambda case: full_precision(case) and case.bias)
def traces_in_one_graph(case: Case) -> None:
    """torch.compile(fullgraph=True) follows the page, forward and backward, and sees the selection change."""
    torch.compiler.reset()
    model, x = case.random(layers=(0,)), case.x()
    want = run(model, x)
    with active(model, None):
        base = run(model, x)
    try:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with warnings.catch_warnings():  # the compiler looks at the gradient of what the page made before the graph
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            y = compiled(x)
        case.expect(relative(y, want) < 1e-5, f"the compiled model departs by {relative(y, want):.1e}.")
        if case.variant.trains:
            y.square().sum().backward()
        activate(model, None)
        case.expect(
            torch.equal(run(compiled, x), base),  # pyright: ignore[reportArgumentType]
            "a compiled model does not see that the adapter was switched off.",
        )
    finally:
        torch.compiler.reset()
