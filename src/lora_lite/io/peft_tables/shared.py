"""Types with tensors of the whole model, and those whose method has no page here: the same function as a change of the
weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.errors import FileError
from ..peft_site import Reading, Site, difference

NEVER = -1e4
"""A logit that no softmax sees."""


def _as_lora(A: Tensor, B: Tensor) -> Reading:
    """y + B A x of rank r, scale and all in B."""
    r = A.shape[0]
    return Reading("lora", {"r": r, "alpha": r}, {"lora_A": A.contiguous(), "lora_B": B.contiguous()}, same=False)


def vera(site: Site) -> Reading:
    """The same vectors and matrices."""
    A, B = site.common("vera_A"), site.common("vera_B")
    d, b = site.take("vera_lambda_d"), site.take("vera_lambda_b")
    if not site.alone:
        return _as_lora(d[:, None] * A[:, : site.d_in], b[:, None] * B[: site.d_out])
    shared = {"lora_A": A[:, : site.widest_in], "lora_B": B[:, : len(d)][: site.widest_out]}
    return Reading("vera", {"r": len(d)}, {"lora_d": d, "lora_b": b}, shared=shared)


def pvera(site: Site) -> Reading:
    """The same; means lie before variances in A's rows and λ_d's entries."""
    A, B = site.common("pvera_A"), site.common("pvera_B")
    d, b = site.take("pvera_lambda_d"), site.take("pvera_lambda_b")
    r = B.shape[1]
    if not site.alone:
        return _as_lora((d[:, None] * A[:, : site.d_in])[:r], b[:, None] * B[: site.d_out])
    shared = {"lora_A": A.view(2, r, -1)[..., : site.widest_in], "lora_B": B[: site.widest_out]}
    return Reading("pvera", {"r": r}, {"lora_d": d.view(2, r), "lora_b": b}, shared=shared)


def vblora(site: Site) -> Reading:
    """The same bank and logits; where the file holds the weights of the best vectors alone, logits that make them."""
    bank, k = site.common("vblora_vector_bank"), site.count("topk", default=2)
    A, B = (_logits(site, f"vblora_logits_{side}", len(bank)) for side in "AB")
    options = {"r": len(A), "vectors": len(bank), "length": bank.shape[1], "topk": k}
    if not site.alone:

        def mixed(logits: Tensor) -> Tensor:
            best, at = logits.topk(k, dim=-1)
            return (best.softmax(-1)[..., None] * bank[at]).sum(-2)

        return _as_lora(mixed(A).flatten(1), mixed(B).transpose(1, 2).flatten(0, 1))
    return Reading("vblora", options, {"lora_logits_A": A, "lora_logits_B": B}, shared={"lora_bank": bank})


def _logits(site: Site, name: str, vectors: int) -> Tensor:
    if f"{name}_topk_indices" not in site.tensors:
        return site.take(name)
    at, first = site.numbers(f"{name}_topk_indices"), site.take(f"{name}_topk_weights")
    weights = torch.cat((first, 1 - first.sum(-1, keepdim=True)), -1)
    return torch.full((*at.shape[:-1], vectors), NEVER).scatter(-1, at, weights.clamp_min(1e-30).log())


def tinylora(site: Site) -> Reading:
    """The same; one v for a group of layers."""
    order, tying = list(site.sizes), float(site.number("weight_tying", default=0.0))
    groups = max(1, round(len(order) * (1 - tying)))
    size = max(1, len(order) // groups)
    v = site.common(f"tinylora_v.{min(order.index(site.path) // size, groups - 1)}")
    A, B, P = (site.take(f"tinylora_{name}") for name in "ABP")
    if site.alone:
        options = {"r": site.count("r"), "u": len(v), "tying": tying}
        return Reading("tinylora", options, {"lora_A": A, "lora_B": B, "lora_P": P}, shared={"lora_v": v})
    change = torch.einsum("u,uij->ij", v, P)
    if A.shape[1] != site.d_in:  # an embedding, whose weight lies the other way round there
        return _as_lora((B @ change).mT, A.mT)
    return _as_lora(A, B @ change)


def randlora(site: Site) -> Reading:
    """The same, with the pairs as they lie there: the columns of B run over n first, the rows of A over r."""
    lam, gamma = site.take("randlora_lambda"), site.take("randlora_gamma")
    site.drop("randlora_A", "randlora_B")
    A, B = site.common("randlora_A"), site.common("randlora_B")
    if site.alone:
        options = {"r": len(lam), "alpha": site.number("randlora_alpha"), "pairing": "peft"}
        m = max(min(size) for size in site.sizes.values())
        n = -(-m // len(lam))
        shared = {"lora_A": A[:, 0, :m], "lora_B": B[: max(site.widest_in, site.widest_out), :n]}
        return Reading("randlora", options, {"lora_lambda": lam, "lora_gamma": gamma}, shared=shared)
    n, (small, large) = gamma.shape[0], sorted((site.d_in, site.d_out))
    scaled = (A[:, :n, :small] * lam[..., None] * gamma).flatten(0, 1)
    change = B[:large, :n].flatten(1) @ scaled * (site.number("randlora_alpha") / site.number("r"))
    return difference(change if site.d_out == large else change.mT)


def hira(site: Site) -> Reading:
    """The same factors."""
    if "hira_embedding_A" in site.tensors:
        A, B = site.take("hira_embedding_A"), site.take("hira_embedding_B")
    else:
        A, B = site.take("hira_A").flatten(1), site.take("hira_B").flatten(1)
    return Reading("hira", {"r": len(A)}, {"lora_A": A, "lora_B": B})


def peanut(site: Site) -> Reading:
    """The same network; its scale is a factor there and alpha/r here."""
    A, B = site.take("peanut_A.weight"), site.take("peanut_B.weight")
    depth, f = site.count("depth", default=0, least=0), site.option("act_fn", "", "relu")
    options = {"r": len(A), "alpha": site.number("scaling", default=1.0) * len(A), "depth": depth, "activation": f}
    inner = {f"lora_E{i}": site.take(f"peanut_encoders.{i}.weight") for i in range(depth)}
    inner |= {f"lora_D{i}": site.take(f"peanut_decoders.{i}.weight") for i in range(depth)}
    return Reading("peanut", options, {"lora_A": A, **inner, "lora_B": B})


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
    flat, values = site.numbers("supertuning_indices"), site.take("supertuning_values")
    numel = site.d_in * site.d_out
    at = torch.stack((flat // site.d_in, flat % site.d_in))
    order = flat.argsort()
    if 0 < len(flat) == len(flat.unique()) and site.kind.plain_vectors:
        found = {"lora_values": values[order], "lora_at": at[:, order].int()}
        options: dict[str, Any] = {"share": min((len(flat) + 0.5) / numel, 1.0)}
        if (A := site.maybe("supertuning_lora_A.weight")) is not None:
            found |= {"lora_A": A, "lora_B": site.take("supertuning_lora_B.weight")}
            options |= {"low_rank": True, "r": len(A), "alpha": site.number("lora_alpha")}
        return Reading("supertuning", options, found)
    change = torch.zeros(site.d_out * site.d_in).scatter_add(0, flat, values).view(site.d_out, site.d_in)
    A = site.maybe("supertuning_lora_A.weight")
    if A is not None:
        B = site.take("supertuning_lora_B.weight")
        change = change + (site.number("lora_alpha") / len(A)) * (B @ A)
    return difference(change)


def poly(site: Site) -> Reading:
    """Factors the other way round; their scale is 1/r."""
    A, B = site.take("poly_lora_A").mT.contiguous(), site.take("poly_lora_B").mT.contiguous()
    logits = site.take("poly_router.module_logits")
    splits, skills, r = A.shape[:3]
    values = {"lora_A": A, "lora_B": B, "lora_l": logits.view(len(logits), splits, skills)}
    options = {"r": r, "alpha": 1.0, "tasks": len(logits), "skills": skills, "splits": splits}
    return Reading("poly", options, values)


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


def adamss(site: Site) -> Reading:
    """Rows of cluster c: B_c A_c Q, Q in the file. Which rows those are PEFT finds anew at each load, by k-means of the
    left directions of [W b] from a fixed seed."""
    W, b, Q = site.weight, site.bias, site.take("adamss_newB")
    whole = W if b is None else torch.cat((W, b[:, None]), 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(site.number("random_seed", default=0)))
        U, _, V = torch.svd_lowrank(whole, q=len(Q), niter=2)
    if V.mT.shape != Q.shape or not torch.allclose(V.mT, Q, atol=1e-3):
        raise FileError(
            f"{site.path}: the directions in the file are not those of this weight, and its clusters are not kept."
        )
    cluster = _clusters(U, min(site.count("num_subspaces", default=5), site.d_out))
    change = torch.zeros_like(whole)
    for c in range(int(cluster.max()) + 1):
        change[cluster == c] = site.take(f"adamss_B.{c}") @ site.take(f"adamss_A.{c}") @ Q
    return difference(change) if b is None else difference(change[:, :-1].contiguous(), change[:, -1].contiguous())


def _clusters(rows: Tensor, n: int) -> Tensor:
    """scikit-learn's k-means, whose labels no file of PEFT's holds."""
    try:
        from sklearn.cluster import KMeans  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise FileError(
            "the clusters of an ADAMSS adapter are not in the file, and PEFT finds them with scikit-learn: "
            "pip install scikit-learn."
        ) from None
    found = KMeans(n, init="random", n_init=1, max_iter=10, random_state=123456789).fit_predict(rows.numpy())
    return torch.from_numpy(found).long()


def _role(path: str) -> str:
    """PEFT's name of what layers of several blocks have in common."""
    *above, last = path.split(".")
    if not above or above[-1].isdigit():
        return last
    if path.endswith("attention.output.dense"):
        return "attention_output"
    return f"{above[-1]}_{last}"


