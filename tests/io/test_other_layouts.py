"""Files of diffusers, kohya, LyCORIS, MLX-LM and the original lora-lite, and tensors at hand."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_lite as ll
from lora_lite.io.other_layouts import METADATA
from lora_lite.testing.case import randomise
from tiny_models import batch, build


class TinyUNet(nn.Module):
    """Names with underscores and numbers, a convolution."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv_in = nn.Conv2d(3, 10, 3, padding=1)
        self.down_blocks = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(10, 12), "to_out": nn.ModuleList()})])
        self.down_blocks[0]["to_out"].append(nn.Linear(12, 6, bias=False))

    def forward(self, x):
        x = self.conv_in(x).flatten(2).mT
        return self.down_blocks[0]["to_out"][0](self.down_blocks[0]["to_q"](x).tanh())


X = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
Q, OUT = "down_blocks.0.to_q", "down_blocks.0.to_out.0"


def g(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def expected(changes):
    """What the network gives with these changes of its weights."""
    model = TinyUNet()
    with torch.no_grad():
        for path, change in changes.items():
            w = model.get_submodule(path).weight
            w += change.view(w.shape)
    return model(X).detach()


def check(path, changes, **options):
    model = TinyUNet()
    bare = model(X).detach()
    ll.load(model, path, **options)
    want = expected(changes)
    torch.testing.assert_close(model(X).detach(), want, rtol=0, atol=2e-5)
    assert (want - bare).abs().max() > 1e-2


PAIRS = {Q: (g(3, 10), g(12, 3)), OUT: (g(2, 12), g(6, 2))}
CONV = (g(2, 3, 3, 3), g(10, 2, 1, 1))


def test_kohya(tmp_path):
    """Ranks of their own, alpha a layer, a convolution."""
    tensors = {}
    for path, (A, B) in PAIRS.items():
        name = "lora_unet_" + path.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B, f"{name}.alpha": torch.tensor(1.5)}
    A, B = CONV
    tensors |= {"lora_unet_conv_in.lora_down.weight": A, "lora_unet_conv_in.lora_up.weight": B}
    tensors["lora_unet_conv_in.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "x.safetensors")
    changes = {Q: 0.5 * PAIRS[Q][1] @ PAIRS[Q][0], OUT: 0.75 * PAIRS[OUT][1] @ PAIRS[OUT][0]}
    check(tmp_path / "x.safetensors", changes | {"conv_in": 0.5 * B.flatten(1) @ A.flatten(1)})


def test_kohya_of_several_parts(tmp_path):
    """The part that the model is; what belongs to others is said."""
    A, B = PAIRS[Q]
    tensors = {"lora_unet_down_blocks_0_to_q.lora_down.weight": A, "lora_unet_down_blocks_0_to_q.lora_up.weight": B}
    save_file(
        tensors | {"lora_te_text_model_q.lora_down.weight": A + 1, "lora_te_text_model_q.lora_up.weight": B + 1},
        tmp_path / "x.safetensors",
    )
    with pytest.warns(ll.LoraLiteWarning, match="'lora_te' is not loaded: this model is the lora_unet"):
        check(tmp_path / "x.safetensors", {Q: B @ A})
    save_file({"lora_te_a.lora_down.weight": A, "lora_te_a.lora_up.weight": B}, tmp_path / "x.safetensors")
    with pytest.raises(ll.FileError, match="belong to no module of this model: 'lora_te_a'"):
        ll.load(TinyUNet(), tmp_path / "x.safetensors")


def test_kohya_dora(tmp_path):
    A, B = PAIRS[Q]
    name, W = "lora_unet_down_blocks_0_to_q", TinyUNet().get_submodule(Q).weight.detach()
    m = g(12, 1).abs() + 0.5
    tensors = {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B, f"{name}.alpha": torch.tensor(6.0)}
    save_file(tensors | {f"{name}.dora_scale": m}, tmp_path / "x.safetensors")
    V = W + 2 * B @ A
    check(tmp_path / "x.safetensors", {Q: m * V / V.norm(dim=1, keepdim=True) - W})


def test_lycoris(tmp_path):
    name = "lycoris_down_blocks_0_to_q"
    parts = {"w1_a": g(12, 2), "w1_b": g(2, 10), "w2_a": g(12, 2, seed=4), "w2_b": g(2, 10, seed=5)}
    save_file(
        {f"{name}.hada_{k}": t for k, t in parts.items()} | {f"{name}.alpha": torch.tensor(1.0)},
        tmp_path / "x.safetensors",
    )
    check(tmp_path / "x.safetensors", {Q: 0.5 * (parts["w1_a"] @ parts["w1_b"]) * (parts["w2_a"] @ parts["w2_b"])})
    w1, a, b = g(3, 2), g(4, 1), g(1, 5)
    kron = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(2.0)}
    save_file({f"{name}.{k}": t for k, t in kron.items()}, tmp_path / "y.safetensors")
    check(tmp_path / "y.safetensors", {Q: 2 * torch.kron(w1, a @ b)})


