"""What the installed neighbours can do: for tests of a thing that an older one, which we allow, does not have."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2])


def older(package: str, than: str) -> bool:
    """Whether the installed version is lower than this MAJOR.MINOR; an absent one is for other marks."""
    return find_spec(package) is not None and _numbers(version(package)) < _numbers(than)


def needs(package: str, at_least: str, what: str) -> pytest.MarkDecorator:
    """Skip with an older version of `package`, which has no `what`."""
    return pytest.mark.skipif(
        older(package, at_least), reason=f"this version of {package} has no {what}: that came with {at_least}"
    )


fused_experts = needs("transformers", "5.0", "fused experts")
fp4_on_cpu = needs("bitsandbytes", "0.48", "fp4 kernels on a CPU")
strict_export_of_hooks = needs("torch", "2.7", "strict export of a model whose root has hooks")
autocast_on_meta = pytest.mark.skipif(
    not torch.amp.is_autocast_available("meta") and older("torch", "2.7"),
    reason="transformers' rotary embeddings ask for an autocast on meta, which torch 2.6 does not know",
)
