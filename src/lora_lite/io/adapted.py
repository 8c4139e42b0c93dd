"""One layer of an attached adapter as writers of other layouts see it: its tensors gathered, on the CPU, in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import StateError
from ..ops.svd import randomised_svd
from ..runtime.layers.kinds import kind_named
from ..runtime.layers.read import read_weight
from ..runtime.layers.tensors import bias_of, is_sharded
from ..runtime.model.record import Record, Target
from ..runtime.model.site import Slot
from ..runtime.view.composed import Composed
from ..runtime.view.layer import DenseView, product
from .gather import full_tensor
from .native import adapter_state_dict

Pair = tuple[Tensor, Tensor]
EXACT = 1e-6
"""Relative norm of what may be left out of a matrix that counts as whole."""


class Adapted:
    """A target of an adapter with its layer."""

    def __init__(self, model: nn.Module, record: Record, target: Target, tensors: dict[str, Tensor]) -> None:
        self.record, self.target, self.tensors = record, target, tensors
        self.path, self.cfg, self.d_in, self.d_out = target.path, target.cfg, target.d_in, target.d_out
        self.module = model.get_submodule(target.path)
        self.kind = kind_named(target.kind)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def weight(self) -> Tensor:
        """W (d_out, d_in) in fp32, gathered from shards."""
        return dense_weight(self.module, self.path, self.target.kind)

    @property
    def stored(self) -> Tensor:
        """The stored weight as a matrix (d_out, d_in) in fp32, whatever the layer does with it."""
        if self.kind.is_quantised(self.module):
            return self.weight
        return self.kind.as_matrix(self.module, full_tensor(self.kind.stored(self.module).detach())).float().cpu()

    @property
    def bias(self) -> Tensor | None:
        """The base's bias in fp32."""
        b = bias_of(self.module)
        return None if b is None else full_tensor(b.detach()).float().cpu()

    def view(self) -> DenseView:
        """What the method's page sees, outside of any forward."""
        view = _View(self, torch.empty(self.d_out, self.d_in, device="meta"))
        view.still = True
        return view

    @torch.no_grad()
    def factors(self) -> Pair | None:
        """A (k, d_in) and B (d_out, k) of the change of the weight, s in B; None where the method has none."""
        if self.target.variant.factors is None:
            return None
        A, B = self.target.variant.factors(self.view())
        return A.detach().float(), B.detach().float()

    @torch.no_grad()
    def change(self) -> tuple[Tensor, Tensor | None]:
        """What the method does to W and to b, read off its page; None for a bias that stays.

        Raises:
            StateError: it is no change of the weight.
        """
        method = self.target.variant
        if not method.affine or kind_named(method.site).stream:
            raise StateError(f"{self.path}: what {method.name!r} does is no change of a weight.")
        w, b = self.weight.double(), self.bias
        shift = w.new_zeros(self.d_out) if b is None else b.double()
        exact = {k: t.double() if t.is_floating_point() else t for k, t in self.tensors.items()}
        slot = Slot(self.record, self.target, {})
        f = Composed([(slot, 1.0, DenseView(nn.Linear(1, 1), slot, w, shift, exact))], w, shift)
        start = f(w.new_zeros(1, self.d_in))
        new = torch.cat([f(e) - start for e in torch.eye(self.d_in, dtype=w.dtype).split(512)]).mT
        moved = start[0] - shift
        scale = max(float(shift.abs().max()), 1e-6)
        return (new - w).float(), moved.float() if float(moved.abs().max()) > 1e-7 * scale else None


class _View(DenseView):
    """A dense view whose weight is read when a page asks for it."""

    def __init__(self, layer: Adapted, shape: Tensor) -> None:
        slot = Slot(layer.record, layer.target, {})
        super().__init__(layer.module, slot, shape, layer.bias, layer.tensors, torch.float32)
        self._layer = layer

    @property
    def weight(self) -> Tensor:
        return self._layer.weight

    def project(self, v: Tensor) -> Tensor:
        return product(v, self._layer.weight)


def dense_weight(module: nn.Module, path: str, kind: str) -> Tensor:
    """W (d_out, d_in) of a layer in fp32 on the CPU, gathered from shards."""
    own = module._parameters.get("weight")
    if own is not None and is_sharded(own):
        return kind_named(kind).as_matrix(module, full_tensor(own.detach())).float().cpu()
    return read_weight(module, path, torch.float32).detach().cpu()


def adapted_layers(model: nn.Module, record: Record) -> list[Adapted]:
    """All targets but fused experts and those tied to another; every rank of a sharded model must call it."""
    state = adapter_state_dict(model, record.name)
    found = []
    for target in record.targets.values():
        if target.tied or target.experts:
            continue
        own = {short: _plain(state[target.key(short)]) for short in target.specs}
        own |= {short: _plain(state[record.targets[owner].key(short)]) for short, owner in target.shared.items()}
        found.append(Adapted(model, record, target, own))
    return found


def _plain(t: Tensor) -> Tensor:
    return t.float() if t.is_floating_point() else t


def best_factors(W: Tensor, r: int) -> tuple[Pair, float]:
    """A (r, d_in) and B (d_out, r) nearest to W, and the relative norm of what is left out."""
    r, generator = min(r, *W.shape), torch.Generator().manual_seed(0)
    if min(W.shape) <= 1024:
        U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
        U, S, V = U[:, :r], S[:r], Vh[:r].mT
    else:
        U, S, V = randomised_svd(W.double(), r, 8, generator)
    root = S.sqrt()
    A, B = (root[:, None] * V.mT).float(), (U * root).float()
    norm = float(W.norm())
    return (A, B), float((W - B @ A).norm()) / norm if norm else 0.0


def uniform(layers: Sequence[Adapted], field: str) -> Any:
    """A field of the config that all layers must have alike.

    Raises:
        StateError: they do not.
    """
    values = {getattr(layer.cfg, field) for layer in layers}
    if len(values) > 1:
        raise StateError(f"layers differ in {field} ({', '.join(map(str, sorted(values, key=str)))})")
    return values.pop()
