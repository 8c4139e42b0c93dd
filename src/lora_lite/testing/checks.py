"""The contract, check by check. Each takes a `Case` and raises AssertionError with a sentence; the number is the promise it belongs to."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..io.native import adapter_state_dict, load, load_adapter_state_dict, save
from ..runtime.attach import attach, detach, rename
from ..runtime.handle import adapters
from ..runtime.merge import merge, unmerge
from ..runtime.schedule import penalty
from ..runtime.select import activate, active, rows
from ..runtime.state import owned_tensors, record_of
from .case import Case, randomise, run, train
from .toy import Conv1D, FakeQuantLinear, Snapshot

Check = Callable[[Case], None]
CHECKS: dict[str, Check] = {}
"""Name -> check, in the order in which they are written."""
PROMISES: dict[str, str] = {}
"""Name of a check -> the promise that it belongs to."""
_ON: dict[str, Callable[[Case], bool]] = {}


def check(promise: str, on: Callable[[Case], bool] = lambda case: True) -> Callable[[Check], Check]:
    """Enter a check into the suite; it runs for the cases that `on` accepts."""

    def enter(function: Check) -> Check:
        CHECKS[function.__name__] = function
        PROMISES[function.__name__] = promise
        _ON[function.__name__] = on
        return function

    return enter


def applies(name: str, case: Case) -> bool:
    """Whether a check has anything to say about this case."""
    return _ON[name](case)


def affine(case: Case) -> bool:
    return case.affine


def full_precision(case: Case) -> bool:
    return case.dtype == torch.float32


def trains(case: Case) -> bool:
    return case.variant.trains


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest entry of b."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def effect(case: Case, model: nn.Module, x: Tensor) -> float:
    """How much the active adapters change the output, relative to it; the checks mean something only when this is large."""
    new = run(model, x)
    with active(model, None):
        return relative(new, run(model, x))


# ---- 1. the base is read-only


@check("1_base_read_only")
def base_survives_a_life_cycle(case: Case) -> None:
    """attach, train, select, save, detach: the base is bit for bit as before, and nothing stays behind."""
    model, x = case.model(), case.x()
    before = Snapshot(model, x)
    bits = {n: p.detach().clone() for n, p in model.named_parameters()}
    case.attach(model)
    if case.variant.trains:
        train(case, model, steps=2)
    randomise(model)
    run(model, x)
    for n, p in bits.items():
        case.expect(
            torch.equal(model.get_parameter(n), p), f"the base parameter {n} changed while the adapter was attached."
        )
        case.expect(not model.get_parameter(n).requires_grad, f"the base parameter {n} still requires a gradient.")
    activate(model, None)
    case.expect(
        torch.equal(run(model, x), before.output[0]), "with no active adapter the output is not the base's bits."
    )
    detach(model)
    before.rng = torch.get_rng_state()  # training and torch.optim may draw; attach alone is checked below
    case.expect(not (d := before.difference(model)), f"after detach {d}.")


@check("1_base_read_only", affine)
def unmerge_gives_the_bits_back(case: Case) -> None:
    """20 cycles of merge and unmerge."""
    model, x = case.random(), case.x()
    before = Snapshot(model, x)
    for _ in range(20):
        merge(model)
        unmerge(model)
    case.expect(not (d := before.difference(model)), f"after 20 merge/unmerge cycles {d}.")


# ---- 2. identity at the start


@check("2_identity")
def fresh_adapter_is_the_identity(case: Case) -> None:
    """Bit for bit, for inputs of 2, 3 and 4 dimensions, training or not; or within the declared bound in fp32."""
    variant = case.variant
    bound = variant.identity_bound
    if variant.exact_identity:
        case.expect(bound == 0, f"exact_identity is declared together with identity_bound = {bound}.")
    else:
        case.expect(
            bound > 0,
            "exact_identity = False needs identity_bound, the largest relative departure in fp32 (math.inf: departs by design).",
        )
    for shape in ((5,), (3, 5), (2, 3, 4)):
        x = case.x(*shape)
        base = run(case.model(), x)
        model = case.fresh(dropout=0.1)
        for mode in (False, True):
            y = run(model.train(mode), x)
            case.expect(
                y.shape == base.shape and y.dtype == base.dtype,
                f"an input {tuple(x.shape)} gives {tuple(y.shape)} {y.dtype}, not {tuple(base.shape)} {base.dtype}.",
            )
            if variant.exact_identity:
                case.expect(
                    torch.equal(y, base),
                    f"a fresh adapter changes the output by {relative(y, base):.1e} (training={mode}, input {tuple(x.shape)}); train the deviation from the identity, or declare identity_bound.",
                )
            elif case.dtype == torch.float32:
                case.expect(
                    relative(y, base) <= bound,
                    f"a fresh adapter departs by {relative(y, base):.1e}, more than the declared {bound:.1e}.",
                )
            case.expect(torch.isfinite(y).all(), "a fresh adapter gives values that are not finite.")


@check("2_identity", lambda case: trains(case))
def random_adapter_does_something(case: Case) -> None:
    """Otherwise every other check would be empty."""
    x = case.x()
    case.expect(
        (e := effect(case, case.random(), x)) > 1e-2, f"random trained tensors change the output by only {e:.1e}."
    )


# ---- 3. nothing is silent


@check("3_nothing_silent", full_precision)
def wrong_calls_raise(case: Case) -> None:
    """Data missing or superfluous, dead patterns, taken names, unknown fields."""
    model = case.model()
    before = Snapshot(model, case.x())
    if case.variant.needs_data:
        with case.raises("attaching without data", "calibration_data", case.variant.name):
            attach(model, case.cfg())
        with case.raises("attaching with an empty list of data"):
            attach(model, case.cfg(), [])
    elif case.variant.group_init is None:
        with case.raises("calibration data that the method does not use", "calibration_data"):
            attach(model, case.cfg(), case.data(case.dtype))
    for changes in (
        {"target_names": ("nothing_here",)},
        {"exclude_names": ("nothing_here",)},
        {"layers": (7,)},
        {"rank_pattern": {"nothing_here": case.cfg().r}},
    ):
        with case.raises(f"attaching with {changes}", next(iter(changes))):
            cfg = case.variant.config(**{**case.cfg().to_dict(), **changes})
            attach(model, cfg, case.data(case.dtype) if case.variant.needs_data else None)
    with case.raises("an unknown field", "no_such_field"):
        case.variant.config.from_dict({**case.cfg().to_dict(), "no_such_field": 1})
    case.expect(not (d := before.difference(model)), f"after calls that raised {d}.")
    case.attach(model)
    with case.raises("a second adapter of the same name", "'default'"):
        case.attach(model)


@check("3_nothing_silent", lambda case: case.variant.on_step is not None and full_precision(case))
def schedule_must_be_stepped(case: Case) -> None:
    """A scheduled method that nothing steps raises at the second training forward, and at save."""
    model = case.fresh().train()
    model(case.x())
    with case.raises("a second training forward without schedule", "ll.schedule"):
        model(case.x())
    with tempfile.TemporaryDirectory() as folder, case.raises("saving without schedule", "schedule"):
        save(model, Path(folder) / "x.safetensors")
    model = case.fresh().train()
    train(case, model, steps=4)
    case.expect(record_of(model).steps == 4, f"4 optimiser steps made {record_of(model).steps} schedule steps.")


@check("3_nothing_silent", lambda case: case.linear and full_precision(case))
def quantised_weight_is_read_only_on_request(case: Case) -> None:
    """A method that reads W raises on a quantised layer, and works with dequantize=True; any other needs no permission."""
    model = case.model(kind=FakeQuantLinear)
    before = Snapshot(model, case.x())
    if case.variant.needs_weight:
        with case.raises("attaching to quantised layers", "dequantize=True", "layers.0.up"):
            case.attach(model)
        case.expect(not (d := before.difference(model)), f"after the refusal {d}.")
        case.attach(model, dequantize=True)
    else:
        case.attach(model)
    if case.variant.trains:
        randomise(model)
        model(case.x()).square().sum().backward()
    detach(model)
    case.expect(not (d := before.difference(model)), f"after detach from quantised layers {d}.")


# ---- 4. all or nothing


class Planted(RuntimeError):
    """The failure that the checks plant."""


@check("4_all_or_nothing", full_precision)
def failed_attach_leaves_no_trace(case: Case) -> None:
    """`init` fails at the last target, `group_init` after its work, the data in the middle."""
    n = len(case.fresh()._lora_lite_state.records["default"].targets)  # type: ignore[union-attr]
    calls = 0
    original = case.variant.init

    def failing_init(layer: Any, cfg: Any) -> None:
        nonlocal calls
        calls += 1
        torch.rand(3)
        if calls == n:
            raise Planted
        if original is not None:
            original(layer, cfg)

    def failing_group_init(model: Any, targets: Any, cfg: Any, data: Any) -> None:
        if (whole := vars(Case)["_group_init"]) is not None:
            whole(model, targets, cfg, data)
        raise Planted

    def one_good_batch(dtype: torch.dtype) -> Any:
        def data() -> Any:
            yield from case.data(dtype)[:1]
            raise Planted

        return data()

    Case._group_init = staticmethod(case.variant.group_init) if case.variant.group_init is not None else None  # type: ignore[attr-defined]
    good = case.data
    plans: list[tuple[str, str | None, Any, Any]] = [
        ("init at its last target", "init", failing_init, good),
        ("group_init", "group_init", failing_group_init, good),
    ]
    if case.variant.needs_data:
        plans.append(("the calibration data", None, None, one_good_batch))
    for second in (False, True):  # on a bare model, and on one that has an adapter already
        for what, member, function, data in plans:
            calls = 0
            model = case.model().train()
            model.layers[0].eval()
            if second:
                case.attach(model, "first")
            before = Snapshot(model, case.x())
            try:
                if member is None:
                    attach(model, case.cfg(), data(case.dtype))
                else:
                    with case.patched(member, function):
                        case.attach(model)
            except Planted:
                pass
            else:
                case.expect(False, f"a failure in {what} was swallowed.")
            case.expect(not (d := before.difference(model)), f"after a failure in {what} {d}.")
            case.attach(model)  # and the model still takes an adapter


@check("4_all_or_nothing")
def attach_draws_no_global_random_number(case: Case) -> None:
    model = case.model().train()
    model.layers[1].eval()
    before, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    case.attach(model)
    case.expect(
        torch.equal(before, torch.get_rng_state()), "attach moved the global random state; draw from layer.generator()."
    )
    case.expect(modes == [m.training for m in model.modules()], "attach changed training modes.")


@check("4_all_or_nothing", lambda case: full_precision(case))
def failed_load_leaves_no_trace(case: Case) -> None:
    """A renamed parent, a missing key, one too many, another prefix: each raises and names the keys."""
    with tempfile.TemporaryDirectory() as folder:
        path = save(case.random(), Path(folder) / "x.safetensors")
        head, tensors = _read(path)
        first = next(iter(tensors))
        damaged = {
            "a missing key": {k: v for k, v in tensors.items() if k != first},
            "an added key": {**tensors, "layers.0.up.lora_stranger": torch.zeros(1)},
            "another prefix": {f"base.{k}": v for k, v in tensors.items()},
            "a wrong shape": {**tensors, first: torch.zeros(*tensors[first].shape, 2)},
            "NaN": {**tensors, first: torch.full(tensors[first].shape, float("nan"))},
        }
        model = case.model()
        before = Snapshot(model, case.x())
        for what, changed in damaged.items():
            if what == "NaN" and not tensors[first].is_floating_point():
                continue
            bad = _write_file(Path(folder) / "bad.safetensors", head, changed)
            with case.raises(f"loading a file with {what}"):
                load(model, bad)
            case.expect(not (d := before.difference(model)), f"after a load that failed for {what} {d}.")
        renamed = case.model()
        renamed.blocks = renamed.layers
        del renamed._modules["layers"]
        with case.raises("loading into a model with a renamed parent", "layers.0"):
            load(renamed, path)


@check("4_all_or_nothing", affine)
def failed_merge_leaves_no_trace(case: Case) -> None:
    from ..runtime import merge as room

    model = case.random()
    before = Snapshot(model, case.x())
    original, calls = room._merge_layer, 0

    def failing(*args: Any) -> None:
        nonlocal calls
        calls += 1
        original(*args)
        if calls == 3:
            raise Planted

    room._merge_layer = failing
    try:
        merge(model)
    except Planted:
        pass
    else:
        case.expect(False, "a failure in merge was swallowed.")
    finally:
        room._merge_layer = original
    case.expect(not (d := before.difference(model)), f"after a merge that failed at its third layer {d}.")


# ---- 5. a layer is what it does


def _merged_and_not(case: Case, model: nn.Module, paths: list[str], **options: Any) -> None:
    """Every layer alone: forward of the merged layer against forward with the adapter, in units of the dtype's rounding."""
    found = []
    for path in paths:
        layer = model.get_submodule(path)
        width = layer.weight.shape[0] if isinstance(layer, Conv1D) else layer.in_features
        g = torch.Generator().manual_seed(3)
        x = torch.randn(64, int(width), generator=g).to(case.dtype)  # pyright: ignore[reportArgumentType]
        y = run(layer, x)
        with active(model, None):
            effect = relative(y, run(layer, x))
        case.expect(effect > 1e-3, f"{path}: the test adapter changes the output by only {effect:.1e}.")
        found.append((path, x, y))
    before = [t.clone() for t in (*model.parameters(), *model.buffers())]
    report = merge(model, **options)
    case.expect(report.n_layers == len(paths), f"merge touched {report.n_layers} layers, the adapter has {len(paths)}.")
    tolerance = 1e-5 if case.dtype == torch.float32 else 16 * case.eps
    for path, x, adapted in found:
        layer = model.get_submodule(path)
        error = relative(run(layer, x), adapted)
        case.expect(
            error <= tolerance,
            f"{path}: merged and adapted outputs differ by {error:.1e} of the largest output (allowed {tolerance:.1e}).",
        )
    case.expect(merge(model).n_layers == 0, "merging again is not a no-op.")
    unmerge(model)
    after = [*model.parameters(), *model.buffers()]
    case.expect(
        len(after) == len(before) and all(torch.equal(a, b) for a, b in zip(after, before, strict=True)),
        "unmerge does not give the bits back.",
    )
    for path, x, adapted in found:
        case.expect(
            torch.equal(run(model.get_submodule(path), x), adapted),
            f"{path}: after unmerge the adapter's output has other bits.",
        )


