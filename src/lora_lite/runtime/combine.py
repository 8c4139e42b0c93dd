"""`ll.combine`: sums of adapters in weight space, never of their factors one by one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..core.arguments import checked
from ..core.errors import ConfigError, StateError
from ..core.registry import holder
from .commit import check_attachable, commit
from .handle import Adapter
from .model.record import Record
from .model.state import not_merged, record_of, state_of, unwrap
from .model.surroundings import own_surroundings
from .progress import track
from .start.staging import stage
from .targets.choose import make_target
from .view.expert import layer_views
from .view.layer import generator_for

Method = Literal["sum", "ties", "dare", "dare_ties"]
METHODS = get_args(Method)
Pair = tuple[Tensor, Tensor]


@checked
def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    name: str,
    method: Method = "sum",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> Adapter:
    """A new adapter ΔW = Σ w_i ΔW_i, active afterwards; the old ones stay.

    Args:
        weights: adapter -> w_i, any sign.
        name: of the new adapter.
        method: "sum" is exact: the factors are laid side by side, [w_1 B_1, w_2 B_2] [A_1; A_2]. "ties" (Yadav et al.
            2023, arXiv 2306.01708) keeps the `density` largest entries of each w_i ΔW_i, elects a sign per entry by
            total mass and averages those that agree. "dare" (Yu et al. 2023, arXiv 2311.03099) drops entries with
            probability 1 − density, rescales by 1/density and sums; "dare_ties" elects signs after dropping. All of
            these work on the dense d_out x d_in update, one layer at a time.
        rank: cut the result to this rank by an SVD. None keeps the exact rank of "sum"; the others need it.
        density, seed: of ties and dare; dropping is drawn per layer from (seed, path).

    Raises:
        StateError: an update is no pair of low-rank factors (gates, rotations, norms: a sum of those is not what it
            seems).
        ConfigError: a method without its rank, or a density outside (0, 1].
    """
    check_attachable(model, name)
    model = unwrap(model)
    _check_options(weights, method, rank, density)
    not_merged(state_of(model), "ll.combine")
    records = [record_of(model, n) for n in weights]
    for record in records:
        _check_summable(record, weights)
    with own_surroundings():
        pairs: dict[str, list[Pair]] = {}
        shapes: dict[str, tuple[int, int]] = {}
        for record in records:
            for view in layer_views(model, record):
                A, B = (t.detach().double() for t in record.variant.factors(view))  # type: ignore[misc]
                if not bool(A.isfinite().all() and B.isfinite().all()):
                    raise StateError(
                        f"adapter {record.name!r} has values that are not finite at {view.path}; training diverged, so "
                        "there is nothing to combine."
                    )
                pairs.setdefault(view.path, []).append((A, weights[record.name] * B))
                shapes[view.path] = (view.in_features, view.out_features)
        factors = {
            path: _combined(pairs[path], path, method, rank, density, seed) for path in track(list(pairs), "combine")
        }
        kinds = {path: target.kind for r in records for path, target in r.targets.items()}
        record = _held(name, factors, shapes, kinds, records[0].cfg.dtype)
        staged = stage(model, record, fill=False)
        for view in staged:
            record.variant.from_factors(view, *factors[view.path])  # type: ignore[misc]
    return commit(model, record, staged, trainable=False)


@checked
def factors(model: nn.Module, name: str | None = None) -> dict[str, Pair]:
    """Path -> (A (k, d_in), B (d_out, k)) of an adapter whose update is B A, its scale in B: what a method is made of
    that routes between other adapters.

    Raises:
        StateError: unknown name, or an update that is no such product of single matrices.
    """
    record = record_of(model, name)
    _check_summable(record, {record.name: 1.0})
    with torch.no_grad():
        pairs = [(view.path, record.variant.factors(view)) for view in layer_views(model, record)]  # type: ignore[misc]
    return {path: (A.clone(), B.clone()) for path, (A, B) in pairs}


def _check_options(weights: Mapping[str, float], method: str, rank: int | None, density: float) -> None:
    if not isinstance(weights, Mapping):
        raise ConfigError(f"ll.combine takes {{'a': 0.5, 'b': 0.5}}, adapters with weights; got {weights!r}.")
    if not weights:
        raise ConfigError("ll.combine needs at least one adapter: {'a': 0.5, 'b': 0.5}.")
    if method not in METHODS:
        raise ConfigError(f"method must be sum, ties, dare or dare_ties, got {method!r}.")
    if method != "sum" and rank is None:
        raise ConfigError(f"method {method!r} makes an update of full rank; say to which rank it is cut: rank=16.")
    if not 0 < density <= 1:
        raise ConfigError(f"density must lie in (0, 1], got {density}.")
    try:
        fine = all(math.isfinite(w) for w in weights.values())
    except (TypeError, OverflowError):
        fine = False
    if not fine:
        raise ConfigError(f"weights must be finite numbers, got {dict(weights)}.")


def _check_summable(record: Record, weights: Mapping[str, float]) -> None:
    """Raise where an adapter is no sum of low-rank updates of single matrices."""
    variant, who, together = record.variant, f"adapter {record.name!r}", f"ll.activate(model, {dict(weights)})"
    if variant.own_weight:
        raise StateError(
            f"{who}: variant {variant.name!r} is not linear in its weight, so a weighted sum of its updates would be "
            "another model. Activate it with its weight instead."
        )
    if record.beside:
        raise StateError(
            f"{who} trains {record.beside[0].path!r} whole, which a sum of factors cannot hold. Activate both adapters "
            f"instead: {together}."
        )
    if any(t.experts for t in record.targets.values()):
        raise StateError(
            f"{who} stands on fused experts, which ll.combine does not sum. Activate the adapters together instead: "
            f"{together}."
        )
    if variant.factors is None:
        raise StateError(
            f"{who}: an update of variant {variant.name!r} is no pair of low-rank factors, so a weighted sum of it "
            f"would be another model. Activate both instead: {together}."
        )


def _held(
    name: str, factors: dict[str, Pair], shapes: dict[str, tuple[int, int]], kinds: dict[str, str], dtype: str
) -> Record:
    """The adapter that will hold the combined factors, every target with the rank of its own."""
    keeper = holder("factors")
    top = max(A.shape[0] for A, _ in factors.values())
    cfg = keeper.config(variant=keeper.name, r=top, alpha=float(top), dtype=dtype)
    targets = {}
    for path, (A, _) in factors.items():
        r = A.shape[0]
        targets[path] = make_target(path, *shapes[path], dataclasses.replace(cfg, r=r, alpha=float(r)), kinds[path])
    return Record(name, keeper, cfg, targets)


def _combined(pairs: list[Pair], path: str, method: str, rank: int | None, density: float, seed: int) -> Pair:
    if method == "sum":
        A, B = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1)
        return (A, B) if rank is None or rank >= A.shape[0] else _cut_pair(A, B, rank)
    deltas = [b @ a for a, b in pairs]
    if method.startswith("dare"):
        deltas = [_drop(d, density, generator_for(seed, path, str(i))) for i, d in enumerate(deltas)]
    else:
        deltas = [_top(d, density) for d in deltas]
    total = torch.stack(deltas).sum(0) if method == "dare" else _elect(deltas)
    return _cut(total, min(rank or 1, *total.shape))


def _cut_pair(A: Tensor, B: Tensor, rank: int) -> Pair:
    """The best rank-`rank` factors of BA, without building BA: QR of both, SVD of the small core."""
    (qb, rb), (qa, ra) = torch.linalg.qr(B), torch.linalg.qr(A.mT)
    u, s, vh = torch.linalg.svd(rb @ ra.mT)
    root = s[:rank].sqrt()
    return (qa @ (vh[:rank].mT * root)).mT, qb @ (u[:, :rank] * root)


def _cut(delta: Tensor, rank: int) -> Pair:
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def _top(delta: Tensor, density: float) -> Tensor:
    keep = max(1, round(density * delta.numel()))
    threshold = delta.abs().flatten().kthvalue(delta.numel() - keep + 1).values
    return torch.where(delta.abs() >= threshold, delta, 0)


def _drop(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    kept = torch.rand(delta.shape, generator=generator, dtype=torch.float32).to(delta.device) < density
    return torch.where(kept, delta / density, 0)


def _elect(deltas: list[Tensor]) -> Tensor:
    """Per entry: the sign with the larger total mass, and the mean of the nonzero entries that have it."""
    stack = torch.stack(deltas)
    sign = stack.sum(0).sign()
    agrees = (stack.sign() == sign) & (stack != 0)
    return torch.where(agrees, stack, 0).sum(0) / agrees.sum(0).clamp_min(1)
