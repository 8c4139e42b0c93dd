"""S2. Loading executes nothing of the file and asks nobody: read in the sources, and watched in a process."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import lora_lite as ll
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import toy

PACKAGE = Path(ll.__file__).parent
FORBIDDEN = {
    "pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "importlib", "runpy", "subprocess", "socket",
    "urllib", "http", "requests", "huggingface_hub", "ctypes", "yaml",
}  # fmt: skip
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.jit.load", "np.load", "numpy.load", "os.system"}


def faults(text: str) -> list[str]:
    """Imports and calls that a file which reads strangers' files must not have."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in FORBIDDEN]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found += [node.module] if node.module.split(".")[0] in FORBIDDEN else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS:
            found.append(ast.unparse(node.func))
    return found


def test_the_sources_of_the_load_path():
    files = [*(PACKAGE / "io").glob("*.py"), *(PACKAGE / "core").glob("*.py"), PACKAGE / "runtime" / "commit.py"]
    assert len(files) > 12
    assert not {path.name: found for path in files if (found := faults(path.read_text()))}


def test_the_search_finds():
    bad = "import pickle\nfrom importlib import import_module\ntorch.load(p)\neval(x)\nimport os.path\nre.compile(x)"
    assert faults(bad) == ["pickle", "importlib", "torch.load", "eval"]


WATCH = """
import json, sys
sys.path[:0] = json.loads(sys.argv[2])
import torch, lora_lite as ll
from lora_lite.testing.toy import toy
places = json.loads(sys.argv[1])
for place in places:
    ll.load(toy(), place)  # imports of our own, and caches
seen, on = [], [False]
FORBIDDEN = {"import", "exec", "compile", "pickle", "marshal", "socket", "subprocess", "ctypes", "urllib", "http",
             "shutil", "os.system", "os.exec", "os.fork", "os.spawn"}

def hook(event, args):
    if not on[0]:
        return
    if event == "open":
        path, mode = str(args[0]), args[1] or "r"
        if not any(path.startswith(p) for p in places) or any(c in str(mode) for c in "wax+"):
            seen.append(f"open {path} {mode}")
    elif event in FORBIDDEN or event.split(".")[0] in FORBIDDEN:
        seen.append(f"{event} {str(args)[:80]}")

sys.addaudithook(hook)
on[0] = True
for place in places:
    ll.load(toy(), place)
on[0] = False
print(json.dumps(seen))
"""


def test_a_process_that_loads_runs_nothing_and_opens_the_files_alone(tmp_path):
    """The interpreter's own audit events, while a native file and a folder of PEFT's are loaded."""
    model = toy()
    ll.attach(model, ll.LoRAConfig(r=3, alpha=7))
    randomise(model)
    places = [str(ll.save(model, tmp_path / "native")), str(ll.export(model, tmp_path / "peft") or tmp_path / "peft")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WATCH, json.dumps(places), json.dumps([p for p in sys.path if p])],
        capture_output=True, text=True, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == []
