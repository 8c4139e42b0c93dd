"""Types whose method has no page here: the same function as a plain LoRA, or as a change of the weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..peft_site import Reading, Site, difference


def _as_lora(A: Tensor, B: Tensor) -> Reading:
    """y + B A x of rank r, scale and all in B."""
    r = A.shape[0]
    return Reading("lora", {"r": r, "alpha": r}, {"lora_A": A.contiguous(), "lora_B": B.contiguous()}, same=False)


def vera(site: Site) -> Reading:
    """diag(λ_b) B diag(λ_d) A with the leading columns and rows of two frozen matrices."""
    A, B = site.common("vera_A")[:, : site.d_in], site.common("vera_B")[: site.d_out]
    return _as_lora(site.take("vera_lambda_d")[:, None] * A, site.take("vera_lambda_b")[:, None] * B)


def pvera(site: Site) -> Reading:
    """VeRA with the mean, which is the first half of A's outputs; the second is a variance for training."""
    A, B = site.common("pvera_A")[:, : site.d_in], site.common("pvera_B")[: site.d_out]
    r = B.shape[1]
    return _as_lora((site.take("pvera_lambda_d")[:, None] * A)[:r], site.take("pvera_lambda_b")[:, None] * B)


def vblora(site: Site) -> Reading:
    """Mixtures of the k best vectors of a bank, laid side by side."""
    bank, k = site.common("vblora_vector_bank"), int(site.number("topk", default=2))

    def mixed(logits: Tensor) -> Tensor:
        best, at = logits.topk(k, dim=-1)
        return (best.softmax(-1)[..., None] * bank[at]).sum(-2)

    A, B = mixed(site.take("vblora_logits_A")), mixed(site.take("vblora_logits_B"))
    return _as_lora(A.flatten(1), B.transpose(1, 2).flatten(0, 1))


