"""`ll.cost`: what a training step with an adapter costs, on paper: shapes only, for a model of any size."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import fake_mode, storage_key
from ..core.arguments import checked
from ..core.config import AdapterConfig
from ..core.errors import ConfigError, LoraLiteError, size_text
from ..core.registry import get_variant
from ..runtime.commit import commit
from ..runtime.model.record import Record
from ..runtime.model.state import STATE, unwrap
from ..runtime.plan import Plan, plan
from ..runtime.start.staging import stage
from ..runtime.targets.structure import describe
from .counting import Saved, counter
from .depth import along, shallow


@dataclass(frozen=True)
class Cost:
    """One training step of `batch` x `length` tokens: the adapter's part beyond the frozen base, and the base's own."""

    variant: str
    """Name of the method."""
    batch: int
    """Rows of the batch."""
    length: int
    """Tokens per row."""
    trained: int
    """Trained numbers."""
    adapter_bytes: int
    """All tensors of the adapter, frozen factors included."""
    gradient_bytes: int
    """Gradients of the trained numbers, in the dtype of the adapter."""
    optimizer_bytes: int
    """AdamW's two moments in fp32."""
    base_params: int
    """Parameters of the base."""
    base_bytes: int
    """Their bytes, in the dtype in which the model was given."""
    base_saved: int
    """Bytes that autograd keeps for the backward pass through the frozen base; the model must give this much to
    anything that trains below its last block."""
    extra_saved: int
    """Bytes kept beyond that because of the adapter."""
    base_checkpointed: int
    """The same with gradient checkpointing of every block: the blocks' inputs, and the largest block or the head while
    its backward pass runs."""
    extra_checkpointed: int
    """Bytes beyond that because of the adapter."""
    base_forward: int
    """Multiply-adds counted as two: matrix products, and attention in full although a causal mask lets a kernel skip
    half of it."""
    base_step: int
    """Forward, and backward through the activations."""
    extra_forward: int
    """Operations of the forward pass beyond the base's."""
    extra_step: int
    """Operations of both passes beyond the base's."""

    @property
    def training_bytes(self) -> int:
        """Weights, adapter, its gradients and moments, and saved activations."""
        own = self.adapter_bytes + self.gradient_bytes + self.optimizer_bytes
        return self.base_bytes + own + self.base_saved + self.extra_saved

    def __str__(self) -> str:
        return (
            f"{self.variant}: {self.batch} x {self.length} tokens: weights {size_text(self.base_bytes)}, adapter "
            f"{size_text(self.adapter_bytes)}, gradients {size_text(self.gradient_bytes)}, optimiser "
            f"{size_text(self.optimizer_bytes)}, saved activations {size_text(self.base_saved)} + "
            f"{size_text(self.extra_saved)} (checkpointed {size_text(self.base_checkpointed)} + "
            f"{size_text(self.extra_checkpointed)}); step {self.base_step / 1e12:.3g} + {self.extra_step / 1e12:.3g} "
            f"TFLOP (forward {self.extra_forward / max(1, self.base_forward):+.1%}, step "
            f"{self.extra_step / max(1, self.base_step):+.1%})"
        )


