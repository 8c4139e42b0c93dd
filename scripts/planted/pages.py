"""Bugs made by rule, for every page of a method: a sum that becomes a difference, a product a quotient, a scale twice
its size, a number one more. What is to notice them are the tests of the method's equations alone: files of known
answers would notice any change."""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterator

from .bug import PACKAGE, ROOT, Bug

MATH = ("forward", "forward_input", "weight", "prefix", "tokens", "act", "init", "group_init", "penalty")
"""Functions of a page that are mathematics."""
OTHER = {ast.Add: ast.Sub(), ast.Sub: ast.Add(), ast.Mult: ast.Div(), ast.Div: ast.Mult()}
EACH = 8
"""Bugs of a page at most."""


def page_bugs() -> list[Bug]:
    """Up to `EACH` bugs of every page, the same at every call."""
    found: list[Bug] = []
    for path in sorted((PACKAGE / "variants").glob("[!_]*.py")):
        text, tests = path.read_text(), ""
        changes = list(_changes(text))
        for function, old, new in random.Random(path.stem).sample(changes, min(EACH, len(changes))):
            whole = ast.get_source_segment(text, function) or ""
            tests = tests or _tests(path.stem, text)
            name = f"{path.stem}.{function.name}: {old} -> {new}"
            if name not in {bug.name for bug in found}:
                found.append(Bug(name, f"variants/{path.name}", whole, whole.replace(old, f"({new})", 1), tests))
    return found


def _changes(text: str) -> Iterator[tuple[ast.FunctionDef, str, str]]:
    """(function, an expression in it, what it becomes)."""
    for function in ast.walk(ast.parse(text)):
        if isinstance(function, ast.FunctionDef) and function.name in MATH:
            for node in ast.walk(function):
                changed = _changed(node)
                old = ast.get_source_segment(text, node)
                if changed is not None and old is not None:
                    yield function, old, changed


def _changed(node: ast.AST) -> str | None:
    """The expression otherwise; None where no rule speaks of it."""
    if isinstance(node, ast.BinOp) and type(node.op) in OTHER:
        return ast.unparse(ast.BinOp(node.left, OTHER[type(node.op)], node.right))
    if isinstance(node, ast.Attribute) and node.attr == "scale":
        return f"2 * {ast.unparse(node)}"
    if isinstance(node, ast.Constant) and type(node.value) is float:
        return repr(node.value + 1)
    return None


def _tests(page: str, text: str) -> str:
    """The files that name the page's method or its config: of the equations, else of the parity with other code, else
    of what runs."""
    names = re.findall(r'^    name = "(\w+)"', text, re.M) + re.findall(r"^class (\w+Config)\(", text, re.M)
    named = re.compile(rf"\b({'|'.join([page, *names])})\b")
    for folder in ("equations", "parity", "runtime"):
        files = [path for path in sorted((ROOT / "tests" / folder).glob("test_*.py")) if named.search(path.read_text())]
        if files:
            return " ".join(str(path.relative_to(ROOT)) for path in files)
    return "tests/equations"
