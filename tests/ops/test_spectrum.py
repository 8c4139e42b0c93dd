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
    krylov, gram = spectrum.krylov_svd, spectrum._gram
    monkeypatch.setattr(spectrum, "krylov_svd", lambda *a: ways.append(["krylov"]) or krylov(*a))
    monkeypatch.setattr(spectrum, "_gram", lambda *a: ways[-1].append("gram") or gram(*a))
    spectrum.top_svd(matrix(901, 830, "steep", torch.float32), 8)
    spectrum.top_svd(matrix(901, 830, "flat", torch.float32), 8)
    assert ways == [["krylov"], ["krylov", "gram"]]
    assert gram(matrix(41, 30, "steep", torch.float32), 20) is None
    assert gram(matrix(41, 30, "outlier", torch.float32), 5) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_a_product_is_decomposed_by_its_factors(dtype):
    L, R = matrix(43, 9, "decaying", dtype), matrix(57, 9, "decaying", dtype)
    U, S, V = spectrum.product_svd(L, R, 4)
    want = torch.linalg.svd(L.double() @ R.double().mT, full_matrices=False)
    eps = torch.finfo(dtype).eps
    assert (S.double() - want[1][:4]).abs().max() <= 30 * eps * want[1][0]
    best = (want[0][:, :4] * want[1][:4]) @ want[2][:4]
    assert ((U * S) @ V.mT - best).norm() <= 300 * eps * best.norm()
    assert (V.gather(0, V.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("m, n", [(830, 901), (901, 830), (12, 9)])
def test_the_left_side_of_what_is_only_multiplied_with(m, n):
    M = matrix(m, n, "decaying", torch.float32)
    U, S = spectrum.top_left(lambda v: M @ v, lambda u: M.mT @ u, m, n, 5, M)
    exact = torch.linalg.svd(M.double(), full_matrices=False)
    assert (S.double() - exact[1][:5]).abs().max() <= 1e-5 * exact[1][0]
    kept = U.double() @ (U.double().mT @ exact[0][:, :5])
    assert (kept - exact[0][:, :5]).norm() <= 1e-3
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("kind", ["flat", "decaying", "outlier"])
def test_near_triplets_keep_the_best_part_to_a_thousandth(kind):
    M = matrix(1301, 1100, kind, torch.float32)
    near, exact = spectrum.top_svd(M, 8, near=0.01)[1], torch.linalg.svdvals(M.double())[:8]
    missing = 1 - float(near.double().square().sum() / exact.square().sum())
    assert -1e-5 < missing < 1e-3
