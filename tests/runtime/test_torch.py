"""What `_torch.py` relies on: each test is red where a torch release answers otherwise, and says by its name what then
breaks."""

from __future__ import annotations

import ast
import contextlib
import inspect
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_lite import _torch


class Answers(nn.Module):
    """Asks in its forward."""

    def __init__(self, question) -> None:
        super().__init__()
        self.question = question
        self.heard: list = []

    def forward(self, x):
        self.heard.append(self.question())
        return x.sin() * 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_is_known_to_run_in_a_backward_pass(reentrant):
    asks = Answers(_torch.backward_is_running)
    x = torch.randn(3, requires_grad=True)
    y = checkpoint(asks, x, use_reentrant=reentrant)
    y.register_hook(lambda g: asks.heard.append(_torch.backward_is_running()))
    y.sum().backward()
    assert asks.heard == [False, True, True]
    assert not _torch.backward_is_running()


def test_a_checkpoint_is_told_from_none_and_from_other_hooks_on_saved_tensors():
    asks = Answers(_torch.inside_checkpoint)
    x = torch.randn(3, requires_grad=True)
    asks(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        asks(x)
    assert asks.heard == [False, False]
    checkpoint(asks, x, use_reentrant=False)
    assert asks.heard[2:] == [True]


def test_a_checkpoint_is_a_constant_of_a_graph_compiled_inside_it():
    def block(x):
        return x.sin() * (2 if _torch.inside_checkpoint() else 3)

    x = torch.randn(5, requires_grad=True)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), x.sin() * 3)
    torch.compiler.reset()
    torch.testing.assert_close(checkpoint(compiled, x, use_reentrant=False), x.sin() * 2)


def test_a_reentrant_checkpoint_is_seen_from_frames_below():
    asks = Answers(_torch.inside_reentrant_checkpoint)
    x = torch.randn(3, requires_grad=True)
    nn.Sequential(asks)(x)
    checkpoint(nn.Sequential(asks), x, use_reentrant=True)
    assert asks.heard == [False, True]


def test_transforms_of_torch_func_are_noticed():
    heard = []

    def f(x):
        heard.append(_torch.functorch_is_active())
        return (x**3).sum()

    f(torch.randn(3))
    torch.func.grad(f)(torch.randn(3))
    torch.func.vmap(f)(torch.randn(2, 3))
    torch.func.jvp(f, (torch.randn(3),), (torch.randn(3),))
    assert heard == [False, True, True, True]


@pytest.mark.parametrize("strict", [True, False])
def test_what_the_user_said_to_load_state_dict_is_read_in_its_frame(strict):
    said = []

    def hook(module, *_):
        frame = _torch.frame_of("load_state_dict", "torch.", within=8)
        assert frame is not None
        said.append(frame.f_locals["strict"])

    model = nn.Sequential(nn.Linear(3, 5))
    model.register_load_state_dict_pre_hook(hook)
    model.load_state_dict(model.state_dict(), strict=strict)
    assert said == [strict]


def test_a_frame_is_looked_for_by_function_and_package_and_so_far_only():
    def outer(within):
        return inner(within)

    def inner(within):
        return hook(within)

    def hook(within):
        return _torch.frame_of("outer", __name__, within)

    frame = outer(2)
    assert frame is not None and frame.f_locals["within"] == 2
    assert outer(1) is None
    assert _torch.frame_of("outer", "torch.") is None


