"""The same small network under our adapter and under PEFT's, with the same tensors: outputs and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import peft
import torch
from torch import Tensor, nn

import lora_lite as ll
from equations.helpers import randomise

Link = Callable[[Any], dict[str, Tensor]]


class Two(nn.Module):
    """up and down with a tanh between, so that the gradient of `up` needs the input gradient of `down`."""

    config = {"model_type": "two"}

    def __init__(self, d_in: int, d_out: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = nn.Linear(d_in, d_out, dtype=dtype), nn.Linear(d_out, d_in, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


def pair(cfg: ll.AdapterConfig, theirs: Any, sizes: tuple[int, int] = (24, 36)) -> tuple[Any, Any]:
    """Our adapted network with random tensors in the config's dtype, and PEFT's, from the same base."""
    mine = Two(*sizes, cfg.torch_dtype)
    ll.attach(mine, cfg)
    randomise(mine)
    theirs.target_modules = {"up", "down"}
    wrapped: Any = peft.get_peft_model(Two(*sizes, cfg.torch_dtype), theirs)
    return mine, wrapped.to(cfg.torch_dtype).base_model.model


def copied(mine: Any, theirs: Any, link: Link) -> list[tuple[Tensor, Tensor]]:
    """Put our values into PEFT's tensors: (value, its tensor) of each."""
    found = []
    for path in ("up", "down"):
        for name, value in link(mine.get_submodule(path)).items():
            tensor = attrgetter(name)(theirs.get_submodule(path))
            assert tensor.shape == value.shape, f"{name}: {tuple(tensor.shape)}, not {tuple(value.shape)}"
            tensor.data.copy_(value.detach())
            found.append((value, tensor))
    return found


def compare(mine: Any, theirs: Any, link: Link, tolerance: float = 1e-9, wrong_backward: bool = False) -> None:
    """Outputs and gradients agree to `tolerance` of their largest entry.

    `link(layer)` maps the name of each of PEFT's tensors on the layer to its value, made of ours by differentiable
    operations: so the gradient of ours follows from theirs. `wrong_backward`: PEFT's is known to be wrong, and ours is
    compared with finite differences of PEFT's output instead.
    """
    links = copied(mine, theirs, link)
    own = list(ll.adapters(mine)["default"].parameters())
    x = torch.randn(2, 5, mine.up.in_features, dtype=mine.up.weight.dtype, requires_grad=True)
    y, z = mine(x), theirs(x)
    with ll.active(mine, None):
        assert (mine(x) - y).abs().max() > 1e-2, "the adapter does nothing"
    weights = torch.randn_like(y)
    got = torch.autograd.grad((y * weights).sum(), [x, *own])
    if wrong_backward:

        def f():
            copied(mine, theirs, link)
            return (theirs(x) * weights).sum()

        errors = [relative(*slopes(got, [x, *own], f))]
    else:
        trained = [(value, tensor) for value, tensor in links if tensor.requires_grad]
        at_x, *rest = torch.autograd.grad((z * weights).sum(), [x, *(tensor for _, tensor in trained)])
        through = torch.stack([(value * g).sum() for (value, _), g in zip(trained, rest, strict=True)]).sum()
        errors = [relative(a, b) for a, b in zip(got, [at_x, *torch.autograd.grad(through, own)], strict=True)]
    errors.append(relative(y, z))
    assert max(errors) <= tolerance, errors
    print(f"largest error {max(errors):.1e}")


def slopes(gradients: Any, leaves: Any, f: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Slopes of f along a random direction in each leaf: by the gradients, and by central differences."""
    mine, differences = [], []
    for g, leaf in zip(gradients, leaves, strict=True):
        way, start = torch.randn_like(leaf), leaf.detach().clone()
        ends = []
        for step in (1e-3, -1e-3):
            leaf.data.copy_(start + step * way)
            ends.append(f().detach())
        leaf.data.copy_(start)
        mine.append((g * way).sum())
        differences.append((ends[0] - ends[1]) / 2e-3)
    return torch.stack(mine), torch.stack(differences)


def relative(a: Tensor, b: Tensor) -> float:
    assert b.abs().max() > 0
    return float((a - b).detach().abs().max() / b.detach().abs().max())
