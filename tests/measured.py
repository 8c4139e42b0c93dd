"""What the tests of clients note for docs/results/clients.md, see scripts/clients_table.py."""

from __future__ import annotations

import importlib.metadata
import json
import os
import time

RECORD = "LORA_LITE_CLIENTS"
"""The environment variable that names the file of what was measured."""


def record(package: str, what: str, difference: float, limit: float) -> None:
    """Note what was measured, and hold it to a limit."""
    path = os.environ.get(RECORD)
    if path:
        row = {
            "client": package, "version": importlib.metadata.version(package), "what": what,
            "difference": difference, "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        with open(path, "a") as f:
            f.write(json.dumps(row) + "\n")
    assert difference <= limit, f"{package}, {what}: {difference}"
