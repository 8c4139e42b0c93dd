"""LoKr against the Kronecker product, entry by entry."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from equations.helpers import adapted, dense_change, randomise
from lora_lite.variants.lokr import split

R, ALPHA = 2, 7.0
FORMS = {
    "factored": {},
    "krona": {"factored": False},
    "both": {"factored": True, "factor_both": True, "factor": 5},
    "wide": {"factored": True, "factor": 10},
}


@pytest.mark.parametrize("form", FORMS)
def test_forward(form):
    d_in, d_out = 20, 30
    model, fc, x = adapted(ll.LoKrConfig(r=R, alpha=ALPHA, dtype="float64", **FORMS[form]), d_in, d_out)
    y = model(x)
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    randomise(model)
    W1 = fc.lora_W1_a @ fc.lora_W1_b if form == "both" else fc.lora_W1
    W2 = fc.lora_W2 if form == "krona" else fc.lora_W2_a @ fc.lora_W2_b
    (_, k), (_, n) = split(d_out, FORMS[form].get("factor", -1)), split(d_in, FORMS[form].get("factor", -1))
    want = torch.zeros(d_out, d_in).double()
    for j in range(d_out):
        for i in range(d_in):
            want[j, i] = ALPHA / R * W1[j // k, i // n] * W2[j % k, i % n]
    torch.testing.assert_close(dense_change(model, d_in), want.detach(), atol=1e-10, rtol=0)
    torch.testing.assert_close(model(x), torch.nn.functional.linear(x, fc.weight + want, fc.bias), atol=1e-10, rtol=0)


def test_widths_split_as_they_are_told():
    assert [split(d, -1) for d in (256, 128, 127, 20)] == [(16, 16), (8, 16), (1, 127), (4, 5)]
    assert [split(128, f) for f in (4, 32, 3, 5)] == [(4, 32), (32, 4), (2, 64), (4, 32)]


def test_a_factor_must_be_positive():
    with pytest.raises(ll.ConfigError, match="factor"):
        ll.LoKrConfig(factor=0)
