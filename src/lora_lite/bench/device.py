"""Absolute times on one device: the base, PEFT and ours, eager and compiled, at the shapes that people train and
serve.

Each unit (a model with one adapter, eager or compiled) is built alone, measured and dropped, and is one row of the
JSON; a unit that fails says why and the run goes on. Times are medians of wall clock around a synchronised device. Peak
memory is all that the device held at once in a training step, weights included.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

import lora_lite as ll

from .pairs import config, has_peft, peft_config
from .speed import forward, highest_bytes, step

LLAMA = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8}
SIZES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        **LLAMA,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {**LLAMA, "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336},
    "tiny": {
        "vocab_size": 128,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "intermediate_size": 48,
        "num_attention_heads": 2,
    },
}
"""Configs of the two published models, and one for trying the run out."""
DECODE = (1, 64)
"""Rows of a decoding batch."""
PROMPT, TOKENS = 16, 8


@dataclass(frozen=True)
class Unit:
    """What one row measures."""

    who: Literal["base", "peft", "ours"]
    method: str
    """"-" of the base."""
    mode: Literal["eager", "compiled"]
    size: str
    shape: str
    r: int

    @property
    def key(self) -> tuple[Any, ...]:
        return self.who, self.method, self.mode, self.size, self.shape, self.r


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """The unit that a row measured."""
    return tuple(row[k] for k in ("who", "method", "mode", "size", "shape", "r"))


def check_device(device: str) -> None:
    """Refuse a device that is not here.

    Raises:
        ConfigError: no CUDA device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ll.ConfigError(
            f"--device cuda: torch {torch.__version__} finds no CUDA device here. Run this on a machine with a GPU and "
            "a CUDA build of torch; lora-lite bench --device cpu --size tiny tries the same run without one."
        )


def units(methods: tuple[str, ...], sizes: tuple[str, ...], shapes: tuple[str, ...], r: int) -> list[Unit]:
    """Every unit of a run: the base once for each size and shape, then PEFT and ours, eager and compiled."""
    found = []
    for size in sizes:
        for shape in shapes:
            for who, method in _contestants(methods):
                found += [Unit(who, method, mode, size, shape, r if method != "-" else 0) for mode in _modes()]
    return found


def _modes() -> tuple[Literal["eager"], Literal["compiled"]]:
    return "eager", "compiled"


def _contestants(methods: tuple[str, ...]) -> Iterator[tuple[Literal["base", "peft", "ours"], str]]:
    from .pairs import PAIRS

    yield "base", "-"
    for method in methods:
        if method in PAIRS and has_peft():
            yield "peft", method
        yield "ours", method


def measure(unit: Unit, device: str, rounds: int) -> dict[str, Any]:
    """One row; `failed` says what went wrong in a unit that could not be measured."""
    row: dict[str, Any] = {**unit.__dict__, "device": device, "rounds": rounds}
    try:
        row |= _measured(unit, device, rounds)
    except Exception as e:  # out of memory, a graph that another library breaks: the run needs nobody
        row["failed"] = f"{type(e).__name__}: {(str(e).strip() or '-').splitlines()[0]}"
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return row


