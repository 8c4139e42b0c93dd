"""The planted bugs can be planted: each text is there once, what it becomes is Python, and no file that does work goes
without one. `make planted` shows that the tests notice them."""

from __future__ import annotations

import ast
import dataclasses
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts"))

from planted import BUGS, PACKAGE, Bug  # noqa: E402 -- the folder stands on the path since the line above
from planted.pages import page_bugs  # noqa: E402

ENGINE = ("core", "ops", "runtime", "io", "cost", "interop")
"""The rooms whose every working file has a bug."""


def faults(bugs: Iterable[Bug], package: Path) -> list[str]:
    """What keeps bugs from being planted."""
    found = []
    for bug in bugs:
        try:
            ast.parse(bug.mutated(package))
        except LookupError as e:
            found.append(str(e))
        except SyntaxError as e:
            found.append(f"{bug.name}: {bug.file} is no Python any more: {e}")
        if bug.old == bug.new:
            found.append(f"{bug.name} changes nothing")
        found += [f"{bug.name}: there is no {path}" for path in bug.test_files if not path.exists()]
    return found


def does_work(path: Path) -> bool:
    """Whether a file defines a function with a body. Constants, re-exports, declared classes and protocols, whose
    functions hold a docstring or `...`, do no work."""
    functions = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))
    return any(not is_declared(statement) for function in functions for statement in function.body)


def is_declared(statement: ast.stmt) -> bool:
    """Whether it is a docstring or `...`."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and (statement.value.value is ... or isinstance(statement.value.value, str))
    )


def without_bug(bugs: Iterable[Bug], package: Path) -> list[str]:
    """Files of the engine that do work and have no bug."""
    have = {bug.file for bug in bugs}
    paths = [path for room in ENGINE for path in sorted((package / room).rglob("*.py"))]
    names = [path.relative_to(package).as_posix() for path in paths if does_work(path)]
    assert len(names) > 50
    return [name for name in names if name not in have]


def test_every_bug_can_be_planted():
    assert not faults(BUGS, PACKAGE)
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 70
    assert all(bug.test_files for bug in BUGS)


def test_bugs_made_by_rule_can_be_planted():
    bugs = page_bugs()
    assert not faults(bugs, PACKAGE)
    assert len({bug.file for bug in bugs}) >= 70 and all(bug.test_files for bug in bugs)
    assert page_bugs() == bugs


def test_every_file_that_does_work_has_a_bug():
    assert not without_bug(BUGS, PACKAGE)


@pytest.fixture
def package(tmp_path):
    return Path(shutil.copytree(PACKAGE, tmp_path / "lora_lite", ignore=shutil.ignore_patterns("base", "__pycache__")))


def test_texts_that_are_gone_or_there_twice_are_noticed(package):
    bug = next(b for b in BUGS if b.file == "core/config.py")
    path = package / bug.file
    text = path.read_text()
    for changed in (text.replace(bug.old, "pass"), text + bug.old):
        path.write_text(changed)
        assert len(faults([bug], package)) == 1
    path.unlink()
    assert len(faults([bug], package)) == 1


def test_bugs_that_prove_nothing_are_noticed():
    bug = BUGS[0]
    for changes in ({"new": bug.old}, {"new": "("}, {"tests": "tests/nowhere.py"}):
        assert len(faults([dataclasses.replace(bug, **changes)], PACKAGE)) == 1


def test_a_new_file_without_a_bug_is_noticed(package):
    (package / "runtime" / "more.py").write_text(
        '"""A file."""\n\nA = 1\n\n\nclass B:\n    """Words."""\n\n'
        '    def f(self) -> int:\n        """Words."""\n        ...\n\n    def g(self) -> int: ...\n'
    )
    assert not without_bug(BUGS, package)
    (package / "runtime" / "more.py").write_text('"""A file."""\n\n\ndef f() -> int:\n    return 1\n')
    assert without_bug(BUGS, package) == ["runtime/more.py"]
