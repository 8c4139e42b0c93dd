"""reference_weights: an adapter that starts from the low-rank part of what the base lost."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_lite as ll
import tiny_models
from lora_lite.testing.toy import Conv1D, FakeQuantLinear
from neighbours import fp4_on_cpu


class Net(nn.Module):
    base_model_prefix = "model"

    def __init__(self, kind=nn.Linear):
        super().__init__()
        self.fc1, self.fc2 = kind(20, 12), kind(12, 15)

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))


def pair(tmp_path, kind=FakeQuantLinear, noise=0.1):
    """A network with damaged weights, and a file of the originals."""
    torch.manual_seed(0)
    net = Net(kind)
    file = {}
    for path in ("fc1", "fc2"):
        layer = net.get_submodule(path)
        W = layer.dequantised() if kind is FakeQuantLinear else layer.weight.detach()
        file[f"{path}.weight"] = (W + noise * W.std() * torch.randn_like(W)).contiguous()
    save_file(file, tmp_path / "full.safetensors")
    return net, file


def dense(net, path):
    layer = net.get_submodule(path)
    with torch.no_grad():
        return (layer(torch.eye(layer.nx if isinstance(layer, Conv1D) else layer.in_features)) - layer.bias).T


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", [nn.Linear, FakeQuantLinear, Conv1D])
def test_the_error_falls_with_the_rank_to_the_best_possible(tmp_path, kind, rslora):
    net, file = pair(tmp_path, kind)
    before = {p: dense(net, p) for p in ("fc1", "fc2")}
    last = dict.fromkeys(before, float("inf"))
    for r in (1, 2, 4, 8, 12, 14):
        cfg = ll.LoRAConfig(r=r, alpha=2 * r + 1, use_rslora=rslora)
        adapter = ll.attach(net, cfg, reference_weights=tmp_path / "full.safetensors")
        assert "reference weights: mean relative error of 2 weights" in str(adapter)
        for path, W in before.items():
            W_ref = file[f"{path}.weight"]
            W_ref = W_ref.T if kind is Conv1D else W_ref
            error = float((W_ref - dense(net, path)).norm())
            assert error == pytest.approx(float(torch.linalg.svdvals(W_ref - W)[r:].norm()), abs=2e-5)
            assert error < last[path] or r > 12
            last[path] = error
        ll.detach(net)
        assert all(torch.equal(dense(net, p), W) for p, W in before.items())
    assert max(last.values()) < 2e-5


def test_what_lies_beyond_the_full_rank_can_still_train(tmp_path):
    net, _ = pair(tmp_path)
    ll.attach(net, ll.LoRAConfig(r=14, alpha=3), reference_weights=tmp_path / "full.safetensors")
    A, B = net.fc1.lora_A, net.fc1.lora_B
    assert (A.abs().sum(1) > 0).all() and (B[:, 12:] == 0).all()


def test_a_base_without_loss_starts_as_ever(tmp_path):
    net, _ = pair(tmp_path, nn.Linear, noise=0.0)
    ll.attach(net, ll.LoRAConfig(r=3), reference_weights=tmp_path / "full.safetensors")
    fresh = pair(tmp_path, nn.Linear, noise=0.0)[0]
    ll.attach(fresh, ll.LoRAConfig(r=3))
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), fresh.state_dict().values(), strict=True))


def test_loading_needs_no_reference(tmp_path):
    net, _ = pair(tmp_path)
    ll.attach(net, ll.LoRAConfig(r=3, alpha=7), reference_weights=tmp_path / "full.safetensors")
    ll.save(net, tmp_path / "a.safetensors")
    other = pair(tmp_path)[0]
    (tmp_path / "full.safetensors").unlink()
    ll.load(other, tmp_path / "a.safetensors")
    x = torch.randn(4, 20)
    assert torch.equal(other(x), net(x))


def test_checkpoints_of_transformers(tmp_path):
    """A folder in shards, with the model's prefix or without it."""
    full = tiny_models.build("llama")
    full.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())["weight_map"]) > 10
    full.model.save_pretrained(tmp_path / "inner")
    assert not any(k.startswith("model.") for k in load_file(tmp_path / "inner" / "model.safetensors"))
    starts = []
    for folder in ("shards", "inner"):
        model = tiny_models.build("llama")
        with torch.no_grad():
            for n, p in model.named_parameters():
                if "proj" in n:
                    p.copy_((p * 16 / p.abs().max()).round() * p.abs().max() / 16)
        base = model(input_ids=torch.arange(10)[None]).logits
        ll.attach(model, ll.LoRAConfig(r=16), reference_weights=str(tmp_path / folder))
        starts.append(ll.adapter_state_dict(model))
        want, got = (m(input_ids=torch.arange(10)[None]).logits for m in (full, model))
        assert (got - want).norm() < 0.7 * (base - want).norm()
    assert all(torch.equal(starts[0][k], starts[1][k]) for k in starts[0])