class Twice(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        return super().step(closure)


def test_an_inner_step_of_one_optimiser_is_told_from_its_outer_step_and_from_another_optimiser():
    p, q = (nn.Parameter(torch.randn(3)) for _ in range(2))
    outer, other = Twice([p], lr=0.1), torch.optim.SGD([q], lr=0.1)
    heard = []

    def after(optimizer, args, kwargs):
        heard.append(("outer" if optimizer is outer else "other", _torch.within_step(optimizer)))
        if optimizer is outer:
            other.step()

    outer.register_step_post_hook(after)
    other.register_step_post_hook(after)
    p.grad, q.grad = torch.randn(3), torch.randn(3)
    outer.step()
    assert [inside for name, inside in heard if name == "outer"] == [True, True, False]
    assert [inside for name, inside in heard if name == "other"] == [False, False, False]


def test_compiled_code_looks_for_hooks():
    _torch.guard_hooks()
    bare, other = nn.Linear(3, 5), nn.Linear(3, 5)
    other.register_forward_hook(lambda m, args, y: y + 1)
    x = torch.randn(2, 3)
    for model in (bare, other, bare):
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


def test_compiled_code_is_forgotten_and_the_compiler_is_not_loaded_for_it():
    torch.compiler.reset()  # of what other tests have compiled for a linear layer
    model = nn.Linear(3, 5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x, plus = torch.randn(2, 3), torch.randn(2, 5)
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):  # as code is compiled before the first attach
        compiled(x)
        model.register_forward_hook(lambda m, args, y: y + plus)
        assert not torch.equal(compiled(x), model(x))
        _torch.forget_compiled()
        assert torch.equal(compiled(x), model(x))
    code = "import sys, lora_lite._torch as t; t.forget_compiled(); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_fake_tensors_are_told_from_others_and_claim_a_device():
    with _torch.fake_mode():
        t = torch.empty(3, 5)
        y = t @ t.mT
    assert _torch.is_fake(t) and _torch.is_fake(y) and y.shape == (3, 3) and y.device.type == "cpu" and not y.is_meta
    assert not _torch.is_fake(torch.empty(3)) and not _torch.is_fake(torch.empty(3, device="meta"))


@pytest.mark.parametrize("kind", ["real", "meta", "fake"])
def test_tensors_that_share_memory_have_one_key(kind):
    with _torch.fake_mode() if kind == "fake" else torch.device("meta" if kind == "meta" else "cpu"):
        t, other = torch.empty(3, 5), torch.empty(3, 5)
        views = t.mT, t[1:], t.view(15), t.detach()
    assert {_torch.storage_key(v) for v in views} == {_torch.storage_key(t)}
    assert _torch.storage_key(other) != _torch.storage_key(t)


@pytest.mark.parametrize("fake", [False, True])
def test_a_reference_to_memory_ends_with_its_last_user(fake):
    with _torch.fake_mode() if fake else contextlib.nullcontext():
        t = torch.empty(6)
        view, reference = t.view(2, 3), _torch.storage_reference(t)
        assert reference.cdata == _torch.storage_key(t)
        del t
        assert not reference.expired()
        del view
        assert reference.expired()


def test_attention_on_a_cpu_is_these_operators():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    q, k, v = (torch.randn(1, 2, 7, 4, requires_grad=True) for _ in range(3))
    with Watch():
        nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()
    assert set(_torch.cpu_attention()) <= seen


def test_a_marked_formula_counts_tensors():
    from torch.utils.flop_counter import FlopCounterMode

    heard = []

    @_torch.counts_tensors
    def formula(*tensors, out_val=None, **_):
        heard.append([type(t) for t in tensors])
        return 1234

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: formula}) as count:
        torch.randn(3, 5).addmm_(torch.randn(3, 2), torch.randn(2, 5))
    assert heard == [[torch.Tensor] * 3] and count.get_total_flops() == 1234


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_the_padding_of_a_convolution_is_what_it_does_itself(mode):
    conv = nn.Conv2d(2, 3, (3, 5), padding=(1, 2), padding_mode=mode)
    x = torch.randn(1, 2, 7, 8)
    padded = nn.functional.pad(x, _torch.conv_padding(conv), mode=mode)
    assert torch.equal(nn.functional.conv2d(padded, conv.weight, conv.bias), conv(x))


def test_a_change_in_place_raises_a_tensors_version():
    """`Tensor._version` and the tables of `nn.Module` are used where they are needed, not through `_torch.py`."""
    t = torch.randn(3)
    before = t._version
    with torch.no_grad():
        t.add_(1)
    assert t._version > before
    module = nn.BatchNorm1d(3)
    assert set(module._parameters) == {"weight", "bias"} and "running_mean" in module._buffers
    assert set(nn.Sequential(module)._modules) == {"0"}
    for table, register in {
        "_forward_pre_hooks": module.register_forward_pre_hook,
        "_forward_hooks": module.register_forward_hook,
        "_load_state_dict_pre_hooks": module.register_load_state_dict_pre_hook,
        "_state_dict_hooks": module.register_state_dict_post_hook,
    }.items():
        handle = register(lambda *_: None)
        assert handle.id in getattr(module, table), table


