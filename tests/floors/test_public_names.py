"""The names of `lora_lite`: those that a user may type, and no file among them."""

from __future__ import annotations

import types

import pytest

import lora_lite as ll

METHODS = [v for v in ll.variants() if v.__module__.startswith("lora_lite.")]


def test_what_is_listed_is_public_and_no_file_but_testing():
    assert {name for name in dir(ll) if isinstance(getattr(ll, name), types.ModuleType)} == {"testing", "callbacks"}
    assert [name for name in dir(ll) if name.startswith("_")] == ["__version__"]
    assert len(dir(ll)) == len(set(dir(ll)))
    assert set(dir(ll)) >= {"attach", "merge", "LoRAConfig", "ConfigError", "Plan", "variants", "cost", "testing"}


def test_a_star_import_gives_what_is_listed():
    names: dict[str, object] = {}
    exec("from lora_lite import *", names)
    assert set(names) - {"__builtins__"} == set(dir(ll)) - {"__version__", "testing", "callbacks"}
    assert names["cost"] is ll.cost and names["variants"] is ll.variants


@pytest.mark.parametrize("method", [v for v in METHODS if v.config is not ll.AdapterConfig], ids=lambda v: v.name)
def test_every_config_is_listed_and_the_name_of_a_method_leads_to_it(method):
    assert getattr(ll, method.config.__name__) is method.config and method.config.__name__ in dir(ll)
    with pytest.raises(AttributeError, match=rf"{method.name}.*lora_lite\.{method.config.__name__}\("):
        getattr(ll, method.name)


def test_a_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(AttributeError, match="'atach'.*'attach'"):
        _ = ll.atach
