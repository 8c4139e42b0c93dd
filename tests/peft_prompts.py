"""Prompts and prefixes on one Llama: PEFT's configs, ours, and what each gives for the text."""

from __future__ import annotations

import peft
import torch
from torch import nn

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


def saved(case, folder):
    """Let PEFT write the case with random tensors. Returns what the adapted model gives, and whether of several
    tasks."""
    torch.manual_seed(1)
    theirs = peft.get_peft_model(tiny_llm.model(), THEIRS[case]()).eval()
    g = torch.Generator().manual_seed(2)
    for p in theirs.parameters():
        if p.requires_grad:
            p.data.add_(0.3 * torch.randn(p.shape, generator=g))
    many = case.startswith("MULTITASK")
    want = theirs_on(theirs, **({"task_ids": torch.tensor(TASKS)} if many else {}))
    theirs.save_pretrained(folder)
    return want, many


def written(method, folder):
    """Export a random adapter of ours. Returns what the model gives, and what PEFT gives with it."""
    model = tiny_llm.model().eval()
    ll.attach(model, OURS[method], CONTEXT if method == "cartridge" else None)
    randomise(model, scale=0.3)
    many = method == "multitask_prompt_tuning"
    want = ours_on(model, many)
    ll.export(model, folder)
    theirs = peft.PeftModel.from_pretrained(tiny_llm.model(), folder).eval()
    return want, theirs_on(theirs, **({"task_ids": torch.tensor(TASKS)} if many else {})), many


class Two(nn.Module):
    """Two linear layers, whose mixtures ask for the rows' tasks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 8, bias=False)

    def forward(self, x):
        return self.down(self.up(x).tanh())


ROWS = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(4))


def poly(folder):
    """Export a random mixture of ours. Returns the bare output, ours, PEFT's, and ours loaded again."""
    model = Two().eval()
    bare = model(ROWS)
    cfg = ll.PolyConfig(r=3, alpha=5, tasks=3, skills=2, splits=2, target_names=".*", alpha_pattern={"up": 2})
    ll.attach(model, cfg)
    randomise(model)
    ll.export(model, folder)
    theirs = peft.PeftModel.from_pretrained(Two(), folder).eval()
    for layer in (theirs.base_model.model.up, theirs.base_model.model.down):
        layer.forward = lambda x, own=layer.forward: own(x, task_ids=torch.tensor(TASKS))
    again = Two().eval()
    ll.load(again, folder)
    with torch.no_grad(), ll.context(model, task_ids=TASKS), ll.context(again, task_ids=TASKS):
        return bare.detach(), model(ROWS), theirs(ROWS), again(ROWS)
