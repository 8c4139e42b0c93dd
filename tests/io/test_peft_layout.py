"""PEFT's folder layout, read and written against the peft package itself."""

from __future__ import annotations

import json

import pytest
import torch

import lora_lite as ll
from neighbours import needs

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def tiny(kind: str = "llama") -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=40, n_positions=32)
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
    )
    return transformers.LlamaForCausalLM(config).eval()


IDS = torch.arange(14).reshape(2, 7)


def randomise(model: torch.nn.Module) -> None:
    g = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.copy_(torch.randn(p.shape, generator=g) * 0.3)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("rslora", [False, True])
def test_reads_what_peft_writes(tmp_path, kind, rslora):
    names = ["c_attn", "c_fc"] if kind == "gpt2" else ["q_proj", "up_proj"]
    cfg = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        target_modules=names,
        alpha_pattern={names[1]: 9},
        rank_pattern={names[1]: 3},
        fan_in_fan_out=kind == "gpt2",
    )
    theirs = peft.get_peft_model(tiny(kind), cfg).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = tiny(kind)
    bare = ours(IDS).logits
    handle = ll.load(ours, tmp_path)
    assert len(handle.targets) == 4
    assert (ours(IDS).logits - bare).abs().max() > 1e-2
    torch.testing.assert_close(ours(IDS).logits, theirs(input_ids=IDS).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_reads_what_we_write(tmp_path, kind):
    names = ("c_attn", "c_proj") if kind == "gpt2" else ("v_proj", "down_proj")
    ours = tiny(kind)
    cfg = ll.LoRAConfig(r=4, alpha=6, use_rslora=True, target_names=names, layers=(1,), rank_pattern={names[0]: 2})
    ll.attach(ours, cfg)
    randomise(ours)
    ll.export(ours, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4 and isinstance(config["lora_alpha"], int)
    theirs = peft.PeftModel.from_pretrained(tiny(kind), tmp_path).eval()
    torch.testing.assert_close(theirs(input_ids=IDS).logits, ours(IDS).logits, atol=1e-6, rtol=0)
    again = tiny(kind)
    ll.load(again, tmp_path)
    torch.testing.assert_close(again(IDS).logits, ours(IDS).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"peft_type": "IA3"}, "no ia3_l"),
        ({"peft_type": "LILY"}, "peft_type 'LILY'"),
        ({"use_dora": True}, "no lora_magnitude_vector"),
        ({"init_lora_weights": "pissa"}, "residual"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication"),
        ({"r": "8"}, "r must be"),
        ({"rank_pattern": {"(": 3}}, "not a regular expression"),
        ({"rank_pattern": {r"(a)\1": 3}}, "not read at"),
        ({"rank_pattern": {".*[qv]_proj": 3}}, "rank 4 in the file and 3"),
        ({"r": 5}, "rank 4"),
    ],
)
def test_refuses_what_it_cannot_honour(tmp_path, change, word):
    theirs = peft.get_peft_model(tiny(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    model = tiny()
    keys, before = list(model.state_dict()), model(IDS).logits
    with pytest.raises(ll.FileError, match=word):
        ll.load(model, tmp_path)
    assert list(model.state_dict()) == keys and torch.equal(model(IDS).logits, before) and ll.adapters(model) == {}


def test_export_refuses_methods_without_factors(tmp_path):
    class Gate(ll.Variant):
        name = "export_probe"

        @staticmethod
        def param_specs(d_in, d_out, cfg):
            return {"lora_g": ll.ParamSpec((d_out,))}

        @staticmethod
        def forward(layer, x, y):
            return y + y * layer.lora_g

    from lora_lite.core import registry

    ll.register(Gate)
    try:
        model = tiny()
        ll.attach(model, ll.AdapterConfig(variant="export_probe"))
        with pytest.raises(ll.StateError, match="no pair of low-rank factors"):
            ll.export(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    finally:
        del registry._TABLE["export_probe"]


def saved(tmp_path, **form):
    """A folder of PEFT's with random factors, its model, and ours without an adapter."""
    cfg = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], **form)
    theirs = peft.get_peft_model(tiny(), cfg).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    return theirs, tiny()


@needs("peft", "0.21", "MiCA")
def test_a_mica_of_peft_trains_on_as_one(tmp_path):
    """B stays frozen, as in PEFT; a plain LoRA of the same factors would train it."""
    theirs, ours = saved(tmp_path, init_lora_weights="mica")
    adapter = ll.load(ours, tmp_path, trainable=True)
    assert adapter.cfg.variant == "mica"
    assert adapter.num_parameters() == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits)


@needs("peft", "0.21", "VeLoRA")
def test_a_load_that_trains_in_another_way_says_so(tmp_path, recwarn):
    from peft.tuners.lora.config import VeloraConfig

    theirs, ours = saved(tmp_path, velora_config=VeloraConfig(num_groups=2))
    recwarn.clear()
    ll.load(ours, tmp_path)
    assert not [w for w in recwarn if issubclass(w.category, ll.LoraLiteWarning)]
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits)
    with pytest.warns(ll.LoraLiteWarning, match="training changes in another way than PEFT's"):
        ll.load(tiny(), tmp_path, trainable=True)
