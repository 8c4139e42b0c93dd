"""The verbs, and the dataclass of each, whose fields are its flags."""

from __future__ import annotations

import importlib

VERBS = {
    "demo": "Demo",
    "data": "Data",
    "train": "Train",
    "eval": "Eval",
    "plan": "Plan",
    "generate": "Generate",
    "chat": "Chat",
    "serve": "Serve",
    "info": "Info",
    "diff": "Diff",
    "check": "Check",
    "merge": "Merge",
    "combine": "Combine",
    "scale": "Scale",
    "convert": "Convert",
    "cite": "Cite",
    "variants": "Variants",
    "bench": "Bench",
}
"""Verb, and file of that name -> class in it."""


def command_of(name: str, words: list[str] | None) -> type:
    """The dataclass of a verb; of the one that runs, with the flags of its method."""
    command = getattr(importlib.import_module(f".{name}", __package__), VERBS[name])
    if words is None or not hasattr(command, "method"):
        return command
    from ._method import chosen_method, with_method

    return with_method(command, chosen_method(words))