@check("5_merge", affine)
def merge_equals_forward(case: Case) -> None:
    for kind in (nn.Linear, Conv1D):
        model = case.model(kind=kind)
        handle = case.attach(model)
        randomise(model)
        _merged_and_not(case, model, handle.targets)


@check("5_merge", affine)
def merge_of_quantised_layers_equals_forward(case: Case) -> None:
    model = case.model(kind=FakeQuantLinear)
    handle = case.attach(model, dequantize=True)
    randomise(model)
    before = Snapshot(model, case.x())
    with case.raises("merging quantised layers without permission", "dequantize=True"):
        merge(model)
    case.expect(not (d := before.difference(model)), f"after the refusal {d}.")
    _merged_and_not(case, model, handle.targets, dequantize=True)
    case.expect(not (d := before.difference(model)), f"after unmerge of quantised layers {d}.")


@check("5_merge", affine)
def merge_of_several_equals_forward(case: Case) -> None:
    """Two adapters with weights, in attach order."""
    model = case.random("first", "second")
    activate(model, {"first": 0.7, "second": -0.4})
    _merged_and_not(case, model, adapters(model)["first"].targets)


@check("5_merge", lambda case: affine(case) and full_precision(case))
def merge_reports_its_error(case: Case) -> None:
    model, x = case.random(), case.x()
    case.expect(merge(model, check=x).logit_error is not None, "merge(check=batch) reports no error.")
    unmerge(model)
    report = merge(model, check={"x": x})
    y = effect_free = None
    unmerge(model)
    y = run(model, x)
    with active(model, None):
        effect_free = run(model, x)
    case.expect(
        report.logit_error is not None and report.logit_error <= 1e-4,
        f"merge reports an error of {report.logit_error} on the batch.",
    )
    case.expect(
        abs((report.effect or 0) - float((y - effect_free).abs().max())) < 1e-4,
        "merge reports another effect than the adapter has.",
    )


@check("5_merge", lambda case: not case.affine and full_precision(case))
def merge_of_what_is_not_affine_raises(case: Case) -> None:
    model = case.random()
    before = Snapshot(model, case.x())
    with case.raises("merging a method that is not affine", case.variant.name):
        merge(model)
    case.expect(not (d := before.difference(model)), f"after the refusal {d}.")


@check("5_merge", lambda case: case.linear and full_precision(case))
def affine_is_what_it_says(case: Case) -> None:
    """f(a u + (1 - a) v) = a f(u) + (1 - a) f(v) on one layer, exactly when the method says so."""
    model = case.random(dtype="float64")
    model = model.double()
    layer = model.get_submodule(adapters(model)["default"].targets[0])
    g = torch.Generator().manual_seed(8)
    u, v = (3 * torch.randn(16, layer.in_features, generator=g, dtype=torch.float64) for _ in range(2))  # type: ignore[arg-type]
    both, apart = run(layer, 0.3 * u + 0.7 * v), 0.3 * run(layer, u) + 0.7 * run(layer, v)
    if case.variant.affine:
        case.expect(
            relative(both, apart) < 1e-9,
            f"affine is declared, yet f misses the affine law by {relative(both, apart):.1e}.",
        )
    else:
        case.expect(
            relative(both, apart) > 1e-6, "affine = False is declared, yet f is affine: merging would be possible."
        )


