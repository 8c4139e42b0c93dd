"""Products of small matrices, sparse and spectral updates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...core.errors import FileError
from ..peft_site import Reading, Site, difference

ROOT = 3**0.5
DB2 = tuple(x / (4 * 2**0.5) for x in (1 + ROOT, 3 + ROOT, 3 - ROOT, 1 - ROOT))
FILTERS: dict[str, tuple[float, ...]] = {"db1": (2**-0.5,) * 2, "haar": (2**-0.5,) * 2, "db2": DB2, "sym2": DB2}
"""Low-pass filter of the inverse transform."""
SHORTEST = 1e-4
"""PEFT's DeLoRA divides no vector by a smaller length."""


def loha(site: Site) -> Reading:
    """The same four factors; a core for the kernel of a convolution is multiplied out."""
    r, alpha = site.count("r", "rank_pattern"), site.number("alpha", "alpha_pattern")
    pairs = [(site.take(f"hada_w{i}_a"), site.take(f"hada_w{i}_b"), site.maybe(f"hada_t{i}")) for i in (1, 2)]
    if pairs[0][2] is not None:
        first, second = (torch.einsum("ijkl,jq,ip->pqkl", t, b, a) for a, b, t in pairs if t is not None)
        return difference((first * second).flatten(1) * (alpha / r))
    (B1, A1, _), (B2, A2, _) = pairs
    return Reading("loha", {"r": r, "alpha": alpha}, {"lora_A1": A1, "lora_B1": B1, "lora_A2": A2, "lora_B2": B2})


def lokr(site: Site) -> Reading:
    """The same factors on a linear layer; on a convolution the kernel belongs to the second matrix."""
    r, alpha = site.count("r", "rank_pattern"), site.number("alpha", "alpha_pattern")
    both, second = "lokr_w1_a" in site.tensors, "lokr_w2_a" in site.tensors
    names = (["w1_a", "w1_b"] if both else ["w1"]) + (["w2_a", "w2_b"] if second else ["w2"])
    t = {name: site.take(f"lokr_{name}") for name in names}
    core = site.maybe("lokr_t2")
    if site.kind.plain_vectors and core is None:
        options = {"r": r, "alpha": alpha, "factored": second, "factor_both": both}
        options["factor"] = site.count("decompose_factor", default=-1, least=-1)
        return Reading("lokr", options, {f"lora_{k.upper()[0]}{k[1:]}": v.flatten(1) for k, v in t.items()})
    W1 = t["w1_a"] @ t["w1_b"] if both else t["w1"]
    if core is not None:
        W2 = torch.einsum("ijkl,ip,jq->pqkl", core, t["w2_a"], t["w2_b"])
    else:
        W2 = t["w2_a"] @ t["w2_b"] if second else t["w2"]
    W1 = W1[:, :, None, None] if W2.dim() == 4 else W1  # kernels of one dimension come out in PEFT's own order
    return difference(torch.kron(W1, W2.contiguous()).reshape(site.d_out, site.d_in) * (alpha / r))


def miss(site: Site) -> Reading:
    """The same matrix; `bat` multiplies it with the weight."""
    D, start = site.take("miss_block"), site.option("init_weights", "", True)
    if start == "bat":
        n, r, _ = D.shape
        pieces: Tensor = site.weight.view(n, r, -1, r)
        return difference((torch.einsum("orgc,ock->orgk", pieces, D) + D[:, :, None]).reshape(site.d_out, site.d_in))
    mini = {"mini": D.shape[1]} if start == "mini" else {}
    return Reading("miss", {"r": D.shape[0], **mini}, {"lora_D": D})


def gralora(site: Site) -> Reading:
    """Transposed factors."""
    A, B = site.take("gralora_A").mT, site.take("gralora_B").mT
    k, r, _ = A.shape
    general = site.maybe("gralora_A_general.weight")
    values = {"lora_A": A, "lora_B": B}
    if general is not None:
        values |= {"lora_A_general": general, "lora_B_general": site.take("gralora_B_general.weight")}
    rest = 0 if general is None else len(general)
    options = {"r": r, "k": k, "general": rest, "alpha": site.number("alpha", "alpha_pattern")}
    return Reading("gralora", options, values)


def c3a(site: Site) -> Reading:
    """The same kernels."""
    w = site.take("c3a_kernel")
    return Reading("c3a", {"block": w.shape[-1]}, {"lora_w": w})


def shira(site: Site) -> Reading:
    """The same numbers, in the order of their places."""
    values, at = site.take("shira_weight"), site.numbers("shira_indices")
    r = site.count("r")
    if len(values) != min(r * (site.d_in + site.d_out), site.d_in * site.d_out):
        return difference(_scattered(site, values, at))
    return Reading("shira", {"r": r}, _placed(site, values, at))


def _placed(site: Site, values: Tensor, at: Tensor) -> dict[str, Tensor]:
    order = (at[0] * site.d_in + at[1]).argsort()
    return {"lora_values": values[order], "lora_at": at[:, order].int()}


def _scattered(site: Site, values: Tensor, at: Tensor) -> Tensor:
    return torch.zeros(site.d_out, site.d_in).index_put((at[0], at[1]), values)


