"""Sparse and spectral updates against PEFT: the same positions and numbers, the same outputs and gradients."""

from __future__ import annotations

import peft
import pytest
import torch

import lora_lite as ll
from parity.against_peft import compare, pair


def placed(mine, theirs, where, exchange=False):
    """Put our positions into PEFT's layers; `exchange` the two mixed quadrants."""
    for path in ("up", "down"):
        ours, other = mine.get_submodule(path), theirs.get_submodule(path)
        i, j = ours.lora_at.long()
        h, w = ours.out_features // 2, ours.in_features // 2
        if exchange:
            i, j = i % h + h * (j >= w), j % w + w * (i >= h)
        getattr(other, where)["default"] = torch.stack((i, j))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # PEFT's
def test_shira():
    mine, theirs = pair(ll.SHiRAConfig(r=3, dtype="float64"), peft.ShiraConfig(r=3))
    placed(mine, theirs, "shira_indices")
    compare(mine, theirs, lambda layer: {"shira_weight.default": layer.lora_values})


def test_fourierft():
    """PEFT transforms in fp32."""
    mine, theirs = pair(ll.FourierFTConfig(n=100, strength=300), peft.FourierFTConfig(n_frequency=100, scaling=300))
    placed(mine, theirs, "indices")
    compare(mine, theirs, lambda layer: {"fourierft_spectrum.default": layer.lora_values}, tolerance=1e-5)


def test_waveft():
    mine, theirs = pair(ll.WaveFTConfig(n=100, strength=5), peft.WaveFTConfig(n_frequency=100, scaling=5))
    placed(mine, theirs, "waveft_indices", exchange=True)
    compare(mine, theirs, lambda layer: {"waveft_spectrum.default": layer.lora_values}, tolerance=1e-5)