# ---- 6. dtypes


@check("6_dtypes")
def adapter_is_fp32_and_output_keeps_its_dtype(case: Case) -> None:
    model, x = case.random(), case.x()
    for target, short, _, t in owned_tensors(model, record_of(model)):
        case.expect(t.dim() > 0, f"{target.path}.{short} has no dimension; sharded training refuses such parameters.")
        if target.specs[short].dtype is None:
            case.expect(t.dtype == torch.float32, f"{target.path}.{short} is stored as {t.dtype}, not float32.")
    case.expect(run(model, x).dtype == case.dtype, f"the output is {run(model, x).dtype}, the base's is {case.dtype}.")


@check("6_dtypes", full_precision)
def autocast_is_honoured(case: Case) -> None:
    """Under autocast the output has the dtype that the bare layer has there, and gradients arrive in fp32."""
    model, x = case.random(), case.x()
    y = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        with active(model, None):
            base = model(x)
        low = model(x)
    case.expect(low.dtype == base.dtype, f"under autocast the output is {low.dtype}, the bare model's {base.dtype}.")
    case.expect(relative(low, y) < 0.15, f"under autocast the output moves by {relative(low, y):.1e}.")
    if case.variant.trains:
        low.float().square().sum().backward()
        grads = [p.grad for p in adapters(model)["default"].parameters()]
        case.expect(
            all(g is not None and g.dtype == torch.float32 and bool(g.isfinite().all()) for g in grads),
            "under autocast a gradient is missing, not fp32 or not finite.",
        )


