"""Files that somebody else wrote: whatever stands in them, one class of error, quickly, and the model is as it was.
Both parsers: our header, and PEFT's folder."""

from __future__ import annotations

import copy
import itertools
import json
import random
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.core.files import DIGITS, parsed
from lora_lite.io.native import read
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import Snapshot, toy

LONG = "9" * 4300


class Raw(str):
    """A piece of JSON that `json.dumps` would not write."""


VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 10**400, Raw(LONG), Raw("-" + LONG), Raw(LONG + "9"), 0.0, 1e308,
    -1e308, 5e-324, float("nan"), float("inf"), -float("inf"), Raw("1e999"), "", "x", "lora", "\ud800", "\x00",
    "a" * 5000, [], [1], [[1]], [None], ["x"], [Raw(LONG)], {}, {"a": 1}, {"": None}, {"lora_A": "layers.0.up"},
    Raw("[" * 500 + "]" * 500), Raw("[" * 50_000 + "]" * 50_000), Raw('{"a":' * 50_000 + "1" + "}" * 50_000),
    [10**400] * 64, [1e308] * 64, [True] * 64, ["1"] * 64, Raw('{"r": 1, "r": 2}'),
]  # fmt: skip


def text(value: Any) -> str:
    """JSON, with `Raw` pieces as they are."""
    pieces: list[str] = []

    def marked(v: Any) -> Any:
        if isinstance(v, Raw):
            pieces.append(v)
            return f"@{len(pieces) - 1}@"
        if isinstance(v, dict):
            return {k: marked(w) for k, w in v.items()}
        return [marked(w) for w in v] if isinstance(v, list) else v

    found = json.dumps(marked(value))
    for i, piece in enumerate(pieces):
        found = found.replace(f'"@{i}@"', piece)
    return found


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a nested value; of a list the first one."""
    yield at
    inner = value if isinstance(value, dict) else range(min(len(value), 1)) if isinstance(value, list) else ()
    for key in inner:
        yield from places(value[key], (*at, key))


def put(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    if not at:
        return new
    value = copy.copy(value)
    value[at[0]] = put(value[at[0]], at[1:], new)
    return value


CONFIGS = {
    "lora": ll.LoRAConfig(r=3, alpha=7, rank_pattern={"down": 2}, alpha_pattern={"up": 5.0}, train_modules=("head",)),
    "adalora": ll.get_variant("adalora").config(variant="adalora", r=3, target_r=2),
    "tokens": ll.get_variant("token_rows").config(variant="token_rows", token_ids=(3, 9)),
    "shira": ll.get_variant("shira").config(variant="shira", r=2),
}


class Native:
    """A file of ours."""

    def __init__(self, folder: Path, cfg: ll.AdapterConfig = CONFIGS["lora"]) -> None:
        model = toy()
        ll.attach(model, cfg)
        randomise(model)
        self.path = ll.save(model, folder / "x")
        self.config, self.tensors = read(self.path)

    def write(self, config: Any = None, tensors: dict[str, Tensor] | None = None) -> Path:
        raw = config if isinstance(config, str) else text(self.config if config is None else config)
        raw = raw.encode("utf-8", "replace").decode()  # a header is UTF-8, or nobody reads the file
        save_file(self.tensors if tensors is None else tensors, self.path, {"lora_lite": raw})
        return self.path


class Folder:
    """A folder of PEFT's."""

    def __init__(self, folder: Path, cfg: ll.AdapterConfig = CONFIGS["lora"]) -> None:
        model = toy()
        ll.attach(model, ll.LoRAConfig(r=3, alpha=7, train_modules=("head",)))
        randomise(model)
        self.path = ll.export(model, folder / "peft")
        self.config = json.loads((self.path / "adapter_config.json").read_text())
        self.config |= {"rank_pattern": {"layers.0.up": 3}, "alpha_pattern": {"layers.0.up": 2}, "use_dora": False}
        self.tensors = load_file(self.path / "adapter_model.safetensors")

    def write(self, config: Any = None, tensors: dict[str, Tensor] | None = None) -> Path:
        raw = config if isinstance(config, str) else text(self.config if config is None else config)
        (self.path / "adapter_config.json").write_text(raw, encoding="utf-8", errors="surrogatepass")
        if tensors is not None:
            save_file(tensors, self.path / "adapter_model.safetensors")
        return self.path


