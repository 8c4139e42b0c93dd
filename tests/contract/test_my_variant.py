"""The whole duty of an author, exactly as the documentation prints it; and what `check_variant` says to authors who
err."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite import ParamSpec
from lora_lite.core import registry


@pytest.fixture(autouse=True)
def registry_as_it_was():
    before = dict(registry._TABLE)
    yield
    registry._TABLE.clear()
    registry._TABLE.update(before)


def my_variant():
    @ll.register
    class MyVariant:
        name = "myvariant"

        @staticmethod
        def param_specs(d_in, d_out, cfg) -> dict[str, ParamSpec]:
            return {
                "lora_A": ParamSpec((cfg.r, d_in), init="kaiming"),
                "lora_B": ParamSpec((d_out, cfg.r), init="zeros"),
            }

        @staticmethod
        def init(layer, cfg) -> None: ...

        @staticmethod
        def forward(layer, x, y):
            return y + (x @ layer.lora_A.mT) @ layer.lora_B.mT

    return MyVariant


def test_the_contract_holds_for_a_page_of_ten_lines():
    cls = my_variant()
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12))
    ll.attach(model, ll.AdapterConfig(variant="myvariant", r=4))
    assert model[0].lora_A.shape == (4, 12)
    ran = ll.testing.check_variant("myvariant")
    assert len(ran) > 25 and ll.testing.check_variant(cls, checks=["round_trip"]) == ["round_trip"]


def wrong(**members):
    """`MyVariant` with other members, registered."""
    cls = my_variant()
    for name, value in members.items():
        setattr(cls, name, staticmethod(value) if callable(value) else value)
    return cls


def shift(layer, x, y):
    return y + 1e-3 + (x @ layer.lora_A.mT) @ layer.lora_B.mT


def upcast(layer, x, y):
    return y.float() + (x.float() @ layer.master("lora_A").mT) @ layer.master("lora_B").mT * 3e-4


def mixes_rows(layer, x, y):
    z = x @ layer.lora_A.mT
    return y + (z + z.sum(0, keepdim=True)) @ layer.lora_B.mT


def looks_ahead(layer, x, y):
    z = x @ layer.lora_A.mT
    return y + z.flip(-2 if z.dim() > 2 else 0) @ layer.lora_B.mT


def square(layer, x, y):
    return y + ((x @ layer.lora_A.mT) ** 2) @ layer.lora_B.mT


def branches_on_data(layer, x, y):
    return y + (x @ layer.lora_A.mT) @ layer.lora_B.mT if x.sum() > -1e9 else y


def normalised(layer, x, y):  # B / ‖B‖ jumps to full length in the first step, whatever its learning rate
    B = layer.lora_B
    return y + (x @ layer.lora_A.mT) @ (B / B.norm().clamp_min(1e-30)).mT


def writes_the_base(layer, cfg):
    layer.weight.mul_(0.5)


def global_draw(layer, cfg):
    layer.lora_A = torch.randn_like(layer.lora_A)


def with_noise(layer, x, y):
    return y + (torch.nn.functional.dropout(x, 0.1) @ layer.lora_A.mT) @ layer.lora_B.mT


def dead_tensor(d_in, d_out, cfg):
    return {
        "lora_A": ParamSpec((cfg.r, d_in), init="kaiming"),
        "lora_B": ParamSpec((d_out, cfg.r)),
        "lora_unused": ParamSpec((3,)),
    }


def saddle(d_in, d_out, cfg):
    return {"lora_A": ParamSpec((cfg.r, d_in)), "lora_B": ParamSpec((d_out, cfg.r))}


@pytest.mark.parametrize(
    ("members", "check", "words"),
    [
        ({"forward": shift}, "fresh_adapter_is_the_identity", "a fresh adapter changes the output"),
        (
            {"exact_identity": False, "forward": shift, "identity_bound": 1e-6},
            "fresh_adapter_is_the_identity",
            "more than the declared",
        ),
        ({"exact_identity": False}, "fresh_adapter_is_the_identity", "needs identity_bound"),
        ({"forward": mixes_rows}, "rows_and_tokens_are_independent", "one row changes another row"),
        ({"forward": looks_ahead}, "rows_and_tokens_are_independent", "later tokens changes earlier"),
        ({"forward": square}, "affine_is_what_it_says", "misses the affine law"),
        ({"affine": False}, "affine_is_what_it_says", "yet f is affine"),
        ({"forward": branches_on_data}, "traces_in_one_graph", "traces_in_one_graph raised"),
        ({"forward": normalised}, "first_step_scales_with_the_learning_rate", "does not scale with lr"),
        ({"init": writes_the_base}, "base_survives_a_life_cycle", "changed while the adapter was attached"),
        ({"init": global_draw}, "same_seed_same_adapter", "global random state"),
        ({"forward": with_noise}, "dropout_acts_in_training_only", "two calls differ"),
        ({"param_specs": dead_tensor}, "gradients_reach_the_adapter_only", "lora_unused gets no gradient"),
        ({"param_specs": saddle}, "first_step_scales_with_the_learning_rate", "saddle"),
        ({"forward": upcast}, "random_adapter_does_something", "only"),
    ],
    ids=lambda v: v if isinstance(v, str) and "_" in v else None,
)  # fmt: skip
def test_a_broken_page_is_told_why(members, check, words):
    wrong(**members)
    with pytest.raises(AssertionError, match=words):
        ll.testing.check_variant("myvariant", checks=[check])


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"name": "not a name"}, "name"),
        ({"param_specs": None}, "param_specs"),
        ({"forward": None}, "forward"),
        ({"config": int}, "AdapterConfig"),
    ],
)
def test_an_incomplete_class_is_refused(members, words):
    body = {
        "name": "incomplete",
        "param_specs": staticmethod(saddle),
        "forward": staticmethod(square),
        **members,
    }
    with pytest.raises(ll.ConfigError, match=words):
        ll.register(type("Incomplete", (), body))
    assert "incomplete" not in registry._TABLE


def test_specs_are_checked():
    for bad in (dict(shape=()), dict(shape=(0, 3)), dict(shape=(2,), init="kaimin")):
        with pytest.raises(ll.ConfigError):
            ParamSpec(**bad)

    model = nn.Sequential(nn.Linear(12, 20))
    for name in ("A", "lora_A@b", "lora_A.b"):
        wrong(param_specs=lambda d_in, d_out, cfg, name=name: {name: ParamSpec((1,))})
        with pytest.raises(ll.TargetError, match="lora_"):
            ll.attach(model, ll.AdapterConfig(variant="myvariant"))
    wrong(init=lambda layer, cfg: setattr(layer, "lora_A", torch.zeros(2, 2)))
    with pytest.raises(ll.StateError, match="shape"):
        ll.attach(model, ll.AdapterConfig(variant="myvariant"))
    wrong(forward=lambda layer, x, y: y + layer.lora_C)
    ll.attach(model, ll.AdapterConfig(variant="myvariant"))
    with pytest.raises(AttributeError, match="declares no 'lora_C'"):
        model(torch.zeros(1, 12))


def test_the_infinite_bound_is_allowed():
    wrong(exact_identity=False, identity_bound=math.inf, forward=shift)
    ll.testing.check_variant("myvariant", checks=["fresh_adapter_is_the_identity"])
