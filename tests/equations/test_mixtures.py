"""NoLA and MTL-LoRA, written out."""

from __future__ import annotations

import torch

import lora_lite as ll
from equations.helpers import adapted, dense_change, randomise


def test_nola():
    model, fc, _ = adapted(ll.NoLAConfig(r=3, alpha=7, bases=5, dtype="float64"))
    randomise(model)
    shared = dict(model.named_buffers())
    A0 = next(t for n, t in shared.items() if "lora_A" in n)
    B0 = next(t for n, t in shared.items() if "lora_B" in n)
    assert A0.shape == (5, 3, 20) and B0.shape == (5, 12, 3)
    A = sum(fc.lora_a[i] * A0[i] for i in range(5))
    B = sum(fc.lora_b[i] * B0[i] for i in range(5))
    torch.testing.assert_close(dense_change(model), (7 / 3 * B @ A).detach(), atol=1e-10, rtol=0)
    assert sum(p.numel() for p in ll.adapters(model)["default"].parameters()) == 10


def test_mtl_lora_gives_each_row_its_task():
    cfg = ll.MTLLoRAConfig(r=3, alpha=7, tasks=3, ups=2, temperature=0.5, dtype="float64")
    model, fc, x = adapted(cfg)
    randomise(model)
    tasks = [2, 0, 1, 1, 2]
    with ll.active(model, None):
        bare = model(x)
    with ll.context(model, task_ids=tasks):
        got, three = model(x), model(x[:, None].expand(-1, 4, -1))
    for i, t in enumerate(tasks):
        p = torch.softmax(fc.lora_w[t] / 0.5, 0)
        B = p[0] * fc.lora_B[0] + p[1] * fc.lora_B[1]
        want = bare[i] + 7 / 3 * B @ fc.lora_L[t] @ fc.lora_A @ x[i]
        torch.testing.assert_close(got[i], want, atol=1e-10, rtol=0)
        torch.testing.assert_close(three[i], want.expand(4, -1), atol=1e-10, rtol=0)


def test_mtl_lora_of_one_task():
    model, fc, _ = adapted(ll.MTLLoRAConfig(r=3, alpha=7, tasks=1, ups=2, temperature=0.5, dtype="float64"))
    randomise(model)
    p = torch.softmax(fc.lora_w[0] / 0.5, 0)
    B = p[0] * fc.lora_B[0] + p[1] * fc.lora_B[1]
    want = 7 / 3 * B @ fc.lora_L[0] @ fc.lora_A
    torch.testing.assert_close(dense_change(model), want.detach(), atol=1e-10, rtol=0)
