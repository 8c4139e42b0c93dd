"""S2. Loading executes nothing of the file and asks nobody: read in the sources, and watched in a process."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lora_lite as ll
from lora_lite.testing.toy import AttentiveToy
from methods import every_method

FORBIDDEN = set(
    "pickle _pickle cloudpickle dill joblib marshal shelve importlib imp runpy subprocess socket ssl http urllib "
    "requests httpx aiohttp ftplib huggingface_hub fsspec transformers peft yaml".split()
)
CLASSES = {"transformers", "transformers.modeling_utils"}
"""A cache and a table of attention functions, of a library that made the model: nothing is asked of a file or a hub."""
CALLS = {"eval", "exec", "compile", "__import__", "system", "popen"}


def loading() -> list[Path]:
    """The files that a call of `ll.load` runs: `io`, `core`, and what these import of the runtime."""
    root = Path(ll.__file__).parent
    found: dict[Path, None] = {}
    queue = [*(root / "io").glob("*.py"), *(root / "core").glob("*.py")]
    while queue:
        path = queue.pop()
        if path in found:
            continue
        found[path] = None
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = path.parents[node.level - 1] / (node.module or "").replace(".", "/")
                names = [base, *(base / alias.name for alias in node.names)]
                queue += [p for n in names for p in (n.with_suffix(".py"), n / "__init__.py") if p.is_file()]
    return list(found)


def unsafe(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        found += [name for name in names if name.split(".")[0] in FORBIDDEN and name not in CLASSES]
        if isinstance(node, ast.Call):
            f = node.func
            name = f.id if isinstance(f, ast.Name) else f.attr if isinstance(f, ast.Attribute) else ""
            of_re = isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name) and f.value.id in ("re", "torch")
            method = isinstance(f, ast.Attribute) and name == "eval"  # of a module: no gradients' mode
            found += [name] * (name in CALLS and not of_re and not method)
            whole = ast.unparse(f)
            found += [whole] * (whole in ("torch.load", "torch.hub.load", "numpy.load", "np.load"))
    return found


def test_loading_runs_nothing_and_asks_no_network():
    files = loading()
    assert len(files) > 50 and any(p.name == "commit.py" for p in files)
    assert not {str(p): bad for p in files if (bad := unsafe(p.read_text()))}


@pytest.mark.parametrize(
    "source", ["import pickle", "from urllib.request import urlopen", "eval(x)", "torch.load(f)", "os.system(x)"]
)
def test_the_rule_finds_a_planted_fault(source):
    assert unsafe(source)


WATCH = """
import json, sys
sys.path[:0] = json.loads(sys.argv[2])
import torch, lora_lite as ll
from lora_lite.testing.toy import AttentiveToy, Toy, toy
places = json.loads(sys.argv[1])
kinds = {True: AttentiveToy, False: Toy}
models = [toy(cls=kinds[attends]) for _ in (1, 2) for _, attends in places]
for (place, _), model in zip(places, models):
    ll.load(model, place)  # imports of our own, and caches
seen, on = [], [False]
FORBIDDEN = {"import", "exec", "compile", "pickle", "marshal", "socket", "subprocess", "ctypes", "urllib", "http",
             "shutil", "os.system", "os.exec", "os.fork", "os.spawn"}

def hook(event, args):
    if not on[0]:
        return
    if event == "open":
        path, mode = str(args[0]), args[1] or "r"
        if not any(path.startswith(p) for p, _ in places) or any(c in str(mode) for c in "wax+"):
            seen.append(f"open {path} {mode}")
    elif event in FORBIDDEN or event.split(".")[0] in FORBIDDEN:
        seen.append(f"{event} {str(args)[:80]}")

sys.addaudithook(hook)
on[0] = True
for (place, _), model in zip(places, models[len(places):]):
    ll.load(model, place)
on[0] = False
print(json.dumps(seen))
"""


def test_a_process_that_loads_runs_nothing_and_opens_the_files_alone(tmp_path):
    """The interpreter's own audit events, while a file of every method and a folder of PEFT's are loaded."""
    places = []
    for parameter in every_method().args[1]:
        case = parameter.values[0]
        if not case.variant.__module__.startswith("lora_lite."):  # another test's, which that process has not imported
            continue
        places.append((str(ll.save(case.random(), tmp_path / case.variant.name)), case.toy is AttentiveToy))
    ll.export(ll.testing.Case(ll.get_variant("lora")).random(), tmp_path / "peft")
    places.append((str(tmp_path / "peft"), False))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WATCH, json.dumps(places), json.dumps([p for p in sys.path if p])],
        capture_output=True, text=True, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == []
