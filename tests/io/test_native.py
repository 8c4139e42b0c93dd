"""The adapter file: what stands in it, what a damaged or hostile one does (one class of error, quickly, and no trace),
and that writing is atomic."""

from __future__ import annotations

import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
import warnings
import weakref

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import lora_lite as ll
from lora_lite.core import files
from lora_lite.io import native
from lora_lite.io.header import read_header
from lora_lite.io.native import read
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import FakeQuantLinear, Snapshot, toy

CFG = ll.LoRAConfig(r=3, alpha=7, dropout=0.1, rank_pattern={"down": 2}, alpha_pattern={r"layers\.1\..*": 5.0})


def x():
    return torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(2))


def adapted(cfg=CFG, name="default"):
    model = toy()
    ll.attach(model, cfg, name=name)
    randomise(model, name)
    return model


@pytest.fixture
def good(tmp_path):
    """(header, tensors, folder) of a valid file."""
    return Good((*read(ll.save(adapted(), tmp_path / "good")), tmp_path))


class Good(tuple):
    def __repr__(self):  # hypothesis prints the arguments of what failed
        return "good"


def write(path, head, tensors, raw=None):
    meta = {"lora_lite": raw if raw is not None else json.dumps(head), "format": "pt"}
    save_file({k: v.contiguous() for k, v in tensors.items()}, str(path), meta)
    return path


def refused(path, *words, within=1.0, error=ll.FileError):
    """Loading raises one class of error, quickly, and leaves the model alone."""
    model = toy()
    before = Snapshot(model)
    start = time.process_time()
    with pytest.raises(error) as e, warnings.catch_warnings():
        warnings.simplefilter("ignore", ll.LoraLiteWarning)
        ll.load(model, path)
    took = time.process_time() - start
    assert took < within, f"{took:.1f} s"
    assert not (d := before.difference(model)), d
    assert all(w in str(e.value) for w in words), f"{words} not in: {e.value}"
    return str(e.value)


# ---- what stands in the file


def test_the_file(good):
    head, tensors, folder = good
    assert sorted(tensors) == sorted(f"layers.{i}.{n}.lora_{t}" for i in (0, 1) for n in ("up", "down") for t in "AB")
    assert head["format"] == 1 and head["version"] == ll.__version__ and head["requires"] == []
    assert head["config"]["alpha"] == 7 and head["config"]["variant"] == "lora"
    ranks = {p: (t["r"], t["scale"]) for p, t in head["targets"].items()}
    assert ranks == {
        "layers.0.up": (3, 7 / 3), "layers.0.down": (2, 7 / 2), "layers.1.up": (3, 5 / 3), "layers.1.down": (2, 5 / 2),
    }  # fmt: skip
    assert read_header(folder / "good.safetensors") == head
    with safe_open(folder / "good.safetensors", "pt") as f:
        assert all(json.loads(v) is not None for k, v in f.metadata().items() if k == "lora_lite")
    assert [p.name for p in folder.iterdir()] == ["good.safetensors"], "a temporary file stayed behind"


def test_saving_is_deterministic(tmp_path):
    a, b = ll.save(adapted(), tmp_path / "a"), ll.save(adapted(name="other"), tmp_path / "b")
    assert a.read_bytes() == b.read_bytes()


def test_effective_scales_survive(tmp_path):
    for cfg in (CFG, ll.LoRAConfig(r=4, alpha=6, use_rslora=True), ll.LoRAConfig(r=2)):
        model = adapted(cfg)
        want = {t.path: t.cfg.scale for t in ll.adapters(model)["default"].record.targets.values()}
        other = toy()
        handle = ll.load(other, ll.save(model, tmp_path / "x"))
        assert {t.path: t.cfg.scale for t in handle.record.targets.values()} == want
        assert handle.cfg == cfg and torch.equal(other(x()), model.eval()(x()))