@pytest.mark.parametrize("names", ["lora_A lora_B", "lora.down lora.up", "lora_linear_layer.down lora_linear_layer.up"])
def test_diffusers(names, tmp_path):
    down, up = names.split()
    tensors = {f"unet.{p}.{down}.weight": A for p, (A, _) in PAIRS.items()}
    tensors |= {f"unet.{p}.{up}.weight": B for p, (_, B) in PAIRS.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    check(tmp_path / "x.safetensors", {p: B @ A for p, (A, B) in PAIRS.items()})  # as diffusers: scale 1
    said = {"unet.r": 3, "unet.lora_alpha": 6, "unet.rank_pattern": {OUT: 2}, "unet.alpha_pattern": {OUT: 3}}
    save_file(tensors, tmp_path / "x.safetensors", {METADATA: json.dumps(said)})
    scales = {Q: 2.0, OUT: 1.5}
    check(tmp_path / "x.safetensors", {p: scales[p] * B @ A for p, (A, B) in PAIRS.items()})


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_written_and_read(form, tmp_path):
    model = TinyUNet()
    cfg = ll.LoRAConfig(r=3, alpha=7, rank_pattern={"to_q": 2}, target_kinds=("linear", "conv"), target_names=(".*",))
    ll.attach(model, cfg)
    randomise(model)
    ll.export(model, tmp_path, format=form)
    other = TinyUNet()
    ll.load(other, tmp_path / "pytorch_lora_weights.safetensors")
    torch.testing.assert_close(other(X), model(X), rtol=0, atol=1e-5)
    keys = list(load_file(tmp_path / "pytorch_lora_weights.safetensors"))
    assert all(k.startswith("unet." if form == "diffusers" else "lora_unet_") for k in keys)
    ll.export(model, tmp_path, format=form, prefix="text_encoder")
    keys = list(load_file(tmp_path / "pytorch_lora_weights.safetensors"))
    assert all(k.startswith("text_encoder." if form == "diffusers" else "lora_te_") for k in keys)


def test_what_image_layouts_do_not_hold(tmp_path):
    model = TinyUNet()
    ll.attach(model, ll.OFTConfig(block_size=2, target_names=("to_q",)))
    randomise(model)
    with pytest.raises(ll.StateError, match="no pair of low-rank factors"):
        ll.export(model, tmp_path, format="kohya")
    ll.export(model, tmp_path, format="kohya", rank=12)
    other = TinyUNet()
    ll.load(other, tmp_path / "pytorch_lora_weights.safetensors")
    torch.testing.assert_close(other(X), model(X), rtol=0, atol=1e-5)


def test_the_rule_of_mlx(tmp_path):
    """`y + scale (x a) b`, one scale for all layers."""
    model, data = build("llama"), batch("llama")
    path = "model.layers.1.self_attn.q_proj"
    d_in, d_out = model.get_submodule(path).in_features, model.get_submodule(path).out_features
    a, b = g(d_in, 3) / 5, g(3, d_out) / 5
    save_file({f"{path}.lora_a": a, f"{path}.lora_b": b}, tmp_path / "adapters.safetensors")
    said = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 3, "scale": 2.5, "dropout": 0.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    want = build("llama")
    with torch.no_grad():
        want.get_submodule(path).weight += 2.5 * (a @ b).mT
    ll.load(model, tmp_path)
    torch.testing.assert_close(model(**data).logits, want(**data).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cfg", [ll.LoRAConfig(r=3, alpha=7), ll.DoRAConfig(r=3, alpha=7), ll.PiSSAConfig(r=3)])
def test_mlx_written_and_read(cfg, tmp_path):
    model, data = build("llama"), batch("llama")
    ll.attach(model, cfg)
    randomise(model)
    ll.export(model, tmp_path, format="mlx")
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["num_layers"] == 2 and "self_attn.q_proj" in said["lora_parameters"]["keys"]
    assert said["fine_tune_type"] == ("dora" if cfg.variant == "dora" else "lora")
    other = build("llama")
    ll.load(other, tmp_path)
    torch.testing.assert_close(other(**data).logits, model(**data).logits, rtol=0, atol=2e-5)


def test_llama_cpp_takes_no_heads(tmp_path):
    model = build("llama")
    ll.attach(model, ll.LoRAConfig(r=2, train_modules=("lm_head",)))
    with pytest.raises(ll.StateError, match="llama.cpp's converter takes no layer that is trained whole: 'lm_head'"):
        ll.export(model, tmp_path, format="llama.cpp")
    ll.detach(model)
    ll.attach(model, ll.LoRAConfig(r=2, target_names=("q_proj",)))
    ll.export(model, tmp_path, format="llama.cpp")
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert all(k.endswith(("lora_A.weight", "lora_B.weight")) for k in keys)


# ---- tensors at hand


def test_tensors_with_pefts_names():
    A, B = PAIRS[Q]
    made = {f"base_model.model.{Q}.lora_A.weight": A.requires_grad_(), f"base_model.model.{Q}.lora_B.weight": B}
    with pytest.warns(ll.LoraLiteWarning, match="a LoRA of scale 1"):
        check(made, {Q: (B @ A).detach()})
    check(made, {Q: (2 * B @ A).detach()}, config={"peft_type": "LORA", "r": 3, "lora_alpha": 6})
    with pytest.raises(ll.FileError, match="belong to no module"):
        ll.load(TinyUNet(), {"base_model.model.x.lora_A.weight": A}, config={"peft_type": "LORA"})
    model = TinyUNet()
    ll.attach(model, ll.LoRAConfig(r=2, target_names=("to_q",)))
    with pytest.raises(ll.FileError, match="load_adapter_state_dict"):
        ll.load(TinyUNet(), ll.adapter_state_dict(model))


# ---- the hub


def test_a_repository_of_the_hub(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    A, B = PAIRS[Q]
    save_file({f"unet.{Q}.lora_A.weight": A, f"unet.{Q}.lora_B.weight": B}, tmp_path / "x.safetensors")
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    check("someone/adapter/x.safetensors", {Q: B @ A}, revision="v1")
    patterns = asked[0][1]["allow_patterns"]
    assert asked[0][0] == "someone/adapter" and asked[0][1]["revision"] == "v1" and "*.bin" not in patterns


def test_no_hub_in_a_sentence(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def fail(*_, **__):
        raise OSError("no connection\nand much more")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(ll.FileError, match="nobody/nothing does not exist: .* the hub's client says: no connection$"):
        ll.load(TinyUNet(), "nobody/nothing")
    with pytest.raises(ll.FileError, match="does not exist"):
        ll.load(TinyUNet(), "./nobody/nothing.safetensors")


# ---- the original lora-lite


@dataclass
class Config:
    variant: str = "lora"
    r: int = 3
    alpha: float | None = None


def test_files_of_the_original(tmp_path, monkeypatch):
    """Its scale is 2 where a config says none, and its gates are around 1."""
    path = tmp_path / "x.pt"
    A, B = (t.detach() for t in PAIRS[Q])
    state = {f"{Q}.lora_A": A, f"{Q}.lora_B": B}
    torch.save({"cfg": {"variant": "lora", "r": 3}, "state": state}, path)
    check(path, {Q: 2 * B @ A})
    torch.save({"cfg": {"variant": "lora", "r": 3, "alpha": 1.5}, "state": state}, path)
    check(path, {Q: 0.5 * B @ A})
    module = ModuleType("lora_lite.config")
    module.Config, Config.__module__, Config.__qualname__ = Config, "lora_lite.config", "Config"
    monkeypatch.setitem(sys.modules, "lora_lite.config", module)
    torch.save({"cfg": Config(alpha=6.0), "state": state}, path)
    monkeypatch.undo()
    check(path, {Q: 2 * B @ A})
    W, gate, m = TinyUNet().get_submodule(OUT).weight.detach(), g(6), g(6).abs() + 1
    torch.save({"cfg": {"variant": "ia3"}, "state": {f"{OUT}.lora_g": gate}}, path)
    check(path, {OUT: (gate - 1)[:, None] * W})
    A, B = (t.detach() for t in PAIRS[OUT])
    V = W + 3 * B @ A
    cfg = {"variant": "dora", "r": 2, "alpha": 6.0}
    torch.save({"cfg": cfg, "state": {f"{OUT}.lora_A": A, f"{OUT}.lora_B": B, f"{OUT}.lora_m": m}}, path)
    check(path, {OUT: m[:, None] * V / V.norm(dim=1, keepdim=True) - W})


class Evil:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"cfg": {"variant": "lora"}, "state": {}}, "missing"),
        ({"cfg": {"variant": "pissa"}, "state": {f"{Q}.lora_A": torch.ones(3, 10)}}, "'lora_B' is missing"),
        ({"cfg": {"variant": "ia3"}, "state": {f"{Q}.lora_g": torch.ones(12), f"{Q}.lora_A": torch.ones(2)}}, "other"),
        (
            {"cfg": {"variant": "later"}, "state": {f"{Q}.lora_g": torch.ones(12)}},
            "'later' of the original is not read",
        ),
        ({"cfg": {"variant": "lora", "r": 3}, "state": {"no.lora_A": torch.ones(3, 2)}}, "no layer 'no'"),
        ([1], '"cfg" and "state"'),
        ({"cfg": Evil(), "state": {}}, "would run"),
    ],
)
def test_what_is_not_read_of_the_original(content, words, tmp_path, capsys):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ll.FileError, match=words):
        ll.load(TinyUNet(), tmp_path / "x.pt")
    assert capsys.readouterr().out == ""
