"""Modules trained whole, against PEFT's modules_to_save and LN Tuning: the same values give the same logits, and
gradients agree."""

from __future__ import annotations

import peft
import pytest
import torch

import lora_lite as ll
import tiny_llm
import tiny_models
from equations.helpers import randomise
from lora_lite.testing.toy import Snapshot

IDS = torch.arange(24).view(2, 12) % 60 + 4


def compare(mine, theirs, pairs):
    """`pairs`: (our trained difference, the base tensor, PEFT's trained tensor); PEFT's are set to base +
    difference."""
    with torch.no_grad():
        for delta, base, other in pairs:
            other.copy_(base + delta.view_as(base))
    ours, other = mine(input_ids=IDS, labels=IDS), theirs(input_ids=IDS, labels=IDS)
    with ll.active(mine, None):
        assert (mine(input_ids=IDS).logits - ours.logits).abs().max() > 1e-2
    torch.testing.assert_close(ours.logits, other.logits, atol=1e-5, rtol=1e-5)
    ours.loss.backward()
    other.loss.backward()
    for delta, _, p in pairs:
        assert delta.grad.abs().max() > 0
        torch.testing.assert_close(delta.grad.view_as(p), p.grad, atol=1e-6, rtol=1e-4)


def test_modules_to_save():
    mine = tiny_llm.model(seed=3)
    ll.attach(mine, ll.LoRAConfig(r=4, alpha=6, target_names=("q_proj",), train_modules=("lm_head", "model.norm")))
    randomise(mine, 0.1)
    options = dict(r=4, lora_alpha=6, target_modules=["q_proj"], modules_to_save=["lm_head", "model.norm"])
    theirs = peft.get_peft_model(tiny_llm.model(seed=3), peft.LoraConfig(**options))
    pairs = []
    for path in ("lm_head", "model.norm"):
        layer, copy = mine.get_submodule(path), theirs.base_model.model.get_submodule(path)
        pairs.append((layer.lora_W, layer.weight, copy.modules_to_save["default"].weight))
    for path in ll.adapters(mine)["default"].targets:
        if path.endswith("q_proj"):
            layer, other = mine.get_submodule(path), theirs.base_model.model.get_submodule(path)
            with torch.no_grad():
                other.lora_A["default"].weight.copy_(layer.lora_A)
                other.lora_B["default"].weight.copy_(layer.lora_B)
    compare(mine, theirs, pairs)


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_tuning_of_layer_norms():
    mine = tiny_llm.model(seed=3)
    handle = ll.attach(mine, ll.WholeConfig(target_kinds=("norm",)))
    randomise(mine, 0.1)
    names = sorted({path.rsplit(".", 1)[-1] for path in handle.targets})
    config = peft.LNTuningConfig(target_modules=names, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(tiny_llm.model(seed=3), config)
    pairs = []
    for path in handle.targets:
        layer = mine.get_submodule(path)
        copy = theirs.base_model.model.get_submodule(path).ln_tuning_layers["default"]
        pairs.append((layer.lora_W, layer.weight, copy.weight))
    assert len(pairs) == 5
    compare(mine, theirs, pairs)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_folders_both_ways(name, tmp_path):
    """What PEFT writes is read, and what is exported PEFT reads: heads, norms and an embedding, with biases and
    transposed weights."""
    heads = {
        "llama": (["lm_head", "norm"], ["q_proj"]),
        "bert": (["classifier", "word_embeddings", "attention.output.LayerNorm"], ["query"]),
        "gpt2": (["ln_f", "c_proj"], ["c_attn"]),
    }
    saved, targets = heads[name]
    options = dict(r=4, lora_alpha=6, target_modules=targets, modules_to_save=saved, fan_in_fan_out=name == "gpt2")
    theirs = peft.get_peft_model(tiny_models.build(name), peft.LoraConfig(**options)).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
        batch = tiny_models.batch(name)
        want = theirs(**batch).logits
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    mine = tiny_models.build(name)
    bare = mine(**batch).logits
    handle = ll.load(mine, tmp_path / "theirs")
    assert handle.record.beside and (want - bare).abs().max() > 1e-2
    torch.testing.assert_close(mine(**batch).logits, want, atol=1e-5, rtol=1e-5)
    ll.export(mine, tmp_path / "mine")
    again = peft.PeftModel.from_pretrained(tiny_models.build(name), tmp_path / "mine").eval()
    torch.testing.assert_close(again(**batch).logits, want, atol=1e-5, rtol=1e-5)
    ll.detach(mine)
    assert torch.equal(mine(**batch).logits, bare)


def test_folders_that_do_not_fit(tmp_path):
    import json

    from safetensors.torch import load_file, save_file

    mine = tiny_models.build("llama")
    ll.attach(mine, ll.LoRAConfig(r=2, train_modules=("lm_head",)))
    folder = ll.export(mine, tmp_path / "x")
    config, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    fields, good = json.loads(config.read_text()), load_file(tensors)
    assert fields["modules_to_save"] == ["lm_head"]
    model = tiny_models.build("llama")
    before = Snapshot(model)
    key = "base_model.model.lm_head.weight"
    for names, held, words in (
        (["lm_head", "scorer"], good, "'scorer', of which the file holds no tensor"),
        ("lm_head", good, "must be a list of names"),
        (["lm_head"], {**good, key: torch.zeros(63, 32)}, "lm_head holds"),
        (["lm_head"], {**good, "base_model.model.lm_head.bias": torch.zeros(64)}, "lm_head holds"),
        (None, {**good, "base_model.model.lm_head.bias": torch.zeros(64)}, "holds a bias"),
    ):
        config.write_text(json.dumps({**fields, "modules_to_save": names}))
        save_file(held, tensors)
        with pytest.raises(ll.FileError, match=words):
            ll.load(model, folder)
        assert not (d := before.difference(model)), d
