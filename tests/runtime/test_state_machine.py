"""Adapters that come, go, act, freeze, change their names and are merged in any order, against a model of a few
lines."""

from __future__ import annotations

import tempfile
from pathlib import Path

import hypothesis.strategies as st
import torch
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, precondition, rule

import lora_lite as ll
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import Snapshot, toy

NAMES = ("default", "a", "b", "c-1")
PLACES = {"all": None, "up": ("up",), "last": (r"layers\.1\.down",)}
X = torch.randn(3, 12, generator=torch.Generator().manual_seed(2))


class Adapters(RuleBasedStateMachine):
    """The reference holds, per adapter, dense (path -> ΔW); the output is computed from these alone."""

    files = Bundle("files")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.model = toy()
        self.model.head.weight.requires_grad_(False)  # what was frozen before stays so afterwards
        self.bare = toy().double()
        self.start = Snapshot(self.model, X)
        self.deltas: dict[str, dict[str, torch.Tensor]] = {}
        self.trainable: dict[str, bool] = {}
        self.active: dict[str, float] = {}
        self.merged = False
        self.count = 0

    def teardown(self) -> None:
        if self.merged:
            ll.unmerge(self.model)
        if self.deltas:
            ll.detach(self.model)
        difference = self.start.difference(self.model)
        assert not difference, difference
        self.folder.cleanup()

    def enter(self, name: str, trainable: bool) -> None:
        found: dict[str, torch.Tensor] = {}
        for path, target in ll.adapters(self.model)[name].record.targets.items():
            layer = self.model.get_submodule(path)
            suffix = "" if name == "default" else f"@{name}"
            A, B = (layer._parameters[f"lora_{t}{suffix}"].detach().double() for t in "AB")
            found[path] = target.cfg.scale * B @ A
        self.deltas[name], self.trainable[name], self.active = found, trainable, {name: 1.0}

    # ---- what may happen

    @initialize(target=files)
    def a_file(self):
        model = toy()
        ll.attach(model, ll.LoRAConfig(r=2, alpha=5, target_names=("down",)))
        randomise(model, seed=99)
        return multiple(ll.save(model, Path(self.folder.name) / "first"))

    @rule(name=st.sampled_from(NAMES), place=st.sampled_from(sorted(PLACES)), r=st.integers(1, 4))
    def attach(self, name, place, r):
        cfg = ll.LoRAConfig(r=r, alpha=3.0, target_names=PLACES[place])
        if name in self.deltas or self.merged:
            return self.refused(lambda: ll.attach(self.model, cfg, name=name))
        ll.attach(self.model, cfg, name=name)
        self.count += 1
        randomise(self.model, name, seed=self.count)
        self.enter(name, True)

    @rule(name=st.sampled_from(NAMES), file=files, trainable=st.booleans())
    def load(self, name, file, trainable):
        if name in self.deltas or self.merged:
            return self.refused(lambda: ll.load(self.model, file, name=name, trainable=trainable))
        ll.load(self.model, file, name=name, trainable=trainable)
        self.enter(name, trainable)

    @rule(target=files, name=st.sampled_from(NAMES))
    def save(self, name):
        self.count += 1
        path = Path(self.folder.name) / f"{self.count}.safetensors"
        if name not in self.deltas or self.merged:
            self.refused(lambda: ll.save(self.model, path, name=name))
            return multiple()
        return multiple(ll.save(self.model, path, name=name))

    @rule(name=st.sampled_from(NAMES))
    def detach(self, name):
        if name not in self.deltas or self.merged:
            return self.refused(lambda: ll.detach(self.model, name))
        ll.detach(self.model, name)
        for table in (self.deltas, self.trainable, self.active):
            table.pop(name, None)

    @rule(old=st.sampled_from(NAMES), new=st.sampled_from(NAMES))
    def rename(self, old, new):
        if old not in self.deltas or new in self.deltas or self.merged:
            return self.refused(lambda: ll.rename(self.model, old, new))
        ll.rename(self.model, old, new)
        for field in ("deltas", "trainable", "active"):
            setattr(self, field, {(new if k == old else k): v for k, v in getattr(self, field).items()})

    @rule(
        choice=st.dictionaries(st.sampled_from(NAMES), st.sampled_from([1.0, 0.5, -2.0]), max_size=4),
        known=st.booleans(),
    )
    def activate(self, choice, known):
        if known:
            choice = {n: w for n, w in choice.items() if n in self.deltas}
        if self.merged or not self.deltas or set(choice) - set(self.deltas):
            return self.refused(lambda: ll.activate(self.model, choice))
        ll.activate(self.model, choice)
        self.active = choice

    @rule(name=st.sampled_from(NAMES), value=st.booleans())
    @precondition(lambda self: self.deltas)
    def freeze(self, name, value):
        if name in self.deltas:
            ll.adapters(self.model)[name].trainable = value
            self.trainable[name] = value

    @rule(name=st.none() | st.sampled_from(NAMES))
    def merge(self, name):
        chosen = self.active if name is None else {name: 1.0}
        if self.merged:
            return
        if not self.deltas or not chosen or set(chosen) - set(self.deltas):
            return self.refused(lambda: ll.merge(self.model, name))
        ll.merge(self.model, name)
        self.merged, self.active = True, dict(chosen)

    @rule()
    @precondition(lambda self: self.merged)
    def unmerge(self):
        ll.unmerge(self.model)
        self.merged = False

    @rule(names=st.lists(st.none() | st.sampled_from(NAMES), min_size=3, max_size=3), known=st.booleans())
    def rows(self, names, known):
        names = [n if n in self.deltas or not known else None for n in names]
        if self.merged or not self.deltas or set(names) - {None} - set(self.deltas):
            return self.refused(lambda: ll.rows(self.model, names).__enter__())
        with torch.no_grad(), ll.rows(self.model, names):
            mixed = self.model(X)
        for i, name in enumerate(names):
            torch.testing.assert_close(
                mixed[i].double(), self.output({name: 1.0} if name else {})[i], atol=1e-4, rtol=1e-4
            )

    @rule(choice=st.none() | st.sampled_from(NAMES))
    def scope(self, choice):
        if self.merged or not self.deltas or (choice is not None and choice not in self.deltas):
            return self.refused(lambda: ll.active(self.model, choice).__enter__())
        with torch.no_grad(), ll.active(self.model, choice):
            y = self.model(X)
        torch.testing.assert_close(y.double(), self.output({choice: 1.0} if choice else {}), atol=1e-4, rtol=1e-4)

    # ---- what must hold

    def refused(self, call) -> None:
        try:
            call()
        except ll.LoraLiteError:
            return
        raise AssertionError("this should have raised")

    @torch.no_grad()
    def output(self, active: dict[str, float]) -> torch.Tensor:
        """The stream of the bare model with W + Σ w ΔW."""
        h = X.double()
        for i, block in enumerate(self.bare.layers):
            v = h
            for name in ("up", "down"):
                layer = getattr(block, name)
                path = f"layers.{i}.{name}"
                dW = sum(w * self.deltas[n][path] for n, w in active.items() if path in self.deltas[n])
                v = v @ (layer.weight + dW).mT + layer.bias
                v = v.tanh() if name == "up" else v
            h = h + v
        return h

    @invariant()
    @torch.no_grad()
    def output_is_the_references(self):
        torch.testing.assert_close(self.model(X).double(), self.output(self.active), atol=1e-4, rtol=1e-4)

    @invariant()
    def names_flags_and_keys_are_the_references(self):
        handles = ll.adapters(self.model)
        assert list(handles) == list(self.deltas)
        acting = {} if self.merged else self.active
        assert {n for n, h in handles.items() if h.active} == set(acting)
        assert {n: h.trainable for n, h in handles.items()} == self.trainable
        wanted, keys = {}, set()
        for name, deltas in self.deltas.items():
            suffix = "" if name == "default" else f"@{name}"
            for path in deltas:
                for t in "AB":
                    wanted[f"{path}.lora_{t}{suffix}"] = self.trainable[name]
        keys = {k for k in self.model.state_dict() if "lora_" in k}
        assert keys == set(wanted)
        base_trains = not self.deltas
        for name, p in self.model.named_parameters():
            want = wanted.get(name, base_trains and name != "head.weight")
            assert p.requires_grad == want, f"requires_grad of {name} is {p.requires_grad}"
        hooked = {path for path, m in self.model.named_modules() if path and (m._forward_hooks or m._forward_pre_hooks)}
        assert hooked == {path for deltas in self.deltas.values() for path in deltas}


TestAdapters = Adapters.TestCase
TestAdapters.settings = settings(max_examples=60, stateful_step_count=25)
