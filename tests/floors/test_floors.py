"""Rooms and floors: who may import whom, where a method's name may stand, and what `io` must never call.

Everything is read from the syntax trees, so an import inside a function or under TYPE_CHECKING counts like any other.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import lora_lite as ll

SRC = Path(__file__).parents[2] / "src" / "lora_lite"

FLOORS = {
    "core": 1,
    "ops": 1,
    "variants": 2,
    "runtime": 2,
    "cost": 3,
    "io": 3,
    "data": 3,
    "interop": 4,
    "testing": 4,
    "demo": 4,
    "bench": 4,
    "cli": 5,
    "__main__": 6,
}
WINGS = {"progress": 1, "model": 1, "layers": 2, "view": 3, "targets": 3, "call": 4, "start": 5}
"""Inside `runtime`: a wing imports wings of lower numbers and itself. Files that stand in no wing are the verbs, above
all of them."""
VERB = 6
FREE = {"_version", "_torch"}
"""Anybody may import these: they import nothing of ours."""
PRIVATE_TORCH = "_torch"
"""The one file that may use what torch does not promise."""
FACADE = 3
"""`__init__` and `import lora_lite as ll`: the public names sit on top of io."""
BELOW_IO = [room for room, floor in FLOORS.items() if floor < FLOORS["io"]]


def files(src: Path) -> list[tuple[str, Path]]:
    """(dotted name below the package, path): ("runtime.hooks", ...); a room's `__init__` has the room's own name."""
    out = []
    for path in sorted(src.rglob("*.py")):
        parts = path.relative_to(src).with_suffix("").parts
        out.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return out


def imported(tree: ast.AST, package: list[str], modules: set[str]) -> Iterator[tuple[int, str]]:
    """(line, dotted name below lora_lite) of every import of our own; "" is the facade. `.` points to `package`."""
    for node in ast.walk(tree):
        full: list[str] = []
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["lora_lite", *package][: len(package) + 2 - node.level] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:  # `from lora_lite.variants import lora`: is `lora` a file, or a name in one?
                below = f"{stem}.{alias.name}".removeprefix("lora_lite.")
                full.append(f"lora_lite.{below}" if below in modules else stem)
        elif isinstance(node, ast.Call) and called(node).endswith(("import_module", "__import__")):
            full = [str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        for name in full:
            if name == "lora_lite" or name.startswith("lora_lite."):
                yield node.lineno, name.removeprefix("lora_lite").removeprefix(".")  # type: ignore[attr-defined]


def called(node: ast.Call) -> str:
    """The dotted text of what a call calls: "torch.load"."""
    return ast.unparse(node.func) if isinstance(node.func, (ast.Name, ast.Attribute)) else ""


def is_variant(module: str) -> bool:
    room, _, page = module.partition(".")
    return room == "variants" and bool(page) and not page.startswith("_")


def violations(src: Path) -> list[str]:
    """Every import that goes up, sideways, or from one method to another, as "file:line: why"."""
    found = []
    listing = files(src)
    modules = {module for module, _ in listing}
    for module, path in listing:
        room = module.split(".")[0]
        where = path.relative_to(src).as_posix()
        if room not in FLOORS and room not in FREE and module != "":
            found.append(f"{where}:1: {room} has no floor")
            continue
        package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        for line, target in imported(ast.parse(path.read_text()), [p for p in package if p], modules):
            to = target.split(".")[0]
            if to in FREE:
                continue
            elif module == "":
                if FLOORS.get(to, 9) > FLOORS["testing"] or to == "demo":
                    found.append(f"{where}:{line}: the facade imports {target}")
            elif room in FREE:
                found.append(f"{where}:{line}: {room} imports {target}")
            elif to not in FLOORS:
                if FLOORS[room] <= FACADE:
                    found.append(f"{where}:{line}: {room} imports the facade that stands on it")
            elif to != room and FLOORS[to] >= FLOORS[room]:
                found.append(f"{where}:{line}: {room} (floor {FLOORS[room]}) imports {target} (floor {FLOORS[to]})")
            elif is_variant(target) and target != module and module.startswith("variants."):
                found.append(f"{where}:{line}: {module} imports the method {target}; share a page that begins with _")
    return found


def wing_violations(src: Path) -> list[str]:
    """Every import inside `runtime` that goes up or sideways between wings, as "file:line: why"."""
    found = []
    for module, path, line, target in own_imports(src):
        if not (module.startswith("runtime.") and target.startswith("runtime.")):
            continue
        mine, other = module.split(".")[1], target.split(".")[1]
        if mine != other and WINGS.get(other, VERB) >= WINGS.get(mine, VERB) and mine in WINGS:
            found.append(f"{path}:{line}: {mine} imports {target}")
    return found


def own_imports(src: Path) -> Iterator[tuple[str, str, int, str]]:
    """(module, its file, line, imported module) of every import of our own in a tree."""
    listing = files(src)
    modules = {module for module, _ in listing}
    for module, path in listing:
        package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        for line, target in imported(ast.parse(path.read_text()), [p for p in package if p], modules):
            yield module, path.relative_to(src).as_posix(), line, target


def circles(src: Path) -> list[str]:
    """Files that import each other, directly or around; `__init__` of the package and of a room stand for
    themselves."""
    uses: dict[str, set[str]] = {}
    for module, _, _, target in own_imports(src):
        if target != module and "" not in (target, module):  # the facade stands apart, see `violations`
            uses.setdefault(module, set()).add(target)
    order: dict[str, int] = {}
    found: list[str] = []

    def visit(module: str, way: list[str]) -> None:
        if module in way:
            found.append(" -> ".join([*way[way.index(module) :], module]))
        elif module not in order:
            order[module] = len(order)
            for target in sorted(uses.get(module, ())):
                visit(target, [*way, module])

    for module in sorted(uses):
        visit(module, [])
    return found


def plain_strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, value) of the string constants that are no docstring, of a module, class, function or attribute."""
    bare = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.lineno, node.value