def _measured(unit: Unit, device: str, rounds: int) -> dict[str, Any]:
    model = build(unit, device).train()
    batch, length = map(int, unit.shape.split("x"))
    ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device)
    row: dict[str, Any] = {"trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    compiled = unit.mode == "compiled"
    if compiled:
        model.compile(dynamic=False)
        row["compile_s"] = round(_wall(lambda: step(model, ids), device), 3)
    row["forward_ms"] = _median(lambda: forward(model, ids), device, rounds)
    row["step_ms"] = _median(lambda: step(model, ids), device, rounds)
    row["peak_mb"] = round(_peak(model, lambda: step(model, ids), device) / 2**20, 1)
    model.eval()
    for rows in DECODE:
        row[f"decode_{rows}_ms"] = _decode(model, rows, device, rounds)
    return row


def build(unit: Unit, device: str) -> Any:
    """The unit's model in bf16 on the device, from its config."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES[unit.size]), dtype=torch.bfloat16)
    model.requires_grad_(False)
    if unit.who == "ours":
        ll.attach(model, config(unit.method, unit.r))
    if unit.who == "peft":
        import peft

        model = peft.get_peft_model(model, peft_config(unit.method, unit.r))
    return model


def _decode(model: Any, rows: int, device: str, rounds: int) -> float:
    """Milliseconds per token of a batch of so many rows, with a cache of fixed size, so that shapes stay."""
    from transformers import StaticCache

    prompt = torch.zeros(rows, PROMPT, dtype=torch.long, device=device)
    token = prompt[:, :1]

    def generate() -> float:
        cache = StaticCache(config=model.config, max_cache_len=PROMPT + TOKENS)
        model(prompt, past_key_values=cache, use_cache=True)
        return _wall(lambda: [model(token, past_key_values=cache, use_cache=True) for _ in range(TOKENS)], device)

    with torch.no_grad():
        generate()
        took = [generate() / TOKENS for _ in range(rounds)]
    return round(1000 * statistics.median(took), 4)


def _median(run: Callable[[], object], device: str, rounds: int) -> float:
    run()
    return round(1000 * statistics.median(_wall(run, device) for _ in range(rounds)), 4)


def _wall(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak(model: Any, run: Callable[[], object], device: str) -> int:
    """Bytes held at once while `run` runs, weights included."""
    if device != "cuda":
        return sum(t.nbytes for t in (*model.parameters(), *model.buffers())) + highest_bytes(run)
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated()


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `*_vs_base`: over the base of the same size, shape and mode."""
    bases = {(r["mode"], r["size"], r["shape"]): r for r in rows if r["who"] == "base"}
    found = []
    for row in rows:
        base = bases.get((row["mode"], row["size"], row["shape"]), {})
        figures = [k for k in row if k.endswith(("_ms", "_mb"))]
        ratios = {f"{k[:-3]}_vs_base": round(row[k] / base[k], 3) for k in figures if base.get(k)}
        found.append({**row, **ratios})
    return found


FIGURES = ("forward_ms", "step_ms", *(f"decode_{rows}_ms" for rows in DECODE), "peak_mb", "compile_s")
COLUMNS = ("method", "model", "tokens", "r", "who", "mode", *(f.replace("_", " ") for f in FIGURES))


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table: absolute figures, and in brackets the multiple of the base in the same mode."""
    first = [row["method"], row["size"], row["shape"], str(row["r"]), row["who"], row["mode"]]
    if "failed" in row:
        return [*first, row["failed"], *[""] * (len(FIGURES) - 1)]

    def shown(key: str) -> str:
        ratio = row.get(f"{key[:-3]}_vs_base")
        value = f"{row[key]:,.2f}" if key in row else "-"
        return value if ratio is None or row["who"] == "base" else f"{value} ({ratio:.2f})"

    return [*first, *map(shown, FIGURES)]


def machine(device: str) -> dict[str, Any]:
    """Versions, and the device's name."""
    from .speed import machine as host

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {**host(), "device": name, "cuda": torch.version.cuda}


def markdown(data: dict[str, Any]) -> str:
    """The table of one JSON."""
    m = data["machine"]
    lines = [
        f"# Absolute times on {m['device']}",
        "",
        f"Generated by `lora-lite bench --device`: bf16, torch {m['torch']}, transformers {m['transformers']}, peft "
        f"{m.get('peft', 'missing')}; medians of wall clock, in brackets the multiple of the base in the same mode. "
        "What is missing was not measured.",
        "",
        "How to read it: where the device has little to do (one token, or few tokens on a small model: compare the "
        "base's forward with its token), it waits for the host, and the figures count Python and the launching of "
        "kernels, which also scatter most. Where it has much to do, they count arithmetic and memory traffic.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    return "\n".join([*lines, *("| " + " | ".join(cells(row)) + " |" for row in data["rows"])]) + "\n"
