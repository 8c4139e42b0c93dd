"""What this library asks of torch beyond its public interface, a function for each thing; `tests/runtime/test_torch.py`
says when a torch release answers otherwise."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn, overrides
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

CALL = nn.Module._wrapped_call_impl.__code__


def backward_is_running() -> bool:
    """Whether this thread runs inside a backward pass. Relies on `_current_graph_task_id`, which is -1 outside."""
    return torch._C._current_graph_task_id() != -1


def inside_checkpoint() -> bool:
    """Whether the forward of a non-reentrant checkpoint runs. Relies on its packing hook, defined in a module whose
    name contains "checkpoint", being the innermost of `torch.autograd.graph.saved_tensors_hooks`.

    Asked while a compiler traces, the answer is a constant of the graph."""
    private: Any = torch._C
    top = getattr(private._autograd, "_top_saved_tensors_default_hooks", None)
    if top is None:  # before torch 2.8: the function `checkpoint` stands some frames up, which is slower to ask
        return frame_of("checkpoint", "torch.utils.checkpoint") is not None
    hooks = top(True)
    return hooks is not None and "checkpoint" in getattr(hooks[0], "__module__", "")


# what torch.compiler.assume_constant_result does, which would load the compiler
inside_checkpoint._dynamo_marked_constant = True  # type: ignore[attr-defined]


def inside_reentrant_checkpoint() -> bool:
    """Whether a reentrant checkpoint runs some frames up. Relies on its autograd function's `forward` standing in
    `torch.utils.checkpoint`."""
    return frame_of("forward", "torch.utils.checkpoint") is not None


def function_cuts() -> bool | None:
    """Whether the nearest autograd function whose forward runs some frames up, as that of a reentrant checkpoint, has
    no input that requires a gradient; None where no such function runs. Relies on its first argument being the context,
    which knows."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount:
            needed = getattr(frame.f_locals.get(code.co_varnames[0]), "needs_input_grad", None)
            if isinstance(needed, tuple):
                return not any(needed)
        frame = frame.f_back
    return None


def functorch_is_active() -> bool:
    """Whether a `torch.func` transform (grad, vmap, jvp) runs. Relies on `_are_functorch_transforms_active`."""
    return torch._C._are_functorch_transforms_active()


def frame_of(function: str, package: str, within: int = sys.maxsize) -> FrameType | None:
    """The nearest frame above the caller's that runs `function` of a module whose name begins with `package`, at most
    `within` frames up. Relies on the names of that function and of its local variables."""
    frame = sys._getframe(2)
    while frame is not None and within:
        if frame.f_code.co_name == function and frame.f_globals.get("__name__", "").startswith(package):
            return frame
        frame, within = frame.f_back, within - 1
    return None


def runs_compiled(module: nn.Module) -> bool:
    """Whether a module's forward, or the whole of it, runs as compiled code. Relies on the names `_orig_mod` and
    `_compiled_call_impl`, and on the compiler marking a function that it wraps with `_torchdynamo_orig_callable`."""
    forward = module.__dict__.get("forward")
    marked = forward is not None and hasattr(forward, "_torchdynamo_orig_callable")
    return marked or "_orig_mod" in module._modules or module._compiled_call_impl is not None


def end_mode(mode: TorchFunctionMode) -> None:
    """Take a mode off this thread's stack, wherever on it; nothing where it is not there. Relies on the functions that
    `TorchFunctionMode` enters and leaves by."""
    if not any(one is mode for one in overrides._get_current_function_mode_stack()):
        return
    above = []
    while (top := overrides._pop_mode()) is not mode:
        above.append(top)
    for one in reversed(above):
        overrides._push_mode(one)


def modules_called_elsewhere() -> list[nn.Module]:
    """The modules of which other threads run a call right now. Relies on `sys._current_frames` and on the name of the
    method of `nn.Module` that every call goes through, `_wrapped_call_impl`."""
    stacks = sys._current_frames()
    stacks.pop(threading.get_ident(), None)
    found: list[nn.Module] = []
    for frame in stacks.values():
        while frame is not None:
            if frame.f_code is CALL:
                found.append(frame.f_locals["self"])
            frame = frame.f_back
    return found


