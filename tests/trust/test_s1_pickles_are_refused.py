"""S1. A pickle is refused by its suffix and by its content, and never opened as one."""

from __future__ import annotations

import os
import pickle

import pytest
import torch

import lora_lite as ll
from lora_lite.testing.toy import Snapshot, toy


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl", ".ckpt", ".safetensors", ""])
@pytest.mark.parametrize("writer", ["pickle", "torch", "legacy torch"])
def test_a_pickle_under_any_name(suffix, writer, tmp_path):
    path, trace = tmp_path / f"adapter{suffix}", tmp_path / "trace"
    if writer == "pickle":
        path.write_bytes(pickle.dumps(Bomb(trace)))
    else:
        torch.save({"a": Bomb(trace)}, path, _use_new_zipfile_serialization=writer == "torch")
    model = toy()
    before = Snapshot(model)
    with pytest.raises(ll.FileError):
        ll.load(model, path)
    assert not trace.exists() and not (d := before.difference(model)), d
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists(), "the bomb of this test is none"


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_folder_with_a_pickle(name, tmp_path):
    folder, trace = tmp_path / "peft", tmp_path / "trace"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["up"]}')
    torch.save({"a": Bomb(trace)}, folder / name)
    model = toy()
    before = Snapshot(model)
    with pytest.raises(ll.FileError):
        ll.load(model, folder)
    assert not trace.exists() and not (d := before.difference(model)), d