def test_dtypes_in_file_and_model(tmp_path):
    model = adapted()
    small = ll.save(model, tmp_path / "small", dtype=torch.bfloat16)
    assert {t.dtype for t in read(small)[1].values()} == {torch.bfloat16}
    other = toy()
    ll.load(other, small)
    assert other.layers[0].up.lora_A.dtype == torch.float32
    torch.testing.assert_close(other(x()), model.eval()(x()), atol=0.05, rtol=0)


def test_compiled_and_wrapped_models_write_plain_keys(tmp_path):
    class DistributedDataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    plain = ll.save(adapted(), tmp_path / "plain")
    for i, wrap in enumerate((torch.compile, DistributedDataParallel)):
        model = wrap(adapted())
        assert ll.save(model, tmp_path / str(i)).read_bytes() == plain.read_bytes()
        assert sorted(ll.adapter_state_dict(model)) == sorted(read(plain)[1])
        fresh = torch.compile(toy())
        ll.load(fresh, plain)
        assert list(ll.adapters(fresh)) == ["default"]


def test_which_adapter_and_where(tmp_path):
    model = adapted(name="a")
    ll.attach(model, CFG, name="b")
    randomise(model, "b", seed=3)
    a, b = ll.save(model, tmp_path / "a", name="a"), ll.save(model, tmp_path / "deep" / "er" / "b.st", name="b")
    assert b.suffix == ".st" and read(a)[1].keys() == read(b)[1].keys()
    other = toy()
    ll.load(other, b, name="first")
    ll.load(other, a, name="second", trainable=True)
    states = [(n, h.trainable, h.active) for n, h in ll.adapters(other).items()]
    assert states == [("first", False, False), ("second", True, True)]
    for mine, theirs in (("first", "b"), ("second", "a")):
        with ll.active(other, mine), ll.active(model, theirs):
            assert torch.equal(other(x()), model.eval()(x()))
    with pytest.raises(ll.FileError, match="folder"):
        ll.save(model, tmp_path, name="a")


def test_the_golden_file_still_loads(tmp_path):
    """A file of format 1, written as bytes here: what was once written must load for ever."""
    entry = {"d_in": 12, "d_out": 20, "r": 2, "scale": 2.5, "base": {}}
    head = {
        "format": 1, "version": "0.1.0", "requires": [], "targets": {"layers.0.up": entry}, "steps": 3,
        "config": {"variant": "lora", "r": 2, "alpha": 5.0, "dtype": "float32", "target_names": ["layers\\.0\\.up"]},
    }  # fmt: skip
    A, B = torch.arange(24).view(2, 12) / 24, torch.arange(40).view(20, 2) / 40
    tensors = {"layers.0.up.lora_A": A, "layers.0.up.lora_B": B}
    layout, data, at = {"__metadata__": {"lora_lite": json.dumps(head)}}, b"", 0
    for k, t in tensors.items():
        layout[k] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [at, at + 4 * t.numel()]}
        data += struct.pack(f"<{t.numel()}f", *t.flatten().tolist())
        at += 4 * t.numel()
    text = json.dumps(layout).encode()
    path = tmp_path / "golden.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    model = toy()
    handle = ll.load(model, path)
    v = torch.randn(4, 12)
    want = v @ (model.layers[0].up.weight + 2.5 * B @ A).mT + model.layers[0].up.bias
    torch.testing.assert_close(model.layers[0].up(v), want)
    assert handle.record.steps == 3


# ---- other people's files


def test_pickles_are_refused_by_content_whatever_they_are_called(tmp_path):
    bomb = pickle.dumps({"a": torch.zeros(3)})
    for name in ("x.bin", "x.pt", "x.pkl", "x.safetensors"):
        word = "safetensors" if name == "x.pt" else "no pickles"  # where the original library's files are looked for
        (tmp_path / name).write_bytes(bomb)
        refused(tmp_path / name, word)
        torch.save({"a": torch.zeros(3)}, tmp_path / name)
        refused(tmp_path / name, word)


