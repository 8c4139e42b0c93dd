"""What a method costs against PEFT and against the least possible: forward, training step, memory.

All runs of one method live in one process and are interleaved (bare base, PEFT, ours, repeat); one thread, process
time. The limit of a step is the frozen base with a backward pass through its activations only. Figures are medians of
paired ratios with quartiles; a goal counts as missed when the lower quartile lies above it. Memory: what autograd saves
between the passes (unique storages, parameters not counted) and the peak of what the allocator hands out in one step.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import lora_lite as ll

SIZES: dict[str, dict[str, Any]] = {
    "S4": {"hidden_size": 384, "num_hidden_layers": 4, "intermediate_size": 1536, "num_attention_heads": 6},
    "M3": {"hidden_size": 768, "num_hidden_layers": 3, "intermediate_size": 2048, "num_attention_heads": 12},
    "tiny": {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48, "num_attention_heads": 2},
}
VOCABULARY = 8192
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Pair = tuple[dict[str, Any], tuple[str, dict[str, Any]]]
# method -> (our fields, PEFT's config class and arguments): the same method at the same size
PAIRS: dict[str, Callable[[int], Pair]] = {
    "lora": lambda r: ({"r": r, "alpha": 2 * r}, ("LoraConfig", {"r": r, "lora_alpha": 2 * r})),
    "lora+dropout": lambda r: (
        {"r": r, "alpha": 2 * r, "dropout": 0.1},
        ("LoraConfig", {"r": r, "lora_alpha": 2 * r, "lora_dropout": 0.1}),
    ),
    "dora": lambda r: ({"r": r, "alpha": 2 * r}, ("LoraConfig", {"r": r, "lora_alpha": 2 * r, "use_dora": True})),
    "hra": lambda r: ({"r": r}, ("HRAConfig", {"r": r})),
    "boft": lambda r: ({"n_factors": 1}, ("BOFTConfig", {"boft_block_size": 4})),
    "oft": lambda r: ({}, ("OFTConfig", {"oft_block_size": 32, "use_cayley_neumann": False})),
    "oft+series": lambda r: ({"neumann_terms": 5}, ("OFTConfig", {"oft_block_size": 32, "use_cayley_neumann": True})),
    "road": lambda r: ({}, ("RoadConfig", {"variant": "road_1"})),
    "delora": lambda r: ({"r": r}, ("DeloraConfig", {"r": r})),
    "ia3": lambda r: ({}, ("IA3Config", {"feedforward_modules": []})),
}
GOALS: dict[str, dict[str, float]] = {
    "lora": {"forward_vs_peft": 0.97, "step_vs_peft": 1.00, "ours_step_vs_base": 1.18, "saved_vs_peft": 1.0},
    "lora+dropout": {"saved_vs_peft": 0.5},
    "dora": {"forward_vs_peft": 0.62, "step_vs_peft": 0.75, "ours_step_vs_base": 1.22},
    "hra": {"forward_vs_peft": 0.20, "step_vs_peft": 0.20, "ours_step_vs_base": 1.18},
    "boft": {"forward_vs_peft": 0.20, "step_vs_peft": 0.20, "ours_step_vs_base": 1.38},
    "oft": {"forward_vs_peft": 0.96, "step_vs_peft": 0.88, "ours_step_vs_base": 1.10},
    "oft+series": {"forward_vs_peft": 0.96, "step_vs_peft": 0.88, "ours_step_vs_base": 1.10},
    "road": {"forward_vs_peft": 0.85, "step_vs_peft": 0.86, "ours_step_vs_base": 1.26, "saved_vs_peft": 0.6},
    "delora": {"forward_vs_peft": 0.90, "step_vs_peft": 0.97},
    "ia3": {"forward_vs_peft": 0.98, "step_vs_peft": 1.00},
}
"""Upper bounds of the ratios. `saved_vs_peft`: what autograd saves beyond the bare base, ours over PEFT's."""
WITHOUT_RANK = ("boft", "oft", "oft+series", "road", "ia3")
"""Methods whose size does not depend on r."""


def methods() -> list[str]:
    """What can be timed: the pairs with PEFT, then every other trained method at linear layers that needs no data."""
    others = [v.name for v in ll.variants() if v.site == ll.Variant.site and v.trains and not v.needs_data]
    return [*PAIRS, *(n for n in others if n not in PAIRS)]


def has_peft() -> bool:
    try:
        import peft  # noqa: F401
    except ImportError:
        return False
    return True


def base(size: str) -> Any:
    """A Llama from a config, the same weights in every call, frozen."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **SIZES[size])).requires_grad_(False)


def ours(size: str, method: str, r: int) -> Any:
    model = base(size)
    variant = ll.get_variant(method.split("+")[0])
    fields: dict[str, Any] = PAIRS[method](r)[0] if method in PAIRS else {"r": r}
    ll.attach(model, variant.config(variant=variant.name, **fields))
    return model


def theirs(size: str, method: str, r: int) -> Any | None:
    """PEFT's model; None where it has no such method or is missing."""
    if method not in PAIRS or not has_peft():
        return None
    import peft

    name, arguments = PAIRS[method](r)[1]
    return peft.get_peft_model(base(size), getattr(peft, name)(target_modules=ALL, **arguments))


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
    with (
        without_stderr(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof,
    ):
        step(model, ids)
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
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    models = {"base": base(size), "peft": theirs(size, method, r), "ours": ours(size, method, r)}
    models = {k: m.train() for k, m in models.items() if m is not None}
    row: dict[str, Any] = {"method": method, "size": size, "shape": shape, "r": r, "rounds": rounds}
    row["trained"] = sum(p.numel() for p in models["ours"].parameters() if p.requires_grad)
    row |= _ratios(_timed(models, ids, rounds, tick)) | _memory(models, ids)
    del models
    gc.collect()
    return row


Times = dict[str, dict[str, list[float]]]
"""forward or step -> model -> seconds of every round."""


def _timed(models: dict[str, Any], ids: torch.Tensor, rounds: int, tick: Callable[[], None]) -> Times:
    """Processor time, the models one after the other in every round."""
    times: Times = {what: {k: [] for k in models} for what in ("forward", "step")}
    for i in range(rounds + 1):
        for name, model in models.items():
            for what, run in (("forward", forward), ("step", step)):
                start = time.process_time()
                run(model, ids)
                if i:  # the first round warms up
                    times[what][name].append(time.process_time() - start)
        tick()
    return times


def _ratios(times: Times) -> dict[str, Any]:
    row = {}
    for what, found in times.items():
        row[f"ours_{what}_vs_base"] = paired(found["ours"], found["base"])
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


def verdicts(row: dict) -> dict[str, str]:
    """Goal -> "met", "missed", or "beyond the base": the bare base itself is not that much faster than PEFT here."""
    out = {}
    for key, goal in GOALS.get(row["method"], {}).items():
        if key not in row:
            continue
        got = row[key]["q1"] if isinstance(row[key], dict) else row[key]
        out[key] = "met" if got <= goal else "missed"
        floor = row.get("peft_" + key.replace("_vs_peft", "_vs_base"))
        if out[key] == "missed" and key.endswith("_vs_peft") and floor and goal * floor["median"] < 1:
            out[key] = "beyond the base"
    return out


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
