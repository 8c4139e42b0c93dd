"""PEFT's prompts and prefixes: saved there and loaded here, exported here and loaded there, the same logits."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("peft")

import torch
from safetensors.torch import load_file, save_file

import lora_lite as ll
import tiny_llm
from peft_prompts import OURS, THEIRS, R, X, ours_on, poly, saved, written


def check(got, want):
    bare = tiny_llm.model().eval()(X).logits
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert (want - bare).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", THEIRS)
def test_saved_by_peft_and_loaded_here(case, tmp_path):
    want, many = saved(case, tmp_path)
    model = tiny_llm.model().eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    ll.load(model, tmp_path)
    check(ours_on(model, many), want)
    ll.detach(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    if case != "ADAPTION_PROMPT":
        tensors = {**load_file(tmp_path / "adapter_model.safetensors"), "prefix_task_cols_": torch.zeros(2)}
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ll.FileError, match="prefix_task_cols_"):
            ll.load(model, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", OURS)
def test_written_here_and_loaded_by_peft(method, tmp_path):
    want, got, many = written(method, tmp_path)
    check(got, want)
    again = tiny_llm.model().eval()
    ll.load(again, tmp_path)
    check(ours_on(again, many), want)


def test_what_is_no_prompt_of_this_model(tmp_path):
    model = tiny_llm.model()
    ll.attach(model, ll.PrefixTuningConfig(r=R, layers=(0,)))
    with pytest.raises(ll.StateError, match="PEFT's PREFIX_TUNING stands in every attention"):
        ll.export(model, tmp_path)
    ll.detach(model)
    ll.attach(model, OURS["prefix_tuning"])
    ll.export(model, tmp_path)
    ll.detach(model)
    weights = tmp_path / "adapter_model.safetensors"
    save_file({"prompt_embeddings": torch.zeros(R, 60)}, weights)
    with pytest.raises(ll.FileError, match="60 wide, and keys and values of this model's 2 attentions are 64"):
        ll.load(model, tmp_path)
    save_file({"prompt_embeddings": torch.zeros(R, 64, dtype=torch.int64)}, weights)
    with pytest.raises(ll.FileError, match="expected floating"):
        ll.load(model, tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(said | {"num_transformer_submodules": 2}))
    save_file({"prompt_embeddings": torch.zeros(R, 64)}, weights)
    with pytest.raises(ll.FileError, match="an encoder and a decoder"):
        ll.load(model, tmp_path)
    assert not ll.adapters(model)


def test_types_that_are_no_method_here_say_why(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LILY"}')
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ll.FileError, match="averages its router over all tokens"):
        ll.load(tiny_llm.model(), tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_mixture_of_tasks_both_ways(tmp_path):
    bare, want, theirs, again = poly(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "POLY"
    assert (want - bare).abs().max() > 0.1
    for got in (theirs, again):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