@check("6_dtypes", lambda case: case.dtype == torch.bfloat16)
def low_precision_agrees_with_high(case: Case) -> None:
    """bf16 base and adapter against the same numbers in fp64."""
    model, x = case.random(), case.x()
    exact = copy.deepcopy(model).double()
    error = relative(run(model, x), run(exact, x.double()))
    case.expect(error < 0.05, f"bf16 departs from fp64 by {error:.1e} of the largest output.")


@check("6_dtypes", full_precision)
def low_precision_storage(case: Case) -> None:
    """dtype="bfloat16" in the config stores bf16 and still works."""
    model = case.random(dtype="bfloat16")
    for target, short, _, t in owned_tensors(model, record_of(model)):
        case.expect(
            target.specs[short].dtype is not None or t.dtype == torch.bfloat16,
            f"{target.path}.{short} is {t.dtype} although the config says bfloat16.",
        )
    case.expect(run(model, case.x()).isfinite().all(), "bf16 adapter tensors give values that are not finite.")


# ---- 7. same seed, same adapter


def _tensors(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    return adapter_state_dict(model, name)


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@check("7_same_seed", full_precision)
def same_seed_same_adapter(case: Case) -> None:
    """Whatever the global random state, the adapter's name, the other adapters and the chosen subset of targets."""
    want = _tensors(case.fresh())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(31337)
        case.expect(
            _same(_tensors(case.fresh()), want),
            "the start depends on the global random state; draw from layer.generator().",
        )
    model = case.random("first")
    case.attach(model, "second")
    case.expect(_same(_tensors(model, "second"), want), "the start depends on the adapter's name or on other adapters.")
    if case.variant.group_init is None and case.variant.shared_specs is None:
        part = case.model()
        case.attach(part, layers=(1,))
        got = _tensors(part)
        case.expect(_same(got, {k: want[k] for k in got}), "the start depends on which other targets there are.")
    case.expect(not _same(_tensors(case.fresh(seed=1)), want) or not _draws(case), "another seed gives the same start.")


def _draws(case: Case) -> bool:
    """Whether a spec draws random numbers (then seeds must matter)."""
    from ..runtime.plan import plan

    targets = plan(case.model(), case.cfg()).targets
    return any(
        s.init in ("kaiming", "normal") or str(s.init).startswith("normal:") for t in targets for s in t.specs.values()
    )


# ---- selection: several adapters, weights, rows


@check("selection")
def selection_restores_itself(case: Case) -> None:
    """`with ll.active` gives the selection back, after exceptions too; unknown names raise."""
    model, x = case.random("a", "b"), case.x()
    y = {}
    for choice in ("a", "b", None):
        activate(model, choice)
        y[choice] = run(model, x)
    activate(model, "a")
    try:
        with active(model, "b"):
            case.expect(torch.equal(run(model, x), y["b"]), "inside `with ll.active` another adapter acts.")
            raise Planted
    except Planted:
        pass
    case.expect(torch.equal(run(model, x), y["a"]), "after an exception in `with ll.active` the selection is not back.")
    activate(model, {"a": 0.0})
    case.expect(relative(run(model, x), y[None]) <= 8 * case.eps, "weight 0 is not the base.")
    with case.raises("activating an unknown adapter", "'nobody'"):
        activate(model, "nobody")


@check("selection", lambda case: trains(case))
def rows_equal_single_runs(case: Case) -> None:
    """One adapter per row: as in a run of its own; rows without adapter have the base's bits; NaN stays in its row; beams repeat rows."""
    model, x = case.random("a", "b"), case.x(5, 4)
    names = ["b", None, "a", "b", None]
    alone = {}
    for choice in ("a", "b", None):
        with active(model, choice):
            alone[choice] = run(model, x)
    tolerance = 2e-6 if case.dtype == torch.float32 else 16 * case.eps

    def compare(y: Tensor, names: list[str | None], what: str) -> None:
        for i, name in enumerate(names):
            if name is None:
                case.expect(
                    torch.equal(y[i], alone[None][i]), f"{what}: a row without adapter has not the base's bits."
                )
            else:
                case.expect(
                    (e := relative(y[i], alone[name][i])) <= tolerance,
                    f"{what}: row {i} differs from a run of its adapter alone by {e:.1e}.",
                )

    with rows(model, names):
        compare(run(model, x), names, "rows")
    with rows(model, ["a", None, None, None, None]):
        compare(run(model, x), ["a", None, None, None, None], "a single row")
    case.expect(relative(alone["a"], alone["b"]) > 1e-2, "the two random adapters do the same.")
    bad = x.clone()
    bad[2] = float("nan")
    with rows(model, names):
        y = run(model, bad)
    case.expect(y[2].isnan().any() and y[[0, 1, 3, 4]].isfinite().all(), "a NaN in one row reaches another row.")
    with rows(model, ["a", None]):
        y = run(model, x[:4])
    compare(y, ["a", "a", None, None], "beams")
    with case.raises("rows with an unknown adapter", "'nobody'"), rows(model, ["nobody"]):
        pass
    with case.raises("rows that do not fit the batch"), rows(model, ["a", "b"]):
        run(model, x)


@check("selection", lambda case: trains(case) and full_precision(case))
def rows_train_their_own_adapter(case: Case) -> None:
    """In a mixed batch each adapter gets the gradient of its rows and of no other."""
    model, x = case.random("a", "b"), case.x(4, 3)
    for handle in adapters(model).values():
        handle.trainable = True
    grads = {}
    for name, part in (("a", [0, 2]), ("b", [3])):
        with active(model, name):
            model(x[part]).square().sum().backward()
        grads[name] = [p.grad.clone() if p.grad is not None else None for p in adapters(model)[name].parameters()]
        model.zero_grad()
    with rows(model, ["a", None, "a", "b"]):
        model(x).square().sum().backward()
    for name, want in grads.items():
        for p, g in zip(adapters(model)[name].parameters(), want, strict=True):
            ok = (
                (p.grad is None or not p.grad.any()) if g is None else p.grad is not None and relative(p.grad, g) < 1e-4
            )
            case.expect(ok, f"in a mixed batch adapter {name!r} gets another gradient than from its rows alone.")


@check("selection")
def rows_and_tokens_are_independent(case: Case) -> None:
    """Changing row j must not change row i, changing a later token not an earlier one."""
    model, x = case.random(), case.x(3, 5)
    y = run(model, x)
    other = x.clone()
    other[1] += 3
    case.expect(torch.equal(run(model, other)[[0, 2]], y[[0, 2]]), "changing one row changes another row.")
    other = x.clone()
    other[:, 3:] -= 2
    case.expect(torch.equal(run(model, other)[:, :3], y[:, :3]), "changing later tokens changes earlier ones.")


# ---- saving


@check("saving")
def round_trip(case: Case) -> None:
    """save, then load into a fresh model: identical output, the same tensors, nothing but the adapter in the file."""
    model, x = case.random(), case.x()
    y = run(model, x)
    with tempfile.TemporaryDirectory() as folder:
        path = save(model, Path(folder) / "x")
        case.expect(path.suffix == ".safetensors", f"the file is called {path.name}.")
        head, tensors = _read(path)
        own = _tensors(model)
        case.expect(list(sorted(tensors)) == sorted(own), "the file's keys are not those of adapter_state_dict.")
        case.expect(
            all(k.rsplit(".", 1)[-1].startswith("lora_") and "@" not in k for k in tensors),
            "a key does not end in lora_*.",
        )
        size = sum(t.numel() * t.element_size() for t in own.values())
        case.expect(
            path.stat().st_size <= size + 65536,
            f"the file has {path.stat().st_size} bytes for {size} bytes of tensors.",
        )
        for name in ("default", "other"):
            fresh = case.model()
            with _no_init(case):
                load(fresh, path, name=name)
            case.expect(
                torch.equal(run(fresh, x), y),
                f"the loaded adapter (called {name!r}) gives another output, by {relative(run(fresh, x), y):.1e}.",
            )
            case.expect(_same(_tensors(fresh, name), own), "the loaded tensors differ.")
            case.expect(
                not any(p.requires_grad for p in fresh.parameters()), "load(trainable=False) left something trainable."
            )
            case.expect(record_of(fresh).cfg == record_of(model).cfg, "the loaded config differs.")
            again = save(fresh, Path(folder) / "again.safetensors", name=name)
            case.expect(_read(again)[0]["targets"] == head["targets"], "saving what was loaded writes other targets.")
        if case.variant.trains:
            handle = load(case.model(), path, trainable=True)
            case.expect(
                all(p.requires_grad for p in handle.parameters()), "load(trainable=True) left a trained tensor frozen."
            )
    fresh = case.fresh()
    load_adapter_state_dict(fresh, None, own)
    case.expect(torch.equal(run(fresh, x), y), "load_adapter_state_dict gives another output.")
    with case.raises("a state dict with a missing key"):
        load_adapter_state_dict(fresh, None, dict(list(own.items())[1:]))


@check("saving", full_precision)
def wrong_base_raises(case: Case) -> None:
    if not case.linear:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = save(case.random(), Path(folder) / "x.safetensors")
        other = case.model()
        with torch.no_grad():
            for p in other.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        before = Snapshot(other, case.x())
        with case.raises("loading onto another base", "base"):
            load(other, path)
        case.expect(not (d := before.difference(other)), f"after a load that was refused {d}.")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            load(other, path, base_check="warn")
        case.expect(seen, "base_check='warn' does not warn.")


@check("saving", full_precision)
def copies_are_independent(case: Case) -> None:
    """deepcopy and pickle carry the adapter, and training the copy leaves the original alone."""
    model, x = case.random(), case.x()
    y = run(model, x)
    for how in ("deepcopy", "pickle"):
        twin = copy.deepcopy(model) if how == "deepcopy" else pickle.load(io.BytesIO(pickle.dumps(model)))
        case.expect(torch.equal(run(twin, x), y), f"a {how} gives another output.")
        randomise(twin, seed=77)
        activate(twin, None)
        case.expect(torch.equal(run(model, x), y), f"changing a {how} changes the original.")
        detach(twin)
        case.expect(torch.equal(run(model, x), y), f"detaching from a {how} changes the original.")


@check("saving", full_precision)
def rename_keeps_the_objects(case: Case) -> None:
    model, x = case.random(), case.x()
    y, own = run(model, x), {id(p) for p in model.parameters()}
    rename(model, "default", "new-name")
    case.expect(torch.equal(run(model, x), y), "renaming changes the output.")
    case.expect({id(p) for p in model.parameters()} == own, "renaming replaces parameters.")
    case.expect(list(adapters(model)) == ["new-name"], "the new name is not listed.")


# ---- training


@check("training", lambda case: trains(case))
def gradients_reach_the_adapter_only(case: Case) -> None:
    """Every trained tensor gets a finite nonzero gradient, no base parameter gets any, and x gets one."""
    model = case.random()
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
    """From a fresh adapter, one step with twice the learning rate changes the output twice as much: ‖ΔW‖ is of the order of lr."""
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
        f"one step with twice the learning rate moves the output {moved[1] / moved[0]:.2f} times as far, not twice; ‖ΔW‖ does not scale with lr.",
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
    case.expect(
        relative(run(plain.train(), x), run(plain.eval(), x)) < 1e-6,
        "without dropout, training mode changes the output.",
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


# ---- files


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from ..io.native import read

    return read(path)


def _write_file(path: Path, head: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    import json

    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in tensors.items()}, str(path), {"lora_lite": json.dumps(head)})
    return path


def _no_init(case: Case) -> Any:
    """Inside, `init` and `group_init` fail: loading needs neither."""
    from contextlib import ExitStack

    def never(*_: Any) -> None:
        raise AssertionError(f"{case}: load ran init or group_init.")

    stack = ExitStack()
    for member in ("init", "group_init"):
        if getattr(case.variant, member) is not None:
            stack.enter_context(case.patched(member, never))
    return stack
