"""Plant known bugs in copies of the package, one at a time, and show that the tests named beside each turn red.

    python scripts/planted_bugs.py [--jobs 2] [--only WORD ...] [--tests "tests/io -k golden"] [--list] [--pages]

The bugs stand in `scripts/planted`; with --pages, those that `planted/pages.py` makes by rule on every page. Exits with
1 when one survives or gives no verdict, or when a test that caught one is red without it.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # before torch

import argparse  # noqa: E402 -- see above
import compileall  # noqa: E402
import contextlib  # noqa: E402
import importlib  # noqa: E402
import multiprocessing  # noqa: E402
import resource  # noqa: E402
import shlex  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
from concurrent.futures import ProcessPoolExecutor, as_completed  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402

from planted import BUGS, PACKAGE, ROOT, Bug  # noqa: E402
from planted.pages import page_bugs  # noqa: E402

FORK = multiprocessing.get_context("fork")
"""A run of tests starts as a copy of this process, which has imported what takes long."""
HEAVY = (
    "torch._dynamo",
    "safetensors.torch",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.trainer",
    "peft",
    "hypothesis.internal.entropy",
    "_hypothesis_pytestplugin",
    "anyio.pytest_plugin",
    "xdist.plugin",
    "typeguard._pytest_plugin",
)
"""Nothing of the package itself."""
LIMIT = 900
"""Seconds after which a run of tests is ended, since a bug may make a loop endless."""
WORDS = [
    "-W",
    "ignore::pytest.PytestAssertRewriteWarning",
    "-x",
    "-q",
    "-p",
    "no:cacheprovider",
    "--no-header",
    "--tb=no",
    "-m",
    "not slow and not gpu",
]


@dataclass(frozen=True)
class Verdict:
    """What became of one bug; `line` names the test that failed, or says why there is no verdict."""

    bug: Bug
    word: str
    line: str
    seconds: float
    """Of a processor."""

    @property
    def killed(self) -> bool:
        return self.word == "killed"


class Copy:
    """A copy of the package in a folder of its own, into which one bug at a time is planted."""

    def __init__(self, folder: Path) -> None:
        self.package = folder / "lora_lite"
        self.out = folder / "output"
        shutil.copytree(PACKAGE, self.package, ignore=shutil.ignore_patterns("__pycache__"))
        compileall.compile_dir(self.package, quiet=2)
        self.count = 0

    def run(self, tests: list[str], bug: Bug | None = None) -> tuple[int | None, str]:
        """(exit status of pytest, None when it took too long; a line of its output), with the bug in the package."""
        if bug is not None:
            path = self.package / bug.file
            path.write_text(bug.mutated())
            self.count += 1
            os.utime(path, (self.count, self.count))  # python compiles again when a file's time or size differs
        try:
            child = FORK.Process(target=_pytest, args=(self.package, tests, self.out))
            child.start()
            child.join(LIMIT)
            if child.is_alive():
                child.kill()
                child.join()
                return None, f"more than {LIMIT} s"
            return child.exitcode, _telling_line(self.out.read_text())
        finally:
            if bug is not None:
                shutil.copy2(PACKAGE / bug.file, self.package / bug.file)


_OWN: list[Copy] = []
"""This process's copy."""


def begin(folder: str) -> None:
    """First of all in a process that plants."""
    _OWN[:] = [Copy(Path(folder) / str(os.getpid()))]


def _pytest(package: Path, tests: list[str], out: Path) -> None:
    """In a process of its own: run tests on the package, with everything that they say in a file."""
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = str(package.parent)  # for what the tests start
    sys.path[:0] = [str(package.parent)]
    status = 70
    try:
        import pytest

        import lora_lite

        assert str(lora_lite.__file__).startswith(str(package)), lora_lite.__file__
        status = int(pytest.main([*WORDS, *tests]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # threads and caches of torch need no farewell


def _telling_line(output: str) -> str:
    lines = output.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED ", "ERROR ")) and "::" in line]
    return (failed or lines[-1:] or [""])[0]


def plant(bug: Bug, tests: str | None) -> Verdict:
    """Plant one bug and run its tests."""
    start = _used()
    try:
        status, line = _OWN[0].run(shlex.split(tests or bug.tests), bug)
    except LookupError as e:
        return Verdict(bug, "gone", str(e), 0.0)
    word = "no verdict"  # of a test: none was chosen, a file could not be read, or the package could not be imported
    if status == 0:
        word = "survived"
    elif status == 1 and "::" in line:
        word = "killed"
    return Verdict(bug, word, line, _used() - start)


def _used() -> float:
    """Seconds of a processor that ended processes of this one took: independent of what else the machine does."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


def control(tests: list[str]) -> str:
    """The line of a test that is red without any bug, or ''."""
    status, line = _OWN[0].run(tests)
    return "" if status == 0 else line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="bugs at a time")
    parser.add_argument("--only", nargs="*", default=[], help="words; only bugs whose name or file holds one of them")
    parser.add_argument("--tests", help="pytest arguments to try instead of those beside each bug")
    parser.add_argument("--list", action="store_true", help="name the bugs and plant none")
    parser.add_argument("--pages", action="store_true", help="bugs made by rule on the pages of methods")
    args = parser.parse_args()
    bugs = [
        b
        for b in (page_bugs() if args.pages else BUGS)
        if not args.only or any(word in f"{b.name} {b.file}" for word in args.only)
    ]
    if args.list:
        print("\n".join(f"{b.file:36} {b.name}" for b in bugs))
        return 0
    start = time.perf_counter()
    for module in HEAVY:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    assert "lora_lite" not in sys.modules
    print(f"{len(bugs)} bugs, {args.jobs} at a time", flush=True)
    verdicts: list[Verdict] = []
    with (
        tempfile.TemporaryDirectory(prefix="planted-") as folder,
        ProcessPoolExecutor(args.jobs, FORK, begin, (folder,)) as pool,
    ):
        for done in as_completed([pool.submit(plant, bug, args.tests) for bug in bugs]):
            v = done.result()
            verdicts.append(v)
            print(f"{len(verdicts):4} {v.word:10} {v.seconds:5.1f} s  {v.bug.name} ({v.bug.file})", flush=True)
            if not v.killed:
                print(f"{'':24}{v.line[:160]}", flush=True)
        killers = list(dict.fromkeys(_node(v.line) for v in verdicts if v.killed))  # one always red kills everything
        parts = [killers[i :: args.jobs] for i in range(args.jobs)]
        red = [line for line in pool.map(control, [part for part in parts if part]) if line]
    for line in red:
        print(f"red without any bug: {line}")
    survivors = [v for v in verdicts if not v.killed]
    for v in survivors:
        print(f"{v.word}: {v.bug.name} ({v.bug.file})")
    wall, used = time.perf_counter() - start, sum(v.seconds for v in verdicts)
    print(f"{len(bugs)} bugs, {len(survivors)} not caught, {wall:.0f} s ({used:.0f} of a processor)")
    return 1 if survivors or red else 0


def _node(line: str) -> str:
    return line.removeprefix("FAILED ").removeprefix("ERROR ").split(" - ")[0]


if __name__ == "__main__":
    sys.exit(main())
