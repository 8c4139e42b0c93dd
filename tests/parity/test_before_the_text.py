"""Prompts and prefixes against PEFT on one Llama, with the same tensors: logits and gradients."""

from __future__ import annotations

import peft
import pytest
import torch

import lora_lite as ll
import tiny_llm
from lora_lite.testing.case import randomise
from parity.against_peft import relative

R, HEADS, WIDE = 3, 2, 16
TASK = {"task_type": "CAUSAL_LM"}


def both(cfg, config, data=None):
    """(our model, PEFT's) with a random adapter of ours, in fp64."""
    mine, theirs = tiny_llm.model().double().eval(), tiny_llm.model().double().eval()
    ll.attach(mine, cfg, data)
    randomise(mine, scale=0.3)
    return mine, peft.get_peft_model(theirs, config).double().eval()


def tokens(*shape, seed=0):
    return torch.randint(4, 80, shape, generator=torch.Generator().manual_seed(seed))


def own(model):
    found = {}
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if ".lora_" in name or name.startswith("lora_"):
            found.setdefault("lora_" + name.split("lora_")[1].split(":")[0], []).append(t)
    return found


# the norms of Llama compute in fp32, whatever the model's dtype
def compare(mine, theirs, pairs, cut=0, tolerance=1e-6, **more):
    """`pairs`: (ours, PEFT's parameter, the value that it must hold as a function of ours)."""
    for _, theirs_p, value in pairs:
        theirs_p.data.copy_(value.detach())
    x, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, 4:] = 0
    got = mine(x, attention_mask=mask).logits
    want = theirs(x, attention_mask=mask, **more).logits[:, cut:]
    kept = mask.bool()
    weights = torch.randn(want[kept].shape, dtype=want.dtype, generator=torch.Generator().manual_seed(1))
    leaves = [p for p, t, _ in pairs if t.requires_grad]
    g = torch.autograd.grad((got[kept] * weights).sum(), leaves)
    h = torch.autograd.grad((want[kept] * weights).sum(), [t for _, t, _ in pairs if t.requires_grad])
    through = sum(
        (value * grad).sum() for (_, t, value), grad in zip([p for p in pairs if p[1].requires_grad], h, strict=True)
    )
    errors = [relative(a, b) for a, b in zip(g, torch.autograd.grad(through, leaves), strict=True)]
    errors.append(relative(got[kept], want[kept]))
    with ll.active(mine, None):
        assert relative(mine(x, attention_mask=mask).logits, got) > 1e-2
    assert max(errors) <= tolerance, errors


def encoder(model):
    return model.prompt_encoder["default"]


def test_prompt_tuning():
    mine, theirs = both(
        ll.PromptTuningConfig(r=R, dtype="float64"), peft.PromptTuningConfig(num_virtual_tokens=R, **TASK)
    )
    (P,) = own(mine)["lora_P"]
    compare(mine, theirs, [(P, encoder(theirs).embedding.weight, P)], cut=R)


def test_p_tuning():
    config = peft.PromptEncoderConfig(num_virtual_tokens=R, encoder_hidden_size=20, **TASK)
    mine, theirs = both(ll.PTuningConfig(r=R, hidden=20, dtype="float64"), config)
    found, head = own(mine), encoder(theirs).mlp_head
    pairs = [(found["lora_Z"][0], encoder(theirs).embedding.weight)]
    for i in range(3):
        pairs += [(found[f"lora_W{i + 1}"][0], head[2 * i].weight), (found[f"lora_b{i + 1}"][0], head[2 * i].bias)]
    compare(mine, theirs, [(a, b, a) for a, b in pairs], cut=R)


