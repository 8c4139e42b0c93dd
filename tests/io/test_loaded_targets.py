"""What `attach` refuses is refused in files too."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_lite as ll


class Net(nn.Module):
    """`b` and `c` may be one layer; an attention whose output layer is never called."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)
        self.c = self.b if shared else nn.Linear(12, 12)
        self.attn = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x):
        x = self.c(self.b(self.a(x)))
        return self.attn(x, x, x)[0]


def folder(path, name):
    path.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": [name]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {"lora_A.weight": torch.ones(2, 12), "lora_B.weight": torch.ones(12, 2)}
    save_file({f"base_model.model.{name}.{k}": t for k, t in tensors.items()}, path / "adapter_model.safetensors")
    return path


@pytest.mark.parametrize(
    ("name", "words"), [("b", "one module has 2 paths"), ("attn.out_proj", "never called as a module")]
)
def test_layers_that_an_adapter_would_miss_or_hit_twice(name, words, tmp_path):
    source = Net(shared=False)
    ll.attach(source, ll.LoRAConfig(r=2, alpha=6, target_names=("a",)))
    native = ll.save(source, tmp_path / "native")
    tensors, meta = load_file(native), json.loads(read_meta(native))
    moved = {k.replace("a.lora", f"{name}.lora"): t for k, t in tensors.items()}
    meta["targets"] = {name: {**meta["targets"]["a"], "base": {}}}
    save_file(moved, tmp_path / "moved.safetensors", {"lora_lite": json.dumps(meta)})
    for file in (folder(tmp_path / "peft", name), tmp_path / "moved.safetensors"):
        model = Net(shared=True)
        with pytest.raises(ll.LoraLiteError, match=words):
            ll.load(model, file)
        assert ll.adapters(model) == {} and not any("lora_" in k for k in model.state_dict())
        if name == "b":
            assert list(ll.load(Net(shared=False), file).targets) == ["b"]


def read_meta(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        return f.metadata()["lora_lite"]
