"""Gates, reflections and rotations."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.errors import FileError
from ...ops.orthogonal import cayley_minus_identity, neumann_minus_identity, skew
from ..peft_site import Reading, Site, difference

NEARLY_PARALLEL = 1e-3
"""What is left of a vector beside those before it, as a share of it, below which its direction is rounding."""


def ia3(site: Site) -> Reading:
    """The gain itself there, 1 + δ here; a gate of the inputs is found by the names of the feed-forward layers."""
    gain = site.take("ia3_l").flatten() - 1
    names = site.option("feedforward_modules") or []
    inputs = site.match.named(names, site.path) if isinstance(names, str) else site.path.endswith(tuple(names))
    if inputs:
        gain = gain.repeat_interleave(site.d_in // gain.numel())
    return Reading("ia3", {"side": "input" if inputs else "output"}, {"lora_g": gain})


def beft(site: Site) -> Reading:
    """The same bias."""
    return Reading("bitfit", {}, {"lora_b": site.take("beft_bias").flatten()})


def hra(site: Site) -> Reading:
    """Columns there, rows here, each the difference from the first of its pair; an odd product is no small change."""
    U = site.take("hra_u").mT
    if len(U) % 2 or site.flag("apply_GS"):
        return difference(_reflected(site, U) - site.weight)
    first = U[::2]
    return Reading("hra", {"r": len(U)}, {"lora_U": U - first.repeat_interleave(2, 0), "lora_U0": first})


def _reflected(site: Site, U: Tensor) -> Tensor:
    """W H_1 ⋯ H_r."""
    W, U = site.weight.double(), U.double()
    if site.flag("apply_GS"):
        basis, R = torch.linalg.qr(U.mT)
        if bool((R.diagonal().abs() < NEARLY_PARALLEL * U.norm(dim=1)).any()):
            raise FileError(
                f"{site.path}: an HRA with apply_GS whose vectors are parallel, as at its start: what PEFT makes of "
                "them is rounding. Train it further, or without apply_GS."
            )
        return (W - 2 * (W @ basis) @ basis.mT).float()
    for u in torch.nn.functional.normalize(U, dim=1):
        W = W - 2 * torch.outer(W @ u, u)
    return W.float()


def oft(site: Site) -> Reading:
    """The exact map turns the other way there; one shared block is written out."""
    embedded = "oft_embedding_R.weight" in site.tensors
    theta = site.take("oft_embedding_R.weight" if embedded else "oft_R.weight")
    d = site.d_out if embedded else site.d_in
    b = _width(theta.shape[1])
    terms = site.count("num_cayley_neumann_terms", default=5) if site.flag("use_cayley_neumann", True) else 0
    bound = float(site.number("eps", default=6e-5)) / len(theta) ** 0.5 if site.flag("coft") else None
    theta = (theta if terms else -theta).expand(d // b, -1).clone()
    if embedded:
        return difference(_turned(site, theta, b, terms, bound))
    options = {"block_size": b, "neumann_terms": terms, "max_norm": bound}
    return Reading("oft", options, {"lora_Q": theta})


def _turned(site: Site, theta: Tensor, b: int, terms: int, bound: float | None) -> Tensor:
    """(R − I)ᵀ W of an embedding, whose outputs PEFT rotates."""
    Q = skew(theta, b)
    if bound is not None:
        Q = Q * (bound / Q.norm(dim=(1, 2), keepdim=True)).clamp_max(1)
    change = neumann_minus_identity(Q, terms) if terms else cayley_minus_identity(Q)
    return torch.block_diag(*change).mT @ site.weight


def _width(n: int) -> int:
    """b of the b(b − 1)/2 entries of a triangle."""
    return int((1 + (1 + 8 * n) ** 0.5) / 2)


def boft(site: Site) -> Reading:
    """X with Q = −(X − Xᵀ)/2 and 1 + s there."""
    X, gain = site.take("boft_R"), site.take("boft_s").flatten() - 1
    b = X.shape[-1]
    rows, columns = torch.triu_indices(b, b, 1).unbind()
    Q = ((X.mT - X) / 2)[..., rows, columns]
    if b % 2:
        return _odd_blocks(site, X, gain)
    values = {f"lora_Q{i}": q for i, q in enumerate(Q, 1)}
    return Reading("boft", {"block_size": b, "n_factors": len(X)}, {"lora_s": gain, **values})


def _odd_blocks(site: Site, X: Tensor, gain: Tensor) -> Reading:
    """One factor of blocks of odd width, which the page here does not have."""
    turn = torch.block_diag(*cayley_minus_identity((X[0].mT - X[0]).double() / 2)).float()
    W = site.weight
    return difference((1 + gain)[:, None] * (W + W @ turn.mT) - W)


def road(site: Site) -> Reading:
    """α itself there; angles lie in the order of the outputs, group by group."""
    k = {"road_1": 1, "road_2": 2, "road_4": 4}[site.option("variant", "", "road_1")]
    group = site.count("group_size", default=64)

    def ours(t: Tensor) -> Tensor:
        half = group // 2
        if k < 4:
            return t.view(-1, k, half).transpose(0, 1).flatten(1)
        own, partner = t.view(-1, 2, 2, half).unbind(1)
        return torch.stack((own[:, 0], partner[:, 0], partner[:, 1], own[:, 1])).flatten(1)

    theta, alpha = ours(site.take("road_theta")), ours(site.take("road_alpha")) - 1
    return Reading("road", {"per_pair": k, "group_size": group}, {"lora_theta": theta, "lora_alpha": alpha})


def ln_tuning(site: Site) -> Reading:
    """The trained copy there, its difference from the base here."""
    w = site.kind.as_matrix(site.module, site.take("ln_tuning_layers.weight"))
    base = site.kind.as_matrix(site.module, site.module._parameters["weight"].detach().float().cpu())  # type: ignore[union-attr]
    new = site.maybe("ln_tuning_layers.bias")
    found = difference(w - base, None if new is None else new - site.bias)  # type: ignore[operator]
    found.same = True
    return found


def psoft(site: Site) -> Reading:
    """The same angles; gains 1 + a, 1 + b there. PEFT finds the triplets anew, and so do we."""
    theta = site.take("psoft_R.weight")
    r = min(site.count("r"), site.d_in, site.d_out)
    U, S, V = _triplets(site, r)
    a, b = (_gain(site, f"psoft_R.vector_{name}", r) for name in "ab")
    start = site.option("ab_svd_init", "", "psoft_init")
    plain = theta.dim() == 1 and not site.flag("use_cayley_neumann") and start == "psoft_init"
    if plain and r > 1:
        values = {"lora_Q": theta, "lora_a": a, "lora_b": b, "lora_U": U, "lora_S": S, "lora_V": V.mT}
        return Reading("psoft", {"r": r}, values)
    root = S.sqrt() if start == "pissa_init" else S
    core = (1 + b)[:, None] * (torch.eye(r) + _core(site, theta, r)) * (1 + a) - torch.eye(r)
    A = (S / root)[:, None] * V.mT
    return Reading("lora", {"r": r, "alpha": r}, {"lora_A": A, "lora_B": (U * root) @ core}, same=False)


def _core(site: Site, theta: Tensor, r: int) -> Tensor:
    """R − I of the r x r matrix in the middle."""
    if theta.dim() == 2:
        return theta - torch.eye(r)
    Q = skew(theta, r)
    if site.flag("use_cayley_neumann"):
        return neumann_minus_identity(Q, site.count("num_cayley_neumann_terms", default=5))
    return cayley_minus_identity(Q)


def _gain(site: Site, name: str, r: int) -> Tensor:
    found = site.maybe(name)
    return torch.zeros(r) if found is None else found - 1


def _triplets(site: Site, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and V, singular vectors in columns, by the decomposition that PEFT makes when it loads."""
    if site.option("psoft_svd") == "lowrank":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(site.number("random_seed", default=0)))
            return torch.svd_lowrank(site.weight, q=r, niter=site.count("psoft_svd_lowrank_niter", default=10, least=0))
    U, S, Vh = torch.linalg.svd(site.weight, full_matrices=False)
    return U[:, :r], S[:r], Vh[:r].mT
