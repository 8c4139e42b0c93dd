"""Adapted language models on a CUDA device: greedy answers, cached and not, are those of the CPU; a forward that is
recorded as a CUDA graph; mixed batches."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

import lora_lite as ll
import tiny_llm
from lora_lite.testing.case import randomise

pytestmark = pytest.mark.gpu
METHODS = (
    "lora",
    "dora",
    "hra",
    "oft",
    "road",
    "loreft",
    "prompt_tuning",
    "prefix_tuning",
    "adaption_prompt",
    "bottleneck",
)


def adapted(method: str):
    model = tiny_llm.model().eval()
    cfg = ll.get_variant(method).config(variant=method)
    ll.attach(model, cfg)
    randomise(model, scale=0.05)
    return model


def prompts(model):
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(3, model.config.vocab_size, (3, 7), generator=g)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # left padding
    return ids, mask


@pytest.mark.parametrize("method", METHODS)
def test_logits_and_answers_are_those_of_the_cpu(method):
    here = adapted(method)
    there = copy.deepcopy(here).cuda()
    ids, mask = prompts(here)
    with torch.no_grad():
        a = here(input_ids=ids, attention_mask=mask).logits
        b = there(input_ids=ids.cuda(), attention_mask=mask.cuda()).logits
        # padding may hold anything
        torch.testing.assert_close(b.cpu()[mask.bool()], a[mask.bool()], rtol=1e-3, atol=1e-3)
        kwargs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        said = there.generate(input_ids=ids.cuda(), attention_mask=mask.cuda(), **kwargs)
        with ll.prompt(there, mask.sum(1).tolist()) if method == "loreft" else contextlib.nullcontext():
            uncached = there.generate(input_ids=ids.cuda(), attention_mask=mask.cuda(), use_cache=False, **kwargs)
    assert torch.equal(said, uncached)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_a_forward_is_captured_as_a_graph(method):
    """No adapter waits for the device on the way: a forward without gradients can be recorded and replayed, also after
    the adapter's values have moved."""
    model = adapted(method).cuda()
    ids, _ = prompts(model)
    ids = ids.cuda()
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(input_ids=ids, use_cache=False)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(input_ids=ids, use_cache=False).logits
        randomise(model, seed=77, scale=0.05)
        graph.replay()
        torch.testing.assert_close(out, model(input_ids=ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)


def test_a_mixed_batch_beside_each_alone():
    model = adapted("lora")
    ll.attach(model, ll.LoRAConfig(r=4, alpha=9), name="b")
    randomise(model, "b", seed=5, scale=0.05)
    model.cuda()
    ids, mask = (t.cuda() for t in prompts(model))
    with torch.no_grad():
        with ll.rows(model, ["default", "b", None]):
            mixed = model(input_ids=ids, attention_mask=mask).logits
        for row, name in enumerate(("default", "b", None)):
            with ll.active(model, name):
                alone = model(input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1]).logits
            kept = mask[row].bool()
            torch.testing.assert_close(mixed[row][kept], alone[0][kept], rtol=1e-4, atol=1e-4)


def test_peft_reads_what_was_trained_on_the_device(tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted("lora").cuda()
    ids = prompts(model)[0].cuda()
    ll.export(model, tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(tiny_llm.model().cuda().eval(), tmp_path / "peft")
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "dora", "hra", "oft"])
def test_compiled_is_eager(method):
    model = adapted(method).cuda()
    ids = prompts(model)[0].cuda()
    with torch.no_grad():
        eager = model(input_ids=ids, use_cache=False).logits
        model.compile(dynamic=False)
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, eager, rtol=1e-3, atol=1e-3)
