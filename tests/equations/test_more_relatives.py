"""DenseLoRA, MonteCLoRA, MiSS's bat, LyCORIS's GLoRA, written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Dirichlet, kl_divergence

import lora_lite as ll
from equations.helpers import adapted, dense_change, randomise


def test_denselora_shares_by_name():
    torch.manual_seed(2)
    blocks = [nn.ModuleDict({"up": nn.Linear(6, 9), "down": nn.Linear(9, 6)}) for _ in range(2)]
    model = nn.ModuleList(blocks).double()
    adapter = ll.attach(model, ll.DenseLoRAConfig(r=3, alpha=7, dtype="float64", target_names=("up", "down")))
    randomise(model)
    assert sum(p.numel() for p in adapter.parameters()) == 4 * 9 + 2 * 3 * (6 + 9)
    state = ll.adapter_state_dict(model)
    x = torch.randn(4, 6, dtype=torch.float64)
    E, D = (state[f"0.up.lora_{k}"] for k in "ED")  # the first of the name holds them
    for block in range(2):
        M = state[f"{block}.up.lora_M"]
        with torch.no_grad(), ll.active(model, None):
            bare = model[block]["up"](x)
        want = bare + 7 / 3 * F.gelu(D @ M @ F.gelu(E @ x.mT)).mT
        torch.testing.assert_close(model[block]["up"](x), want, atol=1e-10, rtol=0)


def test_monteclora_is_lora_after_training_and_noisy_before():
    model, fc, x = adapted(ll.MonteCLoRAConfig(r=3, alpha=7, samples=4, noise=0.5, dtype="float64"))
    randomise(model)
    model.eval()
    torch.testing.assert_close(dense_change(model), (7 / 3 * fc.lora_B @ fc.lora_A).detach(), atol=1e-10, rtol=0)
    mean = model(x)
    with torch.no_grad():
        model.train()
        torch.manual_seed(0)
        draws = torch.stack([model(x) for _ in range(400)])
    spread = (draws - mean).std(0).mean()
    assert (draws.mean(0) - mean).abs().max() < 0.3 * spread and spread > 0.1


def published_draws(sigma, logits, d_in, noise, n):
    """PEFT's sampler, written out: several Z mixed by p, each with the square roots of a Wishart's diagonal."""
    r, k = len(sigma), len(logits)
    alpha = logits.exp()
    c = (1 / alpha * (1 - 2 / k) + (1 / alpha).sum() / k**2).clamp_min(1e-6)
    found = []
    for _ in range(n):
        g = torch.randn(r, r, dtype=sigma.dtype)
        v = torch.diag(torch.diag(sigma.exp()) @ (g @ g.mT) @ torch.diag(sigma.exp())).clamp_min(1e-3)
        mean = alpha.log() - alpha.log().mean()
        p = torch.softmax(mean + torch.linalg.cholesky(torch.diag(c)) @ torch.randn_like(mean), 0)
        Z = torch.randn(k, d_in, r, dtype=sigma.dtype) @ torch.diag(v.sqrt())
        found.append(noise * torch.einsum("n,nij->ji", p, Z))
    return torch.stack(found)


def test_monteclora_draws_by_the_published_law():
    from lora_lite.runtime.model.state import SITE
    from lora_lite.runtime.view.layer import LayerView
    from lora_lite.variants.monteclora import drawn

    cfg = ll.MonteCLoRAConfig(r=2, samples=3, noise=0.5, dtype="float64")
    model, fc, _ = adapted(cfg, d_in=5)
    randomise(model, scale=0.5)
    view = LayerView(fc, fc.__dict__[SITE].slots["default"], torch.float64)
    torch.manual_seed(0)
    with torch.no_grad():
        ours = torch.stack([drawn(view) for _ in range(1500)])
        theirs = published_draws(fc.lora_sigma, fc.lora_l, 5, 0.5, 1500)
    for moment in (lambda t: t.square().mean((0, 2)).sqrt(), lambda t: t.abs().mean((0, 2))):
        torch.testing.assert_close(moment(ours), moment(theirs), rtol=0.1, atol=0)


@pytest.mark.parametrize("kl", [1.0, 0.3])
def test_monteclora_penalises_three_divergences(kl):
    model, fc, _ = adapted(ll.MonteCLoRAConfig(r=3, samples=4, prior=0.7, kl=kl, dtype="float64"))
    randomise(model)
    sigma, a = fc.lora_sigma.detach(), fc.lora_l.detach().exp()
    dirichlet = kl_divergence(Dirichlet(a), Dirichlet(torch.full_like(a, 0.7)))
    v = (2 * sigma).exp()
    wishart = 0.5 * (-v.log().sum() * 3 + v.sum() * 3 - 9)
    torch.manual_seed(0)
    w = torch.distributions.Chi2(torch.tensor(3.0, dtype=torch.float64)).sample((200_000, 3)) * v
    gaussian = 4 * 0.5 * (w - w.log() - 1).sum(-1).mean()
    torch.testing.assert_close(ll.penalty(model).item(), kl * float(dirichlet + wishart + gaussian), rtol=1e-2, atol=0)


def test_miss_bat():
    model, fc, _ = adapted(ll.MiSSBatConfig(r=4, dtype="float64"))
    randomise(model)
    W, want = fc.weight.detach(), torch.zeros(12, 20, dtype=torch.float64)
    for o in range(3):
        for g in range(5):
            block, M = W[4 * o : 4 * o + 4, 4 * g : 4 * g + 4], fc.lora_M[o].detach()
            want[4 * o : 4 * o + 4, 4 * g : 4 * g + 4] = block @ M + M
    torch.testing.assert_close(dense_change(model), want, atol=1e-10, rtol=0)
    with pytest.raises(ll.ConfigError, match="r=5 does not divide a 20->12 layer"):
        adapted(ll.MiSSBatConfig(r=5))


def test_glora_of_lycoris():
    model, fc, _ = adapted(ll.GLoRALycorisConfig(r=3, alpha=7, dtype="float64"))
    randomise(model)
    want = 7 / 3 * (fc.weight @ fc.lora_A1 @ fc.lora_A2 + fc.lora_B1 @ fc.lora_B2)
    torch.testing.assert_close(dense_change(model), want.detach(), atol=1e-10, rtol=0)
