"""`ll.context`: what a method reads of each row, cut with the rows and kept for recomputation."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
import tiny_llm
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import toy

CFG = ll.MultitaskPromptTuningConfig(r=3, tasks=3)


def tokens(*shape, seed=0):
    return torch.randint(4, 80, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model():
    model = tiny_llm.model().eval()
    for name in "ab":
        ll.attach(model, CFG, name=name)
        randomise(model, name, seed=ord(name), scale=0.5)
    return model


def alone(model, x, name, task):
    with torch.no_grad(), ll.active(model, name), ll.context(model, task_ids=[task]):
        return model(x[None]).logits[0]


@torch.no_grad()
def test_each_row_has_its_task_and_its_adapter(model):
    x, names, tasks = tokens(4, 5), ["b", "a", None, "a"], [2, 0, 1, 2]
    with ll.rows(model, names), ll.context(model, task_ids=tasks):
        got = model(x).logits
    for i, name in enumerate(names):
        torch.testing.assert_close(got[i], alone(model, x[i], name, tasks[i]), atol=1e-5, rtol=1e-5)
    assert (alone(model, x[1], "a", 0) - alone(model, x[1], "a", 2)).abs().max() > 1e-2


@torch.no_grad()
def test_beams_repeat_each_row(model):
    x, how = tokens(2, 5), {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "eos_token_id": None}
    with ll.active(model, "a"), ll.context(model, task_ids=[2, 0]):
        both = model.generate(x, **how)
    for i, task in enumerate((2, 0)):
        with ll.active(model, "a"), ll.context(model, task_ids=[task]):
            assert torch.equal(both[i : i + 1], model.generate(x[i : i + 1], **how))


def test_recomputation_in_backward_reads_the_tasks_of_its_forward(model):
    grads = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        x = tokens(2, 5)
        with ll.active(model, "a"), ll.context(model, task_ids=[1, 2]):
            loss = model(input_ids=x, labels=x).loss
        model.zero_grad()
        loss.backward()  # outside of the block
        grads.append(torch.cat([p.grad.flatten() for p in ll.adapters(model)["a"].parameters()]))
    torch.testing.assert_close(grads[0], grads[1], atol=1e-7, rtol=1e-4)


def test_blocks_nest_and_end(model):
    x = tokens(1, 4)
    with ll.active(model, "a"):
        with ll.context(model, task_ids=[1]), ll.context(model, other=[5]):
            model(x)
        with pytest.raises(ll.SelectionError, match=r"task_ids.*ll.context\(model, task_ids="):
            model(x)


def test_mistakes(model):
    with pytest.raises(ll.SelectionError, match="one entry per batch row"), ll.context(model, task_ids=3):
        pass
    with ll.context(model, task_ids=[0, 1]), pytest.raises(ll.SelectionError, match="task_ids of 2 rows.*batch has 3"):
        model(tokens(3, 4))
    with pytest.raises(ll.StateError, match="no adapter"), ll.context(toy(), task_ids=[0]):
        pass
