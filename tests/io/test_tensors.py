"""A file that was written is complete, and readable by whom the user's mask allows."""

from __future__ import annotations

import os

import pytest
import torch

from lora_lite.core.errors import FileError
from lora_lite.io import tensors

VALUES = {"a": torch.arange(3.0)}


@pytest.mark.skipif(os.name != "posix", reason="masks of POSIX")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_the_mode_follows_the_mask(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        tensors.write_tensors(tmp_path / "x", VALUES, {})
        assert os.umask(mask) == mask, "the mask is as it was"
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == mode


def test_other_values_than_those_given_are_no_file(tmp_path, monkeypatch):
    write = tensors.save_file
    monkeypatch.setattr(tensors, "save_file", lambda new, *rest: write({k: t + 1 for k, t in new.items()}, *rest))
    with pytest.raises(FileError, match="does not read back"):
        tensors.write_tensors(tmp_path / "x", VALUES, {})
    assert not list(tmp_path.iterdir())
