"""Virtual tokens before the text: once per call they run through the model by themselves, and what they leave in each
layer, keys and values, is what the text attends to.

In a causal model nothing else of them reaches the text, so this is the model on both sequences together. Logits,
labels, masks and the key-value cache are those of the text alone; its positions begin after virtual tokens and
prefixes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import SelectionError
from ..model.call import Call, Chosen, Led, Rows, is_zero
from ..model.record import Record
from ..model.site import Site, Slot
from ..model.state import SITE, ModelState
from ..model.undo import surely
from ..view.cache import cache_of
from ..view.kept import versions
from ..view.layer import LayerView
from .batch import TOKENS, batch_first

Called = tuple[tuple[Any, ...], dict[str, Any]]


def lead(state: ModelState, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Called | None:
    """Run the virtual tokens of the acting adapters and move the text's positions behind them and behind prefixes; None
    where no adapter that acts has any.

    Raises:
        SelectionError: the model takes no positions or embeddings.
    """
    now = state.here.now
    active, rows, call, extent = now.selection or (*state.choice(), None, None)
    acting = {name: state.records[name].variant for name in _acting(active, rows)}
    tokens = [name for name, variant in acting.items() if variant.tokens is not None]
    lengths = {name: state.records[name].cfg.r for name, variant in acting.items() if variant.prefix is not None}
    if not tokens and not lengths:
        return None
    parameters = list(inspect.signature(model.forward).parameters)
    named: dict[str, Any] = {**dict(zip(parameters, args, strict=False)), **kwargs}
    first = batch_first(model, (), named)
    if first is None:
        raise SelectionError(f"adapter {[*acting][0]!r} stands before the text, and the call brings none.")
    call = call or Call((first.shape[0], first.shape[1] if first.dim() > 1 else 1), {})
    call.led = {}
    now.selection = active, rows, call, extent
    if tokens:
        _check(model, parameters, tokens)
        call.led = led = _led(state, model, tokens, active, rows)
        lengths |= {name: next(iter(found.values()))[0].shape[2] for name, found in led.items()}
    if "position_ids" not in parameters:
        return None
    return (), {**named, "position_ids": _positions(rows, named, first, lengths)}


def _acting(active: Chosen, rows: Rows | None) -> list[str]:
    names = [name for name, weight in active if not is_zero(weight)] if rows is None else rows.names
    return [name for name in dict.fromkeys(names) if name is not None]


def _check(model: nn.Module, parameters: list[str], names: list[str]) -> None:
    """Raise where virtual tokens cannot be put before the text."""
    if "position_ids" not in parameters or "inputs_embeds" not in inspect.signature(_decoder(model).forward).parameters:
        raise SelectionError(
            f"adapter {names[0]!r} has virtual tokens, and {type(model).__name__} takes no position_ids and "
            "inputs_embeds, so they cannot be put before the text."
        )


def _led(state: ModelState, model: nn.Module, names: list[str], active: Chosen, rows: Rows | None) -> dict[str, Led]:
    """Adapter -> what its virtual tokens leave; all together where they act together, alone where a batch mixes
    them."""
    if rows is None:
        return _run(state, model, names, active)
    found: dict[str, Led] = {}
    for name in names:
        found |= _run(state, model, [name], ((name, 1.0),))
    return found


def _decoder(model: nn.Module) -> nn.Module:
    get: Any = getattr(model, "get_decoder", None)
    found = get() if callable(get) else None
    return found if isinstance(found, nn.Module) else model


def _run(state: ModelState, model: nn.Module, names: list[str], active: Chosen) -> dict[str, Led]:
    """Adapter -> what its virtual tokens leave on each attention module, under this selection."""
    records = [state.records[name] for name in names]
    views = [_view(state, model, record) for record in records]
    memo = state.here.now.memo
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or memo is None or len(active) > 1:
        return _left(state, model, records, views, active)
    key = ("virtual tokens", *names)
    stamp = (*versions(views[0]._module, views[0]._slot), id(state.said_here().context))
    if key not in memo or memo[key][0] != stamp:
        memo[key] = stamp, _left(state, model, records, views, active)
    return memo[key][1]  # type: ignore[return-value]


def _view(state: ModelState, model: nn.Module, record: Record) -> LayerView:
    """An adapter's page sees the first of its layers."""
    layer = model.get_submodule(_own(record)[0])
    site: Site = layer.__dict__[SITE]
    slot: Slot = site.slots[record.name]
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    return LayerView(layer, slot, embeddings.weight.dtype, state.here.now.call)


def _left(
    state: ModelState, model: nn.Module, records: list[Record], views: list[LayerView], active: Chosen
) -> dict[str, Led]:
    from transformers import DynamicCache

    each = [_rows_first(view._slot.tokens(view)) for view in views]  # type: ignore[misc]
    B = max(len(t) for t in each)
    embedded = torch.cat([t.expand(B, -1, -1) for t in each], 1)
    cache, decoder = DynamicCache(), _decoder(model)
    run = decoder.forward if decoder is model else decoder  # the root's own hooks are for the text
    with _alone(state, decoder, active):
        run(inputs_embeds=embedded, past_key_values=cache, use_cache=True)
    found: dict[str, Led] = {}
    start = 0
    for record, tokens in zip(records, each, strict=True):
        part = slice(start, start + tokens.shape[1])
        layers = {path: cache.layers[model.get_submodule(path).layer_idx] for path in _own(record)}  # type: ignore[index]
        found[record.name] = {path: (one.keys[:, :, part], one.values[:, :, part]) for path, one in layers.items()}
        start = part.stop
    return found


def _own(record: Record) -> list[str]:
    """The attention modules on which an adapter stands."""
    return [path for path, target in record.targets.items() if target.variant is record.variant]


def _rows_first(tokens: Tensor) -> Tensor:
    return tokens if tokens.dim() == 3 else tokens[None]


@contextmanager
def _alone(state: ModelState, decoder: nn.Module, active: Chosen) -> Iterator[None]:
    """Under this selection, without rows, and without gradient checkpointing, which would keep no cache."""
    now = state.here.now
    saved = now.selection
    checked = [m for m in decoder.modules() if getattr(m, "gradient_checkpointing", False)]

    def restore() -> None:
        now.selection = saved
        for module in checked:
            module.gradient_checkpointing = True  # type: ignore[assignment]

    with surely(restore):
        now.selection = active, None, now.call, None
        for module in checked:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        yield


def _positions(rows: Rows | None, named: dict[str, Any], first: Tensor, lengths: dict[str, int]) -> Tensor:
    """The text's positions, moved behind the virtual tokens of each row."""
    at = named.get("position_ids")
    if at is None:
        tokens = next((named[name] for name in TOKENS if isinstance(named.get(name), Tensor)), first)
        cache = cache_of(named)
        past = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
        T = tokens.shape[-1]
        if tokens.is_floating_point():  # vectors
            T = tokens.shape[-2] if tokens.dim() > 2 else 1
        at = (torch.arange(T, device=tokens.device) + past)[None]
    if rows is None:
        return at + sum(lengths.values())
    names = rows.names
    if len(first) % len(names):
        raise SelectionError(f"ll.rows names {len(names)} rows, and the batch has {len(first)}.")
    each = torch.tensor([lengths.get(name or "", 0) for name in names], device=at.device)
    return at + each.repeat_interleave(len(first) // len(names))[:, None]