@pytest.mark.parametrize("epsilon", [90.0, 0.1])
def test_cpt(epsilon):
    """Inside of the ball gradients agree too; outside PEFT writes the projection into its parameter."""
    config = peft.CPTConfig(
        cpt_token_ids=[5, 9, 11],
        cpt_tokens_type_mask=[1, 2, 4],
        opt_projection_epsilon=epsilon,
        opt_projection_format_epsilon=epsilon / 2,
        **TASK,
    )
    mine, theirs = both(
        ll.CPTConfig(
            r=R,
            start_tokens=(5, 9, 11),
            token_types=(1, 2, 4),
            epsilon=epsilon,
            format_epsilon=epsilon / 2,
            dtype="float64",
        ),
        config,
    )
    D, P0 = own(mine)["lora_D"][0], own(mine)["lora_P0"][0]
    torch.testing.assert_close(P0, encoder(theirs).embedding.weight.data)
    if epsilon > 1:
        compare(mine, theirs, [(D, encoder(theirs).delta_embedding.weight, D)], cut=R)
    encoder(theirs).delta_embedding.weight.data.copy_(D)
    x = tokens(2, 6)
    torch.testing.assert_close(mine(x).logits, theirs(x).logits[:, R:], atol=1e-7, rtol=1e-7)


def test_multitask_prompt_tuning():
    config = peft.MultitaskPromptTuningConfig(num_virtual_tokens=R, num_tasks=3, num_ranks=2, **TASK)
    cfg = ll.MultitaskPromptTuningConfig(r=R, tasks=3, ranks=2, dtype="float64")
    mine, theirs = both(cfg, config)
    found, other = own(mine), encoder(theirs)
    pairs = [(found["lora_P"][0], other.embedding.weight), (found["lora_U"][0], other.prefix_task_cols)]
    pairs.append((found["lora_V"][0], other.prefix_task_rows))
    with ll.context(mine, task_ids=[2, 0]):
        compare(mine, theirs, [(a, b, a) for a, b in pairs], cut=R, task_ids=torch.tensor([2, 0]))
    with pytest.raises(ll.SelectionError, match="task_ids.*ll.context"):
        mine(tokens(2, 4))


@pytest.mark.parametrize("method", ["prefix_tuning", "cartridge"])
def test_prefixes(method):
    text = tokens(1, 5, seed=4)
    if method == "cartridge":
        data, cfg = [{"input_ids": text}], ll.CartridgeConfig(r=R, frozen=1, dtype="float64")
        config = peft.CartridgeConfig(num_virtual_tokens=R, num_frozen_tokens=1, **TASK)
    else:
        data, cfg = None, ll.PrefixTuningConfig(r=R, dtype="float64")
        config = peft.PrefixTuningConfig(num_virtual_tokens=R, **TASK)
    mine, theirs = both(cfg, config, data)
    found, halves = own(mine), []
    for layer in range(2):
        for letter in "KV":
            t = found[f"lora_{letter}"][layer]
            if method == "cartridge":
                t0 = found[f"lora_{letter}0"][layer]
                t = t0 + torch.cat((torch.zeros_like(t0[:1]), t))
            halves.append(t)
    whole = torch.cat(halves, 1)  # (r, 2 layers · keys and values)
    if method == "cartridge":
        encoder(theirs).frozen_embedding.data.copy_(whole[:1].detach())
        target, value = encoder(theirs).trainable_embedding, whole[1:]
    else:
        target, value = encoder(theirs).embedding.weight, whole
    target.data.copy_(value.detach())
    x = tokens(2, 6)
    got, want = mine(x).logits, theirs(x).logits
    weights = torch.randn_like(got)
    leaves = [*found["lora_K"], *found["lora_V"]]
    g = torch.autograd.grad((got * weights).sum(), leaves)
    (at,) = torch.autograd.grad((want * weights).sum(), [target])
    h = torch.autograd.grad((value * at).sum(), leaves)
    assert max(relative(a, b) for a, b in zip((got, *g), (want, *h), strict=True)) < 1e-9


def test_adaption_prompt():
    config = peft.AdaptionPromptConfig(adapter_len=R, adapter_layers=1, **TASK)
    mine, theirs = both(ll.AdaptionPromptConfig(r=R, layers=(-1,), dtype="float64"), config)
    found = own(mine)
    P, gate = found["lora_P"][0], found["lora_g"][0]
    layer = theirs.get_base_model().model.layers[1].self_attn
    compare(mine, theirs, [(P, layer.adaption_prompt, P[None]), (gate, layer.adaption_gate, gate)])
