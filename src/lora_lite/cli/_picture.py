"""Where a method hooks, as a drawing: the frozen part of the model, and the method's page before, beside or in it."""

from __future__ import annotations

from dataclasses import dataclass

import lora_lite as ll


@dataclass(frozen=True)
class Picture:
    """What goes in, what is frozen, what comes out, and where the page stands."""

    into: str
    frozen: str
    out: str
    before: bool
    """The page rewrites what goes in."""
    after: bool
    """The page rewrites what comes out, from both."""
    beside: str
    """What the page puts into the frozen part, or nothing."""


PLACES = {
    "linear": ("x", "layer, frozen", "y"),
    "block": ("h", "block, frozen", "h"),
    "embedding": ("tokens", "embedding, frozen", "e"),
    "module": ("x", "module, frozen", "y"),
    "attention": ("queries", "attention, frozen", "y"),
}
"""Site -> (what goes in, what is frozen, what comes out)."""


def picture(variant: type[ll.Variant]) -> Picture:
    """The drawing of one method, from the members of its page."""
    into, frozen, out = PLACES.get(variant.site, ("x", f"{variant.site}, frozen", "y"))
    beside = ""
    if variant.prefix is not None:
        beside = "r keys and values"
    if variant.tokens is not None:
        into, frozen, out, beside = "text", "model, frozen", "logits", "virtual tokens"
    after = (variant.forward or variant.weight) is not None and not beside
    return Picture(into, frozen, out, variant.forward_input is not None, after, beside)


def drawn(variant: type[ll.Variant]) -> str:
    """The drawing in characters, narrower than 80 columns for the names of the package."""
    p = picture(variant)
    start = f"{p.into} ──▶ [{variant.name}] ──▶ {p.into}'" if p.before else p.into
    if p.beside:
        rest = f"{start} ──▶ {p.frozen} ──▶ {p.out}"
        where = " " * rest.index(p.frozen)
        return f"{where}[{variant.name}]: {p.beside}\n{where} │\n{where} ▼\n{rest}"
    if not p.after:
        return f"{start} ──▶ {p.frozen} ──▶ {p.out}"
    first = f"{start} ─┬─▶ {p.frozen} ──▶ {p.out} ─┐"
    fork, join = first.index("┬"), len(first) - 1
    return f"{first}\n{' ' * fork}└{'─' * (join - fork - 1)}┴─▶ [{variant.name}] ──▶ {p.out}'"
