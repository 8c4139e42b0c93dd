"""transformers' Trainer, and those of TRL and sentence-transformers which inherit it, on a model with adapters:
attached inside, checkpoints that hold the adapter and never the base, a reference model without a second base."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_lite as ll

from ..core.arguments import checked
from ..core.errors import ConfigError, StateError
from ..core.registry import check_config
from ..runtime.model.state import state_of
from . import reference
from .card import card, fields
from .engines import leave_base_out
from .folder import CARD, copy_adapters, load_checkpoint, load_steps, write_folder
from .homes import homes, new_home, trainable
from .peft_config import our_config
from .reference import Reference
from .refused import check_packing, check_trainer
from .served import merged_for_servers

__all__ = ["AdapterMixin", "adapter_trainer", "load_checkpoint", "trainer"]

_Base: Any = object
"""The trainer's class, as the mixin sees it: known only where a subclass names it."""


@checked
def trainer(base: type, cfg: ll.AdapterConfig | None = None, **options: Any) -> type:
    """A Trainer class for adapters, from one of transformers, TRL or sentence-transformers.

        trainer = ll.trainer(SFTTrainer, ll.LoRAConfig(r=16))(model="Qwen/Qwen3-0.6B", args=args, train_dataset=data)
        trainer = ll.trainer(DPOTrainer)(model=model, ...)                  # attached or loaded already

    Checkpoints and `save_model` hold the adapters and nothing of the base, in a folder that `ll.load` reads, and PEFT
    and `AutoModel` where the method allows. A reference model (DPO, KTO, GRPO, RLOO) is the same base with a frozen
    copy of the adapter as it was, or the bare base where the trainer attached it.

    Args:
        base: the class, whose arguments stay as they are. A `peft_config=` among them may be a config of ours or
            PEFT's LoraConfig; ours is attached in either case.
        cfg: what to attach to the model, whether it is given as a module, by its name or by `model_init`. None: the
            model has its adapter already, or `peft_config=` says what to attach.
        options: further arguments of `ll.attach`, say `calibration_data=batches`.

    Returns:
        A subclass of `base`.
    """
    if not isinstance(base, type):
        raise ConfigError(
            f"ll.trainer takes a trainer's class and gives one back: ll.trainer(SFTTrainer, cfg)(model=..., ...); got "
            f"{base!r}."
        )
    if cfg is not None and not hasattr(cfg, "peft_type"):
        check_config(cfg)
    made = adapter_trainer(base)
    if cfg is None and not options:
        return made
    return type(made.__name__, (made,), {"adapter_cfg": cfg, "attach_options": options})


@functools.cache
def adapter_trainer(base: type | None = None) -> type:
    """`ll.trainer` for models with attached adapters; `base` is transformers' Trainer where it is None."""
    if base is None:
        from transformers import Trainer as base
    root = next(c for c in reversed(base.__mro__) if "compute_loss" in vars(c))
    inner = type("Inside", (_Inside, root), {})
    bases = (AdapterMixin, inner) if base is root else (AdapterMixin, base, inner)
    return type(f"Adapter{base.__name__}", bases, {"trainer_class": base})


class _Inside(_Base):
    """Stands between a trainer and transformers' own Trainer, where the model has been loaded and prepared, to attach
    the adapter there."""

    def __init__(self, model: nn.Module | str | None = None, *args: Any, **kwargs: Any) -> None:
        if isinstance(model, str):
            model = _loaded(model)
        if model is None:  # model_init makes it, see `call_model_init`
            super().__init__(model, *args, **kwargs)
            return
        self._adapt(model)  # type: ignore[attr-defined]
        super().__init__(model, *args, **kwargs)


