"""Embeddings and convolutions: every registered method either works on them, merge included, or refuses at attach."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import lora_lite as ll


class Vision(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def embedding() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Embedding(23, 12)), torch.randint(0, 23, (3, 5))


def conv1d() -> tuple[nn.Module, torch.Tensor]:
    return Vision(nn.Conv1d(4, 12, 3, stride=2, padding=2, dilation=2)), torch.randn(3, 4, 19)


def conv2d() -> tuple[nn.Module, torch.Tensor]:
    return Vision(nn.Conv2d(4, 12, (3, 2), stride=(2, 1), padding="valid", bias=False)), torch.randn(3, 4, 9, 8)


def circular() -> tuple[nn.Module, torch.Tensor]:
    return Vision(nn.Conv2d(4, 12, 3, padding=(1, 2), padding_mode="circular")), torch.randn(3, 4, 7, 8)


MAKE = {"embedding": embedding, "conv1d": conv1d, "conv2d": conv2d, "circular": circular}


def attach(name: str, model: nn.Module, **kwargs) -> None:
    variant = ll.get_variant(name)
    if name == "miss_bat":  # whose rank divides every width
        kwargs["r"] = 1
    cfg = variant.config(variant=name, target_kinds=("embedding", "conv"), **kwargs)
    ll.attach(model, cfg)


def randomise(model: nn.Module) -> None:
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.2)


@pytest.mark.parametrize("place", MAKE)
@pytest.mark.parametrize("name", [v.name for v in ll.variants() if v.site == "linear" and not v.needs_data])
def test_works_or_refuses(name, place, tmp_path):
    torch.manual_seed(0)
    model, x = MAKE[place]()
    model.eval()
    bare = model(x)
    keys = list(model.state_dict())
    try:
        attach(name, model)
    except ll.TargetError as e:
        assert "target_kinds" in str(e)
        assert list(model.state_dict()) == keys and torch.equal(model(x), bare)
        return
    variant = ll.get_variant(name)
    if variant.exact_identity:
        assert torch.equal(model(x), bare)
    randomise(model)
    changed = model(x)
    assert changed.shape == bare.shape and (changed - bare).abs().max() > 1e-3
    changed.square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in ll.adapters(model)["default"].parameters())
    with torch.no_grad(), ll.rows(model, ["default", None, "default"]):
        mixed = model(x)
    assert torch.equal(mixed[1], bare[1])
    torch.testing.assert_close(mixed[0], changed[0], atol=1e-5, rtol=1e-5)
    ll.save(model, tmp_path / "a.safetensors")
    if variant.affine:
        ll.merge(model)
        size = max(1.0, float(changed.detach().abs().max()))  # an update of full rank is a large one
        torch.testing.assert_close(model(x), changed, atol=1e-5 * size, rtol=1e-5)
        ll.unmerge(model)
        assert torch.equal(model(x), changed)
    ll.detach(model)
    assert torch.equal(model(x), bare)
    ll.load(model, tmp_path / "a.safetensors")
    assert torch.equal(model(x), changed)


def test_lora_works_on_all_of_them():
    for place in MAKE:
        test = MAKE[place]()
        attach("lora", test[0])
        assert ll.adapters(test[0])["default"].num_parameters() > 0


def test_lora_on_a_convolution_is_two_convolutions():
    torch.manual_seed(0)
    model, x = conv1d()
    attach("lora", model, r=4, alpha=6.0)
    randomise(model)
    conv = model.conv
    A, B = conv.lora_A, conv.lora_B
    h = torch.conv1d(x, A.view(4, 4, 3), None, 2, 2, 2)
    want = torch.conv1d(x, conv.weight, conv.bias, 2, 2, 2) + 1.5 * torch.conv1d(h, B[:, :, None])
    torch.testing.assert_close(model(x), want, atol=1e-5, rtol=1e-5)


def test_what_is_not_one_matrix_is_refused():
    grouped = Vision(nn.Conv1d(4, 12, 3, groups=2))
    with pytest.raises(ll.TargetError, match="groups=2"):
        attach("lora", grouped)
    model, _ = embedding()
    with pytest.raises(ll.TargetError, match="dropout"):
        attach("lora", model, dropout=0.1)


def test_kinds_are_asked_for():
    model = nn.Sequential(nn.Embedding(9, 12), nn.Linear(12, 12))
    plan = ll.plan(model, ll.LoRAConfig(r=2))
    assert [t.path for t in plan.targets] == ["1"]
    assert ("0", "embedding; add it with target_kinds") in plan.unadapted
    both = ll.plan(model, ll.LoRAConfig(r=2, target_kinds=("linear", "embedding")))
    assert sorted(t.path for t in both.targets) == ["0", "1"]


@pytest.mark.parametrize("place", MAKE)
@pytest.mark.parametrize("cfg", [ll.LoRAConfig(r=4, alpha=6.0), ll.WholeConfig()])
def test_one_graph(place, cfg):
    torch.compiler.reset()
    model, x = MAKE[place]()
    ll.attach(model, dataclasses.replace(cfg, target_kinds=("embedding", "conv")))
    randomise(model)
    fast = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(fast(x), model(x))
    ll.activate(model, None)
    torch.testing.assert_close(fast(x), model(x))
    torch.compiler.reset()


def test_a_page_that_multiplies_from_the_left_is_refused(monkeypatch):
    from lora_lite.core import registry

    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))

    @ll.register
    class Left(ll.Variant):
        """M @ x, which is no product of the input's rows."""

        name = "left"

        @staticmethod
        def param_specs(d_in, d_out, cfg):
            return {"lora_M": ll.ParamSpec((d_out, d_in))}

        @staticmethod
        def forward(layer, x, y):
            return y + layer.lora_M @ x

    model, _ = embedding()
    with pytest.raises(ll.TargetError, match="does more with its input"):
        ll.attach(model, ll.AdapterConfig(variant="left", target_kinds=("embedding",)))
