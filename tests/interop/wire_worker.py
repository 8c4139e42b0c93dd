"""One process of a run under torchrun that counts what it holds and what it sends in a step, printed as JSON by rank 0.

wire_worker.py fsdp2 METHOD DTYPE SHARDS: a tiny Llama, cut over all processes or over SHARDS of them.
wire_worker.py tensor: a block of two layers, cut by hand as Megatron does, with LoRA on both; its gradients are
compared with those of one process.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import lora_lite as ll
import tiny_llm
from lora_lite.testing.toy import toy


class Wire(TorchDispatchMode):
    """Bytes that a ring sends for the collectives of this process."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        flat = [t for a in args for t in (a if isinstance(a, list | tuple) else [a]) if isinstance(t, torch.Tensor)]
        sizes = [t.numel() * t.element_size() for t in flat]
        if "c10d._allgather_base_" in str(func) or "c10d._reduce_scatter_base_" in str(func):
            self.sent += max(sizes) - min(sizes)
        elif "c10d.allreduce_" in str(func):
            copies = 2  # of every run here
            self.sent += 2 * (copies - 1) / copies * sum(sizes)
        elif "c10d" in str(func):
            raise AssertionError(f"{func} is not counted")
        return func(*args, **(kwargs or {}))


def nbytes(t: torch.Tensor) -> int:
    t = t.to_local() if isinstance(t, DTensor) else t
    return t.numel() * t.element_size()


def fsdp2(method: str, dtype: str, shards: int) -> dict[str, float]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    n = dist.get_world_size()
    shape, names = ((n,), ("all",)) if shards == n else ((n // shards, shards), ("copies", "shards"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    model = tiny_llm.model().to(getattr(torch, dtype))
    handle = ll.attach(model, ll.get_variant(method).config(variant=method, r=3))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(handle.param_groups(lr=1e-3))
    ids, most = torch.zeros(2, 9, dtype=torch.long), 0

    def look(*_: object) -> None:
        nonlocal most
        most = max(most, sum(nbytes(p) for p in model.parameters() if not isinstance(p, DTensor)))

    blocks: Any = model.model.layers
    for layer in blocks:
        layer.mlp.register_forward_hook(look)
    with Wire() as wire:
        model(input_ids=ids, labels=ids).loss.backward()
    gradients = sum(nbytes(p.grad) for p in handle.parameters() if p.grad is not None)
    optimizer.step()
    moments = [t for s in optimizer.state.values() for k, t in s.items() if k.startswith("exp_avg")]
    adapter = sum(nbytes(t) for name, t in model.named_parameters() if "lora_" in name)
    everything = sum(map(nbytes, model.parameters()))
    return {
        "sent": wire.sent,
        "weights": everything - adapter,
        "adapter": adapter + sum(nbytes(t) for name, t in model.named_buffers() if "lora_" in name),
        "states": gradients + sum(map(nbytes, moments)),
        "gathered": most,
    }


def summed(t: torch.Tensor) -> torch.Tensor:
    t = t.detach().clone()
    dist.all_reduce(t)
    return t


class Write(torch.autograd.Function):
    """The sum over ranks where inputs are cut; its gradient is whole already."""

    @staticmethod
    def forward(ctx, x):
        return summed(x)

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        return g


class Read(torch.autograd.Function):
    """The same on every rank where outputs are cut; its gradient is a sum over ranks."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        return summed(g)


def tensor() -> dict[str, float]:
    rank, n = dist.get_rank(), dist.get_world_size()
    model = toy(bias=False)
    ll.attach(model, ll.LoRAConfig(r=3, alpha=7))
    block: Any = model.layers[0]
    scale = 7 / 3
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in (block.up, block.down):
            layer.lora_B.normal_(generator=generator)
    x = torch.randn(2, 9, 12, generator=generator)
    wanted = x + block.down(torch.tanh(block.up(x)))
    wanted.square().sum().backward()

    cut = [block.up.weight.chunk(n)[rank], block.up.lora_A, block.up.lora_B.chunk(n)[rank],
           block.down.weight.chunk(n, 1)[rank], block.down.lora_A.chunk(n, 1)[rank], block.down.lora_B]  # fmt: skip
    own: list[Any] = [t.detach().clone().requires_grad_(i % 3 > 0) for i, t in enumerate(cut)]
    W, A, B, V, C, D = own
    with Wire() as wire:
        read = Read.apply(x.requires_grad_())
        h = torch.tanh(read @ W.mT + read @ A.mT @ B.mT * scale)
        y = x + Write.apply(h @ V.mT + h @ C.mT @ D.mT * scale)
        y.square().sum().backward()
        activations = wire.sent
        A.grad, D.grad = summed(A.grad), summed(D.grad)
    pairs = [(y, wanted), (A.grad, block.up.lora_A.grad), (D.grad, block.down.lora_B.grad)]
    pairs += [(B.grad, block.up.lora_B.grad.chunk(n)[rank]), (C.grad, block.down.lora_A.grad.chunk(n, 1)[rank])]
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * float(want.abs().max()))
    return {"base": activations, "adapter": wire.sent - activations}


dist.init_process_group("gloo")
found = tensor() if sys.argv[1] == "tensor" else fsdp2(sys.argv[2], sys.argv[3], int(sys.argv[4]))
if dist.get_rank() == 0:
    print(json.dumps(found))
dist.destroy_process_group()
