"""`ll.cost` against what is measured on a real model, for every trained method."""

from __future__ import annotations

import collections
import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lora_lite as ll
import tiny_models
from lora_lite.bench import speed
from lora_lite.cost.counting import counter
from lora_lite.cost.paper import Paper
from methods import OF_EACH_KIND
from neighbours import needs, older

B, T = 2, 48
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "vocab_size": 128,
}


def llama(device="cpu", **changes):
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**SIZES | changes)).requires_grad_(False).train()


def measured(model):
    ids = torch.zeros(B, T, dtype=torch.long)
    saved = speed.saved_bytes(model, ids)
    with counter() as count:
        embeds = model.get_input_embeddings()(ids)
        embeds = embeds if embeds.requires_grad else embeds.detach().requires_grad_(True)
        loss = model(inputs_embeds=embeds, labels=ids, use_cache=False).loss
        forward = count.get_total_flops()
        loss.backward()
    return forward, count.get_total_flops(), saved


@pytest.fixture(scope="module")
def paper():
    return Paper(llama("meta"), B, T)


@pytest.fixture(scope="module")
def bare():
    return measured(llama())


def peak_saved(model):
    """The most that autograd keeps at one moment of a step, parameters not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    users, now, peak = collections.Counter(), 0, 0

    class Held:
        def __init__(self, t):
            nonlocal now, peak
            self.t, self.key = t, t.untyped_storage().data_ptr()
            self.size = 0 if self.key in own else t.untyped_storage().nbytes()
            users[self.key] += 1
            now += self.size if users[self.key] == 1 else 0
            peak = max(peak, now)

        def __del__(self):
            nonlocal now
            users[self.key] -= 1
            now -= self.size if users[self.key] == 0 else 0

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.t):
        speed.step(model, torch.zeros(B, T, dtype=torch.long))
    assert now == 0
    return peak


METHODS = [v.name for v in ll.variants() if v.trains and v.site in ("linear", "block") and v.needs_data != "adapters"]


QUICK = (*OF_EACH_KIND, "boft", "vera", "lokr", "fourierft", "molora", "bottleneck", "prefix_tuning")


@pytest.mark.parametrize("method", [pytest.param(m, marks=[pytest.mark.slow] * (m not in QUICK)) for m in METHODS])
def test_within_five_percent_of_the_real_thing(method, paper, bare):
    variant = ll.get_variant(method)
    cfg = variant.config(variant=method, r=4) if method != "adalora" else variant.config(variant=method, r=6)
    if variant.site == "block":
        cfg = variant.config(variant=method, r=4, positions="all")
    data = (
        [{"input_ids": torch.arange(24).view(2, 12), "labels": torch.arange(24).view(2, 12)}]
        if variant.needs_data
        else None
    )
    model = llama()
    adapter = ll.attach(model, cfg, calibration_data=data)
    if variant.on_step is not None:
        ll.schedule(model, torch.optim.SGD(adapter.param_groups(lr=0.0)), 10)
    forward, step, saved = measured(model)
    cost = paper.cost(cfg)
    if not getattr(cfg, "rho", 1) > 1:  # a rank that data redistributes is not known on paper
        assert cost.trained == adapter.num_parameters()
    assert cost.extra_forward == pytest.approx(forward - bare[0], rel=0.05, abs=64)
    assert cost.extra_step == pytest.approx(step - bare[1], rel=0.05, abs=64)
    assert cost.extra_saved == pytest.approx(saved - bare[2], rel=0.05, abs=512)
    if older("transformers", "5.0"):
        return  # its blocks keep other things between checkpoints
    model.gradient_checkpointing_enable({"use_reentrant": True})  # the other kind hides from hooks what it keeps
    assert cost.base_checkpointed + cost.extra_checkpointed == pytest.approx(peak_saved(model), rel=0.05)


@needs("transformers", "5.0", "mask that is counted here")
def test_the_base_itself(paper, bare):
    assert (paper.base[0], paper.base[1]) == bare[:2]
    assert paper.base[2] == pytest.approx(bare[2], rel=0.01)
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 96) + 64 * 128
    attention = 2 * 2 * 2 * B * T * T * 64  # two blocks, two products, not halved for the causal mask
    assert paper.base[0] == 2 * B * T * weights + attention
    assert paper.base[1] == 2 * 2 * B * T * weights + attention * 7 // 2  # five products backward, one of them again


def test_deep_models_checkpoint_to_their_blocks_inputs():
    few, many = (Paper(llama("meta", num_hidden_layers=n), B, T).base for n in (2, 6))
    assert many[3] - few[3] == 4 * B * T * 64 * 4
    assert many[3] < many[2] / 2


CHOSEN = [
    ll.VeRAConfig(r=4),  # two factors for all blocks
    ll.LoRAConfig(r=4, layers=(1, 3)),
    ll.LoRAConfig(r=4, rank_pattern={"layers.2.mlp.gate_proj": 2}),
]


def test_a_deep_model_lies_on_the_line_of_two_shallow_ones():
    deep = llama("meta", num_hidden_layers=4)
    line, whole = Paper(deep, B, T), Paper(deep, B, T)
    whole.shallow = []
    whole.base = whole._bare()
    assert len(line.shallow) == 2 and line.base == whole.base
    for cfg in CHOSEN:
        assert line.cost(cfg) == whole.cost(cfg)


def test_blocks_of_different_builds_are_counted_one_by_one():
    deep = llama("meta", num_hidden_layers=4)
    deep.model.layers[2].mlp = llama("meta", intermediate_size=32).model.layers[0].mlp
    paper = Paper(deep, B, T)
    assert paper.shallow == [] and paper.base[0] < Paper(llama("meta", num_hidden_layers=4), B, T).base[0]
    assert Paper(llama("meta", num_hidden_layers=3), B, T).shallow == []  # nothing would be won


def test_grouped_heads_and_a_model_that_checkpoints_already():
    plain = llama("meta", num_key_value_heads=2)
    assert Paper(plain, B, T).base[0] == measured(llama(num_key_value_heads=2))[0]
    model = copy.deepcopy(plain)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert Paper(model, B, T).base == Paper(plain, B, T).base
    assert model.is_gradient_checkpointing


def test_lora_by_hand(paper):
    cost = paper.cost(ll.LoRAConfig(r=4))
    widths = 2 * (4 * (64 + 64) + 3 * (64 + 96))
    assert cost.trained == 4 * widths
    assert cost.adapter_bytes == cost.gradient_bytes == 16 * widths
    assert cost.optimizer_bytes == 32 * widths
    assert cost.extra_forward == 2 * B * T * 4 * widths
    assert cost.extra_step == 3 * cost.extra_forward


def test_nothing_is_touched_and_memory_grows_with_tokens():
    model = llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    one = ll.cost(model, ll.DoRAConfig(r=4), batch=1, length=32)
    four = ll.cost(model, ll.DoRAConfig(r=4), batch=4, length=32)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())
    assert four.extra_saved > 3 * one.extra_saved
    assert "TFLOP" in str(one)


def test_mistakes_are_named():
    with pytest.raises(ll.ConfigError, match="must be positive"):
        ll.cost(llama("meta"), ll.LoRAConfig(), batch=0)
    with pytest.raises(
        ll.ConfigError, match=r"(?s)BertForSequenceClassification cannot be run .* causal language model"
    ):
        ll.cost(tiny_models.build("bert"), ll.LoRAConfig())
    with pytest.raises(ll.ConfigError, match="bare transformers model"):
        ll.cost(torch.nn.Linear(3, 4), ll.LoRAConfig())
    with pytest.raises(ll.TargetError):
        ll.cost(llama("meta"), ll.LoRAConfig(target_names=("nowhere",)))


def test_a_deep_model_without_a_config_is_counted_whole():
    model = llama(num_hidden_layers=5)
    bare, wanted = Paper(model, B, T), ll.cost(model, ll.LoRAConfig(r=3), B, T)
    assert bare.shallow

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.get_input_embeddings = model, model.get_input_embeddings

        def forward(self, **batch):
            return self.inside(**batch)

    paper = Paper(Own(), B, T)
    assert not paper.shallow
    assert paper.cost(ll.LoRAConfig(r=3)).extra_forward == wanted.extra_forward > 0
