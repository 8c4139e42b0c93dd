"""A training step on many GPUs, on paper: what each of them holds, and what it sends.

FSDP2 (`fully_shard` on every block, then on the model) cuts dimension 0 of every parameter into N parts, each padded to
ceil(rows / N) rows. A block is gathered for its forward pass and again for its backward pass; what stands outside the
blocks is gathered once and stays. Gradients exist for trained tensors only. A ring sends (N-1)/N of what is gathered or
reduced to shards, and twice that of what is reduced to all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..core.config import AdapterConfig
from ..core.errors import ConfigError, size_text
from ..runtime.model.site import base_parameters
from ..runtime.model.state import unwrap
from ..runtime.plan import plan
from ..runtime.targets.structure import describe

Engine = Literal["ddp", "fsdp2"]
MOMENTS = 8
"""Bytes of AdamW's two fp32 moments per trained number."""


@dataclass(frozen=True)
class Part:
    """One tensor of the adapted model."""

    block: str
    """Path of the block in which it stands; empty outside of all."""
    shape: tuple[int, ...]
    itemsize: int
    trained: bool
    adapter: bool
    cut: bool = True
    """Whether FSDP2 cuts it: parameters, not buffers."""

    def held(self, n: int) -> int:
        """Numbers that the first of n processes holds."""
        return math.ceil(self.shape[0] / n) * math.prod(self.shape[1:]) if self.cut else math.prod(self.shape)

    def gathered(self, n: int) -> int:
        """Bytes of the whole, with the padding of n parts."""
        return n * self.held(n) * self.itemsize if self.cut else 0


@dataclass(frozen=True)
class Spread:
    """Bytes of one GPU among `gpus`, activations apart (those of its own rows: `ll.cost`)."""

    engine: Engine
    gpus: int
    shards: int
    """GPUs over which one copy of the model is cut: all of them, or fewer, between which gradients are averaged."""
    weights: int
    """Of the base, at rest."""
    adapter: int
    """Of the adapter's tensors, at rest."""
    states: int
    """Gradients and AdamW's moments."""
    gathered: int
    """The most that is whole at a time: what stands outside the blocks, the largest block and the next one."""
    sent_weights: int
    """Sent per forward and backward pass to gather the base."""
    sent_adapter: int
    """Sent to gather the adapter."""
    sent_gradients: int
    """Sent to reduce the gradients of what is trained."""

    @property
    def resting(self) -> int:
        return self.weights + self.adapter + self.states

    @property
    def sent(self) -> int:
        return self.sent_weights + self.sent_adapter + self.sent_gradients

    def __str__(self) -> str:
        cut = f" in shards over {self.shards}" if self.shards not in (1, self.gpus) else ""
        return (
            f"{self.engine} on {self.gpus}{cut}: each holds weights {size_text(self.weights)}, adapter "
            f"{size_text(self.adapter)}, gradients and moments {size_text(self.states)}, gathered at most "
            f"{size_text(self.gathered)}; sends {size_text(self.sent)} a step, "
            f"{size_text(self.sent_adapter + self.sent_gradients)} of it for what is trained"
        )


def spread(model: nn.Module, cfg: AdapterConfig, gpus: int, engine: Engine = "fsdp2", shards: int = 0) -> Spread:
    """What one of `gpus` processes holds and sends with an adapter of this config.

    Args:
        model: any model, on the meta device too; it is not touched.
        shards: GPUs over which FSDP2 cuts one copy (a two-dimensional mesh, HSDP); 0: all.

    Raises:
        ConfigError: gpus is below 1, or no multiple of shards.
        TargetError: as `ll.plan`.
    """
    return spread_of(parts_of(model, cfg), gpus, engine, shards)


def spread_of(parts: list[Part], gpus: int, engine: Engine = "fsdp2", shards: int = 0) -> Spread:
    """The same for tensors that are given."""
    n = {"ddp": 1, "fsdp2": shards or gpus}[engine]
    if gpus < 1 or n < 1 or gpus % n:
        raise ConfigError(f"gpus must be at least 1 and a multiple of shards, got {gpus} and {shards}.")
    own, base = [p for p in parts if p.adapter], [p for p in parts if not p.adapter]
    trained = [p for p in parts if p.trained]
    blocks: dict[str, int] = {}
    for p in parts:
        blocks[p.block] = blocks.get(p.block, 0) + p.gathered(n)
    outside, largest = blocks.pop("", 0), sorted(blocks.values(), reverse=True)[:2]
    reduced = sum(p.gathered(n) for p in trained) * (n - 1) // n
    copies = gpus // n
    averaged = 2 * (copies - 1) * sum(p.held(n) * p.itemsize for p in trained) // copies
    return Spread(
        engine,
        gpus,
        n,
        weights=sum(p.held(n) * p.itemsize for p in base),
        adapter=sum(p.held(n) * p.itemsize for p in own),
        states=sum(p.held(n) * (p.itemsize + MOMENTS) for p in trained),
        gathered=outside + sum(largest) if n > 1 else 0,
        sent_weights=_gathering(base, n),
        sent_adapter=_gathering(own, n),
        sent_gradients=reduced + averaged,
    )


