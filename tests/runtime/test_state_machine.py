"""Adapters of several methods that come, go, act, train, freeze, are saved, copied, cast, merged and summed in any
order, against plain tensors and the papers' formulas."""

from __future__ import annotations

import copy
import pickle
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, precondition, rule
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_lite as ll
import reference_model as reference
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import Block, Snapshot

NAMES = ("default", "a", "b", "c-1")
PLACES = {"all": None, "up": ("up",), "last": (r"layers\.1\.down",), "head": ("head", "down")}
METHODS = {
    "lora": lambda r, **f: ll.LoRAConfig(r=r, alpha=3.0, **f),
    "dylora": lambda r, **f: ll.DyLoRAConfig(r=r, alpha=3.0, **f),
    "dora": lambda r, **f: ll.DoRAConfig(r=r, alpha=3.0, **f),
    "ia3": lambda r, **f: ll.IA3Config(**f),
    "ia3_input": lambda r, **f: ll.IA3Config(side="input", **f),
    "bitfit": lambda r, **f: ll.BitFitConfig(**f),
}
IDS = torch.randint(0, 17, (3, 4), generator=torch.Generator().manual_seed(2))
PULL = torch.randn(3, 4, 17, generator=torch.Generator().manual_seed(3))
LR = 1e-2


class Net(nn.Module):
    """Embedding, two blocks, and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 12)
        self.layers = nn.ModuleList([Block(True, nn.Linear), Block(True, nn.Linear)])
        self.head = nn.Linear(12, 17, bias=False)
        self.head.weight = self.embed.weight
        self.recompute: str | None = None

    def forward(self, input_ids):
        h = self.embed(input_ids)
        if self.recompute == "reentrant":
            h = h.requires_grad_() if h.is_leaf else h
        for block in self.layers:
            h = checkpoint(block, h, use_reentrant=self.recompute == "reentrant") if self.recompute else block(h)
        return self.head(h)

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head


def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        model = Net().eval()
    model.layers[0].up.weight.requires_grad_(False)  # what was frozen before stays so afterwards
    return model


def plain(model: nn.Module) -> reference.Model:
    """The bare model's numbers."""
    W = {n.removesuffix(".weight"): p.detach().double() for n, p in model.named_parameters() if n.endswith("weight")}
    b = {n.removesuffix(".bias"): p.detach().double() for n, p in model.named_parameters() if n.endswith("bias")}
    return reference.Model(W | {"head": W["embed"]}, b, blocks=2)


