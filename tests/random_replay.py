"""Random steps of every verb, on one model with adapters of any method, against a replay: after each step the output is
computed again from the files that `ll.save` writes, in fp64, with the papers' formulas or the method's page.

python tests/random_replay.py --seconds 600 --seed 7    # longer, or from another seed
python tests/random_replay.py --seed 12 --programs 1    # that program again

A program is one seed: its steps are printed when one fails, and the same seed gives the same steps.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import pickle
import random
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

import lora_lite as ll
import reference_model as papers
from lora_lite.testing import Case
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import Block, Conv1D, Output, Snapshot
from samples import OPTIONS

NAMES = ("default", "a", "b", "c-1")
PLACES: list[dict[str, Any]] = [
    {}, {"target_names": ("up",)}, {"target_names": (r"layers\.1\.down",)}, {"layers": (0,)},
    {"target_names": ("head", "down")},
]  # fmt: skip
OTHER_KINDS: list[dict[str, Any]] = [
    {"target_kinds": ("conv",), "target_names": ("mix",)},
    {"target_kinds": ("embedding", "conv"), "target_names": ("embed", "mix")},
]
PAPERS = {"lora", "dora", "bitfit"}
"""Methods whose formula is taken from `reference_model`, which knows nothing of the library."""
IDS = torch.randint(0, 17, (3, 4), generator=torch.Generator().manual_seed(2))
PULL = torch.randn(3, 4, 17, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """Embedding, a block of `nn.Linear`, a block of `Conv1D`, a convolution over tokens, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 12)
        self.layers = nn.ModuleList([Block(True, nn.Linear), Block(True, Conv1D)])
        self.mix = nn.Conv1d(12, 12, 3, padding=1)
        self.head = nn.Linear(12, 17, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        h = self.embed(input_ids)
        for block in self.layers:
            h = block(h)
        logits = self.head(h + self.mix(h.mT).mT)
        if labels is None:
            return logits
        return Output(logits=logits, loss=F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        return Net().eval()


def calibration() -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(9)
    return [{k: torch.randint(0, 17, (4, 6), generator=g) for k in ("input_ids", "labels")} for _ in range(3)]


@functools.cache
def methods() -> dict[str, dict[str, Any]]:
    """Name -> the fields with which it takes layers of the toy's size; all methods that stand on linear layers."""
    found = {}
    for variant in ll.variants():
        case = Case(variant, options=dict(OPTIONS.get(variant.name, {})))
        if case.linear and variant.site == "linear":
            cfg = case.cfg()
            found[variant.name] = {**case.options, "r": cfg.r, "alpha": cfg.alpha}
    return found


# ---- the replay


class Everywhere:
    """The span of every position."""

    def take(self, h: Tensor) -> Tensor:
        return h

    def add(self, h: Tensor, change: Tensor) -> Tensor:
        return h + change


class Paper:
    """What a page may ask of its layer, from plain tensors: nothing of the runtime is behind it."""

    training, peers, by_number, path = False, 1, False, "replayed"

    def __init__(self, W: Tensor, b: Tensor | None, tensors: dict[str, Tensor], cfg: Any, strength: float) -> None:
        self.weight, self.bias, self.cfg, self.strength = W, b, cfg, strength
        self.out_features, self.in_features = W.shape
        self._tensors = tensors

    def __getattr__(self, name: str) -> Tensor:
        if not name.startswith("lora_"):
            raise AttributeError(name)
        return self._tensors[name]

    def master(self, name: str) -> Tensor:
        return self._tensors[name]

    tiny = master

    def once(self, what: str, compute: Callable[[], Any]) -> Any:
        return compute()

    def dropout(self, x: Tensor) -> Tensor:
        return x

    def base(self, v: Tensor) -> Tensor:
        return F.linear(v, self.weight, self.bias)

    def spans(self, h: Tensor, split: bool = False) -> list[Everywhere]:
        return [Everywhere()]

    def project(self, v: Tensor) -> Tensor:
        return v @ self.weight.mT

    def row_norms(self) -> Tensor:
        return self.weight.norm(dim=1)

    def column_norms(self) -> Tensor:
        return self.weight.norm(dim=0)


@dataclass
class Replayed:
    """One adapter as its file says it: header and tensors."""

    targets: dict[str, dict[str, Any]]
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    trainable: bool = True

    @classmethod
    def of(cls, path: Path, trainable: bool = True) -> Replayed:
        with safe_open(path, "pt") as f:
            head = json.loads(f.metadata()["lora_lite"])
            tensors = {k: f.get_tensor(k) for k in f.keys()}
        exact = {k: t.double() if t.is_floating_point() else t for k, t in tensors.items()}
        return cls(head["targets"], head["config"], exact, trainable)

    @property
    def method(self) -> str:
        return self.config["variant"]

    def scale(self, path: str) -> float:
        """alpha / r, or alpha / √r, from what the config says of this target."""
        said = {**self.config, **self.targets[path].get("config", {})}
        r = said["r"]
        return (said["alpha"] or r) / (r**0.5 if said.get("use_rslora") else r)

    def of_target(self, path: str) -> dict[str, Tensor]:
        """Short name -> tensor, those that it shares with other targets among them."""
        own = {k.removeprefix(f"{path}."): t for k, t in self.tensors.items() if k.startswith(f"{path}.lora_")}
        shared = self.targets[path].get("shared", {})
        return own | {short: self.tensors[f"{owner}.{short}"] for short, owner in shared.items()}


class Replay:
    """The model in fp64, from numbers alone."""

    def __init__(self, model: Net) -> None:
        numbers = {k: t.detach().double().clone() for k, t in model.state_dict().items()}
        self.W = {k.removesuffix(".weight"): t for k, t in numbers.items() if k.endswith(".weight")}
        for path in ("layers.1.up", "layers.1.down"):
            self.W[path] = self.W[path].mT
        self.b = {k.removesuffix(".bias"): t for k, t in numbers.items() if k.endswith(".bias")}
        self.adapters: dict[str, Replayed] = {}

    def __call__(self, ids: Tensor, active: dict[str, float]) -> Tensor:
        h = F.embedding(ids, self.W["embed"])
        for one, weight in self.here("embed", active):
            h = h + weight * F.embedding(ids, self.update(one, "embed").mT)
        for i in (0, 1):
            h = h + self.linear(f"layers.{i}.down", self.linear(f"layers.{i}.up", h, active).tanh(), active)
        mixed = F.conv1d(h.mT, self.W["mix"], self.b["mix"], padding=1)
        for one, weight in self.here("mix", active):
            mixed = mixed + weight * F.conv1d(h.mT, self.update(one, "mix").view_as(self.W["mix"]), padding=1)
        return self.linear("head", h + mixed.mT, active)

    def here(self, path: str, active: dict[str, float]) -> list[tuple[Replayed, float]]:
        """Who stands there and acts, in the order of attaching."""
        return [(a, active[n]) for n, a in self.adapters.items() if n in active and path in a.targets]

    def update(self, one: Replayed, path: str) -> Tensor:
        """s B A."""
        t = one.of_target(path)
        return one.scale(path) * t["lora_B"] @ t["lora_A"]

    def linear(self, path: str, x: Tensor, active: dict[str, float]) -> Tensor:
        """Every input is rewritten first, then every output."""
        W, b = self.W[path], self.b.get(path)
        here = [(self.page(one, path, weight), one, weight) for one, weight in self.here(path, active)]
        for layer, one, weight in here:
            rewrite = ll.get_variant(one.method).forward_input
            if rewrite is not None:
                blend = 1.0 if ll.get_variant(one.method).own_weight else weight
                x = x + blend * (rewrite(layer, x) - x)
        y = F.linear(x, W, b)
        for layer, one, weight in here:
            variant = ll.get_variant(one.method)
            blend = 1.0 if variant.own_weight else weight
            y = y + blend * (self.output(layer, one, path, x, y) - y)
        return y

    def page(self, one: Replayed, path: str, strength: float) -> Paper:
        variant = ll.get_variant(one.method)
        cfg = variant.config.from_dict({**one.config, **one.targets[path].get("config", {})})
        return Paper(self.W[path], self.b.get(path), one.of_target(path), cfg, strength)

    def output(self, layer: Paper, one: Replayed, path: str, x: Tensor, y: Tensor) -> Tensor:
        variant = ll.get_variant(one.method)
        if one.method in PAPERS:
            letters = {k.removeprefix("lora_"): t for k, t in one.of_target(path).items()}
            b = torch.zeros(len(layer.weight), dtype=y.dtype) if layer.bias is None else layer.bias
            return papers.output_of(one.method, letters, one.scale(path), x, y, layer.weight, b)
        return y if variant.forward is None else variant.forward(layer, x, y)


# ---- the program


class Program:
    """One seed: a model, what should be on it, and steps drawn at random."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random, self.folder = random.Random(seed), folder
        self.model = net()
        self.start = Snapshot(self.model, IDS)
        self.replay = Replay(self.model)
        self.active: dict[str, float] = {}
        self.merged: Snapshot | None = None
        self.files: list[tuple[Path, Replayed]] = []
        self.count = 0
        self.log: list[str] = []
        self.steps = {k.removeprefix("step_"): getattr(self, k) for k in sorted(vars(Program)) if k.startswith("step_")}

    def run(self, steps: int, counts: Counter[str]) -> None:
        for _ in range(steps):
            few = len(self.known) < 2 and self.random.random() < 0.5  # or else most steps have nothing to work on
            name = "attach" if few else self.random.choice(list(self.steps))
            self.log.append(name)
            if self.steps[name]() is not False:
                counts[name] += 1
                self.check()
        self.finish()

    def say(self, words: Any) -> None:
        self.log[-1] += f" {words}"

    @property
    def known(self) -> dict[str, Replayed]:
        return self.replay.adapters

    def fresh(self) -> int:
        self.count += 1
        return self.count

    def some(self) -> str:
        """A name, known or not."""
        name = self.random.choice([*NAMES, *self.known])
        self.say(name)
        return name

    def refused(self, call: Callable[[], Any]) -> None:
        self.say("(refused)")
        try:
            call()
        except ll.LoraLiteError:
            return
        raise AssertionError("this should have raised")

    def written(self, name: str) -> Replayed:
        """What the adapter's file says now."""
        path = ll.save(self.model, self.folder / f"{self.fresh()}", name=name)
        return Replayed.of(path, name not in self.known or self.known[name].trainable)

    def enter(self, name: str, trainable: bool = True) -> None:
        self.known[name] = self.written(name)
        self.known[name].trainable, self.active = trainable, {name: 1.0}

    # -- coming and going

    def step_attach(self) -> None:
        name, method = self.some(), self.random.choice(list(methods()))
        fields = {**methods()[method], **self.random.choice(PLACES)}
        if method == "lora" and self.random.random() < 0.5:
            fields |= self.random.choice(OTHER_KINDS)
        if method == "lora" and self.random.random() < 0.5:
            fields["use_rslora"] = True
        if "lora" in method and self.random.random() < 0.5:
            fields["alpha_pattern"] = {"up|mix": 1.5}
        variant = ll.get_variant(method)
        self.say(f"{method} {fields}")
        try:
            cfg = variant.config(**{"variant": method, **fields})
            data = calibration() if variant.needs_data else None
            ll.attach(self.model, cfg, data, name=name)
        except (ll.ConfigError, ll.TargetError):  # not of this size, or no such place for it; nothing may have changed
            self.say("(does not fit)")
            return
        except ll.StateError:
            assert name in self.known or self.merged
            self.say("(refused)")
            return
        assert name not in self.known and not self.merged
        randomise(self.model, name, seed=self.fresh(), scale=0.1)
        self.enter(name)

    def step_load(self) -> bool | None:
        if not self.files:
            return False
        name, (path, saved), trainable = self.some(), self.random.choice(self.files), self.random.random() < 0.5
        self.say(path.name)
        call = functools.partial(ll.load, self.model, path, name=name, trainable=trainable)
        if name in self.known or self.merged:
            return self.refused(call)
        call()
        self.known[name] = Replayed(saved.targets, saved.config, dict(saved.tensors), trainable)
        self.active = {name: 1.0}

    def step_save(self) -> None:
        name, path = self.some(), self.folder / f"kept{self.fresh()}.safetensors"
        if name not in self.known or self.merged:
            return self.refused(lambda: ll.save(self.model, path, name=name))
        ll.save(self.model, path, name=name)
        self.files.append((path, Replayed.of(path)))

    def step_export(self) -> bool | None:
        """Through another library's folder: the same output again."""
        plain = [n for n, a in self.known.items() if a.method == "lora" and not {"mix", "embed"} & set(a.targets)]
        free = [n for n in NAMES if n not in self.known]
        if not plain or not free or self.merged:
            return False
        old, name = self.random.choice(plain), self.random.choice(free)
        self.say(f"{old} -> {name}")
        folder = self.folder / f"peft{self.fresh()}"
        ll.export(self.model, folder, name=old)
        ll.load(self.model, folder, name=name)
        with torch.no_grad():
            self.near(self.model(IDS), self.replay(IDS, {old: 1.0}))
        self.enter(name, trainable=False)

    def step_detach(self) -> None:
        name = self.random.choice([None, *NAMES, *self.known])
        self.say(name)
        if not self.known or (name is not None and name not in self.known) or self.merged:
            return self.refused(lambda: ll.detach(self.model, name))
        ll.detach(self.model, name)
        for gone in list(self.known) if name is None else [name]:
            del self.known[gone]
            self.active.pop(gone, None)

    def step_rename(self) -> None:
        old, new = self.some(), self.some()
        if old not in self.known or new in self.known or self.merged:
            return self.refused(lambda: ll.rename(self.model, old, new))
        ll.rename(self.model, old, new)
        self.replay.adapters = {(new if k == old else k): v for k, v in self.known.items()}
        self.active = {(new if k == old else k): v for k, v in self.active.items()}

    def step_combine(self) -> bool | None:
        free = [n for n in NAMES if n not in self.known]
        summable = [n for n, a in self.known.items() if self.sums(ll.get_variant(a.method))]
        if not free or not summable or self.merged:
            return False
        chosen = self.random.sample(summable, self.random.randint(1, len(summable)))
        weights = {n: self.random.choice([1.0, 0.5, -2.0]) for n in chosen}
        name = self.random.choice(free)
        self.say(f"{weights} -> {name}")
        places = {p for n in weights for p in self.known[n].targets}
        want = {p: sum(w * self.dense(self.known[n], p) for n, w in weights.items()) for p in places}
        ll.combine(self.model, weights, name=name)
        self.enter(name, trainable=False)
        assert set(self.known[name].targets) == places
        for path, delta in want.items():
            self.near(torch.as_tensor(self.dense(self.known[name], path)), torch.as_tensor(delta))

    @staticmethod
    def sums(variant: Any) -> bool:
        return variant.factors is not None and not variant.own_weight

    def dense(self, one: Replayed, path: str) -> Tensor | float:
        """W' − W of one adapter on one layer; 0 where it does not stand."""
        if path not in one.targets:
            return 0.0
        if path in ("mix", "embed"):
            return self.replay.update(one, path)
        eye = torch.eye(self.replay.W[path].shape[1], dtype=torch.float64)
        y = F.linear(eye, self.replay.W[path], self.replay.b.get(path))
        return (self.replay.output(self.replay.page(one, path, 1.0), one, path, eye, y) - y).mT

    # -- who acts, who trains

    def step_activate(self) -> None:
        choice = {self.some(): self.random.choice([1.0, 0.5, -2.0]) for _ in range(self.random.randint(0, 3))}
        if self.random.random() < 0.7:
            choice = {n: w for n, w in choice.items() if n in self.known}
        self.say(choice)
        if self.merged or not self.known or set(choice) - set(self.known):
            return self.refused(lambda: ll.activate(self.model, choice))
        ll.activate(self.model, choice)
        self.active = choice

    def step_scope(self) -> None:
        choice = self.random.choice([None, *NAMES, *self.known])
        self.say(choice)
        if self.merged or not self.known or (choice is not None and choice not in self.known):
            return self.refused(lambda: ll.active(self.model, choice).__enter__())
        with torch.no_grad(), ll.active(self.model, choice):
            self.near(self.model(IDS), self.replay(IDS, {choice: 1.0} if choice else {}))

    def step_rows(self) -> None:
        names = [self.random.choice([None, *NAMES]) for _ in IDS]
        if self.random.random() < 0.8:
            names = [n if n in self.known else None for n in names]
        self.say(names)
        if self.merged or not self.known or set(names) - {None} - set(self.known):
            return self.refused(lambda: ll.rows(self.model, names).__enter__())
        with torch.no_grad(), ll.rows(self.model, names):
            mixed = self.model(IDS)
        for i, name in enumerate(names):
            self.near(mixed[i], self.replay(IDS, {name: 1.0} if name else {})[i])

    def step_freeze(self) -> bool | None:
        name, value = self.some(), self.random.random() < 0.5
        if name not in self.known or self.merged:
            return False
        ll.adapters(self.model)[name].trainable = value
        self.known[name].trainable = value

    def step_train(self) -> bool | None:
        """A step of gradient descent: gradients are those of the replay, and nobody else moves."""
        learning = [n for n in self.active if self.known[n].trainable]
        if self.merged or not learning:
            return False
        parameters = {n: self.parameters(n) for n in learning}
        leaves = {}
        for n in learning:
            for key in parameters[n]:
                leaves[n, key] = self.known[n].tensors[key].detach().requires_grad_()
            self.known[n].tensors |= {key: leaves[n, key] for key in parameters[n]}
        (self.replay(IDS, self.active) * PULL).sum().backward()
        self.model.zero_grad()
        (self.model(IDS) * PULL).sum().backward()
        for (n, key), leaf in leaves.items():
            want = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            grad = parameters[n][key].grad
            self.near(torch.zeros_like(want) if grad is None else grad, want, 1e-3, f"the gradient of {n}: {key}")
        ours = {id(p) for of_one in parameters.values() for p in of_one.values()}
        assert not [k for k, p in self.model.named_parameters() if p.grad is not None and id(p) not in ours]
        torch.optim.SGD([p for n in learning for p in ll.adapters(self.model)[n].parameters()], lr=1e-3).step()
        self.model.zero_grad()
        for n, one in list(self.known.items()):
            now = self.written(n)
            moved = [k for k, t in now.tensors.items() if not torch.equal(t, one.tensors[k].detach())]
            assert not set(moved) - set(parameters.get(n, ())), f"{n} moved: {moved}"
            self.known[n] = now

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Key of the file -> the parameter, found by its name on the model."""
        suffix = "" if name == "default" else f"@{name}"
        found = {}
        for key in self.known[name].tensors:
            path, _, short = key.rpartition(".")
            at = self.model.get_submodule(path)._parameters.get(short + suffix)
            if at is None:  # what layers share stands on the model itself
                at = self.model._parameters.get(f"{short}:{path.replace('.', ':')}{suffix}")
            if at is not None and at.requires_grad:
                found[key] = at
        return found

    # -- merging

    def step_merge(self) -> bool | None:
        name = self.random.choice([None, *NAMES, *self.known])
        self.say(name)
        chosen = self.active if name is None else {name: 1.0}
        if self.merged:
            return False
        if not chosen or set(chosen) - set(self.known) or not all(self.affine(n) for n in chosen):
            return self.refused(lambda: ll.merge(self.model, name))
        before = Snapshot(self.model)
        ll.merge(self.model, name)
        self.merged, self.active = before, dict(chosen)

    def affine(self, name: str) -> bool:
        """Whether a weight can stand for the adapter; mixtures choose by the input."""
        return ll.get_variant(ll.adapters(self.model)[name].cfg.variant).affine

    def step_unmerge(self) -> bool | None:
        if not self.merged:
            return False
        ll.unmerge(self.model)
        difference = self.merged.difference(self.model)
        assert not difference, difference
        self.merged = None

    # -- what is done to models

    def step_copy(self) -> None:
        """The original or the copy goes on; the other one is spoilt."""
        copied, stay = self.random.random() < 0.5, self.random.random() < 0.5
        twin = copy.deepcopy(self.model) if copied else pickle.loads(pickle.dumps(self.model))
        other = twin if stay else self.model
        if not stay:
            self.model, self.start.bits_only = twin, True
            if self.merged is not None:
                self.merged.bits_only = True
        with torch.no_grad():
            for p in other.parameters():
                p.fill_(7.0)

    def step_state_dict(self) -> bool | None:
        if self.merged:
            return False
        kept = {k: v.clone() for k, v in self.model.state_dict().items()}
        for name in self.known:
            randomise(self.model, name, seed=self.fresh())
        self.model.load_state_dict(kept)

    def step_adapter_state_dict(self) -> bool | None:
        name = self.some()
        if name not in self.known:
            return self.refused(lambda: ll.adapter_state_dict(self.model, name))
        if self.merged:
            return False
        kept = ll.adapter_state_dict(self.model, name)
        randomise(self.model, name, seed=self.fresh())
        ll.load_adapter_state_dict(self.model, name, kept)

    def step_new_values(self) -> bool | None:
        name = self.some()
        if name not in self.known or self.merged:
            return False
        randomise(self.model, name, seed=self.fresh(), scale=0.05)
        self.known[name] = self.written(name)

    def step_double(self) -> bool | None:
        if self.merged:
            return False
        self.model.double()
        with torch.no_grad():
            got = self.model(IDS)
        assert got.dtype == torch.float64
        self.near(got, self.replay(IDS, self.active))
        self.model.float()

    def step_failing_call(self) -> None:
        """A layer that raises in the middle of a call, in a scope or not."""
        inner = self.model.layers[1].forward

        def fails(h: Tensor) -> Tensor:
            raise ZeroDivisionError

        self.model.layers[1].forward = fails
        try:
            if self.known and not self.merged and self.random.random() < 0.5:
                with ll.rows(self.model, [self.random.choice(list(self.known)) for _ in IDS]):
                    self.model(IDS)
            else:
                self.model(IDS)
        except ZeroDivisionError:
            pass
        finally:
            del self.model.layers[1].forward
        assert self.model.layers[1].forward == inner

    # -- what must hold

    def near(self, got: Tensor, want: Tensor, tolerance: float = 1e-4, what: str = "the output") -> None:
        gap, size = float((got.double() - want).abs().max()), max(1.0, float(want.abs().max()))
        assert gap <= tolerance * size, f"{what} is off by {gap:.1e} of {size:.1e}"

    @torch.no_grad()
    def check(self) -> None:
        self.near(self.model(IDS), self.replay(IDS, self.active))
        handles = ll.adapters(self.model)
        assert list(handles) == list(self.known)
        assert {n for n, h in handles.items() if h.active} == set({} if self.merged else self.active)
        assert {n: h.trainable for n, h in handles.items()} == {n: a.trainable for n, a in self.known.items()}

    def finish(self) -> None:
        """All of it goes, and the model is what it was."""
        self.log.append("the end")
        if self.merged:
            ll.unmerge(self.model)
        if self.known:
            ll.detach(self.model)
        difference = self.start.difference(self.model)
        assert not difference, difference


def program(seed: int, steps: int, counts: Counter[str]) -> None:
    """Run one seed. Raises AssertionError with its steps."""
    rng = torch.get_rng_state()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", ll.LoraLiteWarning)
        torch.set_rng_state(rng)
        one = Program(seed, Path(folder))
        try:
            one.run(steps, counts)
        except Exception as e:
            told = "\n".join(f"  {i}. {words}" for i, words in enumerate(one.log, 1))
            raise AssertionError(f"seed {seed}: {type(e).__name__}: {e}\n{told}") from e


def replayed(
    seconds: float, seed: int = 0, steps: int = 30, programs: int | None = None, least: int = 8
) -> Counter[str]:
    """Programs from `seed` on until the time is over, `least` at least; how often each step was taken."""
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds
    first = seed
    while seed < first + min(least, programs or least) or (
        time.monotonic() < end and (programs is None or seed < first + programs)
    ):
        program(seed, steps, counts)
        seed += 1
    print(f"seeds {first} to {seed - 1}, {steps} steps each: {sum(counts.values())} steps {dict(counts)}")
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--programs", type=int)
    args = parser.parse_args()
    replayed(args.seconds, args.seed, args.steps, args.programs)
