"""Token positions for methods that edit the residual stream: where the prompt lies in a call, whatever is padded or
cached.

The root's pre-hook works this out once per call, and only while an adapter that asks for positions acts; the hooks of
the blocks look it up.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import SelectionError
from ...core.positions import Since, parse_positions
from ..model.call import Call, Chosen, Columns, Prompt, Rows
from ..model.state import ModelState
from ..view.cache import cache_of, opaque
from .batch import TOKENS
from .invoked import since

IGNORED = -100
STATES = ("cache_params", "state")
"""Under these names recurrent models take what they remember."""
CURE = (
    "Name the prompts: with ll.prompt(model, lengths): ... (one length per row, padding not counted; None: every "
    "token belongs to the prompt)."
)


def locate(
    state: ModelState,
    active: Chosen,
    rows: Rows | None,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Call | None:
    """Where the acting adapters' positions lie in this call; None when none of them asks.

    Raises:
        SelectionError: the prompt cannot be told from the call, and a guess would be a silent mistake.
    """
    texts = {}
    for name in [n for n, _ in active] if rows is None else rows.names:
        text = "all" if name is None else getattr(state.records[name].cfg, "positions", "all")
        if text != "all":
            texts[text] = name
    if not texts:
        return None
    who = ", ".join(f"adapter {name!r} (positions={text!r})" for text, name in texts.items())
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise SelectionError(
            f"{who}: an encoder-decoder model has two sequences and no prompt in either; use positions='all'."
        )
    batch = _Batch(model, args, kwargs, who)
    invoked: dict[str, Columns] = {text: _since(state, text, batch) for text in texts if text.startswith("from:")}
    about_prompts = [text for text in texts if text not in invoked]
    return Call((batch.B, batch.T), invoked | _prompts(state, model, batch, about_prompts))


def _prompts(state: ModelState, model: nn.Module, batch: _Batch, texts: list[str]) -> dict[str, Columns]:
    """What `Call.found` holds for the wordings that speak of the prompt."""
    if not texts:
        return {}
    if _is_over(state.said_here().prompt, batch.past, batch.T):
        return {text: (None, None, 0) if text == "generated" else () for text in texts}
    n = _lengths(state, model, batch)
    return {text: _columns(text, n, batch) for text in texts}


def _since(state: ModelState, text: str, batch: _Batch) -> Columns:
    """What it holds for one that speaks of tokens."""
    spec = parse_positions(text)
    assert isinstance(spec, Since)
    last = state.begun.get((text, id(batch.cache)))
    keep, begun = since(batch.tokens, spec.tokens, batch.past, batch.cache, last, batch.who)
    if begun is not None:
        state.here.now.begun[text] = begun
    if batch.mask is not None:
        keep = keep & batch.mask.index_select(1, torch.arange(batch.T, device=batch.device) + batch.past)
    return None, keep, 0


class _Batch:
    """One call of the model: its tokens, what is cached before them, and which of them are padding."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], who: str) -> None:
        self.named, self.who = _named(model, args, kwargs), who
        tokens = _tokens(self.named)
        if tokens is None:
            raise SelectionError(
                f"{who}: the call brings no tensor of shape (batch, tokens, ...). Use positions='all'."
            )
        self.tokens, (self.B, self.T), self.device = tokens, tokens.shape[:2], tokens.device
        self.cache = cache_of(self.named)
        self.past = _past(self.named, self.cache, who)
        self.mask = _mask(self.named.get("attention_mask"), self.B, self.T, self.past, who)
        if self.mask is not None:
            self.mask = self.mask.to(self.device)
            _check_cache_found(self.mask, self.T, self.cache, self.past, who)
        self.count = None if self.mask is None else self.mask.long().cumsum(1)
        """(B, columns so far): how many tokens that are no padding lie up to each column."""
        self.eager = not torch.compiler.is_compiling()

    @property
    def is_first(self) -> bool:
        """Nothing is cached before it."""
        return isinstance(self.past, int) and self.past == 0

    @property
    def total(self) -> Tensor:
        """(B,) number of tokens so far, padding not counted."""
        if self.count is not None:
            return self.count[:, -1]
        return torch.full((self.B,), self.T, device=self.device) + self.past


