"""B5. Fewer targets, or others, than were meant: every entry of a config hits something or raises and is named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.testing.toy import Snapshot, toy
from methods import every_method


@pytest.mark.parametrize(
    ("fields", "dead"),
    [
        ({"target_names": ("up", "wrong_proj")}, "wrong_proj"),
        ({"exclude_names": ("up", "wrong_proj")}, "wrong_proj"),
        ({"rank_pattern": {"up": 2, "wrong_proj": 2}}, "wrong_proj"),
        ({"alpha_pattern": {"up": 2.0, "wrong_proj": 2.0}}, "wrong_proj"),
        ({"train_modules": ("head", "wrong_head")}, "wrong_head"),
        ({"layers": (0, 5)}, "5"),
        ({"layers": (0, -3)}, "-1|-3"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_one_dead_entry_among_good_ones_is_named(fields, dead):
    model = toy()
    before = Snapshot(model)
    for call in (ll.plan, ll.attach):
        with pytest.raises(ll.TargetError, match=dead):
            call(model, ll.LoRAConfig(r=3, alpha=7, **fields))
        assert not (d := before.difference(model)), d


@every_method()
def test_what_the_plan_counts_is_what_is_attached(case):
    model = case.model()
    cfg = case.cfg()
    plan = ll.plan(model, cfg)
    base = {id(p) for p in model.parameters()}
    handle = case.attach(model)
    assert handle.targets == [t.path for t in plan.targets]
    if case.variant.group_init is None:  # data may choose ranks
        ours = [p for p in model.parameters() if id(p) not in base]
        assert sum(p.numel() for p in ours if p.requires_grad) == plan.trainable == handle.num_parameters()


class Towers(nn.Module):
    """Two towers whose layers have the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.language = toy(), toy()

    def forward(self, x):
        return self.language(self.vision(x))


@every_method(lambda case: not case.variant.needs_data)
def test_no_module_outside_of_the_scope_gets_anything(case):
    model = Towers()
    if not case.linear:
        pytest.skip("stands on the blocks of all stacks")
    before = Snapshot(model.vision)
    handle = ll.attach(model, case.sized(target_names=(r"language\.layers\..*",), **_fits(case)))
    assert len(handle.targets) == 4 and all(p.startswith("language.") for p in handle.targets)
    for p in model.vision.parameters():
        p.requires_grad_(True)  # the freeze of the base is meant
    before.rng = torch.get_rng_state()
    assert not (d := before.difference(model.vision)), d


def _fits(case):
    cfg = case.cfg()
    return {"r": cfg.r, "alpha": cfg.alpha}