class AdapterMixin(_Base):
    """What changes for adapters: where they are attached, parameter groups, penalty, schedule, reference, and what a
    checkpoint holds."""

    trainer_class: type
    adapter_cfg: ll.AdapterConfig | None = None
    attach_options: dict[str, Any] = {}

    def __init__(self, model: Any = None, *args: Any, **kwargs: Any) -> None:
        check_trainer(self.trainer_class)
        self._to_attach = self.adapter_cfg
        if kwargs.get("peft_config") is not None:
            if self.adapter_cfg is not None:
                raise ConfigError(
                    "two configs are said, ll.trainer(TrainerClass, cfg) and peft_config=...; leave one out."
                )
            self._to_attach = kwargs.pop("peft_config")
        self._reference: Reference | None = None
        self._scheduled_optimizer: Any = None
        if isinstance(model, str) and hasattr(self.trainer_class, "model_class"):  # sentence-transformers loads none
            model = self.trainer_class.model_class(model)
        if model is not None:
            self._check_has_adapter(model)
        said = reference.said(self.trainer_class, model, args, kwargs)
        self._said_args = said.get("args")
        self._way = "" if said.get("ref_model") is not None else reference.way(self.trainer_class, self._said_args)
        if self._way:
            self._reference = Reference()
        if self._way == "argument":
            kwargs["ref_model"] = self._reference
        self._stored = _stored(model)
        with _without_beta(self._said_args, self._way == "beta") as beta:
            super().__init__(model, *args, **kwargs)
        _uncast(self._stored)
        self._stored = []
        if self._way == "beta":
            self.beta = self.beta if beta is None else beta
        if self._way == "attribute" or (self._way == "beta" and self.beta):
            self.ref_model = self._reference
        merged_for_servers(self, self.model)
        if getattr(self, "is_deepspeed_enabled", False):
            leave_base_out(self.accelerator)

    def _check_has_adapter(self, model: Any) -> None:
        if self._to_attach is None and not (isinstance(model, nn.Module) and trainable(model)):
            raise StateError(
                "this trainer trains adapters, and the model has no trainable one: give the config, "
                "ll.trainer(TrainerClass, cfg), or call ll.attach(model, cfg) or ll.load(model, path, trainable=True) "
                "before constructing it."
            )

    def _adapt(self, model: nn.Module) -> None:
        """Attach what is to be attached, and let the reference follow."""
        self._check_has_adapter(model)
        _uncast(self._stored)  # before the reference copies them
        fresh = self._to_attach is not None
        if fresh:
            home = new_home(model)
            ll.attach(home, our_config(self._to_attach, home), **self.attach_options)
        check_packing(self._said_args, model)
        self._fresh = fresh
        if self._reference is not None:
            reference.check_arguments(self._said_args, model)
        if self._reference is not None and self._way != "teacher":
            self._reference.follow(model, fresh)

    def _setup_teacher_model(self) -> None:
        """The teacher of SDFT and SDPO: the model itself, as it was, or a running average of what it becomes."""
        kind = self.args.teacher_model_kind
        if kind == "live" or self._reference is None:
            self.teacher_model = self.model
            return
        self._reference.follow(self.model, self._fresh and kind != "ema")
        self.teacher_model = self._reference
        if kind == "ema":
            rate, every = self.args.teacher_update_rate, self.args.teacher_sync_steps
            self.add_callback(reference.averaging(self._reference, rate, every))

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """The model of a run or of a trial of a sweep, with its adapter."""
        model = super().call_model_init(trial)
        self._adapt(model)
        return model

    # ---- optimiser

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser that the arguments name, over `adapter.param_groups` and whatever else requires a gradient."""
        if self.optimizer is None:
            lr, decay = self.args.learning_rate, self.args.weight_decay
            groups = [group for _, handle in trainable(self.model) for group in handle.param_groups(lr, decay)]
            given = getattr(self, "optimizer_cls_and_kwargs", None)
            cls, options = given or self.get_optimizer_cls_and_kwargs(self.args, self.model)
            chosen = [options.pop(key) for key in ("params", "model", "optimizer_dict") if key in options]
            if (chosen and not _are_plain_groups(chosen[0])) or not isinstance(cls, type):
                raise StateError(
                    f"optim={self.args.optim!r} chooses its parameters itself, which would ignore the adapter's "
                    "groups; use 'adamw_torch'."
                )
            others = chosen[0] if chosen else [{"params": list(self.model.parameters()), "weight_decay": decay}]
            mine = {id(p) for group in groups for p in group["params"]}
            self.optimizer = cls(groups + _without(others, mine, lr), **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning-rate schedule, and `ll.schedule` for methods that have one of their own."""
        target: Any = optimizer if optimizer is not None else self.optimizer
        target = getattr(target, "optimizer", target)  # accelerate's wrapper takes no hooks
        if self._scheduled_optimizer is not target:
            for home in {id(home): home for home, handle in trainable(self.model) if _has_schedule(handle)}.values():
                ll.schedule(home, target, num_training_steps)
                self._scheduled_optimizer = target
        return super().create_scheduler(num_training_steps, optimizer)

    # ---- loss

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The trainer's loss; while training, plus `ll.penalty` of the active adapters."""
        result = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        punished = [home for home in homes(self.model) if _has_penalty(home)] if model.training else []
        if not punished:
            return result
        loss = result[0] if return_outputs else result
        # A loss that is normalised over the accumulated batch already is summed over its parts, not averaged.
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = self.model_accepts_loss_kwargs and kwargs.get("num_items_in_batch") is not None
        share = getattr(self, "current_gradient_accumulation_steps", 1) if scaled else 1
        for home in punished:
            loss = loss + (ll.penalty(home) / share).to(loss.device)
        return (loss, result[1]) if return_outputs else loss

    # ---- checkpoints

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's training; trackers (`report_to`) find the adapter's fields in the model's config meanwhile."""
        with _fields_told(self.model):
            return super().train(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the folder of every trainable adapter, and nothing of the base."""
        folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        checkpoint = _internal_call and output_dir is not None  # push_to_hub names no folder
        write_folder(self.model, folder, self, compact=not checkpoint)
        if self._reference is not None and checkpoint:
            self._reference.save(folder, writer=self.args.should_save)
        if getattr(self.args, "push_to_hub", False) and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def create_model_card(self, model_name: str | None = None, *args: Any, **kwargs: Any) -> None:
        """The adapter's card, in the place of the trainer's, which would describe a whole model."""
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        tags = kwargs.get("tags") or ()
        text = card(
            self.model,
            (folder / "adapter_config.json").is_file(),
            self.state.log_history,
            self.state.global_step,
            model_name,
            kwargs.get("dataset_name") or kwargs.get("dataset"),
            [tags] if isinstance(tags, str) else tags,
        )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CARD).write_text(text, encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_checkpoint(self.model if model is None else model, resume_from_checkpoint)
        if self._reference is not None:
            self._reference.load(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and getattr(self, "is_deepspeed_enabled", False):  # its engine has loaded the tensors
            load_steps(self.model, checkpoint)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        load_checkpoint(self.model, self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        copy_adapters(checkpoint_folder, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)


def _without(groups: list[dict[str, Any]], mine: set[int], lr: float) -> list[dict[str, Any]]:
    """The groups without these parameters and without frozen ones, at `lr` where they name no rate; no empty group."""
    found = []
    for group in groups:
        rest = [p for p in group["params"] if p.requires_grad and id(p) not in mine]
        found += [{"lr": lr, **group, "params": rest}] if rest else []
    return found


def _are_plain_groups(found: Any) -> bool:
    """Whether these are parameter groups as any optimiser takes them, and nothing that only one of them knows."""
    return isinstance(found, list) and all(
        isinstance(g, dict) and set(g) <= {"params", "lr", "weight_decay"} for g in found
    )


def _has_schedule(handle: ll.Adapter) -> bool:
    return handle.record.variant.on_step is not None


def _has_penalty(home: nn.Module) -> bool:
    state = state_of(home)
    return bool(state.here.now.penalties) or any(state.records[name].variant.penalty for name, _ in state.active)


def _loaded(name: str) -> nn.Module:
    """The model of a name or folder, of the class that its config names."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(name)
    made = next((getattr(transformers, a) for a in config.architectures or () if hasattr(transformers, a)), None)
    if made is None:
        raise StateError(f"{name!r} does not say of which class its model is; load it and pass the model itself.")
    return made.from_pretrained(name)


def _stored(model: Any) -> list[tuple[nn.Parameter, Tensor]]:
    """What the trainable adapters of a model hold."""
    found = trainable(model) if isinstance(model, nn.Module) else []
    return [(p, p.data) for _, handle in found for p in handle.parameters()]


def _uncast(stored: list[tuple[nn.Parameter, Tensor]]) -> None:
    """TRL casts every trainable parameter of a quantised model to bfloat16; the adapter's precision is the config's."""
    for p, data in stored:
        if p.dtype != data.dtype:
            p.data = data.to(p.device)


@contextmanager
def _without_beta(args: Any, act: bool) -> Iterator[float | None]:
    """The KL factor of the arguments, which is 0 inside: a trainer that sees one loads a second base for it."""
    if not act or args is None:
        yield None
        return
    beta, args.beta = args.beta, 0.0
    try:
        yield beta
    finally:
        args.beta = beta


@contextmanager
def _fields_told(model: Any) -> Iterator[None]:
    """The adapters' fields in the model's config, which every tracker logs."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        yield
        return
    config.lora_lite = fields(model)
    try:
        yield
    finally:
        vars(config).pop("lora_lite", None)
