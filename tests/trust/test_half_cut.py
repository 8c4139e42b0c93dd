"""Targets that run without a gradient in a training call are named, also where others have one."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_lite as ll

SITES = ("linear", "block")
TRAINED = [v for v in ll.variants() if v.trains and not v.needs_data and v.on_step is None and v.site in SITES]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fc(x))


class Offload(torch.autograd.Function):
    """As checkpoints of other libraries: an autograd function of their own."""

    @staticmethod
    def forward(ctx, block, h):
        ctx.block = block
        ctx.save_for_backward(h)
        with torch.no_grad():
            return block(h)

    @staticmethod
    def backward(ctx, g):
        (h,) = ctx.saved_tensors
        h = h.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(h)
        torch.autograd.backward(y, g)
        return None, h.grad


def reentrant(block: nn.Module, h: Tensor) -> Tensor:
    return checkpoint(block, h, use_reentrant=True)


def no_grad(block: nn.Module, h: Tensor) -> Tensor:
    with torch.no_grad():
        return block(h)


def plain(block: nn.Module, h: Tensor) -> Tensor:
    return block(h)


def modern(block: nn.Module, h: Tensor) -> Tensor:
    return checkpoint(block, h, use_reentrant=False)


class Towers(nn.Module):
    """A vision tower and a decoder; each runs its blocks in its own way."""

    def __init__(self, tower=plain, decoder=plain) -> None:
        super().__init__()
        self.patch = nn.Linear(8, 8)
        self.tower = nn.ModuleList(Block() for _ in range(2))
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.how = tower, decoder

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.patch(x)
        for block in self.tower:
            h = self.how[0](block, h)
        h = h if y is None else y
        for block in self.layers:
            h = self.how[1](block, h)
        return h


X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


def adapted(variant: type[ll.Variant] | None = None, *how, **fields) -> nn.Module:
    variant = variant or ll.LoRAConfig(r=2) and next(v for v in ll.variants() if v.name == "lora")
    model = Towers(*how)
    if variant.site == "block":
        fields = {"positions": "all", **fields}
    if isinstance(
        getattr(variant.config(variant=variant.name), "share", None), float
    ):  # a hundredth of 8 x 8 is nothing
        fields = {"share": 0.2, **fields}
    if "parts" in variant.config.__dataclass_fields__:
        fields = {"parts": 2, **fields}
    ll.attach(model, variant.config(variant=variant.name, r=2, **fields))
    return model.train()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("cut", [reentrant, Offload.apply])
@pytest.mark.parametrize("variant", TRAINED, ids=lambda v: v.name)
def test_half_of_the_targets(variant, cut):
    try:
        model = adapted(variant, cut, modern)
    except ll.LoraLiteError:
        model = adapted(variant, cut, modern, target_kinds=("linear",), target_roles=())
    tower = [t for t in ll.adapters(model)["default"].targets if t.startswith("tower")]
    if not tower:
        return
    with pytest.raises(
        ll.SelectionError, match=rf"{len(tower)} of .* would not train: '{tower[0]}'.*use_reentrant=False"
    ):
        model(X)
    model.patch.requires_grad_(True)  # what enable_input_require_grads does
    model(X).sum().backward()
    grads = [p.grad is not None for n, p in model.named_parameters() if p.requires_grad]
    assert all(grads)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("how", "lost"), [((reentrant, reentrant), 4), ((reentrant, plain), 2), ((plain, reentrant), 0)]
)
def test_who_is_cut_off(how, lost):
    """Behind targets that have a gradient nobody is."""
    model = adapted(None, *how)
    if not lost:
        model(X).sum().backward()
        ll.check(model)
        return
    with pytest.raises(ll.SelectionError, match=f"{lost} of 4 targets"):
        model(X)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_an_input_of_its_own():
    """The decoder is fed with something that needs no gradient."""
    model = adapted(None, plain, reentrant)
    with pytest.raises(ll.SelectionError, match=r"'layers\.0\.fc', 'layers\.1\.fc'"):
        model(X, X)
    model(X, X.clone().requires_grad_()).sum().backward()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_targets_that_are_not_trained_may_be_cut():
    model = adapted(None, reentrant, modern, target_names=(r"layers\..*fc",))
    model(X).sum().backward()
    ll.check(model)
    ll.attach(model, ll.LoRAConfig(r=2, target_names=(r"tower\..*fc",)), name="frozen")
    ll.adapters(model)["frozen"].trainable = False
    ll.activate(model, ["default", "frozen"])
    model(X).sum().backward()
    ll.adapters(model)["frozen"].trainable = True
    with pytest.raises(ll.SelectionError, match=r"'tower\.0\.fc'"):
        model(X)
    with ll.rows(model, ["default", "frozen"]), pytest.raises(ll.SelectionError, match=r"'tower\.0\.fc'"):
        model(X)
    model.eval()(X)
    with torch.no_grad():
        model.train()(X)


def test_the_models_own_no_grad_is_said_once():
    model = adapted(None, no_grad, plain)
    with pytest.warns(
        ll.LoraLiteWarning, match=r"'tower\.0\.fc', 'tower\.1\.fc' ran under the model's own.*exclude_names"
    ):
        model(X).sum().backward()
    model(X).sum().backward()


def test_a_teacher_pass_of_the_same_layers_is_nothing():
    class Twice(Towers):
        def forward(self, x):
            with torch.no_grad():
                target = super().forward(x)
            return super().forward(x) - target

    model = Twice()
    ll.attach(model.train(), ll.LoRAConfig(r=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(X).sum().backward()
    ll.check(model)
