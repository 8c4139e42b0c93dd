"""S5. Truncated, overlapping, not finite: the file is refused, and the model is as before."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

import lora_lite as ll
from lora_lite.io.native import read
from lora_lite.testing.toy import Snapshot
from methods import OF_EACH_KIND, every_method


def forget_sums(head):
    """Or else the checksums would refuse the file first."""
    for target in head["targets"].values():
        target.pop("crc32", None)


def refused(model, path, why="."):
    before = Snapshot(model)
    with pytest.raises(ll.FileError, match=why):
        ll.load(model, path)
    assert not (d := before.difference(model)), d


@every_method(quick=OF_EACH_KIND)
def test_one_number_that_is_not_finite(case, tmp_path):
    head, tensors = read(ll.save(case.random(), tmp_path / "x"))
    forget_sums(head)
    for i, (key, t) in enumerate(tensors.items()):
        if not t.is_floating_point():
            continue
        bad = t.clone()
        bad.view(-1)[i % t.numel()] = (float("nan"), float("inf"), -float("inf"))[i % 3]
        save_file({**tensors, key: bad}, str(tmp_path / "bad.safetensors"), {"lora_lite": json.dumps(head)})
        refused(case.model(), tmp_path / "bad.safetensors", "not finite")


@every_method(quick=OF_EACH_KIND)
def test_every_cut(case, tmp_path):
    whole = ll.save(case.random(), tmp_path / "x").read_bytes()
    model = case.model()
    for n in sorted({0, 1, 7, 8, 9, *(len(whole) * k // 7 for k in range(1, 7)), len(whole) - 1}):
        (tmp_path / "cut.safetensors").write_bytes(whole[:n])
        refused(model, tmp_path / "cut.safetensors")
    (tmp_path / "long.safetensors").write_bytes(whole + b"x")
    refused(model, tmp_path / "long.safetensors")


@pytest.mark.parametrize("how", ["overlapping", "a hole", "beyond the end", "twice the same key"])
def test_offsets_that_lie(how, tmp_path):
    case = ll.testing.Case(ll.get_variant("lora"))
    head, tensors = read(ll.save(case.random(), tmp_path / "x"))
    layout, at = {"__metadata__": {"lora_lite": json.dumps(head)}}, 0
    for key, t in tensors.items():
        size = 4 * t.numel()
        layout[key] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [at, at + size]}
        at += {"overlapping": size - 4, "a hole": size + 4}.get(how, size)
    if how == "beyond the end":
        layout[key]["data_offsets"] = [2**40, 2**40 + size]
    text = json.dumps(layout)
    if how == "twice the same key":
        entry = json.dumps({key: layout[key]})[1:-1]
        text = text[:-1] + ", " + entry + "}"
    (tmp_path / "bad.safetensors").write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(at + 64))
    refused(case.model(), tmp_path / "bad.safetensors")


def test_a_tensor_of_another_kind_of_number(tmp_path):
    case = ll.testing.Case(ll.get_variant("lora"))
    head, tensors = read(ll.save(case.random(), tmp_path / "x"))
    forget_sums(head)
    key = next(iter(tensors))
    for dtype in (torch.int64, torch.bool, torch.uint8):
        save_file(
            {**tensors, key: tensors[key].to(dtype)}, str(tmp_path / "bad.safetensors"), {"lora_lite": json.dumps(head)}
        )
        refused(case.model(), tmp_path / "bad.safetensors")
