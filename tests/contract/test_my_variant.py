"""The whole duty of an author, exactly as the documentation prints it; and what `check_variant` says to authors who
err."""

from __future__ import annotations

import ast
import inspect
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite import ParamSpec
from lora_lite.core import layer as layer_file
from lora_lite.core import registry, targets, variant
from lora_lite.core.files import opened
from lora_lite.runtime.view.layer import LayerView


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
            return y + layer.cfg.scale * (layer.dropout(x) @ layer.lora_A.mT) @ layer.lora_B.mT

    return MyVariant


def test_the_contract_holds_for_a_page_of_ten_lines():
    cls = my_variant()
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12))
    ll.attach(model, ll.AdapterConfig(variant="myvariant", r=4))
    assert model[0].lora_A.shape == (4, 12)
    ran = ll.testing.check_variant("myvariant")
    assert ran[:2] == ["specs_are_a_dict_of_specs", "pages_return_what_they_rewrite"]  # these name the cause
    assert len(ran) > 30 and ll.testing.check_variant(cls, checks=["round_trip"]) == ["round_trip"]


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


def product(layer, x):
    return (layer.dropout(x) @ layer.lora_A.mT) @ layer.lora_B.mT


def without_scale(layer, x, y):
    return y + product(layer, x)


def scale_squared(layer, x, y):
    return y + layer.cfg.scale**2 * product(layer, x)


def root_of_scale(layer, x, y):
    return y + layer.cfg.scale**0.5 * product(layer, x)


def fixed_size(d_in, d_out, cfg):
    return {"lora_A": ParamSpec((4, d_in), init="kaiming"), "lora_B": ParamSpec((d_out, 4))}


def with_dropout_twice(layer, x, y):
    dropped = layer.dropout(layer.dropout(x))
    return y + layer.cfg.scale * (dropped @ layer.lora_A.mT) @ layer.lora_B.mT


def with_its_own_dropout_too(layer, x, y):
    dropped = torch.nn.functional.dropout(layer.dropout(x), layer.cfg.dropout, layer.training)
    return y + layer.cfg.scale * (dropped @ layer.lora_A.mT) @ layer.lora_B.mT


def without_dropout(layer, x, y):
    return y + layer.cfg.scale * (x @ layer.lora_A.mT) @ layer.lora_B.mT


def half_fixed_size(d_in, d_out, cfg):
    return {"lora_A": ParamSpec((cfg.r, d_in), init="kaiming"), "lora_B": ParamSpec((d_out, 3))}


def swapped_specs(d_in, d_out, cfg):
    return {"lora_A": ParamSpec((cfg.r, d_out), init="kaiming"), "lora_B": ParamSpec((d_in, cfg.r))}


def for_matrices_alone(layer, x, y):
    return y + torch.einsum("bi,ri,or->bo", x, layer.lora_A, layer.lora_B)


def writes_into_y(layer, x, y):
    return y.add_(product(layer, x))


def cuts_gradients(layer, x, y):
    return y + layer.cfg.scale * product(layer, x).detach()


def takes_x_alone(layer, x):
    return x


def weight_transposed(layer, W):
    return (W + layer.lora_B @ layer.lora_A).mT


def weight_in_place(layer, W):
    return W.add_(layer.lora_B @ layer.lora_A)


def forgets_return(layer, x, y):
    y + product(layer, x)


def returns_a_tuple(layer, x, y):
    return y, product(layer, x)


def returns_the_narrow_side(layer, x, y):
    return x @ layer.lora_A.mT


def returns_fp32(layer, x, y):
    return y + (x.float() @ layer.master("lora_A").mT) @ layer.master("lora_B").mT


def list_of_specs(d_in, d_out, cfg):
    return [ParamSpec((cfg.r, d_in)), ParamSpec((d_out, cfg.r))]


def shapes_only(d_in, d_out, cfg):
    return {"lora_A": (cfg.r, d_in), "lora_B": (d_out, cfg.r)}


KEPT = {}


def keeps_on_the_class(layer, cfg):
    ll.get_variant("myvariant").norm = layer.weight.norm()


def keeps_in_the_module(layer, cfg):
    KEPT[layer.path] = layer.weight.norm()


def keeps_on_the_layer(layer, cfg):
    layer._module.kept = layer.weight.norm()


def counts_calls_on_the_layer(layer, x, y):
    layer._module.calls = vars(layer._module).get("calls", 0) + 1
    return y + product(layer, x)


