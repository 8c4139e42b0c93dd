"""What train, demo and eval share: a quiet loading of model and data, seeds and threads, the folder of a run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lora_lite as ll

from ..demo.data import IGNORED, Example, batches, encode, load_examples, load_model

BaseDtype = Literal["float32", "bfloat16", "float16"]
ADAPTER, RUN = "adapter.safetensors", "run.json"
OURS = re.compile(r"adapter\.safetensors|run\.json|log\.jsonl|loss\.png|loss\.tmp\.png|checkpoint-\d+")
"""What a run writes; --overwrite deletes this and nothing else."""


def quiet(debug: bool) -> None:
    """Keep other libraries' chatter, bars and usage reports off the terminal."""
    import logging
    import os
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if debug:
        return
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for package in ("transformers", "accelerate", "trl", "datasets", "torch", "bitsandbytes"):
        warnings.filterwarnings("ignore", module=rf"{package}(\.|$)")


def prepare(model: str, dtype: str, threads: int, seed: int) -> tuple[Any, Any]:
    """(model, tokenizer), on the GPU where there is one, with threads and the global seed set."""
    import torch

    if threads < 0:
        raise ll.ConfigError(f"--threads must be 0 (torch's choice) or more, got {threads}.")
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    base, tokenizer = load_model(model, dtype)
    if torch.cuda.is_available():
        base = base.to("cuda")
    return base, tokenizer


def encoded(examples: Sequence[Example], tokenizer: Any, max_length: int) -> list[dict[str, list[int]]]:
    """Token ids and labels of every example."""
    if max_length < 2:
        raise ll.ConfigError(f"--max-length must be at least 2, got {max_length}.")
    return [encode(e, tokenizer, max_length) for e in examples]


def split_rows(
    data: str, eval_data: str | None, rows: int | None, eval_rows: int, seed: int, tokenizer: Any
) -> tuple[list[Example], list[Example], str]:
    """Training examples, evaluation examples, and a word on where the latter come from.

    wordmath brings its own validation split. Of a file without `eval_data`, at most a tenth is held out.
    """
    if rows is not None and rows < 1:
        raise ll.ConfigError(f"--rows must be positive, got {rows}.")
    if eval_rows < 0:
        raise ll.ConfigError(f"--eval-rows must be 0 or more, got {eval_rows}.")
    train = load_examples(data, "train", rows, seed, tokenizer)
    if eval_rows == 0:
        return train, [], "none"
    if eval_data is not None:
        evals = load_examples(eval_data, "validation", eval_rows, seed, tokenizer)
        return train, evals, f"{len(evals)} rows of {eval_data}"
    if data == "wordmath":
        return (
            train,
            load_examples(data, "validation", eval_rows, 0, tokenizer),
            f"{eval_rows} rows of the validation split",
        )
    import random

    order = list(range(len(train)))
    random.Random(seed).shuffle(order)
    held = set(order[: min(eval_rows, len(train) // 10)])
    evals = [train[i] for i in sorted(held)]
    return [e for i, e in enumerate(train) if i not in held], evals, f"{len(evals)} rows held out of {data}"


def calibration(
    variant: type[ll.Variant], wanted: int | None, rows: list[dict[str, list[int]]], size: int, tokenizer: Any
) -> list[Any] | None:
    """The batches a method with a start from data gets: the first of the training rows; None for the other methods."""
    if variant.group_init is None:
        if wanted is not None:
            raise ll.ConfigError(
                f"--calibration-batches: method {variant.name!r} uses no calibration data; leave the flag out."
            )
        return None
    n = 8 if wanted is None else wanted
    if n < 1:
        raise ll.ConfigError(f"--calibration-batches must be positive, got {n}.")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return list(batches(rows[: n * size], size, pad))


def attach(
    model: Any,
    cfg: ll.AdapterConfig,
    wanted: int | None,
    rows: list[dict[str, list[int]]],
    size: int,
    tokenizer: Any,
    pairs: bool = False,
    reference: str | None = None,
) -> ll.Adapter:
    """`ll.attach` with the calibration data that the method asks for; contrast pairs are made of the rows only if
    `pairs`."""
    variant = ll.get_variant(cfg.variant)
    if variant.needs_data != "pairs":
        data = calibration(variant, wanted, rows, size, tokenizer)
        return ll.attach(model, cfg, calibration_data=data, reference_weights=reference)
    if not pairs:
        raise ll.ConfigError(
            f"method {variant.name!r} is fitted from contrast pairs, which a file of examples does not hold. "
            "In Python: ll.attach(model, cfg, calibration_data=[(positive batch, negative batch), ...])."
        )
    right, wrong = rows[: 4 * size], [swapped(a, b) for a, b in zip(rows[: 4 * size], rows[1:], strict=False)]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    both = zip(batches(right[: len(wrong)], size, pad), batches(wrong, size, pad), strict=True)
    return ll.attach(model, cfg, calibration_data=list(both))


def swapped(row: dict[str, list[int]], other: dict[str, list[int]]) -> dict[str, list[int]]:
    """The prompt of one row with the completion of another: the negative half of a contrast pair."""
    prompt = [t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label == IGNORED]
    completion = [label for label in other["labels"] if label != IGNORED]
    return {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}


def check_folder(out: Path, overwrite: bool) -> list[str]:
    """The files of an earlier run in the folder of a new one, which changes nothing yet.

    Raises:
        FileError: it holds a run and may not be overwritten, or it is a file.
    """
    if out.exists() and not out.is_dir():
        raise ll.FileError(f"--out {out} is a file; give a folder.")
    ours = sorted(p.name for p in out.iterdir() if OURS.fullmatch(p.name)) if out.is_dir() else []
    if ours and not overwrite:
        raise ll.FileError(
            f"--out {out} holds a run already ({', '.join(ours[:3])}). Give another folder, or --overwrite to replace "
            "that run."
        )
    return ours


def open_folder(out: Path, overwrite: bool) -> None:
    """Make the folder of a new run, without what an earlier run left in it; other files stay."""
    for name in check_folder(out, overwrite):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    out.mkdir(parents=True, exist_ok=True)


def write_run(out: Path, facts: dict[str, Any]) -> None:
    """`run.json`: everything that decides the run."""
    (out / RUN).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")


def last_checkpoint(out: Path) -> Path:
    """The newest checkpoint of a run.

    Raises:
        FileError: there is none.
    """
    found = sorted(out.glob("checkpoint-*"), key=lambda p: int(p.name.rsplit("-", 1)[1])) if out.is_dir() else []
    found = [p for p in found if (p / "trainer_state.json").is_file()]
    if not found:
        raise ll.FileError(
            f"--resume: {out} holds no checkpoint. Start the run without --resume, with --save-every above 0."
        )
    return found[-1]


def check_same_run(out: Path, facts: dict[str, Any]) -> None:
    """Resuming goes on with the same run: whatever decides it must be as before.

    Raises:
        FileError: a setting differs; each is named.
    """
    path = out / RUN
    if not path.is_file():
        raise ll.FileError(f"--resume: {out} holds no {RUN}.")
    old, new = flat(json.loads(path.read_text())), flat(facts)
    other = [f"{k}: {old.get(k)!r} before, {new.get(k)!r} now" for k in {**old, **new} if old.get(k) != new.get(k)]
    if other:
        raise ll.FileError(
            f"--resume goes on with the same run, and this one differs ({'; '.join(other)}). Give the same flags, or "
            "another --out."
        )


def flat(facts: dict[str, Any]) -> dict[str, Any]:
    """The entries of the config beside the others."""
    return {**{k: v for k, v in facts.items() if k != "config"}, **facts.get("config", {})}