FORMS: dict[str, Callable[..., Any]] = {"native": Native, "peft": Folder}
X = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(2))


class Model:
    """One model for many files: taken back to what it was after each."""

    def __init__(self) -> None:
        self.model = toy()
        self.before = Snapshot(self.model)

    def load(self, path: Path, what: object, within: float = 1.0) -> str:
        """Load, or see a FileError, in less than a second; "loaded" or what the error says."""
        start = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ll.LoraLiteWarning)
                ll.load(self.model, path)
        except ll.FileError as e:
            said = str(e)
            assert len(said) < 5000, what
        else:
            said = "loaded"
            assert self.model(X).isfinite().all(), what
            ll.detach(self.model)
        assert time.process_time() - start < within, what
        assert not (d := self.before.difference(self.model)), f"{what}: {d}"
        return said


@pytest.mark.parametrize("share", [90, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cfg", CONFIGS)
def test_any_value_at_any_place(form, cfg, share, tmp_path):
    if form == "peft" and cfg != "lora":
        return
    file, model = FORMS[form](tmp_path, CONFIGS[cfg]), Model()
    pairs = list(itertools.product(places(file.config), VALUES))
    random.Random(3).shuffle(pairs)
    for at, value in pairs[::share]:
        model.load(file.write(put(file.config, at, value)), (at, str(value)[:50]))
    assert model.load(file.write(), "the file itself") == "loaded"


@pytest.mark.parametrize("form", FORMS)
def test_what_is_no_json(form, tmp_path):
    file, model = FORMS[form](tmp_path), Model()
    for raw in ("", "{", "nul", LONG + "9", "[" * 100_000, '{"a":' * 100_000, "\x00", "\ufeff{}", "null", "[]", "NaN"):
        assert model.load(file.write(raw), raw[:20]) != "loaded"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1e308, -1e308, 1e39, 1e30, 1e12])
def test_scales_that_no_float_can_bear(form, scale, tmp_path):
    file, model = FORMS[form](tmp_path), Model()
    config = copy.deepcopy(file.config)
    if form == "native":
        config["config"] |= {"alpha": scale, "alpha_pattern": {}, "rank_pattern": {}, "r": 3}
        entry = {k: v for k, v in config["targets"]["layers.0.up"].items() if k != "config"}
        config["targets"] = {"layers.0.up": entry | {"scale": scale / 3}}
        tensors = {k: t for k, t in file.tensors.items() if k.startswith("layers.0.up")}
        assert "scale" in model.load(file.write(config, tensors), scale)
    else:
        for change in ({"lora_alpha": scale, "alpha_pattern": {}}, {"alpha_pattern": {"layers.0.up": scale}}):
            assert "scale" in model.load(file.write(config | change), scale)


STRANGE: dict[str, Callable[[Tensor], Tensor]] = {
    "0-dim": lambda t: torch.tensor(1.0),
    "64-dim": lambda t: t.reshape((1,) * (64 - t.dim()) + t.shape),
    "complex": lambda t: t.to(torch.complex64),
    "bool": lambda t: t > 0,
    "int64": lambda t: t.to(torch.int64),
    "uint8": lambda t: t.to(torch.uint8),
    "uint16": lambda t: t.abs().to(torch.uint16),
    "empty": lambda t: t[:0],
    "nan": lambda t: t * float("nan"),
    "too large for float32": lambda t: t.double() * 1e308,
    "flat": lambda t: t.flatten(),
    "transposed": lambda t: t.mT.contiguous(),
}