class Paper:
    """A copy of a model without weights, on which the costs of many configs are counted; the base is counted once.

    Args:
        model: a transformers model, on any device, the meta device included; it is not touched.
        batch, length: rows and tokens of a training batch.

    Raises:
        ConfigError: the model takes no `inputs_embeds`, or batch or length is not positive.
    """

    def __init__(self, model: nn.Module, batch: int = 1, length: int = 2048) -> None:
        if batch < 1 or length < 1:
            raise ConfigError(f"batch and length must be positive, got {batch} and {length}.")
        model = unwrap(model)
        if not hasattr(model, "get_input_embeddings") or STATE in model.__dict__:
            raise ConfigError(
                "costs are counted on a bare transformers model (with get_input_embeddings); detach adapters first."
            )
        self.batch, self.length = batch, length
        self.mode = fake_mode()
        meta = {
            id(t): _like(t, "meta")
            for m in model.modules()
            for t in (*m._parameters.values(), *m._buffers.values())
            if t is not None
        }
        self.model: Any = copy.deepcopy(model, meta).train()
        for p in self.model.parameters():
            p.requires_grad_(False)
        for m in self.model.modules():
            if getattr(m, "gradient_checkpointing", False):
                m.gradient_checkpointing = False  # its hooks would hide what the blocks keep; that is computed instead
        self.base_params = sum(p.numel() for p in self.model.parameters())
        self.base_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())
        self.depth, self.shallow = describe(self.model).n_layers, shallow(self.model)
        try:
            self.base = self._bare()
        except Exception as e:  # whatever a model says to tensors without values
            raise ConfigError(
                f"{type(model).__name__} cannot be run on shapes alone: "
                f"{str(e).splitlines()[0] if str(e) else type(e).__name__} Costs are counted on a causal language "
                "model in its plain, unquantised form: AutoModelForCausalLM.from_config(config) on the meta device."
            ) from e

    def _bare(self) -> tuple[int, ...]:
        if self.shallow:
            first, second = (self._count(m) for m in self.shallow)
            return along(first, second, self.depth)
        return self._count(self.model)

    def cost(self, cfg: AdapterConfig) -> Cost:
        """The cost of one config. Its start is not computed, so methods that read weights or data are counted too;
        methods that edit some tokens only are counted as if they edited all.

        Raises: as `ll.plan`.
        """
        if "positions" in {f.name for f in dataclasses.fields(cfg)}:
            cfg = dataclasses.replace(cfg, positions="all")  # where prompts begin and end is no matter of shapes
        the_plan = plan(self.model, cfg)
        counts = self._from_shallow(the_plan) or self._adapted(self.model, the_plan)
        forward, step, saved, checkpointed, gradients = counts
        return Cost(
            get_variant(the_plan.cfg.variant).name,
            self.batch,
            self.length,
            the_plan.trainable,
            the_plan.bytes,
            gradients,
            the_plan.optimizer_bytes,
            self.base_params,
            self.base_bytes,
            self.base[2],
            saved - self.base[2],
            self.base[3],
            checkpointed - self.base[3],
            self.base[0],
            self.base[1],
            forward - self.base[0],
            step - self.base[1],
        )

    def _from_shallow(self, the_plan: Plan) -> tuple[int, ...] | None:
        """What `_adapted` counts, from the shallow models; None where there are none, or where the plan does not lie
        on their line: a config that chooses blocks, a method whose tensors depend on the depth."""
        if not self.shallow:
            return None
        try:
            one, two = (plan(m, the_plan.cfg) for m in self.shallow)
        except LoraLiteError:  # a pattern that names a later block
            return None
        if along(_size(one), _size(two), self.depth) != _size(the_plan):
            return None
        first, second = (self._adapted(m, p) for m, p in zip(self.shallow, (one, two), strict=True))
        return along(first, second, self.depth)

    def _adapted(self, model: Any, the_plan: Plan) -> tuple[int, ...]:
        """What `_count` counts of a model with a plan's adapter, and the bytes of its gradients."""
        model = copy.deepcopy(model)
        the_plan = plan(model, the_plan.cfg)
        variant = get_variant(the_plan.cfg.variant)
        record = Record("default", variant, the_plan.cfg, {t.path: t for t in the_plan.targets})
        commit(model, record, stage(model, record, fill=False), trainable=True)
        gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        return *self._count(model), gradients

    def _count(self, model: Any) -> tuple[int, ...]:
        """(operations of the forward pass, of both passes, bytes saved between them, the same with checkpointing)."""
        with without_weights(model, self.mode):
            own = {storage_key(t) for t in (*model.parameters(), *model.buffers())}
            saved = Saved(model, own, self.length)
            with self.mode, counter() as count:
                ids = torch.zeros(self.batch, self.length, dtype=torch.long)
                with saved.watch():
                    embeds = model.get_input_embeddings()(ids)  # trained, or made to need a gradient
                    embeds = embeds if embeds.requires_grad else embeds.detach().requires_grad_(True)
                    loss = model(inputs_embeds=embeds, labels=ids, use_cache=False).loss
                forward = count.get_total_flops()
                loss.backward()
                return forward, count.get_total_flops(), saved.total(), saved.checkpointed()


@checked
def cost(model: nn.Module, cfg: AdapterConfig, batch: int = 1, length: int = 2048) -> Cost:
    """What one training step of `batch` x `length` tokens costs with an adapter of this config, counted without
    weights.

    The page itself is run on shapes, forward and backward: nothing is stated method by method. Memory: bytes that
    autograd keeps between the passes (unique storages, parameters not counted), with the attention kernel that torch
    picks on a CPU, which keeps no T x T matrix; without gradient checkpointing, and (`*_checkpointed`) the most that
    lives at once when every block is checkpointed. Operations: those of matrix products and attention, as
    `torch.utils.flop_counter` counts them; small factorisations are not counted.

    Raises:
        ConfigError: no transformers model, or one that cannot be run on shapes alone.
        TargetError: as `ll.plan`.
    """
    return Paper(model, batch, length).cost(cfg)


def _size(the_plan: Plan) -> tuple[int, ...]:
    return len(the_plan.targets), the_plan.trainable, the_plan.params, the_plan.bytes


def _like(t: Tensor, device: str) -> Tensor:
    empty = torch.empty(t.shape, dtype=t.dtype, device=device)
    return nn.Parameter(empty, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else empty


@contextmanager
def without_weights(model: nn.Module, mode: Any) -> Iterator[None]:
    """Fake tensors in place of all parameters and buffers: shapes that compute like a CPU's tensors and hold
    nothing."""
    tables: list[dict[str, Any]] = [t for m in model.modules() for t in (m._parameters, m._buffers)]  # pyright: ignore[reportAssignmentType]
    kept = [dict(table) for table in tables]
    made: dict[int, Tensor] = {}
    try:
        with mode:
            for table in tables:
                for k, t in table.items():
                    if t is not None:
                        made[id(t)] = table[k] = made[id(t)] if id(t) in made else _like(t, "cpu")
        yield
    finally:
        for table, before in zip(tables, kept, strict=True):
            table.update(before)
