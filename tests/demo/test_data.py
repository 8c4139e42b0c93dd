"""The bundled rows, and models from any local folder."""

from __future__ import annotations

import pytest
import torch

import tiny_llm
from lora_lite import FileError
from lora_lite.demo.data import load_model, wordmath_rows
from lora_lite.demo.wordmath import generate


def test_wordmath_rows():
    rows = wordmath_rows("validation", 7, seed=2)
    assert [(r["prompt"], r["completion"]) for r in rows] == [
        (p.prompt, p.completion) for p in generate("validation", 7, seed=2)
    ]


def test_any_local_folder_is_a_model_in_the_dtype_of_its_checkpoint(tmp_path):
    folder = tiny_llm.save(tmp_path / "m")
    model, tok = load_model(str(folder), dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert tok.padding_side == "left" and tok.pad_token == "<pad>"
    model.save_pretrained(folder)
    assert load_model(str(folder), dtype="auto")[0].dtype == torch.bfloat16


def test_a_name_that_loads_nothing_says_what_is_possible(tmp_path):
    with pytest.raises(FileError, match="demo"):
        load_model(str(tmp_path / "nothing"))


def test_truncated_weights_are_one_sentence(tmp_path):
    folder = tiny_llm.save(tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(FileError, match="no model can be loaded") as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)