def quoted_names(src: Path, rooms: Iterable[str], names: set[str]) -> list[str]:
    """Where a file of `rooms` quotes the name of a method."""
    return [
        f"{path.relative_to(src).as_posix()}:{line}: names the method {value!r}"
        for module, path in files(src)
        if module.split(".")[0] in rooms
        for line, value in plain_strings(ast.parse(path.read_text()))
        if value in names
    ]


UNSAFE_MODULES = set("pickle _pickle cloudpickle dill joblib marshal shelve importlib imp runpy".split())
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}


def unsafe(src: Path) -> list[str]:
    """What could run code from a file: unpicklers, importers, eval."""
    found = []
    for module, path in files(src):
        if module.split(".")[0] != "io":
            continue
        where = path.relative_to(src).as_posix()
        tree = ast.parse(path.read_text())
        torch_names = {"torch"}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                torch_names |= {alias.asname or alias.name for alias in node.names if alias.name == "torch"}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                bad = [alias.name for alias in node.names if alias.name.split(".")[0] in UNSAFE_MODULES]
            elif isinstance(node, ast.ImportFrom):
                stem = node.module or ""
                bad = [stem] if stem.split(".")[0] in UNSAFE_MODULES and not node.level else []
                if stem.split(".")[0] == "torch":
                    bad += [f"{stem}.{alias.name}" for alias in node.names if alias.name in ("load", "serialization")]
            elif isinstance(node, ast.Attribute):
                owner, _, tail = ast.unparse(node).rpartition(".")
                bad = [f"{owner}.{tail}"] if owner in torch_names and tail in ("load", "serialization") else []
            elif isinstance(node, ast.Call):
                bad = [called(node)] if called(node).removeprefix("builtins.") in UNSAFE_CALLS else []
                bad += [f"{k.arg}=True" for k in node.keywords if k.arg == "allow_pickle"]
            else:
                continue
            found += [f"{where}:{node.lineno}: {name}" for name in bad]
    return found


OF_MODULES = set("_parameters _buffers _modules _version _fields _hf_peft_config_loaded".split())
"""Private attributes of other packages' modules and tensors that any file may read: they are as old as torch itself
(tests/runtime/test_torch.py watches them), Python's fields of a named tuple, and transformers' own mark of a model
with adapters."""


def private(src: Path) -> list[str]:
    """What reaches into another package, most of all torch: a module that begins with `_`, an attribute that begins
    with `_` and that no file here defines, the interpreter's frames."""
    trees = {module: (path, ast.parse(path.read_text())) for module, path in files(src)}
    own = OF_MODULES | {name for _, tree in trees.values() for name in defined(tree)}
    found = []
    for module, (path, tree) in trees.items():
        if module == PRIVATE_TORCH:
            continue
        where = path.relative_to(src).as_posix()
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute) and node.attr not in own:
                names = ["." + node.attr]
            bad = [name for name in names if re.search(r"(^|\.)_(?!_)", name) and not name.startswith("lora_lite.")]
            found += [f"{where}:{node.lineno}: {name} belongs into {PRIVATE_TORCH}.py" for name in bad]
    return found