def within_compiled() -> bool:
    """Whether compiled code, or what it calls, runs some frames up. Relies on its callers standing in `torch._dynamo`,
    whose functions run nothing else of a model but what it was told to leave alone."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("torch._dynamo"):
            return True
        frame = frame.f_back
    return False


def within_step(optimizer: Optimizer) -> bool:
    """For a step hook: whether an outer step of the same optimiser is still running, since torch runs the hooks again
    for a `super().step()`. Relies on one wrapper around every `step`, which calls the hooks itself and whose first
    argument is `self`."""
    wrapper = sys._getframe(2)
    frame = wrapper.f_back
    while frame is not None:
        if frame.f_code is wrapper.f_code and frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False


def guard_hooks() -> None:
    """From now on, compiled code looks whether a module has hooks. Otherwise that of one model runs in another model of
    the same classes, which then is the bare base in silence. Relies on the compiler's `skip_nnmodule_hook_guards`."""
    import torch._dynamo.config as compiler

    compiler.skip_nnmodule_hook_guards = False


def forget_compiled() -> None:
    """Forget compiled code, which need not have looked for the hooks that came or went. Relies on the compiler being
    the module `torch._dynamo`, which is not loaded before something is compiled."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def fake_mode() -> Any:
    """A mode in which tensors have shapes and no values, and claim to lie on a device. Relies on
    `torch._subclasses.fake_tensor`."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def is_fake(t: Tensor) -> bool:
    """Whether `t` was made under `fake_mode`, whose module is loaded then."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(t, module.FakeTensor)


def makes_fakes() -> bool:
    """Whether a mode is on in which what is made has no values."""
    return is_fake(torch.empty(0))


def storage_key(t: Tensor) -> int:
    """The same for tensors that share memory, of tensors without values too, which have no address. Valid while `t`
    lives. Relies on `_cdata`, the address of the storage object."""
    return t.untyped_storage()._cdata


def storage_reference(t: Tensor) -> Any:
    """A weak reference to the memory of a tensor, of one without values too: `cdata` is its key, `expired()` says
    whether nothing uses it any more. Relies on `torch.multiprocessing.reductions.StorageWeakRef`."""
    from torch.multiprocessing.reductions import StorageWeakRef

    return StorageWeakRef(t.untyped_storage())


def cpu_attention() -> tuple[Any, Any]:
    """The operators of the attention kernel that torch picks on a CPU, forward and backward. Relies on their names."""
    aten = torch.ops.aten
    return aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention_for_cpu_backward


def counts_tensors(formula: Any) -> Any:
    """Mark a formula of `FlopCounterMode(custom_mapping=...)` to be handed tensors instead of shapes. Relies on
    `_get_raw`."""
    formula._get_raw = True
    return formula


def conv_padding(conv: nn.Module) -> list[int]:
    """What a convolution with a padding mode of its own hands to `F.pad`. Relies on
    `_reversed_padding_repeated_twice`."""
    return conv._reversed_padding_repeated_twice  # type: ignore[return-value]


def persistent_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """(name, buffer) of a module's own buffers that are part of its state dict. Relies on
    `_non_persistent_buffers_set`."""
    return [(k, t) for k, t in module._buffers.items() if t is not None and k not in module._non_persistent_buffers_set]


def without_overrides() -> AbstractContextManager[None]:
    """Functions of torch on tensor subclasses run as on tensors inside. Relies on `DisableTorchFunctionSubclass`."""
    private: Any = torch._C
    return private.DisableTorchFunctionSubclass()


def with_tensors(change: Callable[[Any], Any], arguments: Any) -> Any:
    """Nested arguments of a function with `change` at every leaf. Relies on `torch.utils._pytree`."""
    return _pytree.tree_map(change, arguments)


def remove_hooks(module: nn.Module, hooks: dict[str, Callable[..., Any]]) -> None:
    """Take functions out of a module's tables of hooks, by the table's name. Relies on those tables, on the ones beside
    them that say which hooks take keyword arguments, and on torch wrapping some functions in an object with `hook`."""
    for table_name, function in hooks.items():
        table = getattr(module, table_name)
        for key in [k for k, h in table.items() if getattr(h, "hook", h) is function]:
            del table[key]
            for extra in ("_with_kwargs", "_always_called"):
                getattr(module, table_name + extra, {}).pop(key, None)


def hook_tables(owner: nn.Module | Optimizer) -> list[dict[int, Any]]:
    """Every table of hooks of a module or an optimiser. Relies on their names ending in `_hooks`, or in what is said of
    some hooks."""
    endings = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
    return [table for name, table in vars(owner).items() if name.endswith(endings) and isinstance(table, dict)]


def sampled_products(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Σ_t a[rows, t] b[columns, t] for two matrices with rows in one piece, without a derivative. Relies on the
    backward pass of an embedding bag's weights being these products."""
    weights_backward: Any = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return weights_backward(a, b, columns, rows, rows, 0, -1)
