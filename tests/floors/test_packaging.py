"""What is promised to whoever installs: extras, one set of versions, no trace of the machine it grew on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import lora_lite as ll

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAX_BYTES = 2_000_000

# Written in pieces, so that this file does not hold what it looks for.
HOSTS = re.compile(
    rb"(?i)py[p]i\.org|python[h]osted|download\.py[t]orch|[a]rtifactory|anaconda\.[o]rg|npm[j]s|/[s]imple/|"
    rb"(?:index-url|find-links)[= ]+[\"']?(?:https?|file):|@ (?:https?|file):"
)
PATHS = re.compile(rb"(?<![\w.\-)}])/(?:home|Users|root|work|workspace|opt|mnt)/[\w.]")


def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def requirement_name(line: str) -> str:
    return re.split(r"[\s<>=!~;\[]", line)[0].lower().replace("_", "-")


def constraints() -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return {requirement_name(line): line for line in lines if line}


def test_core_needs_torch_and_safetensors_only():
    assert {requirement_name(line) for line in PROJECT["dependencies"]} == {"torch", "safetensors"}
    assert any(line.startswith("safetensors[torch]") for line in PROJECT["dependencies"])  # saving needs its numpy


def test_extras():
    extras = PROJECT["optional-dependencies"]
    assert set(extras) == {"hf", "cli", "quant", "eval", "serve", "docs", "dev"}
    assert "lora-lite[hf]" in extras["cli"]


def test_constraints_pin_every_direct_dependency():
    pins = constraints()
    assert pins["torch"] == "torch==2.13.0"
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+(; python_version >= \"3\.11\")?", pin) for pin in pins.values()), pins
    asked = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
    names = {requirement_name(line) for line in asked if "python_version <" not in line} - {"lora-lite"}
    assert names <= set(pins), f"no pin for {sorted(names - set(pins))}"


def test_one_version():
    assert ll.__version__ == version("lora-lite")


def test_the_command_is_installed():
    (command,) = entry_points(group="console_scripts", name="lora-lite")
    assert command.value == "lora_lite.cli:main"


def test_package_says_that_it_is_typed():
    assert (ROOT / "src/lora_lite/py.typed").exists()


@pytest.mark.parametrize("text", ["https://py" + "pi.org/x", "see /ho" + "me/me/x", "--index-url htt" + "p://x"])
def test_the_patterns_find_a_planted_trace(text):
    assert HOSTS.search(text.encode()) or PATHS.search(text.encode())


def test_no_registry_and_no_path_of_a_machine():
    here = f"{ROOT}/".encode()
    found = []
    for path in tracked():
        data = path.read_bytes()
        hits = [match.group() for pattern in (HOSTS, PATHS) for match in pattern.finditer(data)]
        hits += [here] if here in data else []
        found += [f"{path.relative_to(ROOT)}: {hit!r}" for hit in hits]
    assert not found, "\n".join(found)


def test_no_large_file_but_the_demo_base():
    large = [
        f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes"
        for path in tracked()
        if path.stat().st_size > MAX_BYTES and ROOT / "src/lora_lite/demo/base" not in path.parents
    ]
    assert not large, "\n".join(large)


SCRIPT = """
import lora_lite as ll, torch
from pathlib import Path
from lora_lite.demo.data import BASE
assert Path(ll.__file__).is_relative_to(%r), ll.__file__
assert (Path(ll.__file__).parent / "py.typed").is_file()
assert (BASE / "config.json").is_file() and list(BASE.glob("*.safetensors")), "the demo's base"
model = torch.nn.Sequential(torch.nn.Linear(12, 20))
ll.attach(model, ll.LoRAConfig(r=3, alpha=5))
ll.save(model, "a.safetensors")
ll.detach(model)
ll.load(model, "a.safetensors")
print(ll.__version__)
"""
"""Run from an empty folder, by the interpreter that the package was installed for."""


@pytest.mark.slow
@pytest.mark.optional_backend("hatchling")
def test_wheel_and_sdist_install_into_a_fresh_environment(tmp_path):
    """Both are built, without network, and hold all that a user needs; torch is borrowed from this environment."""
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path / "dist")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    bare = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    for built in (wheel, sdist):
        home = tmp_path / built.name[-4:].strip(".")
        venv.create(home)  # pip of this environment installs into it
        python = home / "bin" / "python"
        site = sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)})
        (Path(site) / "borrowed.pth").write_text("".join(f"{p}\n" for p in sys.path if p.endswith("-packages")))
        install = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--no-build-isolation",
        ]
        install += ["--ignore-installed", built]
        done = subprocess.run(list(map(str, install)), env=bare, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (home / "work").mkdir()
        for words in (["-c", SCRIPT % str(home)], ["-m", "lora_lite.cli", "--version"]):
            done = subprocess.run(
                [str(python), *words], cwd=home / "work", env=bare, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0 and ll.__version__ in done.stdout, done.stderr
        assert (home / "bin" / "lora-lite").is_file()
