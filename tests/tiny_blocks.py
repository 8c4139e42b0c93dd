"""Two tiny decoders from configs, padded batches, and what a block returned: for tests of block sites."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import lora_lite as ll

VOCABULARY = 40


def decoder(kind: str = "llama", blocks: int = 3) -> nn.Module:
    """Random LlamaForCausalLM or GPT2LMHeadModel of width 16, in eval mode."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=64,
            n_embd=16,
            n_layer=blocks,
            n_head=2,
            bos_token_id=1,
            eos_token_id=None,
        )
        return GPT2LMHeadModel(config).eval()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def prompts(lengths: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Token ids (n,) for each length, no padding token among them."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=g) for n in lengths]


def padded(rows: list[Tensor], side: str = "left") -> dict[str, Tensor]:
    """input_ids, attention_mask and position_ids of the rows, padded with 0 to one length."""
    T = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), T, dtype=torch.long), torch.zeros(len(rows), T, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(T - len(row), T) if side == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = row, 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


def block_path(model: nn.Module, index: int) -> str:
    """Path of a block."""
    return next(p for p in ll.plan(model, ll.DiReFTConfig(r=1, layers=(index,))).targets).path


@contextmanager
def outputs(model: nn.Module, index: int = 0) -> Iterator[list[Tensor]]:
    """Inside, every call appends what the block returned, adapters included."""
    seen: list[Tensor] = []

    def hook(_m: nn.Module, _args: object, out: Tensor | tuple[Tensor, ...]) -> None:
        seen.append((out[0] if isinstance(out, tuple) else out).detach())

    handle = model.get_submodule(block_path(model, index)).register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def changed(model: nn.Module, batch: dict[str, Tensor], index: int = 0) -> list[list[int]]:
    """Columns of each row at which the active adapters change the block's output; the blocks before it must carry
    none."""
    with outputs(model, index) as seen, torch.no_grad():
        model(**batch)
        with ll.active(model, None):
            model(**batch)
    return [row.nonzero().flatten().tolist() for row in (seen[0] != seen[1]).any(-1)]


def randomise(model: nn.Module, name: str = "default", seed: int = 5, scale: float = 0.5) -> None:
    """Random values in every trained tensor of one adapter."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in ll.adapters(model)[name].parameters():
            p += scale * torch.randn(p.shape, generator=g, dtype=p.dtype)


def edited(cfg: ll.AdapterConfig, data: object = None) -> tuple[nn.Module, Tensor, Tensor]:
    """(block 0 of the fp64 toy with the method on it, its bare output (2, 7, 12), its edited output); prompts of 7 and
    3 tokens."""
    model = ll.testing.toy(dtype=torch.float64)
    x = torch.randn(2, 7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ll.attach(model, dataclasses.replace(cfg, layers=(0,), dtype="float64"), data)
    with outputs(model) as seen, torch.no_grad(), ll.prompt(model, (7, 3)):
        with ll.active(model, None):
            model(x)
        if data is None:
            model(x)
            assert torch.equal(*seen), "not the identity at the start"
            randomise(model)
        model(x)
    return model.layers[0], seen[0], seen[-1]
