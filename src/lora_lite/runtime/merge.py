"""merge / unmerge: write the active adapters into the base weights, derived from their own pages, and give the bits
back."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import forget_compiled
from ..core.arguments import checked
from ..core.errors import LoraLiteError, StateError, WeightError
from .call.acting import check_acts
from .call.batch import call_batch, evaluating, values_of
from .commit import change
from .layers.cell import rounding
from .layers.kinds import kind_named
from .layers.tensors import bias_of, device_of, exact_dtype, is_sharded, stored_weight
from .model.call import Chosen
from .model.kind import Cell, Part
from .model.merged import Merged, Original
from .model.record import Record
from .model.site import Site, Slot, base_parameters, owned_tensors
from .model.state import SITE, ModelState, outside_calls, record_of, state_of, unwrap
from .model.surroundings import own_surroundings
from .model.undo import Undo, restoring
from .progress import track
from .select import active as active_scope
from .view.expert import still_with_adapters
from .view.folded import folded, shift


@dataclass
class MergeReport:
    """What a merge did. Prints as a few lines."""

    adapters: list[str]
    """Names of the merged adapters."""
    n_layers: int
    """Number of layers whose weight was written."""
    change: dict[str, float]
    """Path -> ‖W' − W‖ / ‖W‖."""
    rounding: dict[str, float]
    """Path -> largest rounding of W' to its storage dtype in a sample of its rows, relative to the largest entry."""
    dequantised: list[str]
    """Paths of quantised layers that are dense now."""
    logit_error: float | None = None
    """Largest difference between the outputs before and after, on the `check` batch."""
    logit_scale: float | None = None
    """Largest absolute output before merging."""
    effect: float | None = None
    """Largest difference that the adapters make on the `check` batch."""

    def __str__(self) -> str:
        mean = sum(self.change.values()) / max(1, len(self.change))
        lines = [
            f"merged {', '.join(self.adapters)} into {self.n_layers} layers: mean relative change {mean:.2e}, largest "
            f"rounding {max(self.rounding.values(), default=0):.1e}"
        ]
        if self.dequantised:
            lines.append(f"  {len(self.dequantised)} quantised layers are dense now, such as {self.dequantised[0]}")
        if self.logit_error is not None:
            lines.append(
                f"  on the check batch: outputs differ by at most {self.logit_error:.2e} (outputs up to "
                f"{self.logit_scale:.2e}, adapter effect {self.effect:.2e})"
            )
        return "\n".join(lines)

    __repr__ = __str__


@checked
@own_surroundings()
def merge(model: nn.Module, name: str | None = None, dequantize: bool = False, check: Any = None) -> MergeReport:
    """Fold adapters into the weights: W' and b' are read off the pages themselves, in fp64, a block at a time.

    Args:
        name: one adapter; None means the active set, with its weights and in its order.
        dequantize: replace quantised target layers by dense ones. Without it they raise.
        check: a batch (dict, tuple or tensor); the outputs before and after are compared and reported.

    Returns:
        A report. Merging what is merged already does nothing and reports no layer.

    Raises:
        StateError: nothing to merge, another set is merged, or a method is not affine in x.
        WeightError: a quantised, tied, offloaded or sharded weight. The model is as before.
    """
    model = unwrap(model)
    state = state_of(model)
    chosen = _chosen(model, state, name)
    if state.merged is not None:
        if state.merged.active == chosen:
            return MergeReport([n for n, _ in chosen], 0, {}, {}, [])
        raise StateError(f"adapters {[n for n, _ in state.merged.active]} are merged; call ll.unmerge(model) first.")
    outside_calls(model, "ll.merge")
    if not chosen:
        raise StateError("no adapter is active; activate one, or name it: ll.merge(model, name=...).")
    targets = mergeable(model, state, chosen, dequantize)
    for adapter, _ in chosen:
        check_acts(state, state.records[adapter], "ll.merge would change the output otherwise than it does")
    merged, modes = Merged(chosen), {m: m.training for m in model.modules()}

    def restore() -> None:
        _restore(model, merged)
        for m, mode in modes.items():
            m.training = mode

    def steps(undo: Undo) -> MergeReport:
        undo(restoring(state))
        undo(restore)
        return _merge(model, state, targets, merged, check)

    return change(model, "ll.merge", steps)


def _merge(model: nn.Module, state: ModelState, targets: Mergeable, merged: Merged, check: Any) -> MergeReport:
    """The steps of `merge`."""
    chosen = merged.active
    before = None if check is None else (_outputs(model, check, dict(chosen)), _outputs(model, check, None))
    report = MergeReport([n for n, _ in chosen], len(targets), {}, {}, [])
    for path, layer, site in track(targets, "merge"):
        _merge_layer(model, path, layer, site, merged, report)
    state.merged = merged
    state.select(())
    forget_compiled()
    if before is not None:
        adapted, bare = before
        after = _outputs(model, check)
        report.logit_error, report.effect = _distance(adapted, after), _distance(adapted, bare)
        report.logit_scale = max(float(t.abs().max()) for t in adapted)
    return report


@checked
@own_surroundings()
def unmerge(model: nn.Module) -> None:
    """Put the original bits back and make the merged adapters active again. Does nothing on a model that is not
    merged."""
    model = unwrap(model)
    state = state_of(model)
    if state.merged is None:
        return
    outside_calls(model, "ll.unmerge")
    merged = state.merged

    def finish() -> None:
        _restore(model, merged)
        state.merged = None
        state.select(merged.active)
        forget_compiled()

    def steps(undo: Undo) -> None:
        undo(finish)  # the merged bits are kept nowhere, so there is no way but forward
        finish()

    change(model, "ll.unmerge", steps)


def _chosen(model: nn.Module, state: ModelState, name: str | None) -> Chosen:
    """The named adapter, or the merged ones, or the active ones."""
    if name is not None:
        return ((record_of(model, name).name, 1.0),)
    return state.active if state.merged is None else state.merged.active


@torch.no_grad()
def _merge_layer(
    model: nn.Module, path: str, layer: nn.Module, site: Site, merged: Merged, report: MergeReport
) -> None:
    """Every matrix of one layer: copied, and written block by block from the copy."""
    slots = [(site.slots[n], weight) for n, weight in merged.active if n in site.slots]
    if not site.kind.writable(layer):
        _replace_layer(model, path, layer, site, slots, merged, report)
        return
    bias, kept = bias_of(layer), site.kind.stored(layer).detach().clone()
    original = Original(path, kept, had_bias=bias is not None)
    original.bias = None if bias is None else bias.detach().to("cpu", copy=True)
    merged.originals.append(original)
    measured = Measured()
    for cell in site.kind.cells(layer, path):
        b = fold_cell(layer, site, cell, slots, cell.matrix(kept), cell.write, measured)
        cell.write_bias(b)
    original.weight = kept.cpu()
    report.change[path], report.rounding[path] = measured.change, measured.rounding


SAMPLED = 8
"""The rounding is looked at in one row of so many: it costs as much as the merge."""


@dataclass
class Measured:
    """Sums over the blocks of one layer."""

    moved: float = 0.0
    """‖W' − W‖²."""
    size: float = 0.0
    """‖W‖²."""
    largest: float = 0.0
    """Largest |W'|."""
    off: float = 0.0
    """Largest |stored W' − W'| of every `SAMPLED`-th row of a block."""

    def add(self, w: Tensor, new: Tensor, change: Tensor, stored: Tensor) -> bool:
        """Count one block of W, of W', of W' − W and of what is stored now; False where that is not finite."""
        low, high = (float(t) for t in torch.aminmax(stored))
        self.size += _square(w.to(torch.promote_types(torch.float32, w.dtype)))
        self.moved += _square(change)
        some = slice(None, None, SAMPLED)
        below, above = (float(t) for t in torch.aminmax(stored[some] - new[some]))
        self.off, self.largest = max(self.off, -below, above), max(self.largest, -low, high)
        return math.isfinite(low) and math.isfinite(high)

    @property
    def change(self) -> float:
        return (self.moved / max(self.size, 1e-60)) ** 0.5

    @property
    def rounding(self) -> float:
        return self.off / max(self.largest, 1e-30)


