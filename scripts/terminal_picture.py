"""Run a command of lora-lite and keep its screen for the pages: terminal_picture.py OUT.svg plan --model M"""

from __future__ import annotations

import contextlib
import io
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lora_lite import cli

WIDTH = 100


def main() -> int:
    out, words = Path(sys.argv[1]), sys.argv[2:]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = cli.main(words)
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text(f"$ lora-lite {shlex.join(words)}", style="bold green"))
    for line in said.getvalue().splitlines():
        console.print(Text(line))
    out.parent.mkdir(parents=True, exist_ok=True)
    console.save_svg(str(out), title="lora-lite")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