def drawn(layer: Any, n: int, seed: int) -> Tensor:
    """PEFT's places (2, n) in a layer d_in -> d_out, which it draws anew whenever it loads."""
    g = torch.Generator().manual_seed(seed)
    flat = torch.randperm(layer.d_out * layer.d_in, generator=g)[:n]
    return torch.stack((flat // layer.d_in, flat % layer.d_in))


def fourierft(site: Site) -> Reading:
    """The same coefficients at the frequencies that PEFT draws."""
    values = site.take("fourierft_spectrum")
    at = drawn(site, len(values), int(site.number("random_loc_seed", default=777)))
    options = {"n": len(values), "strength": float(site.number("scaling", default=150.0))}
    return Reading("fourierft", options, _placed(site, values, at))


def waveft(site: Site) -> Reading:
    """The same coefficients at the places that PEFT draws, which exchanges the two mixed quadrants."""
    values = site.take("waveft_spectrum")
    at = drawn(site, len(values), int(site.number("random_loc_seed", default=777)))
    strength = float(site.number("scaling", default=25.0))
    if not site.flag("use_idwt", True):
        return difference(strength * _scattered(site, values, at))
    family = str(site.option("wavelet_family", "", "db1"))
    if family not in FILTERS:
        raise FileError(
            f"wavelet_family={family!r} is not read, only {', '.join(FILTERS)} are. Merge the adapter "
            "in PEFT and load the merged model."
        )
    if len(FILTERS[family]) > 2:
        return difference(strength * _synthesised(site, values, at, FILTERS[family]))
    h, w = (site.d_out + 1) // 2, (site.d_in + 1) // 2
    i, j = at
    exchanged = torch.stack((i % h + h * (j >= w), j % w + w * (i >= h)))
    return Reading("waveft", {"n": len(values), "strength": strength}, _placed(site, values, exchanged))


def _synthesised(site: Site, values: Tensor, at: Tensor, low: tuple[float, ...]) -> Tensor:
    """The inverse transform of one level of numbers that lie in the middle of a wider matrix, cut to the weight."""
    (up, left), (across, down) = _synthesis(site.d_in, low), _synthesis(site.d_out, low)
    C = torch.zeros(len(down), len(left)).index_put((at[0] + across, at[1] + up), values)
    return _middle(_middle(down.mT @ _exchanged(C) @ left, site.d_out).mT, site.d_in).mT


def _exchanged(C: Tensor) -> Tensor:
    """C as PEFT reads it: its second quadrant is the high frequency of the columns, ours that of the rows."""
    top, bottom = C.chunk(2)
    (a, b), (c, d) = top.chunk(2, 1), bottom.chunk(2, 1)
    return torch.cat((torch.cat((a, c), 1), torch.cat((b, d), 1)))


def _synthesis(d: int, low: tuple[float, ...]) -> tuple[int, Tensor]:
    """(where d numbers begin among the coefficients, the matrix (coefficients, outputs) that makes d and more of
    them)."""
    n = len(low)
    size = (d + n - 2 + 1) // 2 * 2
    high = [(-1) ** i * x for i, x in enumerate(reversed(low))]
    M = torch.zeros(size, size + n - 2)
    for k in range(size // 2):
        M[k, 2 * k : 2 * k + n] = torch.tensor(low)
        M[size // 2 + k, 2 * k : 2 * k + n] = torch.tensor(high)
    cut = (2 * n - 3) // 2
    return (size - d) // 2, M[:, cut : M.shape[1] - cut]


def _middle(t: Tensor, d: int) -> Tensor:
    start = (t.shape[0] - d) // 2
    return t[start : start + d]


def delora(site: Site) -> Reading:
    """The normalised product N(B, A) alone there. N(B, A) − N(−B, A) = 2 N(B, A): half the strength, from the frozen
    pair −B, A. Vectors below a length act in part there, c b̂; here as half the difference of the unit vectors c b̂ + √(1
    − c²) e and −c b̂ + √(1 − c²) e with an e across b̂, which is 0 for a B that starts as 0."""
    A, B, strength = site.take("delora_A"), site.take("delora_B"), site.take("delora_lambda").flatten()
    a, b = A.norm(dim=1), B.norm(dim=0)
    c = (a / a.clamp_min(SHORTEST)) * (b / b.clamp_min(SHORTEST))
    if len(B) == 1 and bool(((c > 0) & (c < 1)).any()):
        raise FileError(f"{site.path}: a DELORA of one output with vectors shorter than {SHORTEST:g} is not read.")
    g = torch.Generator().manual_seed(0)
    along, across = normalize(B, dim=0), torch.randn(B.shape, generator=g).to(B)
    across = normalize(across - along * (along * across).sum(0), dim=0) * (1 - c.square()).clamp_min(0).sqrt()
    frozen = torch.where(c < 1, across - c * along, -B)
    trained = torch.where(c < 1, 2 * c * along, 2 * B)
    A = torch.where((a > 0)[:, None], A, torch.randn(A.shape, generator=g).to(A))
    values = {"lora_A": torch.zeros_like(A), "lora_B": trained, "lora_A0": A, "lora_B0": frozen}
    found = {**values, "lora_lambda": strength / 2, "lora_w": site.take("delora_w_norm").flatten()}
    return Reading("delora", {"r": A.shape[0]}, found)


def deft(site: Site) -> Reading:
    """P and R themselves there; from P0 = P it is R alone that differs."""
    P = site.take("deft_P")
    r = P.shape[1]
    how, s = site.option("decomposition_method", "", "qr"), (site.option("alpha") or r) / r
    Q, T = (P, P.relu()) if how == "relu" else (torch.linalg.qr(P).Q,) * 2
    W = site.weight
    if site.flag("para"):
        return difference(-Q @ (T.mT @ W))
    values = {"lora_P": torch.zeros_like(P), "lora_P0": P, "lora_R": site.take("deft_R") - T.mT @ W / s}
    return Reading("deft", {"r": r, "alpha": s * r, "projection": how}, values)