def _columns(text: str, n: Tensor, batch: _Batch) -> Columns:
    """What `Call.found` holds for one wording, n (B,) being the lengths of the prompts."""
    spec = parse_positions(text)
    if not isinstance(spec, (str, Since)):
        return _prompt_tokens(*spec, n, batch.count, batch.T, batch.past)
    column = torch.arange(batch.T, device=batch.device) + batch.past
    if batch.count is None or batch.mask is None:
        rank = column.expand(batch.B, batch.T)
        return None, (rank < n[:, None]) if spec == "prompt" else (rank >= n[:, None]), 0
    rank = batch.count.index_select(1, column) - 1
    keep = (rank < n[:, None]) if spec == "prompt" else (rank >= n[:, None])
    return None, keep & batch.mask.index_select(1, column), 0


def _is_over(given: Prompt | None, past: Any, T: int) -> bool:
    """Whether the prompt is known to lie before this call: a step of cached generation."""
    if not isinstance(past, int) or past == 0:
        return False
    if given is None or given.lengths is None:
        return T == 1
    return given.ends is not None and past >= given.ends


def _prompt_tokens(p: int, s: int, n: Tensor, count: Tensor | None, T: int, past: Any) -> tuple[Tensor, Tensor, int]:
    """(columns (B, p + s), which of them are there, p) of the first p and last s of n tokens; n//2 of each at most
    where both are asked for."""
    cap = (n // 2 if p and s else n)[:, None]
    k, j = torch.arange(p, device=n.device), torch.arange(s, device=n.device)
    which = torch.cat(((k + 0 * cap), (n[:, None] - s + j)), 1)  # the which-th token of the row
    keep = torch.cat((k < cap, s - j <= cap), 1)
    column = which.clamp_min(0)
    if count is not None:
        column = torch.searchsorted(count, column + 1)
    column = column - past
    return column.clamp(0, T - 1), keep & (column >= 0) & (column < T), p


def _lengths(state: ModelState, model: nn.Module, batch: _Batch) -> Tensor:
    """(B,) number of prompt tokens per row: what `ll.prompt` says, else what the labels say, else all tokens of a first
    call."""
    given = state.said_here().prompt
    if given is not None and given.lengths is not None:
        return _named_lengths(given, given.lengths, batch)
    if given is not None and batch.is_first:
        return batch.total
    if _packed(batch.named, batch.eager):
        raise SelectionError(
            f"{batch.who}: the batch packs several sequences into one row, and a prompt cannot be found in it. Turn "
            "packing (padding-free batches) off."
        )
    labels = batch.named.get("labels")
    if isinstance(labels, Tensor) and tuple(labels.shape[:2]) == (batch.B, batch.T) and batch.is_first:
        return _labelled_lengths(labels, batch)
    if model.training and torch.is_grad_enabled() and not isinstance(labels, Tensor):
        raise SelectionError(f"{batch.who}: a training call without labels does not tell where the prompts end. {CURE}")
    return _lengths_of_first_call(state, batch)


def _lengths_of_first_call(state: ModelState, batch: _Batch) -> Tensor:
    """All tokens of a call with nothing cached before it; none of a later one."""
    if not isinstance(batch.past, int):  # a static cache in compiled code: its length is a tensor
        return torch.where(batch.past == 0, batch.total, torch.zeros_like(batch.total))
    if batch.is_first:
        if batch.eager:
            _watch_growth(state, batch.named, batch.tokens, batch.who)
        return batch.total
    if batch.T > 1:
        raise SelectionError(
            f"{batch.who}: {batch.T} new tokens follow {batch.past} cached ones; whether they are prompt or answer "
            f"cannot be told. {CURE}"
        )
    return torch.zeros_like(batch.total)


def _named_lengths(given: Prompt, lengths: Tensor, batch: _Batch) -> Tensor:
    """The lengths that a `with ll.prompt(...)` block names, repeated for beams."""
    if batch.B % len(lengths):
        raise SelectionError(f"ll.prompt names {len(lengths)} rows, and the batch has {batch.B}.")
    n = lengths.to(batch.device).repeat_interleave(batch.B // len(lengths))
    if batch.eager and batch.is_first:
        fits = bool((n <= batch.total).all())
        given.ends = batch.T if fits else None
        if not fits and batch.cache is None and not batch.named.get("use_cache"):
            raise SelectionError(
                f"ll.prompt names prompts of {lengths.tolist()} tokens, and the batch has rows of "
                f"{batch.total.tolist()} tokens."
            )
    return n


def _labelled_lengths(labels: Tensor, batch: _Batch) -> Tensor:
    """The tokens before the first label of each row."""
    free = (labels != IGNORED).long().cumsum(1) == 0
    if batch.count is not None:
        free = free & (batch.count.diff(dim=1, prepend=batch.count.new_zeros(batch.B, 1)) > 0)[:, : batch.T]
    n = free.sum(1)
    if batch.eager and bool((n == 0).any()):
        raise SelectionError(
            f"{batch.who}: labels are given, and a row of them does not start with {IGNORED}, so where its prompt ends "
            f"cannot be told. Mask the prompt in the labels with {IGNORED} (TRL: completion_only_loss=True), or name "
            f"it. {CURE}"
        )
    return n


def _watch_growth(state: ModelState, named: Mapping[str, Any], tokens: Tensor, who: str) -> None:
    """Generation without a cache calls the model with ever longer sequences; from the second on the prompt cannot be
    told."""
    now = state.here.now
    if named.get("use_cache") is not False or tokens.is_floating_point():
        now.previous = None
        return
    old, now.previous = now.previous, tokens
    if (
        old is not None
        and old.shape[0] == tokens.shape[0]
        and old.shape[1] + 1 == tokens.shape[1]
        and torch.equal(old, tokens[:, :-1])
    ):
        now.previous = None
        raise SelectionError(
            f"{who}: this looks like generation without a cache, where prompt and answer come as one sequence. {CURE}"
        )


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if len(args) < 2:  # the input itself: found by its shape
        return {"": args[0], **kwargs} if args else kwargs
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _tokens(named: Mapping[str, Any]) -> Tensor | None:
    """The input with one entry per token."""
    for value in (*map(named.get, TOKENS), *named.values()):
        if isinstance(value, Tensor) and value.dim() >= 2:
            return value
    return None


def _past(named: Mapping[str, Any], cache: Any, who: str) -> Any:
    """Number of cached tokens before this call."""
    n = None
    silent = next((name for name in STATES if named.get(name) is not None), "")
    silent = silent or opaque(named)
    if silent and named.get("cache_position") is None:
        raise SelectionError(
            f"{who}: the model's state ({silent}) does not tell how many tokens came before; use positions='all'."
        )
    if hasattr(cache, "get_seq_length"):
        n = cache.get_seq_length()
    elif isinstance(cache, (tuple, list)):
        n = cache[0][0].shape[-2]
    elif isinstance(named.get("cache_position"), Tensor):
        n = named["cache_position"][0]
    if n is None:
        return 0
    return int(n) if isinstance(n, Tensor) and not torch.compiler.is_compiling() else n


def _mask(mask: Any, B: int, T: int, past: Any, who: str) -> Tensor | None:
    """(B, columns so far) bool, True at tokens that are no padding; None when there is no mask."""
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", mask)
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() == 4:  # what the newest token may see: all but padding
        row = mask[:, 0, -1, :].expand(B, -1)
        mask = row > torch.finfo(row.dtype).min / 2 if row.is_floating_point() else row.bool()
    so_far = past + T if isinstance(past, int) else 0
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != B or mask.shape[1] < so_far:
        what = f"has shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"is a {type(mask).__name__}"
        raise SelectionError(
            f"{who}: attention_mask {what}; to find the prompt it must be (batch, tokens), cached tokens included."
        )
    return mask.bool()


def _check_cache_found(mask: Tensor, T: int, cache: Any, past: Any, who: str) -> None:
    """Raise where the mask says that tokens came before, and nothing that holds them was found in the call."""
    before = mask.shape[1] - T
    if cache is None and isinstance(past, int) and past == 0 and before > 0 and not torch.compiler.is_compiling():
        raise SelectionError(
            f"{who}: attention_mask covers {mask.shape[1]} tokens and the call brings {T}, so {before} came "
            f"before, but no cache of them was found. {CURE}"
        )


def _packed(named: Mapping[str, Any], eager: bool) -> bool:
    if any(named.get(k) is not None for k in ("cu_seq_lens_q", "cu_seqlens", "seq_idx")):
        return True
    at = named.get("position_ids")
    if (
        not eager
        or named.get("attention_mask") is not None
        or not isinstance(at, Tensor)
        or at.dim() != 2
        or at.shape[1] < 2
    ):
        return False
    return bool((at[:, 1:] < at[:, :-1]).any())
