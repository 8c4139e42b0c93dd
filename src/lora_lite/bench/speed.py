"""What a method costs against PEFT and against the least possible: forward, training step, one token, memory, verbs.

All runs of one method live in one process and are interleaved (bare base, PEFT, ours, repeat); one thread, process
time. The limit of a step is the frozen base with a backward pass through its activations only. Figures are medians of
paired ratios with quartiles. Memory: what autograd saves between the passes (unique storages, parameters not counted)
and the peak of what the allocator hands out in one step.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import lora_lite as ll

from . import verbs
from .goals import GOALS, verdicts
from .pairs import PAIRS, SIZES, VOCABULARY, WITHOUT_RANK, all_three, base, has_peft, methods, ours, theirs

__all__ = [
    "GOALS",
    "PAIRS",
    "SIZES",
    "VOCABULARY",
    "WITHOUT_RANK",
    "base",
    "has_peft",
    "measure",
    "methods",
    "ours",
    "theirs",
    "verdicts",
]


def forward(model: nn.Module, ids: Tensor) -> None:
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)


def step(model: Any, ids: Tensor) -> None:
    """Forward and backward to the embeddings and to whatever trains; no optimiser."""
    embeds = model.get_input_embeddings()(ids)
    embeds = embeds if embeds.requires_grad else embeds.detach().requires_grad_(True)  # an adapted embedding trains
    model(inputs_embeds=embeds, labels=ids, use_cache=False).loss.backward()
    for p in model.parameters():
        p.grad = None


def saved_bytes(model: Any, ids: Tensor) -> int:
    """What a step keeps between forward and backward."""
    return kept_bytes(model, lambda: step(model, ids))


def kept_bytes(model: Any, run: Callable[[], object]) -> int:
    """Bytes that autograd keeps in `run`, forward and backward: unique storages, parameters and buffers not counted."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.layout != torch.strided:  # a rival's sparse matrix, which has no storage to tell it by: not counted
            return t
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(seen.values())


@contextmanager
def without_stderr() -> Iterator[None]:
    """The profiler announces itself on the process's stderr, below Python."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_bytes(model: Any, ids: Tensor) -> int:
    """Largest sum of live allocations during one step, above what was there before it."""
    return highest_bytes(lambda: step(model, ids))


def highest_bytes(run: Callable[[], object]) -> int:
    """Largest sum of live allocations during one call, above what was there before it."""
    with (
        without_stderr(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof,
    ):
        run()
    profiler: Any = prof.profiler
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def summary(values: list[float]) -> dict[str, float]:
    q1, q2, q3 = statistics.quantiles(values, n=4)
    return {"median": round(q2, 3), "q1": round(q1, 3), "q3": round(q3, 3)}


def paired(a: list[float], b: list[float]) -> dict[str, float]:
    return summary([x / y for x, y in zip(a, b, strict=True)])


def measure(method: str, size: str, shape: str, r: int, rounds: int, tick: Callable[[], None] = lambda: None) -> dict:
    """One row: every ratio of one method at one size. `tick` is called after every round."""
    rows, length = map(int, shape.split("x"))
    models = all_three(size, method, r)
    vocabulary = models["base"].config.vocab_size
    ids = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    row: dict[str, Any] = {"method": method, "size": size, "shape": shape, "r": r, "rounds": rounds}
    row["trained"] = sum(p.numel() for p in models["ours"].parameters() if p.requires_grad)
    row |= _ratios(_timed(models, ids, rounds, tick)) | _memory(models, ids)
    del models["base"]
    ll.detach(models["ours"])
    if "peft" in models:
        models["peft"] = models["peft"].unload()
    row |= verbs.measure(models, method, r, rounds, highest_bytes)
    tick()
    del models
    gc.collect()
    return row


Times = dict[str, dict[str, list[float]]]
"""forward, step or token -> model -> seconds of every round."""


def _timed(models: dict[str, Any], ids: torch.Tensor, rounds: int, tick: Callable[[], None]) -> Times:
    """Processor time, the models one after the other in every round."""
    runs: dict[str, Callable[[Any], float]] = {
        "forward": lambda model: verbs.seconds(lambda: forward(model.train(), ids)),
        "step": lambda model: verbs.seconds(lambda: step(model.train(), ids)),
        "token": verbs.per_token,
    }
    times: Times = {what: {k: [] for k in models} for what in runs}
    for i in range(rounds + 1):
        for what, run in runs.items():
            for name, model in models.items():
                took = run(model)
                if i:  # the first round warms up
                    times[what][name].append(took)
        tick()
    for model in models.values():
        model.train()
    return times


def _ratios(times: Times) -> dict[str, Any]:
    row = {}
    for what, found in times.items():
        row[f"ours_{what}_vs_base"] = paired(found["ours"], found["base"])
        row[f"base_{what}_ms"] = round(1000 * statistics.median(found["base"]), 3)
        if "peft" in found:
            row[f"peft_{what}_vs_base"] = paired(found["peft"], found["base"])
            row[f"{what}_vs_peft"] = paired(found["ours"], found["peft"])
    return row


def _memory(models: dict[str, Any], ids: torch.Tensor) -> dict[str, Any]:
    """What adapters keep beyond the base: bytes saved for the backward pass, and at the peak."""
    row: dict[str, Any] = {}
    saved = {k: saved_bytes(m, ids) for k, m in models.items()}
    peak = {k: peak_bytes(m, ids) for k, m in models.items()}
    for name in models.keys() - {"base"}:
        row[f"{name}_extra_saved_mb"] = round((saved[name] - saved["base"]) / 2**20, 2)
        row[f"{name}_extra_peak_mb"] = round((peak[name] - peak["base"]) / 2**20, 2)
    if "peft" in models:
        row["saved_vs_peft"] = round((saved["ours"] - saved["base"]) / max(1, saved["peft"] - saved["base"]), 3)
    return row


def settings(
    chosen: tuple[str, ...], sizes: tuple[str, ...], shapes: tuple[str, ...], ranks: tuple[int, ...]
) -> Iterator[tuple[str, str, str, int]]:
    """(method, size, shape, r) of every row; a method without a rank takes the first one only."""
    for method in chosen:
        for size in sizes:
            for shape in shapes:
                for r in ranks[:1] if method in WITHOUT_RANK else ranks:
                    yield method, size, shape, r


def machine() -> dict[str, Any]:
    """Versions, and the kind of processor."""
    import transformers

    out = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    if has_peft():
        import peft

        out["peft"] = peft.__version__
    return {**out, "lora_lite": ll.__version__, "threads": torch.get_num_threads(), "processor": platform.machine()}
