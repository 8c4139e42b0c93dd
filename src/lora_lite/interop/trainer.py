"""transformers' Trainer, and TRL's trainers which inherit it, on a model with attached adapters: checkpoints hold the
adapter and never the base."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_lite as ll

from ..core.errors import FileError, StateError
from ..io import native
from ..io.header import check_sums, config_from_header
from ..runtime.layers.tensors import is_sharded
from ..runtime.model.state import DEFAULT, state_of, unwrap

_Base: Any = object
"""The trainer's class, as the mixin sees it: known only where a subclass names it."""


@cache
def adapter_trainer(base: type | None = None) -> type:
    """A Trainer class for models with attached adapters.

    Args:
        base: `transformers.Trainer` (the default), `trl.SFTTrainer` or another class that inherits the former.

    Returns:
        A subclass of `base`; its arguments are those of `base`. Attach the adapter first, then construct it:

            ll.attach(model, ll.LoRAConfig(r=8))
            trainer = adapter_trainer()(model=model, args=TrainingArguments(...), train_dataset=data)
            trainer.train(resume_from_checkpoint=True)
    """
    if base is None:
        from transformers import Trainer as base
    return type(f"Adapter{base.__name__}", (AdapterMixin, base), {})


class AdapterMixin(_Base):
    """What changes for adapters: parameter groups, penalty, schedule, and what a checkpoint holds. Put it before the
    trainer: `class T(AdapterMixin, Trainer)`."""

    def __init__(self, model: nn.Module | None = None, *args: Any, **kwargs: Any) -> None:
        if not isinstance(model, nn.Module) or not any(a.trainable for a in ll.adapters(model).values()):
            raise StateError(
                "this trainer trains adapters, and the model has no trainable one: call ll.attach(model, cfg) "
                "or ll.load(model, path, trainable=True) before constructing it."
            )
        with _quantised_base_allowed(model), _tensors_kept(model):
            super().__init__(model, *args, **kwargs)
        self._scheduled_optimizer: Any = None

    # ---- optimiser

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser that the arguments name, over `adapter.param_groups` and whatever else requires a gradient."""
        if self.optimizer is None:
            lr, decay = self.args.learning_rate, self.args.weight_decay
            groups = [
                group
                for handle in ll.adapters(self.model).values()
                if handle.trainable
                for group in handle.param_groups(lr, decay)
            ]
            mine = {id(p) for group in groups for p in group["params"]}
            rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in mine]
            groups += [{"params": rest, "lr": lr, "weight_decay": decay}] if rest else []
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            if {"params", "model", "optimizer_dict"} & set(options) or not isinstance(cls, type):
                raise StateError(
                    f"optim={self.args.optim!r} chooses its parameters itself, which would ignore the adapter's "
                    "groups; use 'adamw_torch'."
                )
            self.optimizer = cls(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning-rate schedule, and `ll.schedule` for methods that have one of their own."""
        target: Any = optimizer if optimizer is not None else self.optimizer
        target = getattr(target, "optimizer", target)  # accelerate's wrapper takes no hooks
        scheduled = any(r.variant.on_step is not None for r in state_of(self.model).records.values())
        if scheduled and self._scheduled_optimizer is not target:
            ll.schedule(self.model, target, num_training_steps)
            self._scheduled_optimizer = target
        return super().create_scheduler(num_training_steps, optimizer)

    # ---- loss

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The trainer's loss; while training, plus `ll.penalty` of the active adapters."""
        result = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        state = state_of(self.model)
        if not model.training or not any(state.records[n].variant.penalty for n, _ in state.active):
            return result
        loss = result[0] if return_outputs else result
        # A loss that is normalised over the accumulated batch already is summed over its parts, not averaged.
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = self.model_accepts_loss_kwargs and kwargs.get("num_items_in_batch") is not None
        share = getattr(self, "current_gradient_accumulation_steps", 1) if scaled else 1
        loss = loss + (ll.penalty(self.model) / share).to(loss.device)
        return (loss, result[1]) if return_outputs else loss

    # ---- checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write every trainable adapter of the model into a folder, and nothing of the base."""
        folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        for handle in _trainable(self.model):
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                ll.save(self.model, folder / adapter_file(handle.name), handle.name, compact=not _internal_call)
            elif any(is_sharded(p) for p in handle.parameters()):
                ll.adapter_state_dict(self.model, handle.name)  # takes its part in gathering the shards

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_checkpoint(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        load_checkpoint(self.model, self.state.best_model_checkpoint)


def adapter_file(name: str) -> str:
    """The file name of an adapter inside a checkpoint."""
    return "adapter.safetensors" if name == DEFAULT else f"adapter-{name}.safetensors"


def load_checkpoint(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Copy the adapters of a checkpoint folder into the attached, trainable adapters, in place, and set their schedules
    to its step.

    Raises:
        FileError: an adapter is missing, has another config or other targets, or was trained on another base; nothing
            is copied then.
    """
    model, found = unwrap(model), []
    for handle in _trainable(model):
        path = Path(folder) / adapter_file(handle.name)
        if not path.is_file():
            raise FileError(f"{folder} is no checkpoint of adapter {handle.name!r}: it holds no {path.name}.")
        head, tensors = native.read(path)
        theirs, ours = config_from_header(head, str(path)).to_dict(), handle.cfg.to_dict()
        other = [f"{k}={theirs.get(k)!r}, not {v!r}" for k, v in ours.items() if theirs.get(k) != v]
        if other:
            raise FileError(
                f"{path} was trained with another config ({'; '.join(other)}); attach with the same one to resume."
            )
        native.check_base(model, handle.record, head, "error", str(path))
        native.check_keys(native.expected(handle.record), tensors, str(path))
        check_sums(head, handle.record, tensors, str(path))
        found.append((handle, head, tensors))
    for handle, head, tensors in found:
        ll.load_adapter_state_dict(model, handle.name, tensors)
        handle.record.steps = int(head.get("steps") or 0)


def _trainable(model: nn.Module) -> list[ll.Adapter]:
    return [handle for handle in ll.adapters(unwrap(model)).values() if handle.trainable]


@contextmanager
def _quantised_base_allowed(model: nn.Module) -> Iterator[None]:
    """Trainer refuses quantised models unless they say that a PEFT adapter is loaded. Say so while it is constructed,
    and only where gradients do pass."""
    quantizer = getattr(model, "hf_quantizer", None)
    if not getattr(model, "is_quantized", False) or quantizer is None:
        yield
        return
    if not quantizer.is_trainable:
        raise StateError(
            f"the base is quantised by {type(quantizer).__name__}, which passes no gradients, so adapters in it "
            "cannot be trained; load it with bitsandbytes or another quantiser that can."
        )
    before = getattr(model, "_hf_peft_config_loaded", False)
    flagged: Any = model
    flagged._hf_peft_config_loaded = True
    try:
        yield
    finally:
        flagged._hf_peft_config_loaded = before


@contextmanager
def _tensors_kept(model: nn.Module) -> Iterator[None]:
    """TRL casts every trainable parameter of a quantised model to bfloat16; the adapter's precision is the config's."""
    kept = [(p, p.data) for handle in _trainable(model) for p in handle.parameters()]
    yield
    for p, data in kept:
        if p.dtype != data.dtype:
            p.data = data.to(p.device)
