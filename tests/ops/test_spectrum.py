"""Leading singular triplets and eigenvectors against fp64 decompositions, whichever way they are found."""

from __future__ import annotations

import pytest
import torch

from lora_lite.ops import spectrum

SPECTRA = {
    "flat": lambda n: torch.linspace(2, 1, n),
    "decaying": lambda n: 10 * torch.logspace(0, -2, n),
    "outlier": lambda n: torch.cat((torch.tensor([300.0]), torch.linspace(3, 1, n - 1))),
    "giant": lambda n: torch.cat((torch.tensor([3000.0]), torch.linspace(3, 1, n - 1))),
    "steep": lambda n: torch.logspace(0, -20, n),
    "deficient": lambda n: torch.cat((torch.linspace(3, 1, 4), torch.zeros(n - 4))),
}


def matrix(m, n, kind, dtype):
    g = torch.Generator().manual_seed(3)
    U = torch.linalg.qr(torch.randn(m, min(m, n), generator=g, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, min(m, n), generator=g, dtype=torch.float64)).Q
    return ((U * SPECTRA[kind](min(m, n)).double()) @ V.mT).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("m, n, k", [(41, 30, 5), (30, 41, 5), (9, 7, 7), (901, 830, 8)])
def test_top_svd(m, n, k, kind, dtype):
    M = matrix(m, n, kind, dtype)
    U, S, V = spectrum.top_svd(M, k)
    exact = torch.linalg.svd(M.double(), full_matrices=False)
    best = (exact[0][:, :k] * exact[1][:k]) @ exact[2][:k]
    eps = torch.finfo(dtype).eps
    assert (S.double() - exact[1][:k]).abs().max() <= 30 * eps * exact[1][0]
    assert ((U * S) @ V.mT - best).norm() <= 3000 * eps * best.norm()
    for Q in (U, V):
        assert (Q.mT @ Q - torch.eye(k)).abs().max() <= 100 * eps
    assert (V.gather(0, V.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_the_side_of_the_rows(dtype):
    X = matrix(30, 211, "decaying", dtype)
    e, V = spectrum.top_eigh_of_rows(X, 5)
    _, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    eps = torch.finfo(dtype).eps
    assert (e.double() / S[:5] ** 2 - 1).abs().max() <= 100 * eps
    assert (V.double() - Vh[:5].mT * spectrum.fix_signs(Vh[:5].mT)).abs().max() <= 100 * eps
    assert spectrum.top_eigh_of_rows(X, 31) is None
    assert spectrum.top_eigh_of_rows(matrix(30, 211, "deficient", dtype), 8) is None


def test_every_way_is_taken(monkeypatch):
    ways = []
    lanczos, gram = spectrum._lanczos, spectrum._gram
    monkeypatch.setattr(spectrum, "_lanczos", lambda *a: ways.append(["lanczos"]) or lanczos(*a))
    monkeypatch.setattr(spectrum, "_gram", lambda *a: ways[-1].append("gram") or gram(*a))
    spectrum.top_svd(matrix(901, 830, "steep", torch.float32), 8)
    spectrum.top_svd(matrix(901, 830, "flat", torch.float32), 8)
    assert ways == [["lanczos"], ["lanczos", "gram"]]
    assert gram(matrix(41, 30, "steep", torch.float32), 20) is None
    assert gram(matrix(41, 30, "outlier", torch.float32), 5) is not None
