"""accelerate's offload of an adapted model: exact where it runs, refused where it would not train."""

from __future__ import annotations

import warnings

import pytest
import torch

import lora_lite as ll
import shared_methods
import tiny_models
from lora_lite.testing.case import randomise

accelerate = pytest.importorskip("accelerate")

IDS = torch.arange(10).view(2, 5)
CONFIGS = {
    "lora": lambda: ll.LoRAConfig(r=3, alpha=7, train_modules=("lm_head",)),
    "dora": lambda: ll.DoRAConfig(r=3, alpha=7),
    "hra": lambda: ll.HRAConfig(r=2),
    "vera": lambda: ll.AdapterConfig(variant=shared_methods.vera().name, r=3, alpha=7),
}


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("method", CONFIGS)
def test_offload_after_attach_is_exact(tmp_path, method, where):
    model = tiny_models.build("llama").eval()
    ll.attach(model, CONFIGS[method]())
    randomise(model, seed=1)
    with torch.no_grad():
        want, state = model(input_ids=IDS).logits, ll.adapter_state_dict(model)
    if where == "memory":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, str(tmp_path / "weights"), execution_device="cpu")
    assert all(p.is_meta for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, want)
        assert all(p.is_meta for p in model.parameters()), "what was brought for the pages stays"
        with ll.active(model, None):
            assert not torch.equal(model(input_ids=IDS).logits, want)
    assert all(p.is_meta for p in model.parameters())
    kept = ll.adapter_state_dict(model)
    assert all(torch.equal(v, kept[k]) for k, v in state.items())
    ll.save(model, tmp_path / "adapter")
    ll.load(bare := tiny_models.build("llama").eval(), tmp_path / "adapter.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(bare(input_ids=IDS).logits, want, atol=1e-6, rtol=0)
    with pytest.raises(ll.WeightError, match=r"layers\.0.*nothing on it would train"):
        model.train()(input_ids=IDS)


def test_a_dynamically_quantised_copy_says_merge_first(tmp_path):
    model = tiny_models.build("llama").eval()
    ll.attach(model, ll.LoRAConfig(r=3, alpha=7))
    randomise(model, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces its end
        copy = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
        with pytest.raises(ll.StateError, match="Merge first"):
            copy(input_ids=IDS)
        want = model(input_ids=IDS).logits
        ll.merge(model)
        model.save_pretrained(tmp_path)
        plain = type(model).from_pretrained(tmp_path)
        got = torch.ao.quantization.quantize_dynamic(plain, {torch.nn.Linear})(input_ids=IDS).logits
    assert 0 < (got - want).abs().max() < 0.2 * want.abs().max()  # int8: measured 0.10


def test_a_tensor_parallel_model_is_refused():
    model = tiny_models.build("llama")
    model._tp_size = 2  # what from_pretrained(tp_plan="auto") leaves on it
    with pytest.raises(ll.StateError, match="tensor-parallel.*Load it without tp_plan"):
        ll.attach(model, CONFIGS["lora"]())
    assert not ll.adapters(model)