@pytest.mark.parametrize("form", FORMS)
def test_tensors_of_another_kind(form, tmp_path):
    file, model = FORMS[form](tmp_path), Model()
    for key in file.tensors:
        if file.tensors[key].dim() == 2 and ("head" in key or "layers.0.up" in key):
            for what, change in STRANGE.items():
                path = file.write(None, {**file.tensors, key: change(file.tensors[key])})
                assert model.load(path, (key, what)) != "loaded", (key, what)


@pytest.mark.parametrize("form", FORMS)
def test_a_tensor_of_65_dimensions(form, tmp_path):
    """safetensors writes none, so the bytes are put together here."""
    file, model = FORMS[form](tmp_path), Model()
    path = file.write(None, file.tensors)
    path = path if path.is_file() else path / "adapter_model.safetensors"
    layout, data = parts(path)
    key = next(k for k in layout if k.endswith(("lora_A", "lora_A.weight")))
    layout[key]["shape"] = [1] * 63 + layout[key]["shape"]
    assemble(path, layout, data)
    assert model.load(file.path, key) != "loaded"


@pytest.mark.parametrize("cfg", ["tokens", "shira"])
@pytest.mark.parametrize("value", [-1, 10**6, -(2**31), 2**31 - 1])
def test_numbers_of_rows_that_are_not_there(cfg, value, tmp_path):
    file, model = Native(tmp_path, CONFIGS[cfg]), Model()
    for key in (k for k, t in file.tensors.items() if not t.is_floating_point()):
        wrong = file.tensors[key].clone()
        wrong.view(-1)[-1] = value
        assert "outside of its range" in model.load(file.write(None, {**file.tensors, key: wrong}), key)


def test_a_row_too_many_and_the_last_one(tmp_path):
    file, model = Native(tmp_path, CONFIGS["shira"]), Model()
    key = next(k for k in file.tensors if k.endswith("layers.0.up.lora_at"))
    for entry in file.config["targets"].values():
        del entry["crc32"]
    for row, value, loads in ((0, 19, True), (0, 20, False), (1, 11, True), (1, 12, False)):  # a layer 12 -> 20
        other = file.tensors[key].clone()
        other[row, -1] = value
        said = model.load(file.write(None, {**file.tensors, key: other}), (row, value))
        assert (said == "loaded") == loads, (row, value, said)


MANY = 20_000


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """The layout and the data of a safetensors file."""
    whole = path.read_bytes()
    n = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + n]), whole[8 + n :]


def assemble(path: Path, layout: dict[str, Any], data: bytes) -> None:
    raw = json.dumps(layout).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def add_empty(path: Path, names: list[str]) -> None:
    """More tensors, without an entry each, as safetensors itself would write them in minutes."""
    layout, data = parts(path)
    end = len(data)
    assemble(path, layout | {n: {"dtype": "F32", "shape": [0], "data_offsets": [end, end]} for n in names}, data)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["x{}", "base_model.model.layers.{}.up.lora_A.weight", "layers.0.up.lora_x{}"])
def test_many_foreign_tensors(form, name, tmp_path):
    file, model = FORMS[form](tmp_path), Model()
    path = file.write(None, file.tensors)
    add_empty(path if path.is_file() else path / "adapter_model.safetensors", [name.format(i) for i in range(2, MANY)])
    assert model.load(path, name) != "loaded"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", ["layers.{}.up", "^x{}$", "(a+)+{}"])
def test_many_patterns(form, pattern, tmp_path):
    file, model = FORMS[form](tmp_path), Model()
    many = {pattern.format(i): 3 for i in range(2, MANY)}
    holder = file.config["config"] if form == "native" else file.config
    for field in ("rank_pattern", "modules_to_save", "target_names"):
        new = many if field.endswith("pattern") else list(many)
        config = put(file.config, ("config",), holder | {field: new}) if form == "native" else holder | {field: new}
        model.load(file.write(config), field)
    if form == "native":
        model.load(file.write(put(file.config, ("targets", "layers.0.up", "config"), {"rank_pattern": many})), "target")


