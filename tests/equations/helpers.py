"""What the equation tests share: one adapted layer of an odd shape, and random values in every trained tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lora_lite as ll


class Box(nn.Module):
    """A container with one linear layer, `fc`."""

    def __init__(self, d_in: int, d_out: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc = nn.Linear(d_in, d_out, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def adapted(
    cfg: ll.AdapterConfig, d_in: int = 20, d_out: int = 12, bias: bool = True, dtype: torch.dtype = torch.float64
) -> tuple[Box, nn.Linear, Tensor]:
    """(model, its layer, an input (5, d_in)) with a fresh adapter of this config on the layer."""
    torch.manual_seed(11)
    model, x = Box(d_in, d_out, bias, dtype), torch.randn(5, d_in, dtype=dtype)
    ll.attach(model, cfg)
    return model, model.fc, x


def randomise(model: nn.Module, scale: float = 0.3, seed: int = 5) -> None:
    """Add random values to every trained adapter tensor."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for handle in ll.adapters(model).values():
            for p in handle.parameters():
                p += scale * torch.randn(p.shape, generator=g, dtype=p.dtype)


def dense_change(model: nn.Module, d_in: int = 20) -> Tensor:
    """W' − W of a `Box`, read off the model: (d_out, d_in)."""
    eye = torch.eye(d_in, dtype=next(model.parameters()).dtype)
    zero = eye.new_zeros(1, d_in)
    with torch.no_grad():
        on = model(eye) - model(zero)
        with ll.active(model, None):
            return (on - (model(eye) - model(zero))).mT
