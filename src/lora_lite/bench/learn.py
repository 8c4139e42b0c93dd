"""One run of the leaderboard: one method on one task, so many steps on the same rows in the same order, one rate."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

import lora_lite as ll

Phase = Literal["select", "final"]
Split = Literal["validation", "test"]
Tick = Callable[[int, int], None]
"""Called with (step, steps)."""
CHECKPOINT = 60.0
"""Seconds between two checkpoints of a run."""
WARMUP = 0.05
"""Share of the steps in which the rate rises; it falls as a cosine after that."""
CALIBRATION = 4
"""Batches for methods that start from data."""
APART = 1_000_000
"""Steps between the rows of two seeds: a method whose start is fixed would else run the same run three times."""
KEPT = 100
"""Losses that a row keeps, each the mean of a stretch of steps."""
TIMED = 5
"""Steps of the finished adapter that are timed, each beside one of LoRA."""


class Task(Protocol):
    """What a method learns: a base, rows in an order that seeds change and methods do not, and questions that training
    has not."""

    name: str
    fields: dict[str, Any]
    """What the task asks of every config, such as a head that is trained beside the adapter."""
    head_lr: float | None
    """The rate of that head, the same for all methods and rates; None where there is none."""

    def load(self) -> nn.Module:
        """A fresh base with the same weights at every call."""
        ...

    def batch(self, step: int) -> dict[str, Tensor]:
        """The rows of this step, a function of the step alone. Below 0: rows for calibration."""
        ...

    def examine(self, model: nn.Module, split: Split) -> tuple[float, float, int]:
        """(share of right answers, loss, number of questions)."""
        ...

    def remembered(self, model: nn.Module) -> float | None:
        """Loss on text of the base's own training; None where the task has no such text."""
        ...


@dataclass(frozen=True)
class Setting:
    """What decides a run. Two runs with one `key` are the same run."""

    task: str
    method: str
    phase: Phase
    seed: int
    lr: float
    steps: int
    fields: dict[str, Any] = field(default_factory=dict)
    """Changes of the method's config."""

    @property
    def key(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.task}-{self.method}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @classmethod
    def of(cls, row: dict[str, Any]) -> Setting:
        """The setting of a finished row."""
        return cls(**{name: row[name] for name in cls.__dataclass_fields__})


def config(task: Task, setting: Setting) -> ll.AdapterConfig:
    variant = ll.get_variant(setting.method)
    return variant.config(variant=variant.name, seed=setting.seed, **{**task.fields, **setting.fields})


def run(
    task: Task, setting: Setting, folder: Path, tick: Tick = lambda done, steps: None, device: str = "cpu"
) -> dict[str, Any]:
    """Train, then answer the validation questions (phase "select") or those of the test (phase "final").

    The run leaves a checkpoint in `folder` once a minute and goes on from it; a finished run leaves none. The device is
    no part of the setting: a run that was finished on another one counts.

    Returns:
        A row of plain data: the setting, accuracy, loss, problems, trained parameters, ms of processor time per step,
        the losses, and the device. A final row also has the bytes of the file, the loss on the base's own text, MB at
        the peak of a step (`step_mb`), and the median step over that of LoRA at its default size, step by step on the
        same batches (`step_vs_lora`).
    """
    torch.manual_seed(setting.seed)
    course = _Course(task, setting, folder, device)
    course.train(tick)
    model, split = course.model, "validation" if setting.phase == "select" else "test"
    accuracy, loss, problems = task.examine(model, split)
    row: dict[str, Any] = {
        **asdict(setting),
        "split": split,
        "accuracy": round(accuracy, 4),
        "loss": _plain(loss),
        "problems": problems,
        "trained": course.handle.num_parameters(),
        "ms_per_step": round(1000 * course.seconds / max(1, len(course.losses)), 2),
        "attach_s": round(course.attach_seconds, 3),
        "losses": stretches(course.losses),
    }
    if setting.phase == "final":
        row["file_bytes"] = course.file_bytes()
        row["remembered"] = _remembered(task, model)
        row["step_mb"] = course.step_mb()
        row["step_vs_lora"] = course.beside_lora()
    course.forget()
    return row | machine(device)