def defined(tree: ast.AST) -> Iterator[str]:
    """Names of functions and classes, and of what is assigned to, alone or as an attribute of `self` or `cls`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                yield node.attr


def own_methods() -> list[type]:
    """The library's registered classes; other tests may have registered more."""
    return [cls for cls in ll.variants() if cls.__module__.startswith("lora_lite.")]


# ---- the rules on the library


def test_every_room_is_there():
    rooms = {module.split(".")[0] for module, _ in files(SRC)} - {""} - FREE
    assert rooms >= {"core", "ops", "variants", "runtime", "cost", "io", "interop", "demo", "cli"}


def test_imports_go_down():
    assert not (found := violations(SRC)), "\n".join(found)


def test_wings_of_the_runtime_import_downwards():
    assert {
        module.split(".")[1] for module, _ in files(SRC) if module.count(".") == 2 and module.startswith("runtime.")
    } == {wing for wing in WINGS if wing != "progress"}
    assert not (found := wing_violations(SRC)), "\n".join(found)


def test_no_files_import_each_other():
    assert not (found := circles(SRC)), "\n".join(found)


def test_no_method_is_named_below_io():
    names = {cls.name for cls in own_methods()}
    assert len(names) > 1
    rooms = [room for room in BELOW_IO if room != "variants"]
    assert not (found := quoted_names(SRC, rooms, names)), "\n".join(found)


def test_no_method_names_another():
    lines, found = quoted_names(SRC, ["variants"], {cls.name for cls in own_methods()}), []
    assert lines
    for cls in own_methods():
        own = tuple(repr(c.name) for c in own_methods() if c.__module__ == cls.__module__)
        page = cls.__module__.removeprefix("lora_lite.").replace(".", "/") + ".py"
        found += [line for line in lines if line.startswith(page + ":") and not line.endswith(own)]
    assert not found, "\n".join(found)


def test_every_page_is_registered_and_every_method_has_a_page():
    pages = {f"lora_lite.{module}" for module, _ in files(SRC) if is_variant(module)}
    assert pages
    assert {cls.__module__ for cls in own_methods()} == pages


def test_io_runs_nothing_from_a_file():
    assert any(module.startswith("io") for module, _ in files(SRC))
    assert not (found := unsafe(SRC)), "\n".join(found)


def test_private_torch_stands_in_one_file():
    assert any(module == PRIVATE_TORCH for module, _ in files(SRC))
    assert not (found := private(SRC)), "\n".join(found)


# ---- the checkers on planted faults: a checker that finds nothing anywhere proves nothing


GOOD = {
    "__init__.py": "from . import variants\nfrom .core.registry import variants as names\nfrom .testing import check\n",
    "_version.py": "__version__ = '1'\n",
    "_torch.py": "import torch\nfrom torch._subclasses import fake_tensor\nf = torch._C._f\n",
    "core/__init__.py": "",
    "core/registry.py": (
        "from .errors import E\nimport torch\nfrom .._version import __version__\nfrom .._torch import f\n"
    ),
    "core/errors.py": '"""the method lora"""\n',
    "ops/__init__.py": "",
    "ops/svd.py": "import torch\n",
    "variants/__init__.py": "from . import lora, dora\n",
    "variants/_family.py": "from ..core.registry import x\n",
    "variants/lora.py": "from ._family import page\nfrom ..ops import svd\nname = 'lora'\n",
    "variants/dora.py": "from ._family import page\n",
    "runtime/hooks.py": "from ..core import registry\nfrom .names import n\nfrom .call import root\n",
    "runtime/model/state.py": "from ...core import registry\nfrom . import site\n",
    "runtime/model/site.py": "class S:\n    def __init__(self):\n        self._own = module._parameters\nS()._own\n",
    "runtime/view/layer.py": "from ..model.state import s\n",
    "runtime/call/root.py": "from ..view.layer import v\nfrom ..progress import track\n",
    "runtime/progress.py": "",
    "runtime/names.py": "def f():\n    'lora'\n    return 'lora_A'\n",
    "io/native.py": "import io\nfrom ..runtime import hooks\nmodel.eval()\nre.compile('a')\nsafe.load(x)\n",
    "testing.py": "from . import runtime\n",
    "demo/run.py": "import lora_lite as ll\n",
    "cli/main.py": "import lora_lite as ll\nfrom ..demo import run\n",
}


