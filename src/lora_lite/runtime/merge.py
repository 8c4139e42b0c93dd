"""merge / unmerge: write the active adapters into the base weights, derived from their own pages, and give the bits
back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import forget_compiled
from ..core.errors import LoraLiteError, StateError, WeightError
from .layers.bank import Bank
from .layers.kinds import CONVS, bias_of, dense_view, device_of, is_plain, is_quantised, is_sharded, stored_weight
from .layers.norm import norm_of
from .layers.read import probe_dtype, read_weight
from .layers.virtual import Lookup, Normed
from .model.record import Record
from .model.site import Site, owned_tensors
from .model.state import SITE, ModelState, outside_scope, record_of, state_of, unwrap
from .progress import track
from .select import active as active_scope
from .view.composed import composed
from .view.expert import ExpertView, slices
from .view.layer import DenseView

COLUMNS = 1024  # of the identity, pushed through the pages at a time


@dataclass
class Original:
    """What `unmerge` puts back on one layer."""

    path: str
    weight: Tensor | None = None
    """A CPU copy of the bits; None when the whole module was replaced."""
    bias: Tensor | None = None
    had_bias: bool = True
    module: nn.Module | None = None
    """The quantised layer that a dense one replaces."""


@dataclass
class Merged:
    """The model's merged state."""

    active: tuple[tuple[str, float], ...]
    originals: list[Original] = field(default_factory=list)


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
    """Path -> largest rounding of W' to its storage dtype, relative to the largest entry."""
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


