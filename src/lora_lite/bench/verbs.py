"""What the verbs take, against PEFT's: attach, plan, save, load, merge, unmerge, and one generated token."""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_lite as ll

from .pairs import config, data, peft_config, targets

PROMPT, TOKENS = 16, 4
PEFT_VERBS = ("attach", "save", "load", "merge", "unmerge")
Seconds = dict[str, list[float]]
"""Verb -> what each round took."""
Peak = Callable[[Callable[[], object]], int]
"""Bytes at the peak of a call."""
Round = tuple[dict[str, float], int | None]
"""Verb -> seconds of one round, and the bytes at the peak of a merge."""


def seconds(run: Callable[[], object]) -> float:
    """Processor time of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def per_token(model: nn.Module) -> float:
    """Seconds per token that continues a key-value cache."""
    from transformers import DynamicCache

    cache, call = DynamicCache(), model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        call(torch.arange(PROMPT, device=device)[None], past_key_values=cache, use_cache=True)
        tokens = [torch.tensor([[i]], device=device) for i in range(TOKENS)]
        return seconds(lambda: [call(t, past_key_values=cache, use_cache=True) for t in tokens]) / TOKENS


def move(parameters: list[Any]) -> None:
    """Away from the identity, where some methods do nothing."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.02 * torch.randn(p.shape, generator=g).to(p))


def of_ours(model: Any, method: str, r: int, folder: Path, peak: Peak | None) -> Round:
    """One round on the bare model, which is bare again afterwards; `peak` measures a merge."""
    cfg, path, batches = config(method, r), folder / "ours.safetensors", data(method, model)
    found: dict[str, float] = {}
    highest = None
    found["plan"] = seconds(lambda: ll.plan(model, cfg))
    found["attach"] = seconds(lambda: ll.attach(model, cfg, calibration_data=batches))
    move(list(ll.adapters(model)["default"].parameters()))
    found["save"] = seconds(lambda: ll.save(model, path))
    ll.detach(model)
    found["load"] = seconds(lambda: ll.load(model, path))
    if ll.get_variant(cfg.variant).affine:
        found["merge"] = seconds(lambda: ll.merge(model))
        found["unmerge"] = seconds(lambda: ll.unmerge(model))
        if peak is not None:
            highest = peak(lambda: ll.merge(model))
            ll.unmerge(model)
    ll.detach(model)
    return found, highest


def of_peft(model: Any, method: str, r: int, folder: Path, peak: Peak | None) -> Round:
    """The same of PEFT."""
    import peft

    made: list[Any] = []
    found: dict[str, float] = {}
    highest = None
    found["attach"] = seconds(lambda: made.append(peft.get_peft_model(model, peft_config(method, r))))
    move([p for p in made[0].parameters() if p.requires_grad])
    where = str(folder / "theirs")
    found["save"] = seconds(lambda: made[0].save_pretrained(where, save_embedding_layers=False))
    bare = made.pop().unload()
    found["load"] = seconds(lambda: made.append(peft.PeftModel.from_pretrained(bare, where)))
    # what some of its methods say who do not merge, or not back
    with torch.no_grad(), suppress(NotImplementedError, ValueError):
        found["merge"] = seconds(made[0].merge_adapter)
        found["unmerge"] = seconds(made[0].unmerge_adapter)
        if peak is not None:
            highest = peak(made[0].merge_adapter)
            made[0].unmerge_adapter()
    made.pop().unload()
    return found, highest


def copying(model: nn.Module) -> float:
    """Seconds that copying the targets' weights takes, the least that an exact merge that can be taken back needs."""
    weights: list[Any] = [m.weight.data for m in targets(model)]
    kept = [w.clone() for w in weights]
    return seconds(lambda: [w.copy_(k) for w, k in zip(weights, kept, strict=True)])


def measure(bare: dict[str, Any], method: str, r: int, rounds: int, peak: Peak) -> dict[str, Any]:
    """Figures of the verbs: medians in milliseconds and paired ratios. `bare` holds models without adapters: "ours",
    and "peft" where it runs. The first round warms up and tells the peaks."""
    times: dict[str, Seconds] = {who: {} for who in bare}
    copies: list[float] = []
    row: dict[str, Any] = {}
    runs = {"peft": of_peft, "ours": of_ours}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(rounds + 1):
            copied = copying(bare["ours"])
            for who, model in bare.items():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # PEFT's, where an unmerge is not exact
                    found, highest = runs[who](model, method, r, Path(folder), None if i else peak)
                if highest is not None:
                    row[f"{who}_merge_peak_mb"] = round(highest / 2**20, 1)
                for verb, took in found.items() if i else ():
                    times[who].setdefault(verb, []).append(took)
            if i:
                copies.append(copied)
    return row | _figures(times, copies)


def _figures(times: dict[str, Seconds], copies: list[float]) -> dict[str, Any]:
    row: dict[str, Any] = {"copy_ms": _ms(copies)}
    for who, found in times.items():
        row |= {f"{who}_{verb}_ms": _ms(took) for verb, took in found.items()}
    for verb in set(PEFT_VERBS) & times["ours"].keys() & times.get("peft", {}).keys():
        row[f"{verb}_vs_peft"] = _ratio(times["ours"][verb], times["peft"][verb])
    for verb in {"merge", "unmerge"} & times["ours"].keys():
        row[f"{verb}_vs_copy"] = _ratio(times["ours"][verb], copies)
    return row


def _ms(took: list[float]) -> float:
    return round(1000 * statistics.median(took), 2)


def _ratio(a: list[float], b: list[float]) -> float:
    return round(statistics.median(x / max(y, 1e-9) for x, y in zip(a, b, strict=True)), 3)