def test_literal_patterns_mean_what_peft_means(tmp_path):
    """The first that hits wins; `^` stands for the whole path."""
    file = Folder(tmp_path)
    for patterns, want in (
        ({"up": 6, "layers.0.up": 9}, {0: 2.0, 1: 2.0}),
        ({"layers.0.up": 9, "up": 6}, {0: 3.0, 1: 2.0}),
        ({"^up": 9}, {0: 1.0, 1: 1.0}),
        ({r"^layers\.1\.up$": 9, "p": 6}, {0: 1.0, 1: 3.0}),
    ):
        model = toy()
        targets = ll.load(model, file.write(file.config | {"alpha_pattern": patterns})).record.targets
        assert {i: targets[f"layers.{i}.up"].cfg.scale for i in (0, 1)} == want, patterns


# ---- chance


class Mutator:
    """Bytes of a file as an attacker who knows nothing would change them: the same for a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def __call__(self, data: bytes) -> bytes:
        new = bytearray(data)
        for _ in range(self.random.choice((1, 1, 2, 5))):
            at = self.random.randrange(len(new) + 1)
            act = self.random.randrange(5)
            if act == 0 and at < len(new):
                new[at] ^= 1 << self.random.randrange(8)
            elif act == 1 and at < len(new):
                new[at] = self.random.choice(b'0123456789-+.eE"[]{},:nulltrue\x00\xff')
            elif act == 2:
                del new[at : at + self.random.randrange(1, 9)]
            elif act == 3:
                new[at:at] = self.random.choice((b"9" * 4400, b"[" * 3000, b"null", b'"', b"-", b"e999", b"\xff\xfe"))
            else:
                start = self.random.randrange(len(new) + 1)
                new[at:at] = new[start : start + self.random.randrange(1, 40)]
        return bytes(new)


@pytest.mark.parametrize("n", [60, pytest.param(4000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", FORMS)
def test_mutated_files(form, n, tmp_path):
    file, model, mutate = FORMS[form](tmp_path), Model(), Mutator(5)
    path = file.write()
    targets = [path] if path.is_file() else sorted(path.iterdir())
    good = {p: p.read_bytes() for p in targets}
    for i in range(n):
        p = targets[i % len(targets)]
        data = good[p]
        if p.suffix == ".safetensors" and i % 4:  # the layout and our header, which a random place would rarely hit
            size = 8 + int.from_bytes(data[:8], "little")
            inner = mutate(data[8:size])
            data = len(inner).to_bytes(8, "little") + inner + data[size:]
        else:
            data = mutate(data)
        p.write_bytes(data)
        model.load(path, (i, p.name))
        p.write_bytes(good[p])
    assert model.load(path, "the file itself") == "loaded"


def test_nothing_of_a_refused_file_stays(tmp_path):
    """The error names the file, and the name is free."""
    file, model = Native(tmp_path), toy()
    with pytest.raises(ll.FileError, match=str(file.path)):
        ll.load(model, file.write(put(file.config, ("config", "r"), 10**400)), name="a")
    assert ll.adapters(model) == {}
    assert isinstance(ll.load(model, file.write(), name="a"), ll.Adapter) and isinstance(model, nn.Module)


def test_one_number_that_is_not_finite(tmp_path):
    """No checksum may stand before the question: PEFT's files have none, and neither have our older ones."""
    model = toy()
    ll.attach(model, ll.LoRAConfig(r=3, alpha=7))
    randomise(model)
    ll.export(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    for value in (float("nan"), float("inf")):
        key = sorted(tensors)[-1]
        save_file({**tensors, key: tensors[key].index_fill(1, torch.tensor([1]), value)}, path)
        with pytest.raises(ll.FileError, match=f"not finite: .*{key.split('.')[-2]}"):
            ll.load(toy(), tmp_path)


def test_digits_of_whole_numbers():
    assert parsed("[" + "9" * DIGITS + "]", "x") == [int("9" * DIGITS)]
    for text in ("9" * (DIGITS + 1), "-" + "9" * (DIGITS + 1)):
        with pytest.raises(ll.FileError, match=r"x is not JSON \(a whole number of"):
            parsed(f"[{text}]", "x")
