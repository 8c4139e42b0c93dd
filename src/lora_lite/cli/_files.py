"""Adapter files as plain facts: ours with their header, other layouts by their tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lora_lite as ll

from ._folder import adapter_path, facts_of


def tensor_file(given: Path) -> Path:
    """The safetensors file of an adapter: a file, a run's folder, or a folder in PEFT's layout.

    Raises:
        FileError: there is none.
    """
    path = adapter_path(given)
    if path.is_dir():
        path = path / "adapter_model.safetensors"
    if not path.is_file():
        raise ll.FileError(f"{given} holds no adapter; give a safetensors file, the folder of a run, or PEFT's folder.")
    return path


def read_file(given: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(facts, tensors): layout and method, and whatever the header or the config beside the file says.

    Raises:
        FileError: it is damaged.
    """
    from ..core.files import opened

    path = tensor_file(given)
    with opened(path) as f:
        meta = f.metadata() or {}
        tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 -- not a mapping
    facts: dict[str, Any] = {"file": str(path), "bytes": path.stat().st_size}
    beside = path.with_name("adapter_config.json")
    if "lora_lite" in meta:
        from ..io.header import read_header

        head = read_header(path)
        ranks = sorted({t["r"] for t in head["targets"].values()})
        facts |= {
            "layout": "lora_lite",
            "method": head["config"]["variant"],
            "config": head["config"],
            "ranks": ranks,
            "targets": list(head["targets"]),
            "base": base_of(path),
            "version": head.get("version"),
            "steps": head.get("steps") or None,  # of a schedule; most methods have none
        }
    elif beside.is_file():
        config = _config(beside)
        facts |= {
            "layout": "peft",
            "method": str(config.get("peft_type", "?")).lower(),
            "config": config,
            "ranks": [config.get("r")],
            "base": config.get("base_model_name_or_path"),
            "targets": sorted({key.rpartition(".lora_")[0] for key in tensors if ".lora_" in key}),
        }
    else:
        known = any(key.startswith("lora_unet") or key.startswith("lora_te") for key in tensors)
        stems = sorted({key.partition(".")[0] for key in tensors})
        facts |= {"layout": "kohya" if known else "unknown", "method": "?", "ranks": [], "targets": stems}
    return facts, tensors


def base_of(adapter: Path) -> str | None:
    """The base that the run of an adapter was trained on, where it is known."""
    try:
        found = facts_of(adapter).get("model")
    except ll.FileError:  # a damaged run says nothing about its adapter
        return None
    return str(found) if found else None


def _config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ll.FileError(f"{path} is damaged.") from None
    if not isinstance(found, dict):
        raise ll.FileError(f"{path} is damaged.")
    return found


def norm(t: Any) -> float:
    """The Frobenius norm of a tensor."""
    return float(t.double().norm())