def _gathering(parts: list[Part], n: int) -> int:
    """Bytes that one of n processes sends while parts are gathered: twice within a block, once outside."""
    return sum(p.gathered(n) * (2 if p.block else 1) for p in parts) * (n - 1) // n


def parts_of(model: nn.Module, cfg: AdapterConfig | None) -> list[Part]:
    """Every tensor of a model with an adapter of this config; with None, of the model that is trained whole."""
    model = unwrap(model)
    blocks = [path for path, _, _ in describe(model).blocks]
    seen: set[int] = set()
    parts = []
    for path, p in base_parameters(model):
        if id(p) not in seen:
            parts.append(Part(_block(path, blocks), tuple(p.shape), p.element_size(), cfg is None, False))
        seen.add(id(p))
    return parts + (list(_adapter_parts(model, cfg, blocks)) if cfg is not None else [])


def _adapter_parts(model: nn.Module, cfg: AdapterConfig, blocks: list[str]) -> Iterator[Part]:
    the_plan = plan(model, cfg)
    for target in the_plan.targets:
        for short, spec in target.specs.items():
            if target.shared.get(short, target.path) == target.path:
                size = (spec.dtype or the_plan.cfg.torch_dtype).itemsize
                block = _block(target.path, blocks)
                yield Part(block, spec.shape, size, spec.is_trained, True, cut=not spec.as_buffer)


def _block(path: str, blocks: list[str]) -> str:
    """The outermost block above a path."""
    above = [b for b in blocks if path == b or path.startswith(f"{b}.")]
    return min(above, key=len, default="")


@dataclass(frozen=True)
class TensorParallel:
    """LoRA beside a base that is cut by columns and rows over t GPUs (Megatron-LM, arXiv 1909.08053), per GPU and step.

    y_i = W_i x + B_i A x where outputs are cut, y = Σ_i (W_i x_i + B A_i x_i) where inputs are: no activation is sent
    for the adapter, but its factor of full width (A there, B here) stands on every GPU, is multiplied by each of them,
    and its gradient is a sum over all.
    """

    gpus: int
    base_sent: int
    """A sum of activations forward and one backward for every layer that writes the stream."""
    adapter_sent: int
    """Gradients of the factors of full width."""
    base_forward: int
    """Operations of the adapted layers' own products in the forward pass."""
    adapter_forward: int
    """Operations of the adapter's products."""


def tensor_parallel(model: nn.Module, cfg: AdapterConfig, gpus: int, tokens: int) -> TensorParallel:
    """LoRA's costs under tensor parallelism, on paper: `ll.attach` refuses such a model.

    Layers that read the stream are cut by outputs, those that write it by inputs; others are not counted.

    Raises:
        ConfigError: another method than LoRA, or gpus below 1.
        TargetError: as `ll.plan`.
    """
    if cfg.variant != "lora" or gpus < 1:
        raise ConfigError(f"tensor parallelism is counted for lora on at least one GPU, got {cfg.variant} on {gpus}.")
    the_plan, structure = plan(model, cfg), describe(unwrap(model))
    ring = 2 * (gpus - 1) / gpus
    gradients = base = own = 0.0
    for target, (_, role, *_) in zip(the_plan.targets, the_plan.rows, strict=True):
        whole, cut = (target.d_in, target.d_out) if role == "reader" else (target.d_out, target.d_in)
        r = target.specs["lora_A"].shape[0]
        gradients += ring * r * whole * the_plan.cfg.torch_dtype.itemsize
        base += 2 * tokens * target.d_in * target.d_out / gpus
        own += 2 * tokens * r * (whole + cut / gpus)
    itemsize = next(p.element_size() for _, p in base_parameters(unwrap(model)))
    written = sum(place.d_out for place in structure.places if place.role == "writer")
    return TensorParallel(
        gpus, round(2 * ring * written * tokens * itemsize), round(gradients), round(base), round(own)
    )