def first_tensors_for_ever(key):
    """Keeps what it computed first in a closure, where nobody can look."""
    kept = {}

    def forward(layer, x, y):
        B = kept.setdefault(key(layer), layer.lora_B.detach().clone())
        return y + (x @ layer.lora_A.mT) @ (layer.lora_B if layer.training else B).mT

    return forward


def mean_of_all_calls():
    seen = []

    def forward(layer, x, y):
        seen.append(x.detach().mean())
        return y + product(layer, x) * (1 + sum(seen) / len(seen))

    return forward


@pytest.mark.parametrize(
    ("members", "check", "words"),
    [
        ({"forward": shift}, "fresh_adapter_is_the_identity", "a fresh adapter changes the output"),
        ({"forward": shift, "identity_bound": 1e-6}, "fresh_adapter_is_the_identity", "more than the declared"),
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
        ({"forward": without_scale}, "ignored_fields_are_declared", r"ignores alpha.*layer\.cfg\.scale.*\('alpha',\)"),
        ({"forward": with_dropout_twice}, "dropout_arrives_once", "7.% of the rows lose their one input"),
        ({"forward": with_its_own_dropout_too}, "dropout_arrives_once", "call it once on the way from x"),
        ({"forward": without_dropout}, "ignored_fields_are_declared", r"ignores dropout.*layer\.dropout"),
        ({"param_specs": fixed_size}, "ignored_fields_are_declared", r"ignores r:.*cfg\.r"),
        ({"ignores": ("alpha",)}, "ignored_fields_are_declared", "declares that it ignores alpha, yet"),
        ({"ignores": ("r",)}, "ignored_fields_are_declared", "declares that it ignores r, yet"),
        ({"ignores": ("dropout",)}, "ignored_fields_are_declared", "declares that it ignores dropout, yet"),
        ({"ignores": ("beta",)}, "ignored_fields_are_declared", "'beta'.*what can be ignored"),
        ({"forward": scale_squared}, "update_grows_with_the_scale", "not grow in proportion"),
        ({"forward": root_of_scale}, "update_grows_with_the_scale", "not grow in proportion"),
        (
            {"forward": forgets_return},
            "pages_return_what_they_rewrite",
            "forward on layers.0.up returns None.*return y",
        ),
        ({"forward": returns_a_tuple}, "pages_return_what_they_rewrite", "returns a tuple"),
        (
            {"forward": returns_the_narrow_side},
            "pages_return_what_they_rewrite",
            r"returns the shape \(5, 3\) for y \(5, 20\)",
        ),
        ({"forward": returns_fp32}, "pages_return_what_they_rewrite", "returns torch.float32 for y in torch.bfloat16"),
        (
            {"forward_input": lambda layer, x: None},
            "pages_return_what_they_rewrite",
            "forward_input on .*None.*return x",
        ),
        (
            {"param_specs": half_fixed_size},
            "pages_return_what_they_rewrite",
            r"lora_A \(4, 12\), lora_B \(20, 3\).*With r=4.*cfg\.r",
        ),
        (
            {"param_specs": swapped_specs},
            "pages_return_what_they_rewrite",
            r"given x \(5, 12\), y \(5, 20\).*declares lora_A \(3, 20\), lora_B \(12, 3\)",
        ),
        ({"forward": for_matrices_alone}, "pages_return_what_they_rewrite", r"x \(3, 5, 12\).*any number of dim"),
        ({"forward": writes_into_y}, "pages_return_what_they_rewrite", "writes into y.*add_"),
        ({"forward": takes_x_alone}, "pages_return_what_they_rewrite", r"write the page as forward\(layer, x, y\)"),
        ({"forward": cuts_gradients}, "gradients_come_out_of_the_page", "cuts it off"),
        ({"param_specs": list_of_specs}, "specs_are_a_dict_of_specs", "a list, not a dict"),
        ({"param_specs": shapes_only}, "specs_are_a_dict_of_specs", "'lora_A' is a tuple, not a ParamSpec"),
        ({"init": keeps_on_the_class}, "nothing_is_kept_outside_of_tensors", r"MyVariant\.norm.*has to be a tensor"),
        ({"init": keeps_in_the_module}, "nothing_is_kept_outside_of_tensors", r"test_my_variant\.KEPT"),
        ({"init": keeps_on_the_layer}, "nothing_is_kept_outside_of_tensors", r"layers\.0\.up\.kept"),
        ({"forward": counts_calls_on_the_layer}, "nothing_is_kept_outside_of_tensors", r"layers\.0\.up\.calls"),
        (
            {"forward": first_tensors_for_ever(lambda layer: layer.path)},
            "the_tensors_decide_alone",
            "new value of layers.0.up.lora_B",
        ),
        (
            {"forward": first_tensors_for_ever(lambda layer: id(layer._module))},
            "the_tensors_decide_alone",
            "new values",
        ),
        ({"forward": mean_of_all_calls()}, "the_tensors_decide_alone", "call of another model"),
    ],
    ids=lambda v: v if isinstance(v, str) and "_" in v else None,
)
def test_a_broken_page_is_told_why(members, check, words):
    wrong(**members)
    with pytest.raises(AssertionError, match=words):
        ll.testing.check_variant("myvariant", checks=[check])


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (lambda layer, W: None, r"weight on layers\.0\.up returns None.*return W"),
        (weight_transposed, r"returns the shape \(12, 20\) for W \(20, 12\)"),
        (weight_in_place, "writes into W"),
    ],
)
def test_a_broken_weight_page_is_told_why(weight, words):
    cls = my_variant()
    members = {"name": "mine", "param_specs": staticmethod(cls.param_specs), "weight": staticmethod(weight)}
    ll.register(type("Mine", (), members))
    with pytest.raises(AssertionError, match=words):
        ll.testing.check_variant("mine", checks=["pages_return_what_they_rewrite"])


