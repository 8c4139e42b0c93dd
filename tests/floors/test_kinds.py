"""Outside of `runtime/layers` no code asks what kind a layer is: it asks the kind."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.runtime.layers import kinds
from lora_lite.runtime.layers.cell import MatrixCell
from lora_lite.runtime.model.kind import Cell, Kind
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import Snapshot

SRC = Path(__file__).parents[2] / "src" / "lora_lite"
LAYERS = "runtime/layers/"
CLASSES = re.compile(r"\b(Bank|Embedding|Conv[123]?d|CONVS|\w*Norm)\b")


def compared(text: str) -> Iterator[tuple[int, str]]:
    """(line, what) of every comparison with a kind's name, and of every look at a layer's class."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            sides += [e for s in sides if isinstance(s, ast.Tuple | ast.List | ast.Set) for e in s.elts]
            names = {m.value for m in sides if isinstance(m, ast.Constant)} & set(kinds.KINDS)
            yield from ((node.lineno, f"compares {name!r}") for name in sorted(names))
        elif isinstance(node, ast.MatchValue) and isinstance(node.value, ast.Constant):
            if node.value.value in kinds.KINDS:
                yield node.lineno, f"compares {node.value.value!r}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            if CLASSES.search(what := ast.unparse(node.args[1])):
                yield node.lineno, f"asks whether it is a {what}"


def test_nobody_compares_a_kind():
    found = [
        f"{where}:{line}: {what}"
        for path in sorted(SRC.rglob("*.py"))
        if not (where := path.relative_to(SRC).as_posix()).startswith(LAYERS)
        for line, what in compared(path.read_text())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        'if target.kind == "embedding": pass',
        'x = 1 if site.kind in ("conv", "norm") else 2',
        'match kind:\n    case "experts":\n        pass',
        "if isinstance(module, nn.Embedding): pass",
        "found = [m for m in modules if isinstance(m, (Bank, nn.Conv2d))]",
    ],
)
def test_the_rule_finds_a_planted_fault(text):
    assert list(compared(text))


def test_the_rule_lets_other_words_pass():
    assert not list(compared('if name == "linearly": f("embedding")\nisinstance(x, nn.Linear)\nkind = "conv"'))


# ---- a kind of a stranger's: one class, and every verb follows


class Bilinear(nn.Module):
    """y = x M + c, with M (d_in, d_out) under a name of its own."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.matrix, self.c = nn.Parameter(torch.randn(d_in, d_out)), nn.Parameter(torch.randn(d_out))

    @property
    def bias(self) -> Tensor:
        return self.c

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix + self.c


class BilinearKind(Kind):
    name = "bilinear"
    plain_vectors = groups_rows = True

    def size(self, module: nn.Module) -> tuple[int, int] | None:
        return tuple(module.matrix.shape) if isinstance(module, Bilinear) else None  # type: ignore[return-value]

    def is_plain(self, module: nn.Module) -> bool:
        return True

    def stored(self, module: nn.Module) -> Tensor:
        return module.matrix  # type: ignore[return-value]

    def as_matrix(self, module: nn.Module, stored: Tensor) -> Tensor:
        return stored.mT

    def as_stored(self, module: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.mT

    def cells(self, module: nn.Module, path: str) -> list[Cell]:
        return [MatrixCell(self, module, path)]


@pytest.fixture
def own_kind():
    before = dict(kinds.KINDS)
    kinds.register_kind(BilinearKind())
    yield
    kinds.KINDS.clear()
    kinds.KINDS.update(before)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Bilinear(12, 20), nn.Tanh(), nn.Linear(20, 7), nn.Tanh(), Bilinear(7, 5)).requires_grad_(False)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "hra"])
def test_a_kind_of_ones_own(own_kind, method, tmp_path):
    model, x = net(), torch.randn(4, 12)
    before = Snapshot(model, x)
    bare = model(x)
    cfg = ll.get_variant(method).config(variant=method, r=4, target_kinds=("bilinear",), target_names=("0", "4"))
    assert [t.path for t in ll.plan(model, cfg).targets] == ["0", "4"]
    ll.attach(model, cfg)
    assert torch.equal(model(x), bare)
    randomise(model)
    y = model(x)
    assert float((y - bare).detach().abs().max()) > 1e-2
    path = ll.save(model, tmp_path / "own")
    other = net()
    ll.load(other, path)
    assert torch.equal(other(x), y)
    with torch.no_grad():
        strange = net()
        strange[0].matrix[10].mul_(1.1)  # one column of W, of which a fingerprint has four
    with pytest.raises(ll.BaseMismatchError):
        ll.load(strange, path)
    ll.attach(model, cfg, name="b")
    randomise(model, seed=5)
    single = {}
    for name in (None, "default", "b"):
        with ll.active(model, name):
            single[name] = model(x)
    with ll.rows(model, ["b", None, "default", "b"]):
        mixed = model(x)
    want = torch.stack([single[name][i] for i, name in enumerate(("b", None, "default", "b"))])
    torch.testing.assert_close(mixed, want, atol=1e-5, rtol=1e-5)
    ll.merge(model, name="b")
    torch.testing.assert_close(model(x), single["b"], atol=1e-5, rtol=1e-5)
    ll.unmerge(model)
    ll.detach(model)
    before.rng = torch.get_rng_state()  # the networks above were drawn meanwhile
    assert not (d := before.difference(model)), d


class Doubled(nn.Linear):
    """A linear layer in its looks."""


class DoubledKind(Kind):
    name = "doubled"

    def size(self, module: nn.Module) -> tuple[int, int] | None:
        return (module.in_features, module.out_features) if isinstance(module, Doubled) else None


def test_ones_own_kind_is_asked_first(own_kind):
    kinds.register_kind(DoubledKind())
    assert kinds.kind_of(Doubled(3, 5)).name == "doubled"  # type: ignore[union-attr]
    assert kinds.kind_of(nn.Linear(3, 5)).name == "linear"  # type: ignore[union-attr]


def test_what_is_no_kind_of_layer_is_said():
    with pytest.raises(ll.TargetError, match="stands on layers"):
        ll.plan(net(), ll.LoRAConfig(target_kinds=("linear", "block")))
    with pytest.raises(ll.ConfigError, match="no kind of layer 'bilinar'"):
        ll.plan(net(), ll.LoRAConfig(target_kinds=("bilinar",)))
