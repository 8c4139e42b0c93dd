"""Random steps of every verb against a replay of the saved tensors with the plain formula: seeds are printed.

LORA_LITE_REPLAY_SECONDS=600 and LORA_LITE_REPLAY_SEED=1000 run it longer, and from elsewhere."""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch

import lora_lite as ll
from random_replay import Program, methods, program, replayed

SECONDS = float(os.environ.get("LORA_LITE_REPLAY_SECONDS", "4"))
SEED = int(os.environ.get("LORA_LITE_REPLAY_SEED", "0"))


def test_random_steps_are_what_their_files_say():
    replayed(SECONDS, SEED)


@pytest.mark.slow
def test_two_minutes_of_them_take_every_step_and_every_method_has_a_turn():
    counts = replayed(max(120.0, SECONDS), SEED + 10_000)
    assert set(counts) == {k.removeprefix("step_") for k in vars(Program) if k.startswith("step_")}
    assert sum(counts.values()) > 500


def test_every_method_on_linear_layers_is_drawn():
    assert len(methods()) > 55
    assert set(methods()) == {v.name for v in ll.variants() if v.site == "linear"}


def without_weights(monkeypatch):
    real = ll.activate
    monkeypatch.setattr(ll, "activate", lambda model, chosen: real(model, list(chosen)))


def one_number_off_after_loading(monkeypatch):
    real = ll.load

    def load(model, path, **more):
        handle = real(model, path, **more)
        with torch.no_grad():
            next(handle.parameters()).view(-1)[0].add_(0.2)

    monkeypatch.setattr(ll, "load", load)


def merged_twice_as_much(monkeypatch):
    real = ll.merge

    def merge(model, name=None):
        before = {k: p.clone() for k, p in model.named_parameters()}
        real(model, name)
        with torch.no_grad():
            for k, p in model.named_parameters():
                p.add_(p - before[k])

    monkeypatch.setattr(ll, "merge", merge)


def a_base_that_stays_frozen(monkeypatch):
    real = ll.detach

    def detach(model, name=None):
        real(model, name)
        next(model.parameters()).requires_grad_(False)

    monkeypatch.setattr(ll, "detach", detach)


def a_copy_that_shares(monkeypatch):
    import copy

    real = copy.deepcopy

    def deepcopy(model, memo=None):
        twin = real(model, memo)
        if isinstance(twin, torch.nn.Module):
            twin.head.weight = model.head.weight
        return twin

    monkeypatch.setattr("random_replay.copy.deepcopy", deepcopy)


FAULTS = [
    without_weights,
    one_number_off_after_loading,
    merged_twice_as_much,
    a_base_that_stays_frozen,
    a_copy_that_shares,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_planted_fault_is_found_and_its_seed_told(fault, monkeypatch):
    fault(monkeypatch)
    with pytest.raises(AssertionError, match=r"^seed \d+: .*\n  1\. "):
        for seed in range(40):
            program(seed, 30, Counter())
