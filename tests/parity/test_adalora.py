"""AdaLoRA against PEFT: the forward, and which triplets live at every step."""

from __future__ import annotations

import peft
import torch
from torch import nn

import lora_lite as ll

R, TARGET, ALPHA, T, TINIT, TFINAL, DELTA = 5, 2, 7.0, 14, 2, 4, 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.fc1, self.fc2 = nn.Linear(20, 14), nn.Linear(14, 15, bias=False)
        self.config = type("C", (), {"to_dict": lambda self: {}, "model_type": "net"})()

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))


def test_forward_gradients_and_pruning():
    model, base = Net(), Net()
    cfg = ll.AdaLoRAConfig(r=R, target_r=TARGET, alpha=ALPHA, tinit=TINIT, tfinal=TFINAL, delta_t=DELTA)
    handle = ll.attach(model, cfg)
    config = peft.AdaLoraConfig(
        init_r=R,
        target_r=TARGET,
        lora_alpha=ALPHA * (R + 1e-5) / R,  # PEFT divides by r + 1e-5
        tinit=TINIT,
        tfinal=TFINAL,
        deltaT=DELTA,
        total_step=T,
        lora_dropout=0.0,
        orth_reg_weight=1e-30,
        target_modules=["fc1", "fc2"],
    )
    theirs = peft.get_peft_model(base, config)
    pairs = []
    for path in ("fc1", "fc2"):
        layer, other = model.get_submodule(path), theirs.base_model.model.get_submodule(path)
        for short in "ABE":
            p, q = getattr(layer, f"lora_{short}"), getattr(other, f"lora_{short}")["default"]
            with torch.no_grad():
                p.normal_(std=0.3)
                q.copy_(p.view(q.shape))
            pairs.append((p, q))
    mine = torch.optim.SGD(handle.parameters(), lr=0.2)
    other = torch.optim.SGD([q for _, q in pairs], lr=0.2)
    ll.schedule(model, mine, T)
    for step in range(1, T + 1):
        g = torch.Generator().manual_seed(step)
        x, target = torch.randn(16, 20, generator=g), torch.randn(16, 15, generator=g)
        y, z = model(x), theirs(x)
        torch.testing.assert_close(y, z, atol=1e-5, rtol=1e-5)
        for out, optimizer in ((y, mine), (z, other)):
            optimizer.zero_grad()
            (out - target).square().mean().backward()
            optimizer.step()
        theirs.base_model.update_and_allocate(step)
        for p, q in pairs:
            torch.testing.assert_close(p.grad, q.grad.view(p.shape), atol=1e-5, rtol=1e-4)
            assert torch.equal(p == 0, (q == 0).view(p.shape)), step
    assert sum(int((model.get_submodule(n).lora_E != 0).sum()) for n in ("fc1", "fc2")) == 2 * TARGET
