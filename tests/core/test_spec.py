"""The starts that a spec can name, each by its statistics."""

from __future__ import annotations

import math

import pytest
import torch

import lora_lite as ll


def filled(init, *shape, seed=0):
    t = torch.full(shape, float("nan"))
    ll.ParamSpec(shape, init=init).fill(t, torch.Generator().manual_seed(seed))
    return t


def test_kaiming_is_uniform_up_to_one_over_the_root_of_the_inputs():
    t = filled("kaiming", 400, 16)
    assert 0.24 < t.max() <= 0.25 and -0.25 <= t.min() < -0.24
    assert math.isclose(float(t.std()), 0.25 / math.sqrt(3), rel_tol=0.03)


@pytest.mark.parametrize(("init", "std"), [("normal", 1.0), ("normal:0.02", 0.02)])
def test_normal_has_its_deviation(init, std):
    t = filled(init, 200, 50)
    assert math.isclose(float(t.std()), std, rel_tol=0.03) and abs(float(t.mean())) < 0.05 * std


def test_constants_and_callables():
    assert filled("zeros", 3).eq(0).all() and filled("ones", 3).eq(1).all() and filled("constant:1.5", 3).eq(1.5).all()
    assert filled(lambda t, g: t.copy_(torch.arange(3.0)), 3).tolist() == [0, 1, 2]


def test_the_generator_decides():
    for init in ("kaiming", "normal", "normal:0.5"):
        assert torch.equal(filled(init, 4, 5), filled(init, 4, 5)) and not torch.equal(
            filled(init, 4, 5), filled(init, 4, 5, seed=1)
        )


def test_what_an_optimiser_sees():
    trained = [ll.ParamSpec((1,), trainable=t, as_buffer=b).is_trained for t in (True, False) for b in (True, False)]
    assert trained == [False, True, False, False]


@pytest.mark.parametrize("shape", [(3.5, 4), (), (0, 4), "34", 3, None, (float("nan"),), (float("inf"),)])
def test_a_shape_that_is_none(shape):
    with pytest.raises(ll.ConfigError, match="ParamSpec"):
        ll.ParamSpec(shape)


def test_a_whole_quotient_is_a_size():
    assert ll.ParamSpec((12 / 2, 4)).shape == (6, 4)