def test_the_cause_is_named_before_its_consequences():
    """Of a page that mixes rows or is not affine, merging fails too: that is not what the author is told."""
    order = list(ll.testing.CHECKS)
    merging = order.index("merge_equals_forward")
    for name in ("affine_is_what_it_says", "rows_and_tokens_are_independent", "gradients_come_out_of_the_page"):
        assert order.index(name) < merging


def test_a_class_that_is_not_registered_is_told_so():
    class Mine(ll.Variant):
        name = "mine"
        param_specs = staticmethod(fixed_size)
        forward = staticmethod(without_scale)

    with pytest.raises(AssertionError, match="Mine is not registered: write @lora_lite.register"):
        ll.testing.check_variant(Mine)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"name": "not a name"}, "name"),
        ({"param_specs": None}, "param_specs"),
        ({"forward": None}, "forward"),
        ({"config": int}, "AdapterConfig"),
        ({"exact_identity": False}, "exact_identity follows from identity_bound"),
        ({"trains": True}, "trains follows from param_specs"),
        ({"needs_data": True}, "'batches' or 'pairs'"),
        ({"holds": "factors"}, "'lora' already holds 'factors'"),
        ({"holds": "modules"}, "'whole' already holds 'modules'"),
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
    wrong(identity_bound=math.inf, forward=shift)
    ll.testing.check_variant("myvariant", checks=["fresh_adapter_is_the_identity"])


def frozen(d_in, d_out, cfg):
    return {"lora_A": ParamSpec((cfg.r, d_in), as_buffer=True), "lora_B": ParamSpec((d_out, cfg.r), trainable=False)}


def refuses_all(d_in, d_out, cfg):
    raise ll.ConfigError("7 inputs or none")


def test_facts_that_follow_from_others():
    cls = my_variant()
    assert cls.exact_identity and cls.trains
    assert wrong(identity_bound=1e-6).exact_identity is False
    assert wrong(param_specs=frozen).trains is False
    assert wrong(param_specs=refuses_all).trains  # what the page says of other sizes is not known
    assert [v.name for v in ll.variants() if not v.trains and v.name != "myvariant"] == [
        "ablation", "arrow", "caa", "pca_steering", "s_steer"
    ]  # fmt: skip

    class Inherits(cls):
        """With a bound of its own."""

        name = "inherits"
        identity_bound = math.inf

    assert not ll.register(Inherits).exact_identity and cls.name == "myvariant"


@pytest.mark.parametrize("name", [v.name for v in ll.variants() if v.site != "block"])
def test_a_page_reads_the_weight_exactly_where_it_says_so(name, monkeypatch):
    """`needs_weight` is declared, so it is compared with what the page does, at the start and in a call; without a
    gradient, in which a page of two forms takes the one that reads no weight."""
    page, read = ll.get_variant(name), []
    weight = LayerView.weight.fget
    monkeypatch.setattr(LayerView, "weight", property(lambda view: read.append(view.path) or weight(view)))
    case = ll.testing.Case(page)
    model = case.model()
    case.attach(model)
    with torch.set_grad_enabled(page.weight is None or page.forward is None):
        model(case.x())
    assert bool(read) == page.needs_weight


