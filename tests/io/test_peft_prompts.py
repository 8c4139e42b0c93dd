"""PEFT's prompts and prefixes: saved there and loaded here, exported here and loaded there, the same logits."""

from __future__ import annotations

import json
import warnings

import pytest

peft = pytest.importorskip("peft")

import torch
from safetensors.torch import load_file, save_file

import lora_lite as ll
import tiny_llm
from lora_lite.testing.case import randomise

R = 3
TASK = {"task_type": "CAUSAL_LM"}
THEIRS = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(num_virtual_tokens=R, **TASK),
    "P_TUNING": lambda: peft.PromptEncoderConfig(num_virtual_tokens=R, encoder_hidden_size=20, **TASK),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(num_virtual_tokens=R, **TASK),
    "PREFIX_TUNING projected": lambda: peft.PrefixTuningConfig(
        num_virtual_tokens=R, prefix_projection=True, encoder_hidden_size=20, **TASK
    ),
    "CPT": lambda: peft.CPTConfig(
        cpt_token_ids=[5, 9, 11], cpt_tokens_type_mask=[1, 2, 4], opt_projection_epsilon=0.7, **TASK
    ),
    "MULTITASK_PROMPT_TUNING": lambda: peft.MultitaskPromptTuningConfig(
        num_virtual_tokens=R, num_tasks=3, num_ranks=2, **TASK
    ),
    "CARTRIDGE": lambda: peft.CartridgeConfig(num_virtual_tokens=R, num_frozen_tokens=1, **TASK),
    "ADAPTION_PROMPT": lambda: peft.AdaptionPromptConfig(adapter_len=R, adapter_layers=1, **TASK),
}
CONTEXT = [{"input_ids": torch.arange(4, 11)[None]}]
OURS = {
    "prompt_tuning": ll.PromptTuningConfig(r=R),
    "p_tuning": ll.PTuningConfig(r=R, hidden=20),
    "prefix_tuning": ll.PrefixTuningConfig(r=R),
    "cpt": ll.CPTConfig(r=R, start_tokens=(5, 9, 11), token_types=(1, 2, 4), epsilon=0.7),
    "multitask_prompt_tuning": ll.MultitaskPromptTuningConfig(r=R, tasks=3, ranks=2),
    "cartridge": ll.CartridgeConfig(r=R),
    "adaption_prompt": ll.AdaptionPromptConfig(r=R, layers=(-1,)),
}
X = torch.randint(4, 80, (2, 6), generator=torch.Generator().manual_seed(0))
TASKS = [2, 0]


def theirs_on(model, **more):
    with torch.no_grad():
        return model(X, **more).logits[:, -X.shape[1] :]


def ours_on(model, many):
    with torch.no_grad():
        if many:
            with ll.context(model, task_ids=TASKS):
                return model(X).logits
        return model(X).logits


def check(got, want):
    bare = tiny_llm.model().eval()(X).logits
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert (want - bare).abs().max() > 1e-2


@pytest.mark.parametrize("case", THEIRS)
def test_saved_by_peft_and_loaded_here(case, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        theirs = peft.get_peft_model(tiny_llm.model(), THEIRS[case]()).eval()
        g = torch.Generator().manual_seed(2)
        for p in theirs.parameters():
            if p.requires_grad:
                p.data.add_(0.3 * torch.randn(p.shape, generator=g))
        more = {"task_ids": torch.tensor(TASKS)} if case.startswith("MULTITASK") else {}
        want = theirs_on(theirs, **more)
        theirs.save_pretrained(tmp_path)
    model = tiny_llm.model().eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    ll.load(model, tmp_path)
    check(ours_on(model, more), want)
    ll.detach(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    if case != "ADAPTION_PROMPT":
        tensors = {**load_file(tmp_path / "adapter_model.safetensors"), "prefix_task_more": torch.zeros(2)}
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ll.FileError, match="prefix_task_more"):
            ll.load(model, tmp_path)


@pytest.mark.parametrize("method", OURS)
def test_written_here_and_loaded_by_peft(method, tmp_path):
    model = tiny_llm.model().eval()
    ll.attach(model, OURS[method], CONTEXT if method == "cartridge" else None)
    randomise(model, scale=0.3)
    many = method == "multitask_prompt_tuning"
    want = ours_on(model, many)
    ll.export(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(tiny_llm.model(), tmp_path).eval()
        check(theirs_on(theirs, **({"task_ids": torch.tensor(TASKS)} if many else {})), want)
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