def merge(model: nn.Module, name: str | None = None, dequantize: bool = False, check: Any = None) -> MergeReport:
    """Fold adapters into the weights: W' and b' are read off the pages themselves, run in fp64 on the identity and on
    zero.

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
    chosen = (
        ((record_of(model, name).name, 1.0),)
        if name is not None
        else (state.merged.active if state.merged is not None else state.active)
    )
    if state.merged is not None:
        if state.merged.active == chosen:
            return MergeReport([n for n, _ in chosen], 0, {}, {}, [])
        raise StateError(f"adapters {[n for n, _ in state.merged.active]} are merged; call ll.unmerge(model) first.")
    outside_scope(state, "ll.merge")
    if not chosen:
        raise StateError("no adapter is active; activate one, or name it: ll.merge(model, name=...).")
    sites = _mergeable(model, state, chosen, dequantize)
    before: list[Tensor] = []
    base: list[Tensor] = []
    if check is not None:
        with active_scope(model, dict(chosen)):
            before = _outputs(model, check)
        with active_scope(model, None):
            base = _outputs(model, check)
    merged = Merged(chosen)
    report = MergeReport([n for n, _ in chosen], len(sites), {}, {}, [])
    try:
        for path, layer, site in track(sites, "merge"):
            _merge_layer(model, path, layer, site, chosen, merged, report)
    except BaseException:
        _restore(model, merged)
        raise
    state.merged, state.active = merged, ()
    forget_compiled()
    if before:
        after = _outputs(model, check)
        report.logit_error, report.logit_scale, report.effect = (
            _distance(before, after),
            max(float(t.abs().max()) for t in before),
            _distance(before, base),
        )
    return report


def unmerge(model: nn.Module) -> None:
    """Put the original bits back and make the merged adapters active again. Does nothing on a model that is not
    merged."""
    model = unwrap(model)
    state = state_of(model)
    if state.merged is None:
        return
    outside_scope(state, "ll.unmerge")
    merged: Merged = state.merged
    _restore(model, merged)
    state.merged, state.active = None, merged.active
    forget_compiled()


def merged_weight(
    layer: nn.Module, path: str, site: Site, chosen: tuple[tuple[str, float], ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """(W, W', b') in fp64 (fp32 where the device has no fp64): F(v) = pages(base(pages_in(v))), b' = F(0), W'ᵀ = F(I) −
    F(0)."""
    dtype = torch.float32 if device_of(layer).type == "mps" else torch.float64
    w = read_weight(layer, path, dtype) if site.kind != "norm" else norm_of(layer).gain(layer, dtype)[:, None]
    b = bias_of(layer)
    b = None if b is None else b.detach().to(dtype)
    d_out, d_in = w.shape
    slots = [(site.slots[n], weight) for n, weight in chosen if n in site.slots]
    f = composed([(slot, weight, DenseView(layer, slot, w, b)) for slot, weight in slots], w, b)

    if site.kind == "norm":
        one, zero = (f(Normed(t)) for t in (torch.ones_like(w.mT), torch.zeros_like(w.mT)))
        return w, (one - zero).mT, zero[0]
    new = torch.empty_like(w)
    if site.kind == "embedding":  # one-hot rows of a large vocabulary are looked up, never built
        for start in range(0, d_in, COLUMNS):
            ids = torch.arange(start, min(COLUMNS + start, d_in), device=w.device)
            new[:, start : start + len(ids)] = f(Lookup(ids, d_in, dtype)).mT
        return w, new, w.new_zeros(d_out)
    zero = f(w.new_zeros(1, d_in))[0]
    for start in range(0, d_in, COLUMNS):
        n = min(COLUMNS, d_in - start)
        eye = w.new_zeros(n, d_in)
        eye[torch.arange(n), torch.arange(start, start + n)] = 1
        new[:, start : start + n] = (f(eye) - zero).mT
    return w, new, zero


@torch.no_grad()
def _merge_layer(
    model: nn.Module,
    path: str,
    layer: nn.Module,
    site: Site,
    chosen: tuple[tuple[str, float], ...],
    merged: Merged,
    report: MergeReport,
) -> None:
    if isinstance(layer, Bank):
        _merge_bank(path, layer, site, chosen, merged, report)
        return
    was_training = layer.training
    layer.eval()
    try:
        w, new, bias = merged_weight(layer, path, site, chosen)
    finally:
        layer.training = was_training
    if not (torch.isfinite(new).all() and torch.isfinite(bias).all()):
        raise StateError(
            f"{path}: the merged weight is not finite; look at the adapter's tensors with ll.adapter_state_dict."
        )
    old_bias = bias_of(layer)
    plain = site.kind == "norm" or is_plain(layer)
    dtype = stored_weight(layer).dtype if plain else probe_dtype(layer)
    report.change[path] = float((new - w).norm() / w.norm().clamp_min(1e-30))
    new = new - norm_of(layer).offset if site.kind == "norm" else new
    stored = new.to(dtype)
    report.rounding[path] = float((stored.to(new.dtype) - new).abs().max() / new.abs().max().clamp_min(1e-30))
    needs_bias = old_bias is not None or bool(bias.abs().max() > 0)
    if site.kind == "norm" and needs_bias and old_bias is None:
        raise WeightError(
            f"{path}: the adapter adds a bias, and this {type(layer).__name__} has none to hold it; keep the adapter "
            "attached."
        )
    if not plain:
        dense: Any = nn.utils.skip_init(
            nn.Linear, w.shape[1], w.shape[0], bias=needs_bias, device=w.device, dtype=dtype
        )  # draws nothing
        dense.requires_grad_(False)
        dense.weight.copy_(stored)
        if needs_bias:
            dense.bias.copy_(bias.to(dtype))
        dense.train(was_training)
        merged.originals.append(Original(path, module=layer))
        report.dequantised.append(path)
        _set_submodule(model, path, dense)
        return
    weight = stored_weight(layer)
    original = Original(
        path,
        weight.detach().to("cpu", copy=True),
        None if old_bias is None else old_bias.detach().to("cpu", copy=True),
        old_bias is not None,
    )
    merged.originals.append(original)
    if site.kind == "norm" or isinstance(layer, CONVS):
        weight.copy_(stored.view_as(weight))
    else:
        dense_view(layer).copy_(stored)
    if old_bias is not None:
        old_bias.copy_(bias.to(old_bias.dtype))
    elif needs_bias:
        layer.__dict__.pop("bias", None)  # a layer may say `self.bias = None` before it knows of parameters
        layer.register_parameter("bias", nn.Parameter(bias.to(dtype), requires_grad=False))


def _merge_bank(
    path: str, bank: Bank, site: Site, chosen: tuple[tuple[str, float], ...], merged: Merged, report: MergeReport
) -> None:
    """One expert after the other, so that one weight at a time stands in fp64."""
    stored, bias = bank.dense().data, bank.bias
    original = Original(path, bank.weight.detach().to("cpu", copy=True))
    original.bias = None if bias is None else bias.detach().to("cpu", copy=True)
    merged.originals.append(original)
    dtype = torch.float32 if stored.device.type == "mps" else torch.float64
    slots = [(site.slots[n], weight) for n, weight in chosen if n in site.slots]
    change = size = rounding = 0.0
    for e in range(bank.n_experts):
        w, b = stored[e].to(dtype), None if bias is None else bias.detach()[e].to(dtype)
        views = [(s, k, ExpertView(bank, s, w, b, {n: t[e] for n, t in slices(bank, s).items()})) for s, k in slots]
        f = composed(views, w, b)
        shift = f(w.new_zeros(1, bank.d_in))[0]
        new = (f(torch.eye(bank.d_in, dtype=dtype, device=w.device)) - shift).mT
        if not (torch.isfinite(new).all() and torch.isfinite(shift).all()):
            raise StateError(
                f"{path}: the merged weight of expert {e} is not finite; look at the adapter's tensors with "
                "ll.adapter_state_dict."
            )
        change, size = change + float((new - w).square().sum()), size + float(w.square().sum())
        stored[e].copy_(new.to(stored.dtype))
        rounding = max(rounding, float((stored[e].to(dtype) - new).abs().max() / new.abs().max().clamp_min(1e-30)))
        if bias is not None:
            bias.data[e].copy_(shift.to(bias.dtype))
    report.change[path], report.rounding[path] = (change / max(size, 1e-60)) ** 0.5, rounding


@torch.no_grad()
def _restore(model: nn.Module, merged: Merged) -> None:
    for original in reversed(merged.originals):
        if original.module is not None:
            _set_submodule(model, original.path, original.module)
            continue
        layer = model.get_submodule(original.path)
        assert original.weight is not None
        stored_weight(layer).copy_(original.weight)
        if original.bias is not None:
            bias = bias_of(layer)
            assert bias is not None
            bias.copy_(original.bias)
        elif not original.had_bias and bias_of(layer) is not None:
            layer.register_parameter("bias", None)


def _mergeable(
    model: nn.Module, state: ModelState, chosen: tuple[tuple[str, float], ...], dequantize: bool
) -> list[tuple[str, nn.Module, Site]]:
    for n, _ in chosen:
        record = state.records[n]
        if not record.variant.affine or record.variant.site == "block":
            why = " (it edits chosen positions of the residual stream)" if record.variant.site == "block" else ""
            raise StateError(
                f"adapter {n!r}: variant {record.variant.name!r} is not an affine function of its layer's input{why}, "
                "so no weight can stand for it. Keep it attached."
            )
    paths = [p for p in dict.fromkeys(p for n, _ in chosen for p in state.records[n].targets)]
    for n, _ in chosen:
        list(owned_tensors(model, state.records[n]))  # raises where a layer was replaced
    sharded = next((n for n, p in model.named_parameters() if is_sharded(p)), None)
    if sharded is not None:
        raise WeightError(
            f"the model is sharded ({sharded}). Save the adapter, load it into an unsharded model and merge there."
        )
    sites = [(p, model.get_submodule(p), model.get_submodule(p).__dict__[SITE]) for p in paths]
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        w = module._parameters.get("weight")
        if w is not None and not w.is_meta:
            owners.setdefault(_storage(w), []).append(path)
    for path, layer, site in sites:
        w = layer._parameters.get("weight")
        if isinstance(layer, Bank):
            continue  # no module but its owner knows the parameter
        plain = site.kind == "norm" or is_plain(layer)
        if not plain and is_quantised(layer) and not dequantize:
            raise WeightError(
                f"{path}: the weight of this {type(layer).__name__} is quantised. ll.merge(model, dequantize=True) "
                "replaces such layers by dense ones and reports the error."
            )
        if not plain and site.kind != "linear":
            raise WeightError(
                f"{path}: a {type(layer).__name__} with a forward of its own cannot be merged; keep the adapter "
                "attached."
            )
        tied = owners.get(_storage(w), []) if w is not None and not w.is_meta and w.numel() else []
        if len(tied) > 1 and not _moves_together([state.records[n] for n, _ in chosen], tied):
            others = [t for t in tied if t != path]
            raise WeightError(
                f"{path}: its weight is tied to {others[0]!r}, so merging would change both. Untie them first: set "
                "model.config.tie_word_embeddings = False and give the layer its own copy (layer.weight = "
                "nn.Parameter(layer.weight.clone())), or keep the adapter attached."
            )
    shared = {id(layer._parameters.get("weight")) for p, layer, _ in sites if not _tied_to(state, chosen, p)}
    return [
        (p, layer, site)
        for p, layer, site in sites
        if not _tied_to(state, chosen, p) or id(layer._parameters.get("weight")) not in shared  # written once
    ]


def _storage(w: Tensor) -> int:
    """What tied weights have in common. Tensor subclasses, as torchao's, all say that they lie at address 0."""
    return w.data_ptr() if type(w.data) is Tensor else id(w)