def pages_that_sort_first():
    """A user's methods: one that could hold factors, one that once would have held modules, one derived from LoRA."""

    @ll.register
    class First:
        name = "aaa"

        @staticmethod
        def param_specs(d_in, d_out, cfg) -> dict[str, ParamSpec]:
            return {
                "lora_A": ParamSpec((cfg.r, d_in), init="kaiming"),
                "lora_B": ParamSpec((d_out, cfg.r)),
            }

        @staticmethod
        def forward(layer, x, y):
            return y + (x @ layer.lora_A.mT) @ layer.lora_B.mT

        @staticmethod
        def factors(layer):
            return layer.lora_A, layer.lora_B

        @staticmethod
        def from_factors(layer, A, B):
            layer.lora_A, layer.lora_B = A, B

    @ll.register
    class Other:
        name = "aab"
        whole = True

        @staticmethod
        def param_specs(d_in, d_out, cfg) -> dict[str, ParamSpec]:
            return {"lora_W": ParamSpec((d_out, d_in))}

        @staticmethod
        def forward(layer, x, y):
            return y + x @ layer.lora_W.mT

    @ll.register
    class Mine(ll.get_variant("lora")):
        name = "aac"

    return First, Other, Mine


def sums_and_modules(folder: Path) -> dict[str, Any]:
    """What `ll.combine`, `train_modules`, save, load and export make: tensors, headers and method names."""

    def fresh():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 9))

    model, found = fresh(), {}
    ll.attach(model, ll.LoRAConfig(r=3, alpha=7, target_names=("0",)), name="a")
    ll.attach(model, ll.LoRAConfig(r=2, alpha=5, target_names=("0",), train_modules=("2",)), name="b")
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_" in key:
                p.copy_(torch.randn(p.shape, generator=g))
    ll.combine(model, {"a": 0.5}, name="sum")
    x = torch.randn(4, 12, generator=g)
    folder.mkdir()
    for name in ("a", "b", "sum"):
        ll.activate(model, name)
        ll.save(model, folder / f"{name}.safetensors", name=name)
        ll.export(model, folder / name)
        for path in (folder / f"{name}.safetensors", folder / name / "adapter_model.safetensors"):
            with opened(path) as f:
                tensors = {key: f.get_tensor(key).tolist() for key in f.keys()}
                found[f"{name} {path.name}"] = (tensors, f.metadata())
        other = fresh()
        handle = ll.load(other, folder / f"{name}.safetensors")
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
        found[name] = handle.cfg.variant
    return found


def test_methods_that_sort_first_take_nothing_over(tmp_path):
    before = sums_and_modules(tmp_path / "before")
    pages_that_sort_first()
    assert [v.name for v in ll.variants()][:3] == ["aaa", "aab", "aac"]
    assert ll.get_variant("aaa").from_factors is not None
    assert sums_and_modules(tmp_path / "after") == before and before["sum"] == "lora"


def test_any_method_with_from_factors_starts_from_reference_weights(tmp_path):
    from safetensors.torch import save_file

    pages_that_sort_first()
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(12, 20))
    change = 0.01 * torch.randn(20, 2) @ torch.randn(2, 12)
    save_file({"0.weight": model[0].weight.detach() + change}, tmp_path / "reference.safetensors")
    ll.attach(model, ll.AdapterConfig(variant="aaa", r=3), reference_weights=tmp_path / "reference.safetensors")
    torch.testing.assert_close(model[0].lora_B @ model[0].lora_A, change, rtol=0, atol=1e-6)


def members() -> list[str]:
    """Every public member of the contract and of what its pages are handed."""
    found = []
    for file in (variant, layer_file, targets):
        for node in ast.parse(inspect.getsource(file)).body:
            if isinstance(node, ast.ClassDef) and node.name != "Derived":
                for item in node.body:
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                        found.append(item.target.id)
                    elif isinstance(item, ast.FunctionDef) and not item.name.startswith("_"):
                        found.append(item.name)
    return list(dict.fromkeys(found))


def test_every_member_is_named_in_the_guide():
    """Each on a line of its table, `name` in code at the line's beginning, with a word on it and an example."""
    guide = (Path(__file__).parents[2] / "docs" / "adding-a-method.md").read_text()
    rows = {m[1]: m[0] for m in re.finditer(r"^\| `(\w+)[^|]*` \| [^|]+ \| `[^|]+` \|$", guide, re.M)}
    found = members()
    assert {"factors", "holds", "once", "strength", "resize", "each_gram", "total_steps", "take"} <= set(found)
    assert not (missing := [m for m in found if m not in rows]), f"docs/adding-a-method.md does not name {missing}"
    assert not (gone := set(rows) - set(found)), f"docs/adding-a-method.md names {gone}, which are no members"
