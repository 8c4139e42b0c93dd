"""What the errors propose, and how the registry answers."""

from __future__ import annotations

import pytest

import lora_lite as ll
from lora_lite.core import registry
from lora_lite.core.errors import did_you_mean, listing
from lora_lite.core.registry import resolve


def test_listing_counts_what_it_leaves_out():
    assert listing("abcdefghi") == "'a', 'b', 'c', 'd', 'e', 'f' and 3 more"
    assert listing("ab") == "'a', 'b'"


def test_the_nearest_names_and_those_with_the_nearest_last_part():
    assert did_you_mean("lorra", ["lora", "oft"]) == " Did you mean 'lora'?"
    assert did_you_mean("down_proj", ["model.layers.0.mlp.down_proj", "head"]) == (
        " Did you mean 'model.layers.0.mlp.down_proj'?"
    )
    assert did_you_mean("zzz", ["lora", "oft"]) == ""


@pytest.fixture
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))


def page(name, module="mine", qualname="Page"):
    body = {
        "name": name,
        "param_specs": staticmethod(lambda d_in, d_out, cfg: {"lora_b": ll.ParamSpec((d_out,))}),
        "forward": staticmethod(lambda layer, x, y: y + layer.lora_b),
        "__module__": module,
        "__qualname__": qualname,
    }
    return type("Page", (), body)


@pytest.mark.usefixtures("own_registry")
def test_a_name_belongs_to_one_class():
    first, again = ll.register(page("mine")), page("mine")
    assert ll.register(again) is again is ll.get_variant("mine") is not first  # a notebook cell run twice
    for other in (page("mine", module="theirs"), page("mine", qualname="Other"), page("lora")):
        with pytest.raises(ll.ConfigError, match=rf"the name '{other.name}' belongs to"):
            ll.register(other)
    assert ll.get_variant("mine") is again


@pytest.mark.usefixtures("own_registry")
def test_methods_come_in_the_order_of_their_names():
    ll.register(page("a_first_one"))
    names = [v.name for v in ll.variants()]
    assert names[1:2] != ["a_first_one"] and names == sorted(names) and "a_first_one" in names


@pytest.mark.usefixtures("own_registry")
def test_the_title_is_the_first_paragraph():
    cls = page("titled")
    cls.__doc__ = "A sentence that goes\n    on.\n\n    And more."
    assert ll.register(cls).title == "A sentence that goes on"


def test_the_general_config_becomes_that_of_its_method_with_every_field():
    general = ll.AdapterConfig(
        variant="lora", r=3, alpha=7, dtype="bfloat16", layers=(1,), dropout=0.25, seed=4, rank_pattern={"up": 2}
    )
    cfg = resolve(general)
    assert type(cfg) is ll.LoRAConfig and cfg.common() == general.common()