def unilora(site: Site) -> Reading:
    """The same; which of the d numbers an entry is, PEFT draws from a seed over all layers together."""
    theta, r = site.common("unilora_theta_d"), site.count("r")
    total = r * sum(d_in + d_out for d_in, d_out in site.sizes.values())
    at = torch.from_numpy(_dealt(len(theta), total, int(site.number("proj_seed", default=42))))
    unit = at.bincount(minlength=len(theta)).clamp_min(1).rsqrt()
    before = 0
    for path, (d_in, d_out) in site.sizes.items():
        if path == site.path:
            break
        before += r * (d_in + d_out)
    at_A, at_B = at[before:][: r * (site.d_in + site.d_out)].split((r * site.d_in, r * site.d_out))
    at_A, at_B = at_A.view(r, site.d_in), at_B.view(site.d_out, r)
    if not site.alone:
        return _as_lora((theta * unit)[at_A], (theta * unit)[at_B])
    values = {"lora_at_A": at_A.int(), "lora_at_B": at_B.int()}
    return Reading("unilora", {"r": r, "length": len(theta)}, values, shared={"lora_theta": theta, "lora_unit": unit})


def _dealt(kinds: int, total: int, seed: int) -> Any:
    """`total` numbers below `kinds`, each as often as any other to one, as numpy's generator shuffles them."""
    import numpy as np

    g = np.random.default_rng(seed)
    times, rest = divmod(total, kinds)
    even = np.repeat(np.arange(kinds), times)
    dealt = np.concatenate((even, g.choice(kinds, size=rest, replace=False))) if rest else even
    g.shuffle(dealt)
    return dealt