class Adapters(RuleBasedStateMachine):
    """`self.bare` holds the adapters in plain tensors; what the model gives is computed from these alone."""

    files = Bundle("files")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.model = net()
        self.bare = plain(self.model)
        self.base_trains = {n for n, p in self.model.named_parameters() if p.requires_grad}
        self.start = Snapshot(self.model, IDS)
        self.active: dict[str, float] = {}
        self.merged = False
        self.count = 0

    @property
    def known(self) -> dict[str, reference.Adapter]:
        return self.bare.adapters

    def teardown(self) -> None:
        self.folder.cleanup()
        if self.merged:
            ll.unmerge(self.model)
        if self.known:
            ll.detach(self.model)
        difference = self.start.difference(self.model)
        assert not difference, difference

    def fresh_seed(self) -> int:
        self.count += 1
        return self.count

    def stored(self, name: str, path: str, letter: str) -> torch.Tensor:
        key = f"{path}.lora_{letter}" + ("" if name == "default" else f"@{name}")
        return self.model.state_dict()[key].detach()

    def read(self, name: str, method: str, paths: list[str], scale: dict[str, float]) -> reference.Adapter:
        """The tensors that an adapter has now, found by their names in the state dict."""
        letters = reference.TRAINED[method]
        tensors = {p: {t: self.stored(name, p, t).double().clone() for t in letters} for p in paths}
        return reference.Adapter(method, tensors, scale)

    def enter(self, name: str, method: str, trainable: bool) -> None:
        """A new adapter: only the sizes are asked of its handle."""
        targets = ll.adapters(self.model)[name].record.targets
        scale = {p: (t.cfg.alpha or t.cfg.r) / t.cfg.r for p, t in targets.items()}
        self.known[name] = self.read(name, method, list(targets), scale)
        self.known[name].trainable, self.active = trainable, {name: 1.0}

    # ---- coming and going

    @initialize(target=files)
    def a_file(self):
        model = net()
        ll.attach(model, ll.LoRAConfig(r=2, alpha=5, target_names=("down",)))
        randomise(model, seed=99)
        path = ll.save(model, Path(self.folder.name) / "first")
        other, self.model = self.model, model
        self.enter("default", "lora", True)
        saved, self.model, self.active = self.known.pop("default"), other, {}
        return multiple((path, saved))

    @rule(
        name=st.sampled_from(NAMES),
        method=st.sampled_from(sorted(METHODS)),
        place=st.sampled_from(sorted(PLACES)),
        r=st.integers(1, 4),
    )
    def attach(self, name, method, place, r):
        cfg = METHODS[method](r, target_names=PLACES[place])
        if name in self.known or self.merged:
            return self.refused(lambda: ll.attach(self.model, cfg, name=name))
        ll.attach(self.model, cfg, name=name)
        randomise(self.model, name, seed=self.fresh_seed())
        self.enter(name, method, True)

    @rule(name=st.sampled_from(NAMES), file=files, trainable=st.booleans())
    def load(self, name, file, trainable):
        path, saved = file
        if name in self.known or self.merged:
            return self.refused(lambda: ll.load(self.model, path, name=name, trainable=trainable))
        ll.load(self.model, path, name=name, trainable=trainable)
        self.known[name] = saved.copy()
        self.known[name].trainable, self.active = trainable, {name: 1.0}

    @rule(target=files, name=st.sampled_from(NAMES))
    def save(self, name):
        path = Path(self.folder.name) / f"{self.fresh_seed()}.safetensors"
        if name not in self.known or self.merged:
            self.refused(lambda: ll.save(self.model, path, name=name))
            return multiple()
        return multiple((ll.save(self.model, path, name=name), self.known[name].copy()))

    @rule(name=st.none() | st.sampled_from(NAMES))
    def detach(self, name):
        if not self.known or (name is not None and name not in self.known) or self.merged:
            return self.refused(lambda: ll.detach(self.model, name))
        ll.detach(self.model, name)
        for gone in [name] if name is not None else list(self.known):
            del self.known[gone]
            self.active.pop(gone, None)

    @rule(old=st.sampled_from(NAMES), new=st.sampled_from(NAMES))
    def rename(self, old, new):
        if old not in self.known or new in self.known or self.merged:
            return self.refused(lambda: ll.rename(self.model, old, new))
        ll.rename(self.model, old, new)
        self.bare.adapters = {(new if k == old else k): v for k, v in self.known.items()}
        self.active = {(new if k == old else k): v for k, v in self.active.items()}

    @rule(
        weights=st.dictionaries(st.sampled_from(NAMES), st.sampled_from([1.0, 0.5, -2.0]), min_size=1, max_size=3),
        name=st.sampled_from(NAMES),
    )
    def combine(self, weights, name):
        unknown = set(weights) - set(self.known)
        low_rank = not unknown and all(self.known[n].method in ("lora", "dylora") for n in weights)
        if name in self.known or self.merged or not low_rank:
            return self.refused(lambda: ll.combine(self.model, weights, name=name))
        want: dict[str, torch.Tensor] = {}
        for n, w in weights.items():
            for path in self.known[n].tensors:
                want[path] = want.get(path, 0) + w * self.known[n].update(path)
        ll.combine(self.model, weights, name=name)
        self.enter(name, "lora", False)
        assert set(self.known[name].tensors) == set(want)
        for path, delta in want.items():
            torch.testing.assert_close(self.known[name].update(path), delta, atol=1e-5, rtol=1e-5)

    @rule(name=st.sampled_from(NAMES), rank=st.integers(1, 4))
    def compact(self, name, rank):
        nested = name in self.known and self.known[name].method == "dylora"
        if not nested or self.merged or rank > min(len(t["A"]) for t in self.known[name].tensors.values()):
            return self.refused(lambda: ll.compact(self.model, name, rank=rank))
        ll.compact(self.model, name, rank=rank)
        old = self.known[name]
        for path, t in old.tensors.items():
            old.scale[path] *= len(t["A"]) / rank
            old.tensors[path] = {"A": t["A"][:rank], "B": t["B"][:, :rank]}

    # ---- who acts, who trains

    @rule(
        choice=st.dictionaries(st.sampled_from(NAMES), st.sampled_from([1.0, 0.5, -2.0]), max_size=4),
        known=st.booleans(),
    )
    def activate(self, choice, known):
        if known:
            choice = {n: w for n, w in choice.items() if n in self.known}
        if self.merged or not self.known or set(choice) - set(self.known):
            return self.refused(lambda: ll.activate(self.model, choice))
        ll.activate(self.model, choice)
        self.active = choice

    @rule(name=st.sampled_from(NAMES), value=st.booleans())
    @precondition(lambda self: self.known)
    def freeze(self, name, value):
        if name in self.known:
            ll.adapters(self.model)[name].trainable = value
            self.known[name].trainable = value

    @rule(names=st.lists(st.none() | st.sampled_from(NAMES), min_size=3, max_size=3), known=st.booleans())
    def rows(self, names, known):
        names = [n if n in self.known or not known else None for n in names]
        if self.merged or not self.known or set(names) - {None} - set(self.known):
            return self.refused(lambda: ll.rows(self.model, names).__enter__())
        with torch.no_grad(), ll.rows(self.model, names):
            mixed = self.model(IDS)
        for i, name in enumerate(names):
            self.near(mixed[i], self.bare(IDS, {name: 1.0} if name else {})[i])

    @rule(choice=st.none() | st.sampled_from(NAMES))
    def scope(self, choice):
        if self.merged or not self.known or (choice is not None and choice not in self.known):
            return self.refused(lambda: ll.active(self.model, choice).__enter__())
        with torch.no_grad(), ll.active(self.model, choice):
            y = self.model(IDS)
        self.near(y, self.bare(IDS, {choice: 1.0} if choice else {}))

    @rule(recompute=st.sampled_from([None, "reentrant", "later"]))
    def train(self, recompute):
        """One step of gradient descent, blocks recomputed or not; the reference takes it with gradients of its own."""
        learning = [n for n in self.active if self.known[n].trainable]
        if self.merged or not learning:
            return
        leaves = []
        for n in learning:
            for path, tensors in self.known[n].tensors.items():
                for letter in tensors:
                    tensors[letter] = tensors[letter].detach().requires_grad_()
                    leaves.append((n, path, letter, tensors[letter]))
        (self.bare(IDS, self.active) * PULL).sum().backward()
        self.model.zero_grad()
        self.model.recompute = recompute
        try:
            (self.model(IDS) * PULL).sum().backward()
        finally:
            self.model.recompute = None
        parameters = dict(self.model.named_parameters())
        ours = set()
        for n, path, letter, leaf in leaves:
            p = parameters[f"{path}.lora_{letter}" + ("" if n == "default" else f"@{n}")]
            ours.add(id(p))
            want = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            got = torch.zeros_like(leaf) if p.grad is None else p.grad.double()
            torch.testing.assert_close(got, want, atol=2e-4 * max(1.0, float(want.abs().max())), rtol=1e-3)
        strangers = [n for n, p in parameters.items() if p.grad is not None and p.grad.any() and id(p) not in ours]
        assert not strangers, f"gradients of what does not train: {strangers}"
        torch.optim.SGD([p for n in learning for p in ll.adapters(self.model)[n].parameters()], lr=LR).step()
        self.model.zero_grad()
        for n, path, letter, leaf in leaves:
            moved = leaf.detach() - LR * (0 if leaf.grad is None else leaf.grad)
            now = self.stored(n, path, letter).double().clone()
            torch.testing.assert_close(now, moved, atol=2e-4 * max(1.0, float(moved.abs().max())), rtol=1e-3)
            self.known[n].tensors[path][letter] = now

    # ---- merging

    @rule(name=st.none() | st.sampled_from(NAMES))
    def merge(self, name):
        chosen = self.active if name is None else {name: 1.0}
        if self.merged:
            return
        tied = any("head" in self.known[n].tensors for n in chosen if n in self.known)
        if not self.known or not chosen or set(chosen) - set(self.known) or tied:
            return self.refused(lambda: ll.merge(self.model, name))
        ll.merge(self.model, name)
        self.merged, self.active = True, dict(chosen)

    @rule()
    @precondition(lambda self: self.merged)
    def unmerge(self):
        ll.unmerge(self.model)
        self.merged = False

    # ---- what is done to models

    @rule(how=st.sampled_from(["deepcopy", "pickle"]), stay=st.booleans())
    def copied(self, how, stay):
        """The original or the copy goes on; the other one is spoilt."""
        twin = copy.deepcopy(self.model) if how == "deepcopy" else pickle.loads(pickle.dumps(self.model))
        other = twin if stay else self.model
        if not stay:
            self.model, self.start.bits_only = twin, True
        with torch.no_grad():
            for p in other.parameters():
                p.fill_(7.0)
        if ll.adapters(other) and not self.merged:
            ll.detach(other)

    @rule(name=st.sampled_from(NAMES))
    def state_dict_round_trip(self, name):
        kept = {k: v.clone() for k, v in self.model.state_dict().items()}
        if name in self.known:
            randomise(self.model, name, seed=self.fresh_seed())
        self.model.load_state_dict(kept)

    @rule(name=st.sampled_from(NAMES))
    def adapter_state_dict_round_trip(self, name):
        if name not in self.known:
            return self.refused(lambda: ll.adapter_state_dict(self.model, name))
        kept = ll.adapter_state_dict(self.model, name)
        randomise(self.model, name, seed=self.fresh_seed())
        ll.load_adapter_state_dict(self.model, name, kept)

    @rule(name=st.sampled_from(NAMES), seed=st.integers(0, 9))
    def new_values(self, name, seed):
        """Tensors are written in place by who trains: nothing of the old values may be kept anywhere."""
        if name in self.known and not self.merged:
            randomise(self.model, name, seed=seed, scale=0.05)
            old = self.known[name]
            self.known[name] = self.read(name, old.method, list(old.tensors), old.scale)
            self.known[name].trainable = old.trainable

    @rule()
    @precondition(lambda self: not self.merged)
    def to_double_and_back(self):
        """fp64 and fp32 again: the same bits, and in between a better answer."""
        self.model.double()
        with torch.no_grad():
            got = self.model(IDS)
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, self.bare(IDS, self.active), atol=1e-6, rtol=1e-6)
        self.model.float()

    @rule(path=st.sampled_from(["layers.0.up", "layers.1.down", "head"]))
    @precondition(lambda self: self.known and not self.merged)
    def replaced_layer(self, path):
        """Somebody swaps a layer of a copy: who stands there is named, and everything can still leave."""
        twin = copy.deepcopy(self.model)
        parent, _, child = path.rpartition(".")
        old = twin.get_submodule(path)
        with torch.random.fork_rng(devices=[]):
            new = nn.Linear(old.in_features, old.out_features, old.bias is not None)
        setattr(twin.get_submodule(parent), child, new)
        for name, adapter in self.known.items():
            if path in adapter.tensors:
                for call in (
                    lambda n=name: ll.adapter_state_dict(twin, n),
                    lambda n=name: ll.save(twin, Path(self.folder.name) / "never", name=n),
                    lambda n=name: ll.merge(twin, n),
                ):
                    self.refused(call, path)
        ll.detach(twin)
        assert not [k for k in twin.state_dict() if "lora_" in k]
        assert not [p for p, m in twin.named_modules() if m._forward_hooks or m._forward_pre_hooks]

    # ---- what must hold

    def refused(self, call, word: str = "") -> None:
        try:
            call()
        except ll.LoraLiteError as e:
            assert word in str(e), f"{word!r} is not in: {e}"
            return
        raise AssertionError("this should have raised")

    def near(self, got: torch.Tensor, want: torch.Tensor) -> None:
        size = max(1.0, float(want.abs().max()))
        torch.testing.assert_close(got.double(), want, atol=2e-5 * size, rtol=0)

    @invariant()
    @torch.no_grad()
    def output_is_the_references(self):
        self.near(self.model(IDS), self.bare(IDS, self.active))

    @invariant()
    def names_flags_and_keys_are_the_references(self):
        handles = ll.adapters(self.model)
        assert list(handles) == list(self.known)
        acting = {} if self.merged else self.active
        assert {n for n, h in handles.items() if h.active} == set(acting)
        assert {n: h.trainable for n, h in handles.items()} == {n: a.trainable for n, a in self.known.items()}
        wanted: dict[str, bool] = {}
        for name, adapter in self.known.items():
            suffix = "" if name == "default" else f"@{name}"
            for path in adapter.tensors:
                wanted |= {f"{path}.lora_{t}{suffix}": adapter.trainable for t in reference.TRAINED[adapter.method]}
                wanted |= {f"{path}.lora_{t}{suffix}": False for t in reference.KEPT.get(adapter.method, ())}
        assert {k for k in self.model.state_dict() if "lora_" in k} == set(wanted)
        for name, p in self.model.named_parameters():
            want = wanted.get(name, not self.known and name in self.base_trains)
            assert p.requires_grad == want, f"requires_grad of {name} is {p.requires_grad}"
        hooked = {p for p, m in self.model.named_modules() if p and (m._forward_hooks or m._forward_pre_hooks)}
        assert hooked == {path for adapter in self.known.values() for path in adapter.tensors}


QUICK = settings(max_examples=20, stateful_step_count=30, suppress_health_check=[HealthCheck.too_slow])
TestAdapters = Adapters.TestCase
TestAdapters.settings = QUICK


@pytest.mark.slow
class TestDeep(Adapters.TestCase):
    """The same, a hundred times as long."""

    settings = settings(QUICK, max_examples=1000, stateful_step_count=90)