def tinylora(site: Site) -> Reading:
    """B (Σ v_i P_i) A with one v for a group of layers."""
    order = list(site.sizes)
    groups = max(1, round(len(order) * (1 - float(site.number("weight_tying", default=0.0)))))
    size = max(1, len(order) // groups)
    v = site.common(f"tinylora_v.{min(order.index(site.path) // size, groups - 1)}")
    A, B, P = (site.take(f"tinylora_{name}") for name in "ABP")
    change = torch.einsum("u,uij->ij", v, P)
    if A.shape[1] != site.d_in:  # an embedding, whose weight lies the other way round there
        return _as_lora((B @ change).mT, A.mT)
    return _as_lora(A, B @ change)


def randlora(site: Site) -> Reading:
    """B A with A (r, n, small) scaled by λ (r, n) and γ (n, small) and B (large, n, r), both laid flat as they are: the
    columns of B run over n first, the rows of A over r."""
    lam, gamma = site.take("randlora_lambda"), site.take("randlora_gamma")
    site.drop("randlora_A", "randlora_B")
    n = gamma.shape[0]
    small, large = sorted((site.d_in, site.d_out))
    A = site.common("randlora_A")[:, :n, :small]
    B = site.common("randlora_B")[:large, :n]
    change = (
        B.flatten(1) @ (A * lam[..., None] * gamma).flatten(0, 1) * (site.number("randlora_alpha") / site.number("r"))
    )
    return difference(change if site.d_out == large else change.mT)


def hira(site: Site) -> Reading:
    """W ∘ (B A)."""
    if "hira_embedding_A" in site.tensors:
        A, B = site.take("hira_embedding_A"), site.take("hira_embedding_B")
    else:
        A, B = site.take("hira_A").flatten(1), site.take("hira_B").flatten(1)
    return difference(site.weight * (B @ A))


def glora(site: Site) -> Reading:
    """W ∘ A + B, and b ∘ D + E + W C on a layer with a bias; each of A … E a product, a vector, a number or nothing."""
    A, B, C, D, E = (_part(site, letter) for letter in "ABCDE")
    W, b = site.weight, site.bias
    change = W * A + B
    if b is None:
        return difference(change.expand_as(W).clone())
    vector = b * _flat(D) + _flat(E) + (W @ C.reshape(-1, 1)).flatten() if C.numel() > 1 else b * _flat(D) + _flat(E)
    return difference(change.expand_as(W).clone(), vector.expand_as(b).clone())


def _flat(t: Tensor) -> Tensor:
    return t.flatten()


def _part(site: Site, letter: str) -> Tensor:
    site.drop(f"glora_{letter}.zeros")
    down, x = site.maybe(f"glora_{letter}.Xd"), site.maybe(f"glora_{letter}.X")
    if down is not None:
        return down @ site.take(f"glora_{letter}.Xu")
    return torch.zeros(1) if x is None else x


def supertuning(site: Site) -> Reading:
    """Sparse numbers at flat places, and a LoRA beside them where it has a rank."""
    at, values = site.take("supertuning_indices").long(), site.take("supertuning_values")
    change = torch.zeros(site.d_out * site.d_in).scatter_add(0, at, values).view(site.d_out, site.d_in)
    A = site.maybe("supertuning_lora_A.weight")
    if A is not None:
        B = site.take("supertuning_lora_B.weight")
        change = change + (site.number("lora_alpha") / len(A)) * (B @ A)
    return difference(change)


def osf(site: Site) -> Reading:
    """The weight's largest triplets as they are, and its smallest ones trained."""
    U, S, V = (site.take(f"osf_svd_params.{name}_low") for name in "USV")
    W = site.weight
    left, values, right = torch.linalg.svd(W, full_matrices=False)
    k = len(values) - len(S)
    return difference((left[:, :k] * values[:k]) @ right[:k] + (U * S) @ V - W)


def frod(site: Site) -> Reading:
    """W' = U (S + diag λ) Vᵀ, V shared by the layers of one role, U the directions of W V⁻ᵀ, S sparse."""
    role = _role(site.path)
    V, at, size = (site.common(f"frod_{name}.{role}") for name in ("V", "s_indices", "s_size"))
    W = site.weight
    along = torch.linalg.solve(V.double(), W.mT.double()).mT
    lengths = along.norm(dim=0)
    U = torch.where(lengths > 1e-12, along / lengths, torch.zeros_like(along)).float()
    core = torch.zeros(*size.long().tolist()).index_put(tuple(at.long()), site.take("frod_lambda_s_values"))
    return difference(U @ (core + site.take("frod_lambda_l").diag()) @ V.mT - W)


def _role(path: str) -> str:
    """PEFT's name of what layers of several blocks have in common."""
    *above, last = path.split(".")
    if not above or above[-1].isdigit():
        return last
    if above[-1] == "output" and last == "dense" and above[-2:-1] == ["attention"]:
        return "attention_output"
    return f"{above[-1]}_{last}"


def unilora(site: Site) -> Reading:
    """Every entry of A and B is one of d numbers, divided by the root of how often that number is used; which one is
    drawn from a seed over all layers together."""
    theta, r = site.common("unilora_theta_d"), int(site.number("r"))
    total = r * sum(d_in + d_out for d_in, d_out in site.sizes.values())
    at = torch.from_numpy(_dealt(len(theta), total, int(site.number("proj_seed", default=42))))
    entries = theta[at] / at.bincount(minlength=len(theta))[at].sqrt()
    before = 0
    for path, (d_in, d_out) in site.sizes.items():
        if path == site.path:
            break
        before += r * (d_in + d_out)
    A, B = entries[before:][: r * (site.d_in + site.d_out)].split((r * site.d_in, r * site.d_out))
    return _as_lora(A.view(r, site.d_in), B.view(site.d_out, r))


def _dealt(kinds: int, total: int, seed: int) -> Any:
    """`total` numbers below `kinds`, each as often as any other to one, as numpy's generator shuffles them."""
    import numpy as np

    g = np.random.default_rng(seed)
    times, rest = divmod(total, kinds)
    even = np.repeat(np.arange(kinds), times)
    dealt = np.concatenate((even, g.choice(kinds, size=rest, replace=False))) if rest else even
    g.shuffle(dealt)
    return dealt
