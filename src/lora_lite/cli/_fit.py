"""Training as the commands do it: transformers' Trainer or TRL's beneath, our log, bar and picture on top."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lora_lite as ll

from ..core.errors import size_text
from ..data.batches import collate
from ..interop.trainer import adapter_trainer
from ._base import processes
from ._console import Bar, clock, is_first
from ._folder import checkpoints, step_of
from ._log import RunLog
from ._session import pad_of

Rows = Sequence[dict[str, Any]]
LOOKS = 100
"""How often in a run the updates are measured."""


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
    patience: int = 0
    bf16: bool = False
    report_to: tuple[str, ...] = ()
    gradient_checkpointing: bool = False
    trainer: str = "hf"
    beta: float = 0.1
    max_length: int | None = None


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
        StateError: the loss or its gradient is no longer finite.
        FileError: the disk is full.
        KeyboardInterrupt: after Ctrl-C, once the step that ran has ended and is kept; after a second one at once.
    """
    base, arguments_class = _classes(options.trainer)
    fields = {f.name for f in dataclasses.fields(arguments_class)}
    pairs = options.trainer == "dpo"
    recompute = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    arguments = arguments_class(
        **_arguments(options, out, bool(evals), resume is None),
        use_cpu=next(model.parameters()).device.type == "cpu",
        **{recompute: options.gradient_checkpointing},
        **({f"{recompute}_kwargs": {"use_reentrant": False}} if options.gradient_checkpointing else {}),
        **({"beta": options.beta, "max_length": options.max_length} if pairs else {}),
    )
    trainer = adapter_trainer(base)(
        model=model,
        args=arguments,
        train_dataset=_dataset(train, options.trainer),
        eval_dataset=_dataset(evals, options.trainer) if evals else None,
        **({} if pairs else {"data_collator": functools.partial(collate, pad=pad_of(tokenizer))}),
        **({} if options.trainer == "hf" else {"processing_class": tokenizer}),
    )
    from transformers import PrinterCallback, ProgressCallback

    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    trainer.create_model_card = lambda *_, **__: None  # TRL's would describe a whole model
    with Bar("training", options.steps) as bar, stopping(bar) as stop:
        trainer.add_callback(_follower(log, bar, options, out, Moved(model), stop))
        try:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        except Exception as e:
            if _disk_is_full(e):
                raise ll.FileError(f"the disk that holds {out} is full; {_kept(out)}") from None
            raise
        finally:
            with contextlib.suppress(OSError):  # on a full disk, what was said of it stays
                log.draw()
    return trainer


def _disk_is_full(e: Exception) -> bool:
    """Python, safetensors and torch each say it in their own way."""
    full = isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left" in str(e) or "PytorchStreamWriter failed" in str(e)


def _kept(out: Path) -> str:
    """What is left of a run that stopped."""
    found = checkpoints(out)
    return f"{found[-1]} is kept." if found else "no checkpoint had been written yet."


def _left_good(out: Path, worst: int) -> str:
    """What is left of a run that diverged: the checkpoints before the step from which the wrong loss came. That one, if
    it was kept, is no good and goes."""
    if is_first():
        for path in checkpoints(out):
            if step_of(path) >= worst:
                shutil.rmtree(path)
    found = checkpoints(out)
    return f"{found[-1]} is kept: --init-from {found[-1]} begins there." if found else "no good checkpoint is left."


class Stop:
    """Whether somebody asked the run to end, and whether there is a step to end after."""

    asked = training = False


@contextmanager
def stopping(bar: Bar) -> Iterator[Stop]:
    """Inside, the first Ctrl-C asks for an end after the step that runs, so that a checkpoint of it can be kept; the
    second one strikes at once, and so does any that comes before the first step."""
    stop = Stop()
    alone = processes() == 1 and threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield stop
        return

    def ask(*_: Any) -> None:
        if stop.asked or not stop.training:
            raise KeyboardInterrupt
        stop.asked = True
        bar.remark("stopping after this step; Ctrl-C again stops at once")

    signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _classes(trainer: str) -> tuple[type, Any]:
    if trainer == "dpo":
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.dpo_trainer import DPOTrainer

        return DPOTrainer, DPOConfig
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
        "bf16": o.bf16,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "no" if o.trainer == "dpo" else "non_padding",
        "report_to": list(o.report_to),
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "prediction_loss_only": True,
    }


def _dataset(rows: Rows, trainer: str) -> Any:
    if trainer == "hf":
        return list(rows)
    from datasets import Dataset

    return Dataset.from_list(list(rows))


class Moved:
    """How far the trained tensors have gone from where they began, block by block."""

    def __init__(self, model: Any) -> None:
        self.start = [(block_of(n), p, p.detach().clone()) for n, p in model.named_parameters() if p.requires_grad]

    def norms(self) -> dict[str, float]:
        """Block -> norm of the update of all its trained tensors together."""
        sums: dict[str, float] = {}
        for block, p, start in self.start:
            if p.shape == start.shape:
                sums[block] = sums.get(block, 0.0) + float((p.detach().float() - start.float()).square().sum())
        return {block: round(total**0.5, 6) for block, total in sums.items()}