def planted(root: Path, **changes: str) -> Path:
    for name, text in {**GOOD, **changes}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_checkers_accept_a_good_tree(tmp_path):
    src = planted(tmp_path)
    assert violations(src) == []
    assert unsafe(src) == [] and private(src) == []
    assert wing_violations(src) == [] and circles(src) == []
    assert quoted_names(src, ["core", "ops", "runtime"], {"lora", "dora"}) == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("core/errors.py", "from ..runtime import hooks"),
        ("core/errors.py", "from ..ops.svd import f"),
        ("core/errors.py", "import lora_lite"),
        ("core/errors.py", "from lora_lite import attach"),
        ("core/errors.py", "from .. import attach"),
        ("core/errors.py", "from .. import io"),
        ("core/errors.py", "import importlib\nimportlib.import_module('lora_lite.io')"),
        ("ops/svd.py", "from ..core import registry"),
        ("ops/svd.py", "def f():\n    from lora_lite.core.registry import register"),
        ("variants/lora.py", "from ..runtime.hooks import h"),
        ("variants/lora.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..runtime import hooks"),
        ("variants/lora.py", "from .dora import DoRA"),
        ("variants/lora.py", "from . import dora"),
        ("variants/lora.py", "from lora_lite.variants import dora"),
        ("variants/lora.py", "import lora_lite.variants.dora"),
        ("variants/_family.py", "from .dora import DoRA"),
        ("runtime/hooks.py", "from ..variants import lora"),
        ("runtime/hooks.py", "from ..variants._family import page"),
        ("runtime/__init__.py", "from ..variants import lora"),
        ("io/native.py", "from ..interop import trainer"),
        ("io/native.py", "import lora_lite as ll"),
        ("demo/run.py", "from ..interop import trainer"),
        ("demo/run.py", "from ..cli import main"),
        ("__init__.py", "from .cli import main"),
        ("_version.py", "from .core import registry"),
        ("_torch.py", "from .core import registry"),
        ("utils/misc.py", "import torch"),
    ],
)
def test_the_import_rule_finds_a_planted_fault(tmp_path, file, text):
    (found,) = violations(planted(tmp_path, **{file: text}))
    assert found.startswith(f"{file}:")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("runtime/model/state.py", "from ..view.layer import v"),
        ("runtime/view/layer.py", "from ..call import root"),
        ("runtime/view/layer.py", "def f():\n    from ..call.root import r"),
        ("runtime/view/layer.py", "from ..targets.choose import t"),
        ("runtime/call/root.py", "from ..hooks import h"),
        ("runtime/progress.py", "from .hooks import h"),
    ],
)
def test_the_wing_rule_finds_a_planted_fault(tmp_path, file, text):
    src = planted(tmp_path, **{file: text, "runtime/targets/choose.py": ""})
    (found,) = wing_violations(src)
    assert found.startswith(f"{file}:")


def test_the_circle_rule_finds_a_planted_fault(tmp_path):
    src = planted(
        tmp_path, **{"runtime/names.py": "from .call.root import r", "runtime/call/root.py": "from ..names import n"}
    )
    assert circles(src) == ["runtime.call.root -> runtime.names -> runtime.call.root"]


def test_the_name_rule_finds_a_planted_fault(tmp_path):
    src = planted(tmp_path, **{"runtime/hooks.py": "def f(v):\n    'lora'\n    return v == 'lora'\n"})
    assert quoted_names(src, ["runtime"], {"lora"}) == ["runtime/hooks.py:3: names the method 'lora'"]


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import importlib.util",
        "def f():\n    from importlib import import_module",
        "import torch\ntorch.load('x')",
        "import torch as t\nf = t.load",
        "from torch import load",
        "import torch\ntorch.serialization.load('x')",
        "eval('1')",
        "exec('1')",
        "__import__('os')",
        "numpy.load('x', allow_pickle=True)",
    ],
)
def test_the_io_rule_finds_a_planted_fault(tmp_path, text):
    assert unsafe(planted(tmp_path, **{"io/native.py": text}))


@pytest.mark.parametrize(
    "text",
    [
        "import torch._dynamo",
        "from torch._subclasses import fake_tensor",
        "def f():\n    from torch import _C",
        "import torch\ntorch._C._current_graph_task_id()",
        "import sys\nframe = sys._getframe(1)",
        "key = t.untyped_storage()._cdata",
        "formula._get_raw = True",
    ],
)
def test_the_rule_on_private_torch_finds_a_planted_fault(tmp_path, text):
    found = private(planted(tmp_path, **{"runtime/hooks.py": text}))
    assert found and all(line.startswith("runtime/hooks.py:") for line in found)