def _square(t: Tensor) -> float:
    numbers = t.flatten()
    return float(numbers.dot(numbers))


def fold_cell(
    layer: nn.Module,
    site: Site,
    cell: Cell,
    slots: list[tuple[Slot, float]],
    w: Tensor,
    write: Callable[[Part, Tensor], Tensor],
    measured: Measured,
) -> Tensor:
    """b' of one matrix W in fp64 or the device's best; W' goes block by block into the hands of `write`."""
    was_training = layer.training
    layer.training = False
    try:
        dtype = exact_dtype(w.device)
        f = still_with_adapters(layer, cell, slots, w, dtype)
        b = shift(f, cell, w, dtype)
        finite = bool(torch.isfinite(b).all())
        for part, new, change in folded(f, cell, w, dtype):
            finite = finite and measured.add(w[part], new, change, write(part, new))
    finally:
        layer.training = was_training
    if not finite:
        which = "" if cell.index is None else f" of expert {cell.index}"
        raise StateError(
            f"{site.path}: the merged weight{which} is not finite; look at the adapter's tensors with "
            "ll.adapter_state_dict."
        )
    return b


def _replace_layer(
    model: nn.Module,
    path: str,
    layer: nn.Module,
    site: Site,
    slots: list[tuple[Slot, float]],
    merged: Merged,
    report: MergeReport,
) -> None:
    """A dense layer in the place of one whose weight is packed."""
    (cell,) = site.kind.cells(layer, path)
    w, _ = cell.read(exact_dtype(device_of(layer)))
    new, measured = torch.empty_like(w), Measured()

    def write(part: Part, block: Tensor) -> Tensor:
        new[part] = block
        return block

    b = fold_cell(layer, site, cell, slots, w, write, measured)
    dense = site.kind.replacement(layer, new, b)
    merged.originals.append(Original(path, module=layer))
    report.change[path], report.rounding[path] = measured.change, rounding(stored_weight(dense), new)
    report.dequantised.append(path)
    _set_submodule(model, path, dense)


@torch.no_grad()
def _restore(model: nn.Module, merged: Merged) -> None:
    for original in reversed(merged.originals):
        if original.module is not None:
            _set_submodule(model, original.path, original.module)
            continue
        layer = model.get_submodule(original.path)
        site: Site = layer.__dict__[SITE]
        assert original.weight is not None
        site.kind.stored(layer).data.copy_(original.weight)
        bias = bias_of(layer)
        if original.bias is not None and bias is not None:
            bias.data.copy_(original.bias)
        elif not original.had_bias and bias is not None:
            layer.register_parameter("bias", None)


Mergeable = list[tuple[str, nn.Module, Site]]


def mergeable(model: nn.Module, state: ModelState, chosen: Chosen, dequantize: bool) -> Mergeable:
    """(path, layer, site) of every layer to write, or the reason why not all of them can be written."""
    records = [state.records[n] for n, _ in chosen]
    for record in records:
        _check_affine(record)
        list(owned_tensors(model, record))  # raises where a layer was replaced
    sharded = next((n for n, p in base_parameters(model) if is_sharded(p)), None)
    if sharded is not None:
        raise WeightError(
            f"the model is sharded ({sharded}). Save the adapter, load it into an unsharded model and merge there."
        )
    paths = dict.fromkeys(p for record in records for p in record.targets)
    layers = [(p, model.get_submodule(p)) for p in paths]
    targets = [(p, layer, layer.__dict__[SITE]) for p, layer in layers]
    users = _users_of_weights(model)
    for path, layer, site in targets:
        _check_writable(path, layer, site, dequantize)
        _check_tied(path, layer, records, users)
    return _written_once(targets, records)


