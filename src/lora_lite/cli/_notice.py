"""What a run can know before its first step: tokens that the model never learned, rows that see each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lora_lite as ll

from ..data.batches import collate
from ..data.tokens import IGNORED, Tokens

SMALL = 1 / 3
"""A row of the embedding or the head that is so much shorter than the middle one was hardly trained."""
LOOKED = 512
"""Rows of data that are looked at."""
APART = 2e-2
"""Relative difference of losses that rounding does not explain."""


def untrained_tokens(model: Any, tokenizer: Any, rows: Sequence[Tokens]) -> list[str]:
    """A sentence on special tokens in the rows whose embedding or head was never trained, with the cure.

    Raises:
        ConfigError: a token has no row in the model at all.
    """
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    used = {t for row in rows[:LOOKED] for t in row["input_ids"]}
    learned = {t for row in rows[:LOOKED] for t in row["labels"] if t != IGNORED}
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    head = getattr(model.get_output_embeddings(), "weight", None)
    if embedding is None or not embedding.is_floating_point():
        return []
    beyond = sorted(t for t in used if t >= embedding.shape[0])
    if beyond:
        raise ll.ConfigError(
            f"the rows hold the token {tokenizer.convert_ids_to_tokens(beyond[0])!r} (number {beyond[0]}), and the "
            f"model has {embedding.shape[0]} rows of embeddings: tokenizer and model do not belong together. Resize it "
            "first: model.resize_token_embeddings(len(tokenizer)), and save both."
        )
    found = set(_untrained(embedding, used & special))
    if head is not None and head.is_floating_point():
        found |= set(_untrained(head, learned & special))
    if not found:
        return []
    ids = sorted(found)
    names = ", ".join(repr(tokenizer.convert_ids_to_tokens(t)) for t in ids)
    numbers = " ".join(map(str, ids))
    return [
        f"the model was never trained on {names}, which these rows use, so the loss will stay high. Choose a template "
        f"of words it knows (--template), or train their rows first: --method token_rows --token-ids {numbers}"
    ]


def _untrained(weight: Any, ids: set[int]) -> list[int]:
    """Those whose row is far shorter than the middle one, or the same as that of another one of them."""
    import torch

    if not ids:
        return []
    with torch.no_grad():
        norms = torch.linalg.vector_norm(weight.detach(), dim=1, dtype=torch.float32)
        short = norms < SMALL * norms.median()
        wanted = sorted(ids)
        rows = weight.detach()[wanted].float()
        same = torch.cdist(rows, rows) == 0
        twins = same.sum(1) > 1
    return [t for t, twin in zip(wanted, twins.tolist(), strict=True) if twin or bool(short[t])]


def check_packing(model: Any, packed: Sequence[dict[str, list[int]]]) -> None:
    """Try whether rows that are packed together see each other; the model keeps no cache from here on.

    Raises:
        ConfigError: they do, in this model.
    """
    import torch

    block = next((b for b in packed if b["position_ids"].count(0) > 1), None)
    if block is None:
        return
    starts = [i for i, p in enumerate(block["position_ids"]) if p == 0]
    begin, end = starts[1], (starts + [len(block["input_ids"])])[2]
    second = {name: ids[begin:end] for name, ids in block.items()}
    both = {name: ids[:end] for name, ids in block.items()}
    model.config.use_cache = False  # with a cache, positions are no sign of where a row begins
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = []
            for row in (both, second):
                batch = {k: v.to(model.device) for k, v in collate([row], 0).items() if k != "labels"}
                logits.append(model(**batch, use_cache=False).logits[0, -(end - begin) :].float())
    finally:
        model.train(was_training)
    together, alone = logits
    if float((together - alone).abs().max()) > APART * float(alone.abs().max()):
        raise ll.ConfigError(
            "--packing: in this model a packed row sees the one before it and would learn from it. Leave the flag out."
        )