def test_what_is_no_file_of_ours(tmp_path):
    refused(tmp_path / "nothing.safetensors", "does not exist")
    huge = struct.pack("<Q", 1 << 62) + bytes(99)
    for name, content in {"empty": b"", "short": b"abc", "zeros": bytes(64), "huge": huge}.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name)
    save_file({"a": torch.zeros(2)}, str(tmp_path / "foreign.safetensors"))
    refused(tmp_path / "foreign.safetensors", "lora_lite header", "adapter_config.json")
    refused(tmp_path)


def test_every_truncation_is_noticed(good):
    _, _, folder = good
    whole = (folder / "good.safetensors").read_bytes()
    for n in (1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 4, len(whole) - 1):
        (folder / "cut.safetensors").write_bytes(whole[:n])
        refused(folder / "cut.safetensors")
    (folder / "long.safetensors").write_bytes(whole + b"more")
    refused(folder / "long.safetensors")


def test_overlapping_and_repeated_offsets_are_refused(good):
    head, tensors, folder = good
    layout = {"__metadata__": {"lora_lite": json.dumps(head)}}
    for k, t in tensors.items():
        layout[k] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [0, 4 * t.numel()]}
    text = json.dumps(layout).encode()
    (folder / "overlap.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(400))
    refused(folder / "overlap.safetensors")


def test_newer_files(good):
    head, tensors, folder = good
    path = write(folder / "new", {**head, "format": 2}, tensors)
    assert "newer version" in refused(path)
    path = write(folder / "new", {**head, "requires": ["rotations"]}, tensors)
    assert "rotations" in refused(path)
    path = write(folder / "new", {**head, "novelty": 1, "config": {**head["config"], "novelty": 2}}, tensors)
    with pytest.warns(ll.LoraLiteWarning, match="novelty"):
        ll.load(toy(), path)


EVIL = {
    "rank 10^9": lambda h: h["config"].update(r=10**9),
    "rank 10^9 of a target": lambda h: h["targets"]["layers.0.up"].update(config={"r": 10**9}),
    "rank 10^6": lambda h: h["config"].update(r=10**6),
    "a rank of the file that is not the tensors'": lambda h: h["config"].update(r=4),
    "a negative rank": lambda h: h["config"].update(r=-3),
    "rank as text": lambda h: h["config"].update(r="3"),
    "rank as a list": lambda h: h["config"].update(r=[3]),
    "a rank that is true": lambda h: h["config"].update(r=True),
    "NaN alpha": lambda h: h["config"].update(alpha=float("nan")),
    "infinite alpha": lambda h: h["config"].update(alpha=float("inf")),
    "alpha 0": lambda h: h["config"].update(alpha=0),
    "dtype load": lambda h: h["config"].update(dtype="load"),
    "unknown method": lambda h: h["config"].update(variant="os.system"),
    "no method": lambda h: h["config"].pop("variant"),
    "a method that is a list": lambda h: h["config"].update(variant=["lora"]),
    "a broken pattern": lambda h: h["config"].update(target_names=["("]),
    "a config that is a list": lambda h: h.update(config=[1]),
    "no targets": lambda h: h.update(targets={}),
    "targets that are a list": lambda h: h.update(targets=[1]),
    "a target that is a list": lambda h: h["targets"].update({"layers.0.up": [1]}),
    "a target that is null": lambda h: h["targets"].update({"layers.0.up": None}),
    "an unknown path": lambda h: h["targets"].update({"layers.7.up": h["targets"]["layers.0.up"]}),
    "the root as a path": lambda h: h["targets"].update({"": h["targets"]["layers.0.up"]}),
    "a norm as a target": lambda h: h["targets"].update({"embed": h["targets"]["layers.0.up"]}),
    "wrong sizes": lambda h: h["targets"]["layers.0.up"].update(d_in=13),
    "negative sizes": lambda h: h["targets"]["layers.0.up"].update(d_in=-12),
    "sizes as text": lambda h: h["targets"]["layers.0.up"].update(d_in="twelve"),
    "sizes of 10^30": lambda h: h["targets"]["layers.0.up"].update(d_in=10**30),
    "no sizes": lambda h: h["targets"]["layers.0.up"].pop("d_in"),
    "a target's config as a list": lambda h: h["targets"]["layers.0.up"].update(config=[1]),
    "a target's config with a wrong type": lambda h: h["targets"]["layers.0.up"].update(config={"alpha": "x"}),
    "another scale than the config's": lambda h: h["targets"]["layers.0.up"].update(scale=99.0),
    "another kind": lambda h: h["targets"]["layers.0.up"].update(kind="block"),
    "an unknown kind": lambda h: h["targets"]["layers.0.up"].update(kind="eval"),
    "a format that is text": lambda h: h.update(format="1"),
    "a format that is true": lambda h: h.update(format=True),
    "format 0": lambda h: h.update(format=0),
    "steps as text": lambda h: h.update(steps="many"),
    "negative steps": lambda h: h.update(steps=-1),
    "a fingerprint of text": lambda h: h["targets"]["layers.0.up"].update(
        base={"sample": ["a"] * 64, "dtype": "float32"}
    ),
    "a fingerprint of lists": lambda h: h["targets"]["layers.0.up"].update(base={"sample": [[1.0]] * 64, "dtype": []}),
    "10^5 config keys of the wrong type": lambda h: h.update(
        config={**{f"k{i}": i for i in range(10**5)}, "variant": "lora", "r": "x"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", EVIL)
def test_hostile_headers(good, what):
    head, tensors, folder = good
    EVIL[what](head)
    refused(write(folder / "evil.safetensors", head, tensors))


@pytest.mark.parametrize("text", ["", "null", "[]", "3", '"x"', "{", "{}", '{"format": 1}', "[" * 100_000, "\x00"])
def test_headers_that_are_not_json_of_ours(good, text):
    _, tensors, folder = good
    refused(write(folder / "evil.safetensors", None, tensors, raw=text))


def test_many_keys(good):
    head, tensors, folder = good
    many = {**tensors, **{f"layers.0.up.lora_x{i}": torch.zeros(1) for i in range(4_000)}}
    text = refused(write(folder / "many.safetensors", head, many), "4000 are unexpected")
    assert len(text) < 1000
    head["targets"] |= {f"layers.{i}.up": head["targets"]["layers.0.up"] for i in range(30_000)}
    refused(write(folder / "many.safetensors", head, tensors), within=8.0)  # minutes if quadratic


def test_a_pattern_of_a_file_is_never_run(good):
    head, tensors, folder = good
    head["config"]["target_names"] = [r"(a+)+(a+)+(a+)+(a+)+$" + "b"]
    model = toy()
    start = time.process_time()
    ll.load(model, write(folder / "slow.safetensors", head, tensors))
    assert time.process_time() - start < 1


def test_wrong_tensors(good):
    head, tensors, folder = good
    key = "layers.0.up.lora_A"
    for what, value in {
        "shape": tensors[key].mT, "flat": tensors[key].flatten(), "nan": tensors[key] * float("nan"),
        "inf": tensors[key] / 0, "integers": tensors[key].to(torch.int64), "bool": tensors[key] > 0,
    }.items():  # fmt: skip
        refused(write(folder / f"{what}.safetensors", head, {**tensors, key: value}), key)
    missing = {k: v for k, v in tensors.items() if k != key}
    renamed = {**missing, "layers.0.up.lora_a": tensors[key]}
    text = refused(
        write(folder / "renamed.safetensors", head, renamed), "1 tensors are missing", key, "1 are unexpected"
    )
    assert "Did you mean 'layers.0.up.lora_a'" in text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=150, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_any_header_loads_or_is_refused(good, data):
    """Whatever JSON stands at whatever place: a working adapter or a LoraLiteError, nothing else."""
    head, tensors, folder = good
    head = json.loads(json.dumps(head))
    place, key = head, data.draw(st.sampled_from(sorted(head)))
    while isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place)))
    place[key] = data.draw(JSON)
    model = toy()
    before = Snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ll.LoraLiteWarning)
        try:
            ll.load(model, write(folder / "any.safetensors", head, tensors))
        except ll.LoraLiteError:
            assert not (d := before.difference(model)), d
        else:
            assert model(x()).isfinite().all()


