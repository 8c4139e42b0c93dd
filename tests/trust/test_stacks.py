"""A model may have several stacks of blocks: block numbers count in each, a list of one block is a stack, and stages of
other widths have their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll

BLOCK_METHODS = [v for v in ll.variants() if v.site == "block" and not v.needs_data]


class Block(nn.Module):
    def __init__(self, d: int, out: int | None = None) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d, 3 * d), nn.Linear(3 * d, d)
        if out is not None:
            self.widen = nn.Linear(d, out)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.fc2(torch.tanh(self.fc1(h)))
        return self.widen(h) if hasattr(self, "widen") else h


class Towers(nn.Module):
    """An encoder of n blocks and a decoder of m."""

    def __init__(self, n: int, m: int, d: int = 8) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.layers = nn.ModuleList(Block(d) for _ in range(n))
        self.decoder.layers = nn.ModuleList(Block(d) for _ in range(m))

    def forward(self, h: Tensor) -> Tensor:
        for block in (*self.encoder.layers, *self.decoder.layers):
            h = block(h)
        return h


def blocks(model: nn.Module, cfg: ll.AdapterConfig) -> list[str]:
    return sorted({t.path.rsplit(".fc", 1)[0] for t in ll.plan(model, cfg).targets})


@pytest.mark.parametrize("cfg", [ll.LoRAConfig, ll.IA3Config, *(v.config for v in BLOCK_METHODS)], ids=str)
@pytest.mark.parametrize(
    ("layers", "want"),
    [
        ((-1,), ["decoder.layers.1", "encoder.layers.3"]),
        ((-2, 3), ["decoder.layers.0", "encoder.layers.2", "encoder.layers.3"]),
        ((0,), ["decoder.layers.0", "encoder.layers.0"]),
        ((-4,), ["encoder.layers.0"]),
    ],
)
def test_numbers_count_in_each_stack(cfg, layers, want):
    assert blocks(Towers(4, 2), cfg(r=2, layers=layers)) == want


@pytest.mark.parametrize("layers", [(4,), (-5,), (0, 7)])
def test_a_number_that_no_stack_has(layers):
    with pytest.raises(ll.TargetError, match=rf"no block \[{layers[-1]}\].*0 to 3"):
        ll.plan(Towers(4, 2), ll.LoRAConfig(layers=layers))


class UNet(nn.Module):
    """Lists of two blocks on the way down and up, one of one block in the middle."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.down, self.mid, self.up = nn.Module(), nn.Module(), nn.Module()
        self.down.attentions = nn.ModuleList(Block(d) for _ in range(2))
        self.mid.attentions = nn.ModuleList([Block(d)])
        self.up.attentions = nn.ModuleList(Block(d) for _ in range(2))
        self.embed = nn.Sequential(nn.Sequential(nn.Linear(d, d), nn.SiLU()))

    def forward(self, h: Tensor) -> Tensor:
        for block in (*self.down.attentions, *self.mid.attentions, *self.up.attentions):
            h = block(h)
        return h


def test_a_list_of_one_block_is_a_stack():
    """And a wrapper around one module is none."""
    want = ["down.attentions.0", "down.attentions.1", "mid.attentions.0", "up.attentions.0", "up.attentions.1"]
    assert blocks(UNet(), ll.LoRAConfig(r=2)) == want
    assert blocks(UNet(), ll.LoRAConfig(r=2, layers=(-1,))) == [want[1], want[2], want[4]]


class Pyramid(nn.Module):
    """Stages whose stream grows wider; the wideners lie between them, or at the end of each."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        widths = (6, 10, 14)
        self.stages = nn.ModuleList(
            Block(d, out if inside else None) for d, out in zip(widths, (*widths[1:], None), strict=True)
        )
        self.between = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.inside = inside

    def forward(self, h: Tensor) -> Tensor:
        for i, stage in enumerate(self.stages):
            h = stage(h)
            if not self.inside and i < 2:
                h = self.between[i](h)
        return h


@pytest.mark.parametrize("variant", BLOCK_METHODS, ids=lambda v: v.name)
def test_stages_have_widths_of_their_own(variant, tmp_path):
    model, x = Pyramid(inside=False).eval(), torch.randn(2, 3, 6)
    base = model(x)
    cfg = variant.config(variant=variant.name, r=2, alpha=3, positions="all")
    handle = ll.attach(model, cfg)
    assert [t.d_out for t in ll.plan(model, cfg).targets] == [6, 10, 14]
    assert torch.allclose(model(x), base, atol=1e-6)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(torch.randn_like(p))
    want = model(x)
    assert not torch.allclose(want, base, atol=1e-2)
    file = ll.save(model, tmp_path / "stages")
    ll.detach(model)
    ll.load(model, file)
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("variant", BLOCK_METHODS, ids=lambda v: v.name)
def test_a_block_that_widens_its_stream_is_named(variant):
    model, x = Pyramid(inside=True), torch.randn(2, 3, 6)
    cfg = variant.config(variant=variant.name, r=2, positions="all")
    ll.attach(model, cfg)
    with pytest.raises(ll.SelectionError, match=r"stages\.0.*10 features.*for 6.*exclude_names"):
        model(x)
    ll.detach(model)
    ll.attach(model, variant.config(variant=variant.name, r=2, positions="all", layers=(-1,)))
    assert model(x).shape == (2, 3, 14)


def test_roles_of_stages():
    """A layer reads the stream of its own stage."""
    plan = ll.plan(Pyramid(inside=False), ll.LoRAConfig())
    roles = [(t.path, row[1]) for t, row in zip(plan.targets, plan.rows, strict=True)]
    assert roles == [(f"stages.{i}.fc{k}", role) for i in range(3) for k, role in ((1, "reader"), (2, "writer"))]
