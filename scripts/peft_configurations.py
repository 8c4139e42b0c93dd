"""Measure PEFT's own test configurations: each saved by PEFT with random tensors, loaded here, compared.

python scripts/peft_configurations.py CHECKOUT                 # a checkout of PEFT's sources: rewrites the results
python scripts/peft_configurations.py CHECKOUT --only LoHa     # those whose name holds a word: printed alone

Nothing of PEFT's is kept here but the names of its configurations; docs/formats.md counts them.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import warnings
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

import lora_lite as ll

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "peft_configurations.jsonl"
TABLES = ("test_custom_models",)
NOISE = 0.2
LIMIT = 1e-5
ACTS = 1e-3
"""Change of the output, relative to its largest entry, below which a configuration would show nothing."""


def configurations(checkout: Path) -> list[tuple[str, str, type, dict[str, Any], Any]]:
    """(name, model, config class, its arguments, module of the tests) of every row."""
    sys.path.insert(0, str(checkout))
    import transformers  # noqa: F401  (which asks whether the next is there)

    sys.modules.setdefault("diffusers", MagicMock())  # imported by the tests' helpers, and not by what is used here
    found = []
    for table in TABLES:
        module = import_module(f"tests.{table}")
        found += [(*row, module) for row in module.TEST_CASES]
    return found


def measured(model_id: str, config: type, arguments: dict[str, Any], module: Any) -> dict[str, Any]:
    """One configuration: its type, and what came of it."""
    bare: nn.Module = module.MockTransformerWrapper.from_pretrained(model_id).eval()
    x = torch.arange(90).view(9, 10)
    base = _output(bare, x)
    with tempfile.TemporaryDirectory() as folder:
        kind = config.__name__
        try:
            said = config(**copy.deepcopy(arguments))
            kind = said.peft_type.value
            want = _saved(copy.deepcopy(bare), said, x, folder, module)
        except Exception as e:  # which is PEFT's own
            return {"peft_type": kind, "outcome": "PEFT cannot", "says": f"{type(e).__name__}: {e}"[:200]}
        return {"peft_type": kind, **_loaded(bare, base, want, x, folder)}


def _saved(model: nn.Module, said: Any, x: Tensor, folder: str, module: Any) -> Tensor:
    import peft

    torch.manual_seed(1)
    theirs: Any = peft.get_peft_model(model, said)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(NOISE * torch.randn(p.shape, generator=g))
    want = _output(theirs.eval(), x)
    theirs.save_pretrained(folder)
    return want


def _output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def _loaded(model: nn.Module, base: Tensor, want: Tensor, x: Tensor, folder: str) -> dict[str, Any]:
    """Load the folder, compare, detach, and look for what stayed behind."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = _hooks(model)
    try:
        ll.load(model, folder)
        got = _output(model, x)
        ll.detach(model)
    except ll.LoraLiteError as e:
        found: dict[str, Any] = {"outcome": "refused", "says": str(e).replace(folder, "FOLDER")[:300]}
    except Exception as e:
        found = {"outcome": "crash", "says": f"{type(e).__name__}: {e}"[:300]}
    else:
        largest = float(want.abs().max())
        error, effect = float((got - want).abs().max()) / largest, float((want - base).abs().max()) / largest
        found = {"outcome": "agrees" if error <= LIMIT else "wrong", "error": error}
        found |= {} if effect > ACTS else {"effect": effect}
    left = model.state_dict()
    same = left.keys() == state.keys() and all(torch.equal(left[k], state[k]) for k in state)
    if not same or _hooks(model) != hooks:
        found["outcome"] = "leaves a trace"
    return found


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--only", default="")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    commit = subprocess.check_output(["git", "-C", str(asked.checkout), "rev-parse", "HEAD"], text=True).strip()
    rows: list[dict[str, Any]] = []
    for name, model_id, config, arguments, module in configurations(asked.checkout):
        if asked.only in name:
            rows.append({"name": name, **measured(model_id, config, arguments, module)})
            if asked.only or rows[-1]["outcome"] != "agrees":
                print(rows[-1], flush=True)
    counts = {o: sum(r["outcome"] == o for r in rows) for o in sorted({r["outcome"] for r in rows})}
    print(len(rows), counts)
    if not asked.only:
        head = {"peft": version("peft"), "torch": torch.__version__, "checkout": commit}
        RESULTS.write_text("\n".join(json.dumps(r) for r in [head, *rows]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
