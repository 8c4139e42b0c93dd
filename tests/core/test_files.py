"""What files may hold."""

import math

import pytest
import torch

from lora_lite.core.files import is_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_is_what_every_number_is(dtype):
    huge = torch.full((3,), min(torch.finfo(dtype).max, 3e38), dtype=dtype)  # their sum is none
    assert is_finite(huge) and is_finite(torch.tensor([1.0, -2.0], dtype=dtype)) and is_finite(huge[:0])
    for wrong in (math.inf, -math.inf, math.nan):
        assert not is_finite(torch.tensor([1.0, wrong, 2.0], dtype=dtype))
    assert not is_finite(torch.tensor([math.inf, -math.inf], dtype=dtype))
    if dtype == torch.float64:
        assert not is_finite(torch.tensor([1e39, -1e39], dtype=dtype))  # more than float32 holds
