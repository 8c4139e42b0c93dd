"""Bytes of strangers for both parsers: our header and PEFT's folder. With atheris they are searched for, guided by what
the parsers execute; what it found is `trust/corpus.json`, which the tests try again.

python tests/fuzz_parsers.py --seconds 600 --corpus /tmp/corpus       # needs `pip install atheris`
python tests/fuzz_parsers.py --keep /tmp/corpus                       # a small part of it into trust/corpus.json
"""

from __future__ import annotations

import argparse
import base64
import importlib
import json
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).parent / "trust" / "corpus.json"
KINDS = ("file", "header", "config", "weights")
"""What the bytes are: a whole native file, the header of one, the config of a folder, the tensors of one. The first
byte of an input says which."""
SLOW = 2.0
"""Seconds of a processor that no input of these sizes may take."""


class Parsers:
    """A model, and places where inputs become files."""

    def __init__(self, folder: Path) -> None:
        import torch
        from safetensors.torch import load_file, save

        import lora_lite as ll
        from lora_lite.io.native import read
        from lora_lite.testing.case import randomise
        from lora_lite.testing.toy import Snapshot, toy

        self.ll, self.save, self.folder = ll, save, folder
        self.said, self.random_state = "", torch.get_rng_state
        self.model = toy()
        ll.attach(self.model, ll.LoRAConfig(r=2, alpha=5, alpha_pattern={"up": 3.0}, target_names=("up", "down")))
        randomise(self.model)
        native = ll.save(self.model, folder / "good")
        ll.export(self.model, folder / "peft")
        ll.detach(self.model)
        self.head, self.tensors = read(native)
        self.weights = load_file(folder / "peft" / "adapter_model.safetensors")
        self.whole = native.read_bytes()
        self.config = (folder / "peft" / "adapter_config.json").read_bytes()
        self.packed = (folder / "peft" / "adapter_model.safetensors").read_bytes()
        torch.set_grad_enabled(False)
        self.before = Snapshot(self.model)
        torch.set_grad_enabled(True)

    def seeds(self) -> list[bytes]:
        head = json.dumps(
            {**self.head, "targets": {p: {**t, "base": {}, "crc32": {}} for p, t in self.head["targets"].items()}}
        )
        return [bytes([i]) + b for i, b in enumerate((self.whole, head.encode(), self.config, self.packed))]

    def place(self, data: bytes) -> Path:
        """The input as files that look right apart from it."""
        kind, rest = KINDS[data[0] % 4] if data else "file", data[1:]
        if kind in ("file", "header"):
            path = self.folder / "tried.safetensors"
            said = {"lora_lite": rest.decode(errors="replace")}
            path.write_bytes(rest if kind == "file" else self.save(self.tensors, said))
            return path
        peft = self.folder / "peft"
        (peft / "adapter_config.json").write_bytes(rest if kind == "config" else self.config)
        (peft / "adapter_model.safetensors").write_bytes(rest if kind == "weights" else self.packed)
        return peft

    def try_it(self, data: bytes) -> bool:
        """Whether the input loads. Raises whatever is no error of ours, and AssertionError where a refused file left
        something behind."""
        try:
            path = self.place(data)
        except (UnicodeError, ValueError):  # what safetensors does not write
            return False
        self.before.rng = self.random_state()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.ll.load(self.model, path)
            except self.ll.LoraLiteError as e:
                loaded, self.said = False, str(e)
            else:
                loaded = True
                self.ll.detach(self.model)
        assert not (d := self.before.difference(self.model)), d
        return loaded


def search(seconds: int, corpus: Path) -> None:
    """Let atheris look for inputs that execute something new."""
    atheris: Any = importlib.import_module("atheris")

    with atheris.instrument_imports(include=["lora_lite.io", "lora_lite.core", "lora_lite.runtime.targets"]):
        import lora_lite.io.header
        import lora_lite.io.peft  # noqa: F401
    corpus.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    parsers = Parsers(folder)
    for i, seed in enumerate(parsers.seeds()):
        (corpus / f"seed{i}").write_bytes(seed)
    words = sorted(
        {*parsers.head, *parsers.head["config"], *json.loads(parsers.config), "lora_A", "layers.0.up", "NaN", "1e999"}
    )
    (folder / "words").write_text("".join(f'"{w}"\n' for w in words))
    options = [
        f"-max_total_time={seconds}",
        "-max_len=12000",
        f"-dict={folder / 'words'}",
        "-timeout=60",
        "-rss_limit_mb=4000",
    ]

    def one(data: bytes) -> None:
        parsers.try_it(data)

    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


def keep(corpus: Path, most: int = 96, longest: int = 3000) -> None:
    """The shortest inputs of which each does what those of its kind before it do not: it executes other lines, or gets
    another answer."""
    folder = tempfile.mkdtemp()
    parsers, seen, kept = Parsers(Path(folder)), set[Any](), list[bytes]()
    for path in sorted(corpus.iterdir(), key=lambda p: (p.stat().st_size, p.name)):
        data = path.read_bytes()
        parsers.said = ""
        lines = lines_of(parsers, data)
        answer = re.sub(r"[^a-z ]", "", parsers.said.replace(folder, ""))[:300]
        new = {(data[:1], place) for place in (*lines, answer)} - seen
        if new and len(data) <= longest and len(kept) < most:
            seen |= new
            kept.append(data)
    CORPUS.write_text(json.dumps([base64.b64encode(d).decode() for d in kept], indent=0) + "\n")
    print(f"{len(kept)} inputs, {sum(map(len, kept))} bytes, {len(seen)} lines and answers")


def lines_of(parsers: Parsers, data: bytes) -> set[tuple[str, int]]:
    """The lines of `io` and `core` that an input executes."""
    found: set[tuple[str, int]] = set()

    def line(frame: Any, event: str, arg: Any) -> Any:
        found.add((frame.f_code.co_filename, frame.f_lineno))
        return line

    def call(frame: Any, event: str, arg: Any) -> Any:
        return (
            line
            if "/lora_lite/io/" in frame.f_code.co_filename or "/lora_lite/core/" in frame.f_code.co_filename
            else None
        )

    sys.settrace(call)
    try:
        parsers.try_it(data)
    finally:
        sys.settrace(None)
    return found


def corpus() -> list[bytes]:
    return [base64.b64decode(text) for text in json.loads(CORPUS.read_text())]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    if args.keep:
        keep(args.keep)
    else:
        search(args.seconds, args.corpus)
