"""`lora-lite convert`: an adapter in another layout."""

from __future__ import annotations

import json
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

import lora_lite as ll

from ..core.errors import did_you_mean
from . import _folder as folder
from ._adapters import BaseCheck, check_paths
from ._base import BaseFlags, check_base, load_base, quiet
from ._console import say

OURS = "lora_lite"


def layouts() -> tuple[str, ...]:
    """Every layout that can be written: ours, and those that `ll.export` names."""
    return OURS, *typing.get_args(typing.get_type_hints(ll.export)["format"])


@dataclass(frozen=True, kw_only=True)
class Convert(BaseFlags):
    """Write an adapter in another layout.

    It is loaded into its model on the way, so that nothing is guessed from names: what does not fit is said, and what
    the layout cannot hold is refused.
    """

    adapter: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, an adapter file or a folder in PEFT's layout."""
    out: Path
    """File or folder of the new one."""
    to: str = "peft"
    """The layout: lora_lite, or one that `ll.export` writes, such as peft."""
    model: str | None = None  # type: ignore[assignment]
    """demo, a local model directory, or a hub id; None: the one that the adapter was trained on, or demo."""
    base_check: BaseCheck = "error"
    """What to do if the adapter was trained on other base weights."""
    json: bool = False
    """Print one JSON object."""


def run(args: Convert) -> int:
    check_base(args)
    check_paths([args.adapter])
    if args.to not in layouts():
        raise ll.ConfigError(
            f"--to {args.to}: there is no such layout.{did_you_mean(args.to, layouts())} Choose from: "
            f"{', '.join(layouts())}."
        )
    folder.check_writable(args.out.parent)
    quiet(args.debug)
    name = folder.model_of(args.model, args.adapter)
    model, _ = load_base(args, name)
    adapter = ll.load(model, folder.adapter_path(args.adapter), base_check=args.base_check)
    path = write(model, args.out, args.to)
    if args.json:
        facts = {"out": str(path), "to": args.to, "method": adapter.cfg.variant, "targets": adapter.targets}
        print(json.dumps(facts))
        return 0
    say(f"{adapter.cfg.variant} on {len(adapter.targets)} layers of {name}, written as {args.to}")
    say(f"adapter  {path}")
    return 0


def write(model: Any, out: Path, to: str) -> Path:
    """The only adapter of a model in one of `layouts`."""
    if to == OURS:
        return ll.save(model, out)
    return Path(ll.export(model, out, format=to))  # type: ignore[arg-type]