def _check_affine(record: Record) -> None:
    kind = kind_named(record.variant.site)
    some = getattr(record.cfg, "positions", "all") != "all"
    if kind.apart or some or not record.variant.affine:
        where = " (it edits chosen positions of the residual stream)" if kind.stream else ""
        where = where or (" (it acts at chosen positions)" if some else "")
        raise StateError(
            f"adapter {record.name!r}: variant {record.variant.name!r} is not an affine function of its layer's "
            f"input{where}, so no weight can stand for it. Keep it attached."
        )


def _check_writable(path: str, layer: nn.Module, site: Site, dequantize: bool) -> None:
    if site.kind.writable(layer):
        return
    if site.kind.is_quantised(layer) and not dequantize:
        raise WeightError(
            f"{path}: the weight of this {type(layer).__name__} is quantised. ll.merge(model, dequantize=True) "
            "replaces such layers by dense ones and reports the error."
        )
    if why := site.kind.why_not_replaced(layer):
        raise WeightError(f"{path}: this {type(layer).__name__} {why}; keep the adapter attached.")


def _users_of_weights(model: nn.Module) -> dict[int, list[str]]:
    """What tied weights have in common -> paths of the modules that hold it."""
    users: dict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        w = module._parameters.get("weight")
        if w is not None and not w.is_meta and w.numel():
            users[_storage(w)].append(path)
    return users


def _storage(w: Tensor) -> int:
    """Tensor subclasses, as torchao's, all say that they lie at address 0."""
    return w.data_ptr() if type(w.data) is Tensor else id(w)


def _check_tied(path: str, layer: nn.Module, records: list[Record], users: dict[int, list[str]]) -> None:
    """Raise where writing this weight would change a layer that the adapters do not change by the same tensors."""
    w = layer._parameters.get("weight")
    tied = [] if w is None else users.get(_storage(w), [])
    if len(tied) < 2 or _moves_together(records, tied):
        return
    other = next(t for t in tied if t != path)
    raise WeightError(
        f"{path}: its weight is tied to {other!r}, so merging would change both. Untie them first: set "
        "model.config.tie_word_embeddings = False and give the layer its own copy (layer.weight = "
        "nn.Parameter(layer.weight.clone())), or keep the adapter attached."
    )


def _moves_together(records: list[Record], paths: list[str]) -> bool:
    """Whether every adapter that changes one of these layers changes all of them by the same tensors."""
    for record in records:
        mine = [record.targets[p] for p in paths if p in record.targets]
        owners = [t.path for t in mine if not t.tied]
        if mine and (len(mine) != len(paths) or len(owners) != 1 or any(t.tied not in ("", owners[0]) for t in mine)):
            return False
    return True


def _written_once(targets: Mergeable, records: list[Record]) -> Mergeable:
    """Without the layers whose weight is that of another one in the list."""

    def is_tied(path: str) -> bool:
        mine = [record.targets[path].tied for record in records if path in record.targets]
        return bool(mine) and all(mine)

    owners = {id(layer._parameters.get("weight")) for path, layer, _ in targets if not is_tied(path)}
    return [t for t in targets if not is_tied(t[0]) or id(t[1]._parameters.get("weight")) not in owners]


def _set_submodule(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    if not child:
        raise LoraLiteError(
            "the model is itself a quantised layer, which cannot be replaced; put it into a container module."
        )
    setattr(model.get_submodule(parent), child, module)


@torch.no_grad()
def _outputs(model: nn.Module, batch: Any, *selection: dict[str, float] | None) -> list[Tensor]:
    """The floating tensors of the model's output in eval mode, under a selection or as it stands."""
    with evaluating(model):
        if selection:
            with active_scope(model, selection[0]):
                out = call_batch(model, batch)
        else:
            out = call_batch(model, batch)
    return [v.detach().float() for v in values_of(out) if isinstance(v, Tensor) and v.is_floating_point()]


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))
