"""What follows from what a method says about itself."""

from __future__ import annotations

import math

from lora_lite.core import ParamSpec, Variant


class Fixed(Variant):
    name = "fixed"
    param_specs = staticmethod(lambda d_in, d_out, cfg: {"lora_v": ParamSpec((d_out,), trainable=False)})


class Sharing(Fixed):
    name = "sharing"
    shared_specs = staticmethod(lambda targets, cfg: {"lora_s": ParamSpec((3,))})


class Other(Fixed):
    name = "other"
    identity_bound = math.inf


def test_a_method_trains_by_tensors_of_its_own_or_shared_ones():
    assert not Fixed.trains
    assert Sharing.trains


def test_only_a_start_without_any_departure_is_exact():
    assert Fixed.exact_identity
    assert not Other.exact_identity