def block_of(name: str) -> str:
    """The block in which a parameter stands: its path up to the first number, or that of its layer."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[:-1] if number is None else parts[: number + 1])


def _follower(log: RunLog, bar: Bar, options: Options, out: Path, moved: Moved, stop: Stop) -> Any:
    """A callback: every step into the log and onto the bar; a run that diverges, no longer improves or is to end is
    stopped."""
    from transformers import TrainerCallback

    class Follower(TrainerCallback):
        best, since, begun, mark, tokens = math.inf, 0, False, 0.0, 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            log.speaks = state.is_world_process_zero
            log.keep(state.global_step)
            for row in log.rows:
                self.judge(row.get("eval_loss"))

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not self.begun:  # after the evaluation that precedes the first step
                self.begun, self.mark, self.tokens = True, time.monotonic(), state.num_input_tokens_seen
                bar.begin_at(state.global_step)
            stop.training = True

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step >= options.steps and args.eval_strategy != "no":
                control.should_evaluate = True  # so that the last figure is one of the result
            control.should_save |= stop.asked

        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_save |= stop.asked

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if stop.asked:
                raise KeyboardInterrupt

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            logs = logs or {}
            loss = logs.get("loss", logs.get("eval_loss"))
            if loss is None:  # the summary of the whole run
                return
            for what, value in (("loss", loss), ("norm of the gradient", logs.get("grad_norm", 0.0))):
                if not math.isfinite(value):
                    worst = state.global_step - (what == "loss" and "loss" in logs)  # the loss is that before the step
                    raise ll.StateError(
                        f"the {what} is {value} at step {state.global_step}: training diverged. Try a smaller --lr (it "
                        f"was {args.learning_rate:g}) or more --warmup; {_left_good(out, worst)}"
                    )
            if "loss" in logs:
                self.step(state, logs, float(loss))
            else:
                log.add(state.global_step, eval_loss=round(float(loss), 6))
                if self.judge(float(loss)):
                    control.should_training_stop = True

        def step(self, state: Any, logs: Any, loss: float) -> None:
            grad = float(logs.get("grad_norm", 0.0))
            often = max(1, options.steps // LOOKS)
            looked = state.global_step % often == 0 or state.global_step == options.steps
            extra: dict[str, Any] = {"updates": moved.norms()} if looked else {}
            if "rewards/margins" in logs:
                extra |= {"margin": float(logs["rewards/margins"]), "preferred": float(logs["rewards/accuracies"])}
            log.add(
                state.global_step,
                loss=round(loss, 6),
                lr=float(logs["learning_rate"]),
                grad_norm=round(grad, 6),
                tokens=int(state.num_input_tokens_seen),
                **extra,
            )
            bar.update(state.global_step, figures(log, loss, float(logs["learning_rate"]), grad, self.rate(state)))

        def rate(self, state: Any) -> float:
            """Tokens a second since the first step of this call."""
            return (state.num_input_tokens_seen - self.tokens) / max(1e-9, time.monotonic() - self.mark)

        def judge(self, eval_loss: float | None) -> bool:
            """Whether so many evaluations in a row were no better than the best before them."""
            if eval_loss is None:
                return False
            self.best, self.since = (eval_loss, 0) if eval_loss < self.best else (self.best, self.since + 1)
            return bool(options.patience) and self.since >= options.patience

    return Follower()


def figures(log: RunLog, loss: float, lr: float, grad: float, rate: float) -> str:
    """The state of a run on one line."""
    evals = [row["eval_loss"] for row in log.rows if "eval_loss" in row]
    parts = [f"loss {loss:.3f}"] + ([f"eval {evals[-1]:.3f}"] if evals else [])
    parts += [f"lr {lr:.1e}", f"grad {grad:.2f}"] + ([f"{rate:,.0f} tokens/s"] if rate else [])
    return ", ".join([*parts, *memory()])


def memory() -> list[str]:
    """The most memory that was in use, on the accelerator or in this process."""
    import torch

    if torch.cuda.is_available():
        return [size_text(torch.cuda.max_memory_allocated())]
    try:
        import resource
    except ImportError:  # not on Windows
        return []
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return [size_text(peak if sys.platform == "darwin" else peak * 1024)]


def last_figures(log: RunLog, seconds: float, trained_tokens: int) -> str:
    """What stays on the terminal after the bar is gone."""
    rows = [row for row in log.rows if "loss" in row]
    if not rows:
        return f"trained in {clock(seconds)}"
    last = rows[-1]
    text = figures(log, last["loss"], last["lr"], last["grad_norm"], trained_tokens / max(1e-9, seconds))
    return f"step {last['step']}: {text}; {clock(seconds)}"