def _tied_to(state: ModelState, chosen: tuple[tuple[str, float], ...], path: str) -> str:
    """The target whose tensors act on this layer because both share one weight, or ''."""
    mine = [state.records[n].targets[path].tied for n, _ in chosen if path in state.records[n].targets]
    return mine[0] if mine and all(mine) else ""


def _moves_together(records: list[Record], paths: list[str]) -> bool:
    """Whether every adapter that changes one of these layers changes all of them by the same tensors."""
    for record in records:
        mine = [record.targets[p] for p in paths if p in record.targets]
        owners = [t.path for t in mine if not t.tied]
        if mine and (len(mine) != len(paths) or len(owners) != 1 or any(t.tied not in ("", owners[0]) for t in mine)):
            return False
    return True


def _set_submodule(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    if not child:
        raise LoraLiteError(
            "the model is itself a quantised layer, which cannot be replaced; put it into a container module."
        )
    setattr(model.get_submodule(parent), child, module)


@torch.no_grad()
def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """The floating tensors of the model's output in eval mode."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        out = (
            model(**batch)
            if isinstance(batch, dict) or hasattr(batch, "keys")
            else model(*batch)
            if isinstance(batch, (tuple, list))
            else model(batch)
        )
    finally:
        for m, mode in modes.items():
            m.training = mode
    values = [out] if isinstance(out, Tensor) else list(out.values()) if hasattr(out, "values") else list(out)
    return [v.detach().float() for v in values if isinstance(v, Tensor) and v.is_floating_point()]


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))
