"""Run the notebooks of docs/notebooks in their order and keep what their cells print.

python scripts/notebooks.py            # all; or name some: python scripts/notebooks.py steering

No Jupyter is needed: a cell is a piece of Python, and what it prints, or the value of its last line, is its output.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import sys
import types
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"


def executed(notebook: dict[str, Any], name: str) -> dict[str, Any]:
    """The notebook with every code cell run in one module of that name, and its outputs in place of the old ones."""
    module = types.ModuleType(name)
    sys.modules[name] = module  # where dataclasses look names up
    try:
        number, cells = 0, []
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                number += 1
                said = run("".join(cell["source"]), f"{name}, cell {number}", vars(module))
                cell = {**cell, "execution_count": number, "outputs": outputs(said)}
            cells.append(cell)
    finally:
        del sys.modules[name]
    return {**notebook, "cells": cells}


def run(source: str, where: str, names: dict[str, Any]) -> str:
    """What one cell prints; the value of a last expression counts as printed."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(tree, where, "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), where, "eval"), names)
            if value is not None:
                print(value)
    return said.getvalue()


def outputs(said: str) -> list[dict[str, Any]]:
    """Printed text in the form of a notebook."""
    return [{"output_type": "stream", "name": "stdout", "text": said.splitlines(keepends=True)}] if said else []


def main() -> int:
    chosen = sys.argv[1:] or [path.stem for path in sorted(FOLDER.glob("*.ipynb"))]
    for name in chosen:
        path = FOLDER / f"{name}.ipynb"
        done = executed(json.loads(path.read_text()), name.replace("-", "_"))
        path.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n")
        print(path.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
