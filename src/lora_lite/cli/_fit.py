"""Training as the commands do it: transformers' Trainer or TRL's beneath, our log, bar and picture on top."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lora_lite as ll

from ..demo.data import collate
from ..interop.trainer import adapter_trainer
from ._console import Bar
from ._log import RunLog

Rows = Sequence[dict[str, list[int]]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the training loop needs to know; the commands fill it from their flags."""

    steps: int
    lr: float
    batch_size: int = 16
    accumulation: int = 1
    warmup: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    eval_every: int = 0
    save_every: int = 0
    keep: int = 2
    best: bool = False
    gradient_checkpointing: bool = False
    trainer: str = "hf"


def fit(
    model: Any,
    tokenizer: Any,
    train: Rows,
    evals: Rows,
    options: Options,
    out: Path,
    log: RunLog,
    resume: Path | None = None,
) -> Any:
    """Train the attached adapter; returns the Trainer. `log` receives every step, and the picture is drawn at the end
    in any case.

    Raises:
        StateError: the loss is no longer finite.
    """
    base, arguments_class = _classes(options.trainer)
    fields = {f.name for f in dataclasses.fields(arguments_class)}
    recompute = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    arguments = arguments_class(
        **_arguments(options, out, bool(evals), resume is None),
        **{recompute: options.gradient_checkpointing},
        **({f"{recompute}_kwargs": {"use_reentrant": False}} if options.gradient_checkpointing else {}),
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    trainer = adapter_trainer(base)(
        model=model,
        args=arguments,
        train_dataset=_dataset(train, options.trainer),
        eval_dataset=_dataset(evals, options.trainer) if evals else None,
        data_collator=functools.partial(collate, pad=pad),
        **({"processing_class": tokenizer} if options.trainer == "sft" else {}),
    )
    from transformers import PrinterCallback, ProgressCallback

    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    trainer.create_model_card = lambda *_, **__: None  # TRL's would describe a whole model
    with Bar("training", options.steps) as bar:
        trainer.add_callback(_follower(log, bar))
        try:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        finally:
            log.draw()
    return trainer


def _classes(trainer: str) -> tuple[type, Any]:
    if trainer == "sft":
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer

        return SFTTrainer, SFTConfig
    from transformers import Trainer, TrainingArguments

    return Trainer, TrainingArguments


def _arguments(o: Options, out: Path, has_eval: bool, fresh: bool) -> dict[str, Any]:
    import torch

    eval_every = o.eval_every if has_eval and o.eval_every else 0
    return {
        "output_dir": str(out),
        "max_steps": o.steps,
        "per_device_train_batch_size": o.batch_size,
        "per_device_eval_batch_size": o.batch_size,
        "gradient_accumulation_steps": o.accumulation,
        "learning_rate": o.lr,
        "warmup_steps": math.ceil(o.warmup * o.steps) if o.warmup < 1 else int(o.warmup),
        "lr_scheduler_type": o.schedule,
        "weight_decay": o.weight_decay,
        "max_grad_norm": o.clip,
        "seed": o.seed,
        "eval_strategy": "steps" if eval_every else "no",
        "eval_steps": eval_every or None,
        "eval_on_start": bool(eval_every) and fresh,
        "save_strategy": "steps" if o.save_every else "no",
        "save_steps": o.save_every or 1,
        "save_total_limit": o.keep,
        "load_best_model_at_end": o.best,
        "metric_for_best_model": "eval_loss" if o.best else None,
        "greater_is_better": False if o.best else None,
        "bf16": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "non_padding",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "prediction_loss_only": True,
    }


def _dataset(rows: Rows, trainer: str) -> Any:
    if trainer != "sft":
        return list(rows)
    from datasets import Dataset

    return Dataset.from_list(list(rows))


def _follower(log: RunLog, bar: Bar) -> Any:
    """A callback: every step into the log and onto the bar."""
    from transformers import TrainerCallback

    class Follower(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            log.keep(state.global_step)
            self.begun = False

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not self.begun:  # after the evaluation that precedes the first step
                self.begun = True
                bar.begin_at(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            logs = logs or {}
            loss = logs.get("loss", logs.get("eval_loss"))
            if loss is None:  # the summary of the whole run
                return
            if not math.isfinite(loss):
                raise ll.StateError(
                    f"the loss is {loss} at step {state.global_step}: training diverged. Try a smaller --lr (it was "
                    f"{args.learning_rate:g}) or more --warmup."
                )
            if "loss" in logs:
                log.add(
                    state.global_step,
                    loss=round(float(loss), 6),
                    lr=float(logs["learning_rate"]),
                    grad_norm=round(float(logs.get("grad_norm", 0.0)), 6),
                    tokens=int(state.num_input_tokens_seen),
                )
                bar.update(state.global_step, f"loss {float(loss):.3f}")
            else:
                log.add(state.global_step, eval_loss=round(float(loss), 6))

    return Follower()
