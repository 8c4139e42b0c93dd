"""`layer.once`: what is kept while a model generates, and what must not be."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lora_lite as ll
import tiny_models
from lora_lite.core.variant import Variant
from lora_lite.testing.case import randomise

COUNT: Counter[str] = Counter()


@pytest.fixture
def counting():
    """A method that counts how often its small algebra runs."""

    @ll.register
    class Counting(Variant):
        """Adds s to every output."""

        name = "counting_memo"

        @staticmethod
        def param_specs(d_in, d_out, cfg):
            return {"lora_s": ll.ParamSpec((1,))}

        @staticmethod
        def forward(layer, x, y):
            def compute():
                COUNT[layer.path] += 1
                return layer.lora_s * layer.strength

            return y + layer.once("s", compute)

    from lora_lite.core import registry

    COUNT.clear()
    yield
    registry._TABLE.pop("counting_memo")


def llama():
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def generate(model, n=6, **kwargs):
    ids = torch.arange(5)[None]
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=n,
        min_new_tokens=n,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )
    return torch.stack(out.logits)


def attach_counting(model):
    return ll.attach(model, ll.AdapterConfig(variant="counting_memo", target_names=("q_proj",)))


def test_once_per_generation(counting):
    model = llama()
    attach_counting(model)
    generate(model)
    assert sum(COUNT.values()) == 1
    generate(model)
    assert sum(COUNT.values()) == 2  # another cache, another generation
    generate(model, use_cache=False, n=3)
    assert sum(COUNT.values()) == 5


def test_nothing_is_kept_in_training_or_with_gradients(counting):
    from transformers import DynamicCache

    model = llama()
    attach_counting(model)
    for training, grad, calls in ((True, False, 2), (False, True, 2), (False, False, 1)):
        COUNT.clear()
        model.train(training)
        cache = DynamicCache()
        with torch.set_grad_enabled(grad):
            for _ in range(2):
                model(torch.arange(3)[None], **tiny_models.continuing(model, cache), use_cache=True)
        assert sum(COUNT.values()) == calls


def test_a_written_tensor_is_seen_in_the_middle(counting):
    from transformers import DynamicCache

    model = llama()
    adapter = attach_counting(model)
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.arange(3)[None], **tiny_models.continuing(model, cache), use_cache=True)
        next(adapter.parameters()).fill_(3.0)
        model(torch.arange(1)[None], **tiny_models.continuing(model, cache), use_cache=True)
    assert sum(COUNT.values()) == 2


def test_copies_take_no_memo_along(counting):
    model = llama()
    attach_counting(model)
    generate(model)
    assert model._lora_lite_state.here.now.decoding is not None
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert clone._lora_lite_state.here.now.decoding is None


def test_a_changed_parameter_between_generations_acts(counting):
    """Weights swapped through `.data` between two generations, as averaging of weights does, which no version counter
    shows."""
    model = llama()
    ll.attach(model, ll.DoRAConfig(r=2, alpha=3))
    randomise(model)
    first = generate(model)
    for p in ll.adapters(model)["default"].parameters():
        p.data.mul_(3.0)
    second = generate(model)
    fresh = copy.deepcopy(model)
    assert not torch.equal(first, second)
    assert torch.equal(second, generate(fresh))


METHODS = [v.name for v in ll.variants() if v.site == "linear" and v.trains and not v.needs_data]


@pytest.mark.parametrize("method", METHODS)
def test_generation_is_the_same_with_and_without(method, monkeypatch):
    model = llama()
    variant = ll.get_variant(method)
    fields = {"r": 4, "alpha": 7} if variant.config.__dataclass_fields__.keys() >= {"r", "alpha"} else {}
    ll.attach(model, variant.config(variant=method, **fields))
    randomise(model)
    kept = generate(model)
    assert model._lora_lite_state.here.now.memo is None
    monkeypatch.setattr("lora_lite.runtime.view.layer.memo_of", lambda module: None)
    torch.testing.assert_close(kept, generate(model), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["lora", "dora", "hra"])
def test_a_token_casts_nothing_again(method):
    """On a bf16 base with fp32 adapters a token of a generation launches the products and no cast, which a GPU would
    feel more than the arithmetic."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers import DynamicCache

    class Casts(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.n += func is torch.ops.aten._to_copy.default
            return func(*args, **(kwargs or {}))

    def casts(model):
        cache, ids = DynamicCache(config=model.config), torch.tensor([[3, 4, 5]])
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, use_cache=True)
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
            with Casts() as seen:
                model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        return seen.n

    model = llama().bfloat16()
    bare = casts(model)
    ll.attach(model, ll.get_variant(method).config(variant=method, r=4, dtype="float32"))
    randomise(model)
    assert casts(model) == bare
    model.train()
    assert casts(model) > bare, "nothing is kept in training"