def test_mistakes_leave_the_model_alone(tmp_path):
    net, file = pair(tmp_path)
    before = {k: v.clone() for k, v in net.state_dict().items()}

    def refused(error, match, where="full.safetensors", cfg=None, model=net):
        with pytest.raises(error, match=match):
            ll.attach(model, cfg or ll.LoRAConfig(r=3), reference_weights=tmp_path / where)

    refused(ll.ConfigError, "'hra' cannot start from reference_weights.* Methods that can: lora", cfg=ll.HRAConfig(r=2))
    refused(ll.FileError, "is no file or folder here", where="nothing")
    (tmp_path / "empty").mkdir()
    refused(ll.FileError, "holds no safetensors file", where="empty")
    (tmp_path / "bad.safetensors").write_bytes(b"123")
    refused(ll.FileError, "cannot be read", where="bad.safetensors")
    save_file({"fc1.weight": file["fc1.weight"]}, tmp_path / "half.safetensors")
    refused(ll.FileError, "has no 'fc2.weight'", where="half.safetensors")
    save_file({k: torch.randn_like(v) for k, v in file.items()}, tmp_path / "other.safetensors")
    refused(ll.BaseMismatchError, "more than a precision", where="other.safetensors")
    save_file({k: v[:3].contiguous() for k, v in file.items()}, tmp_path / "small.safetensors")
    refused(ll.BaseMismatchError, r"is \(3, 20\), the layer's \(12, 20\)", where="small.safetensors")
    save_file({k: v.to(torch.int8) for k, v in file.items()}, tmp_path / "packed.safetensors")
    refused(ll.FileError, "not a matrix of weights", where="packed.safetensors")
    assert list(net.state_dict()) == list(before) and all(
        torch.equal(v, before[k]) for k, v in net.state_dict().items()
    )
    assert not ll.adapters(net) and not net.fc1._forward_hooks


@pytest.mark.optional_backend("bitsandbytes")
@pytest.mark.parametrize("quant_type", ["nf4", pytest.param("fp4", marks=fp4_on_cpu)])
def test_nf4(tmp_path, quant_type):
    """Nearer to the full-precision model with every rank, in weights and in logits."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    full = nn.Sequential(nn.Linear(128, 192), nn.Tanh(), nn.Linear(192, 64)).requires_grad_(False)
    save_file({k: v.contiguous() for k, v in full.state_dict().items()}, tmp_path / "full.safetensors")
    x = torch.randn(64, 128)
    errors = []
    for r in (0, 4, 16, 48):
        layers = []
        for m in full:
            if isinstance(m, nn.Linear):
                layer = bnb.nn.Linear4bit(
                    m.in_features, m.out_features, compute_dtype=torch.float32, quant_type=quant_type
                )
                layer.weight = bnb.nn.Params4bit(m.weight.data.clone(), requires_grad=False, quant_type=quant_type)
                layer.bias = nn.Parameter(m.bias.data.clone())
                m = layer.to("cpu")
            layers.append(m)
        base = nn.Sequential(*layers).train()
        if r:
            adapter = ll.attach(base, ll.LoRAConfig(r=r, alpha=2 * r), reference_weights=tmp_path / "full.safetensors")
            assert "reference weights: mean relative error of 2 weights" in str(adapter)
        with torch.enable_grad():  # without a gradient bitsandbytes takes another path on a CPU
            y = base(x.clone().requires_grad_()).detach()
        errors.append(float((y - full(x)).norm() / full(x).norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.6 * errors[0]
