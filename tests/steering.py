"""Contrast pairs for the toy, and the hidden states of their rows found with plain hooks and loops."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def contrast_pairs(n: int = 3, dtype: torch.dtype = torch.float64) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """(positive, negative) batches of 4 rows, padded on either side; the sides differ by a common shift and by
    noise."""
    g = torch.Generator().manual_seed(21)
    shift = torch.randn(12, generator=g)
    found = []
    for i in range(n):
        pair = []
        for sign in (1, -1):
            x, mask = torch.randn(4, 6, 12, generator=g) + sign * shift, torch.ones(4, 6, dtype=torch.long)
            mask[1, 4:] = 0
            mask[2, : i + 1] = 0
            x[mask == 0] = 1e6  # padding must not count
            pair.append({"x": x.to(dtype), "attention_mask": mask})
        found.append(tuple(pair))
    return found


def row_vectors(model: nn.Module, path: str, pairs, token: str = "last") -> tuple[Tensor, Tensor]:
    """(positive, negative), each (n, d): what stands for each row in the output of the module."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, args, out: seen.append(out))
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    with torch.no_grad():
        for pair in pairs:
            for side, batch in zip(sides, pair, strict=True):
                model(**batch)
                for row, mask in zip(seen.pop(), batch["attention_mask"], strict=True):
                    real = [h for h, m in zip(row, mask, strict=True) if m]
                    side.append(real[-1] if token == "last" else sum(real) / len(real))
    handle.remove()
    return torch.stack(sides[0]), torch.stack(sides[1])