def test_hooks_come_off_and_their_tables_are_found():
    module = nn.Linear(2, 2)

    def before(m, args, kwargs):
        return None

    def after(m, args, kwargs, output):
        return output + 1

    x = torch.zeros(1, 2)
    bare = module(x)
    empty = [dict(table) for table in _torch.hook_tables(module)]
    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after, with_kwargs=True, always_call=True)
    module.register_forward_hook(kept := (lambda m, args, output: output * 2))
    assert torch.equal(module(x), 2 * (bare + 1))
    assert [dict(table) for table in _torch.hook_tables(module)] != empty
    _torch.remove_hooks(module, {"_forward_pre_hooks": before, "_forward_hooks": after})
    assert torch.equal(module(x), 2 * bare), "another's hook went too, or ours stayed"
    _torch.remove_hooks(module, {"_forward_hooks": kept})
    assert [dict(table) for table in _torch.hook_tables(module)] == empty


def test_a_function_whose_forward_runs_knows_whether_a_gradient_is_needed():
    seen = []

    class Outer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(_torch.function_cuts())
            return x * 1

        @staticmethod
        def backward(ctx, g):
            return g

    assert _torch.function_cuts() is None
    Outer.apply(torch.zeros(1))
    Outer.apply(torch.zeros(1, requires_grad=True))
    assert seen == [True, False]


def test_compiled_code_is_seen_from_inside_and_from_outside():
    module = nn.Linear(2, 2)
    assert not _torch.runs_compiled(module) and not _torch.within_compiled()
    module.compile(backend="eager")
    assert _torch.runs_compiled(module) and _torch.runs_compiled(torch.compile(nn.Linear(2, 2), backend="eager"))
    other = nn.Linear(2, 2)
    other.forward = torch.compile(other.forward, backend="eager")
    assert _torch.runs_compiled(other)
    seen = []

    @torch.compiler.disable
    def left_alone(x):
        seen.append(_torch.within_compiled())
        return x

    torch.compile(lambda x: left_alone(x) + 1, backend="eager")(torch.zeros(2))
    assert seen == [True]


def test_buffers_of_the_state_dict():
    module = nn.BatchNorm1d(3)
    module.register_buffer("scratch", torch.zeros(1), persistent=False)
    assert [name for name, _ in _torch.persistent_buffers(module)] == [
        "running_mean",
        "running_var",
        "num_batches_tracked",
    ]


def test_overrides_stay_out_and_arguments_are_changed():
    class Loud(torch.Tensor):
        pass

    t = torch.zeros(2).as_subclass(Loud)
    with _torch.without_overrides():
        assert type(t + 1) is torch.Tensor
    assert type(t + 1) is Loud
    changed = _torch.with_tensors(lambda v: v + 1 if isinstance(v, int) else v, ((1, [2]), {"a": 3, "b": "c"}))
    assert changed == ((2, [3]), {"a": 4, "b": "c"})


def test_calls_of_other_threads_are_seen():
    inside, go_on = threading.Event(), threading.Event()

    class Waits(nn.Module):
        def forward(self):
            inside.set()
            go_on.wait(10)

    module = Waits()
    thread = threading.Thread(target=module)
    thread.start()
    inside.wait(10)
    assert any(m is module for m in _torch.modules_called_elsewhere())
    go_on.set()
    thread.join()
    assert not any(m is module for m in _torch.modules_called_elsewhere())


def test_a_mode_leaves_the_stack_from_wherever_it_stands():
    from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    below, above = Mode(), Mode()
    below.__enter__()
    with above:
        _torch.end_mode(below)
        assert _get_current_function_mode_stack() == [above]
        _torch.end_mode(below)  # it is gone
        assert _get_current_function_mode_stack() == [above]
    assert not _get_current_function_mode_stack()


def test_a_mode_that_makes_fakes_is_seen():
    assert not _torch.makes_fakes()
    with _torch.fake_mode():
        assert _torch.makes_fakes()
    with torch.device("meta"):
        assert not _torch.makes_fakes()


def test_the_weights_of_a_bag_get_sampled_products():
    a, b = torch.randn(4, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    rows, columns = torch.tensor([0, 0, 3]), torch.tensor([4, 1, 1])
    torch.testing.assert_close(_torch.sampled_products(a, b, rows, columns), (a @ b.mT)[rows, columns])


def test_every_function_has_a_test():
    tested = {n.attr for n in ast.walk(ast.parse(Path(__file__).read_text())) if isinstance(n, ast.Attribute)}
    own = {name for name, f in inspect.getmembers(_torch, inspect.isfunction) if f.__module__ == _torch.__name__}
    assert own - tested == set()