class _Course:
    """The training of one run, whole or from its checkpoint."""

    def __init__(self, task: Task, setting: Setting, folder: Path, device: str) -> None:
        self.task, self.setting, self.device = task, setting, device
        self.folder, self.state = folder, folder / f"{setting.key}.pt"
        self.losses: list[float] = []
        self.seconds = 0.0
        task.batch(0)  # the rows are read before the first step is timed
        saved = torch.load(self.state, weights_only=True) if self.state.is_file() else None
        self.model, start = task.load().to(device), time.perf_counter()
        self.handle = self._attached(saved)
        self.attach_seconds = time.perf_counter() - start
        variant = ll.get_variant(setting.method)
        self.optimizer = torch.optim.AdamW(
            self.handle.param_groups(setting.lr, modules_lr=task.head_lr), weight_decay=0.0
        )
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        if saved is not None:
            self.optimizer.load_state_dict(saved["optimizer"])
            self.losses, self.seconds, self.attach_seconds = saved["losses"], saved["seconds"], saved["attach_seconds"]
        if variant.on_step is not None:
            ll.schedule(self.model, self.optimizer, setting.steps)
        self.penalised = variant.penalty is not None

    def _attached(self, saved: dict[str, Any] | None) -> ll.Adapter:
        if saved is not None:
            return ll.load(self.model, self._file(len(saved["losses"])), trainable=True)
        variant = ll.get_variant(self.setting.method)
        data = [self._batch(-1 - i) for i in range(CALIBRATION)] if variant.needs_data else None
        return ll.attach(self.model, config(self.task, self.setting), calibration_data=data)

    def _batch(self, step: int) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in self.task.batch(step).items()}

    def train(self, tick: Tick) -> None:
        self.model.train()
        saved = time.monotonic()
        for step in range(len(self.losses), self.setting.steps):
            start = time.process_time()
            self.losses.append(self._step(step))
            self.seconds += time.process_time() - start
            tick(step + 1, self.setting.steps)
            if not math.isfinite(self.losses[-1]):
                break  # a rate that is too high is a result too
            if time.monotonic() - saved > CHECKPOINT:
                self._save()
                saved = time.monotonic()
        self.model.eval()

    def _step(self, step: int) -> float:
        torch.manual_seed(1_000_003 * self.setting.seed + step)  # dropout is a function of the step, also after a stop
        rise = (step + 1) / max(1.0, WARMUP * self.setting.steps)
        shape = min(1.0, rise) * 0.5 * (1 + math.cos(math.pi * step / self.setting.steps))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * shape
        loss = self._passes(self._batch(self.setting.seed * APART + step))
        torch.nn.utils.clip_grad_norm_(list(self.handle.parameters()), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss)

    def _passes(self, batch: dict[str, Tensor]) -> Tensor:
        """Forward and backward; the loss, without what the method adds to it."""
        loss: Tensor = self.model(**batch).loss
        (loss + ll.penalty(self.model) if self.penalised else loss).backward()
        return loss.detach()

    def step_mb(self) -> float:
        """MB at the peak of a step's passes beyond weights, adapter and optimiser: every tensor that is made counts
        from then until nothing refers to it, so that the figure is the same on every machine. Of a GPU, what torch
        took."""
        from .memory import Live

        batch = self._batch(0)
        self.model.train()
        if self.device == "cpu":
            with Live(self.model) as live:
                self._passes(batch)
            found = live.peak
        else:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self._passes(batch)
            found = torch.cuda.max_memory_allocated() - before
        self.optimizer.zero_grad()
        return round(found / 2**20, 3)

    def beside_lora(self) -> float:
        """Median of a step of this adapter over one of LoRA, forward, backward and optimiser, turn by turn."""
        plain = Setting(self.task.name, "lora", "final", self.setting.seed, 1e-4, self.setting.steps)
        lora, took = _Course(self.task, plain, self.folder, self.device), dict[_Course, list[float]]()
        for step in range(-1, TIMED):
            for course in (self, lora):
                course.model.train()
                start = _clock(self.device)
                course._step(max(step, 0))
                if step >= 0:  # the first is a warm-up
                    took.setdefault(course, []).append(_clock(self.device) - start)
        return round(statistics.median(took[self]) / statistics.median(took[lora]), 3)

    def _file(self, step: int) -> Path:
        return self.folder / f"{self.setting.key}-{step}.safetensors"

    def file_bytes(self) -> int:
        """Size of the finished adapter's file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return ll.save(self.model, self._file(self.setting.steps)).stat().st_size

    def _save(self) -> None:
        """The adapter's file of this step, then the rest, which names the step: a run that is killed in between goes on
        from the checkpoint before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        step = len(self.losses)
        ll.save(self.model, self._file(step), compact=False)
        beside = self.state.with_suffix(".tmp")
        rest = {"optimizer": self.optimizer.state_dict(), "losses": self.losses, "seconds": self.seconds}
        torch.save(rest | {"attach_seconds": self.attach_seconds}, beside)
        beside.replace(self.state)
        for path in self.folder.glob(f"{self.setting.key}-*.safetensors"):
            if path != self._file(step):
                path.unlink()

    def forget(self) -> None:
        """Remove the checkpoint."""
        for path in (self.state, *self.folder.glob(f"{self.setting.key}-*.safetensors")):
            path.unlink(missing_ok=True)


def _remembered(task: Task, model: nn.Module) -> dict[str, float] | None:
    """Loss on the base's own text, before and after. For methods that edit prompts the whole text is one."""
    with ll.prompt(model, None):
        after = task.remembered(model)
        if after is None:
            return None
        with ll.active(model, None):
            before = task.remembered(model)
    return {"before": _plain(before), "after": _plain(after)}


def _plain(value: float | None) -> Any:
    """A figure as JSON can hold it."""
    return None if value is None or not math.isfinite(value) else round(value, 5)


def stretches(losses: list[float]) -> list[Any]:
    """At most `KEPT` means of stretches of equal length, in order."""
    length = max(1, math.ceil(len(losses) / KEPT))
    return [_plain(sum(part) / len(part)) for i in range(0, len(losses), length) if (part := losses[i : i + length])]


def _clock(device: str) -> float:
    """Processor time of this process; on a GPU the time of day once it has nothing left to do."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the run ran on."""
    versions = {"torch": torch.__version__, "python": platform.python_version(), "lora_lite": ll.__version__}
    name = torch.cuda.get_device_name() if device != "cpu" else "cpu"
    return {
        "versions": versions,
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "device": name,
    }