@hypothesis.given(at=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
@hypothesis.settings(max_examples=100, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_any_flipped_byte_loads_or_is_refused(good, at, value):
    _, _, folder = good
    whole = bytearray((folder / "good.safetensors").read_bytes())
    whole[int(at * len(whole))] = value
    (folder / "flipped.safetensors").write_bytes(whole)
    model = toy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ll.LoraLiteWarning)
        try:
            ll.load(model, folder / "flipped.safetensors", base_check="ignore")
        except ll.LoraLiteError:
            pass


# ---- other bases


def test_the_base_is_compared_within_its_rounding(tmp_path):
    path = ll.save(adapted(), tmp_path / "x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ll.load(toy(dtype=torch.bfloat16), path)  # the same weights, rounded
    other = toy()
    other.layers[1].down.weight.data *= 1.05
    refusal = pytest.raises(ll.BaseMismatchError, match="layers.1.down.*base_check='warn'")
    with refusal:
        ll.load(other, path)
    with pytest.warns(ll.LoraLiteWarning, match="layers.1.down"):
        ll.load(other, path, name="a", base_check="warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ll.load(other, path, name="b", base_check="ignore")
    with pytest.raises(ll.FileError, match="base_check"):
        ll.load(other, path, name="c", base_check="no")


@pytest.mark.parametrize(
    ("dtype", "rounded", "changed"),
    [
        (torch.float32, 1 + 2**-20, 1 + 2**-15),
        (torch.float16, 1 + 2**-10, 1 + 2**-8),
        (torch.bfloat16, 1 + 2**-8, 1 + 2**-6),
    ],
    ids=str,
)
def test_every_dtype_has_the_tolerance_of_its_own_rounding(dtype, rounded, changed, tmp_path):
    model = toy(dtype=dtype)
    ll.attach(model, CFG)
    path = ll.save(model, tmp_path / "x")
    for factor in (rounded, changed):
        other = toy(dtype=dtype)
        other.layers[1].down.weight.data *= factor
        assert not torch.equal(other.layers[1].down.weight, model.layers[1].down.weight)
        if factor == rounded:
            ll.load(other, path)
        else:
            with pytest.raises(ll.BaseMismatchError, match="layers.1.down"):
                ll.load(other, path)


# ---- writing


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    from lora_lite.io import tensors

    model = adapted()
    path = ll.save(model, tmp_path / "x")
    old = path.read_bytes()
    randomise(model, seed=4)

    def broken(new, file, meta):
        with open(file, "wb") as f:
            f.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(tensors, "save_file", broken)
    with pytest.raises(ll.FileError, match="disk full"):
        ll.save(model, path)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == [path.name]

    def wrong(new, file, meta):
        save_file({k: t + 1 for k, t in new.items()}, file, meta)

    monkeypatch.setattr(tensors, "save_file", wrong)
    with pytest.raises(ll.FileError, match="does not read back"):
        ll.save(model, path)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path):
    path = ll.save(adapted(), tmp_path / "x")
    old = path.read_bytes()
    code = f"""
import os, signal, sys
sys.path[:0] = {[p for p in sys.path if p]!r}
import lora_lite as ll
from lora_lite.io import tensors
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import toy
model = toy()
ll.attach(model, ll.LoRAConfig(r=3))
randomise(model)
tensors.os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
ll.save(model, {str(path)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert path.read_bytes() == old
    ll.load(toy(), path)


def test_state_dicts(tmp_path):
    model = adapted()
    state = ll.adapter_state_dict(model)
    assert all(t.device.type == "cpu" and not t.requires_grad for t in state.values())
    state["layers.0.up.lora_A"].zero_()
    assert model.layers[0].up.lora_A.any(), "the state is a view of the model"
    own = {id(p) for p in model.parameters()}
    before = Snapshot(model)
    for bad in (
        {k: v for k, v in state.items() if "lora_A" in k},
        {**state, "x.lora_A": torch.zeros(1)},
        {**state, "layers.0.up.lora_A": torch.zeros(12, 3)},
        {},
    ):
        with pytest.raises(ll.FileError):
            ll.load_adapter_state_dict(model, None, bad)
        assert not (d := before.difference(model)), d
    ll.load_adapter_state_dict(model, "default", state)
    assert {id(p) for p in model.parameters()} == own and not model.layers[0].up.lora_A.any()


def test_other_weights_beside_a_quantised_layer_raise(tmp_path):
    """A layer that is only quantised differently warns, once, and the other layers are checked all the same."""
    path = ll.save(adapted(), tmp_path / "x")

    def coarse(*layers):
        model = toy()
        for block, name in layers:
            dense = getattr(model.layers[block], name)
            packed = FakeQuantLinear(dense.in_features, dense.out_features)
            step = dense.weight.abs().amax(1, keepdim=True) / 127
            packed.scales, packed.bias = step.detach(), dense.bias
            packed.weight.data = (dense.weight / step).round().to(torch.int8)
            setattr(model.layers[block], name, packed)
        return model

    with pytest.warns(ll.LoraLiteWarning, match="quantised differently") as seen:
        ll.load(coarse((0, "up"), (0, "down"), (1, "up")), path)
    assert len([w for w in seen if "quantised" in str(w.message)]) == 1
    for first in ((0, "up"), (0, "down")):
        other = coarse(first)
        with torch.no_grad():
            other.layers[1].up.weight.normal_()
        with pytest.raises(ll.BaseMismatchError, match=r"layers\.1\.up"), warnings.catch_warnings():
            warnings.simplefilter("ignore", ll.LoraLiteWarning)
            ll.load(other, path)


def test_a_file_is_taken_tensor_by_tensor(tmp_path, monkeypatch):
    path = ll.save(adapted(), tmp_path / "a.safetensors")
    lent, opens, each, opened = [], [], native.each_tensor, files.opened

    def watched(path, keys):
        for key, t in each(path, keys):
            assert sum(old() is not None for old in lent) <= 1, "what was copied has been let go of"
            lent.append(weakref.ref(t))
            yield key, t

    monkeypatch.setattr(native, "each_tensor", watched)
    monkeypatch.setattr(files, "opened", lambda path: opens.append(path) or opened(path))
    monkeypatch.setattr(files, "MAPPED", 1)
    model = toy()
    ll.load(model, path)
    assert len(lent) == len(ll.adapter_state_dict(model)) <= len(opens), "the pages of the file are let go of"
    torch.testing.assert_close(model(x()), adapted()(x()), atol=0, rtol=0)


def memory(key):
    with open("/proc/self/status") as f:
        return int(next(line for line in f if line.startswith(key)).split()[1]) * 1024


WIDE = 2 * 4 * 4096 * 512 * 4


def wide():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(4)))


def peak_of_load(path):
    """What loading takes at its peak and afterwards, over the adapter's size; in a process that did nothing before."""
    model = wide()
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the peak counts from here
    before = memory("VmRSS")
    ll.load(model, path)
    return (memory("VmHWM") - before) / WIDE, (memory("VmRSS") - before) / WIDE


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the system does not tell a process's peak")
@pytest.mark.parametrize("layout", ["a.safetensors", "peft"])
def test_loading_needs_little_more_than_what_is_loaded(layout, tmp_path):
    path, model = tmp_path / layout, wide()
    ll.attach(model, ll.LoRAConfig(r=4096, alpha=3))
    ll.save(model, path) if path.suffix else ll.export(model, path, format="peft")
    code = f"from tests.io.test_native import peak_of_load; print(*peak_of_load({str(path)!r}))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, after = map(float, ran.stdout.split())
    assert after > 0.9, "the measure sees what was loaded"
    assert peak < 1.3, "8 MiB of the file are looked at at a time, an eighth of this one; 2.1 where it is read whole"
