"""The signs of singular vectors and eigenvectors are the library's choice, and another device's library chooses
otherwise: a fresh adapter must compute the same function whichever it is."""

from __future__ import annotations

import torch

from methods import every_method


def computed(case) -> bool:
    return bool(case.variant.needs_weight or case.variant.needs_data)


@every_method(computed)
def test_a_start_does_not_turn_on_the_signs_of_a_decomposition(case, monkeypatch):
    expected = case.fresh()(case.x())
    svd, eigh, qr = torch.linalg.svd, torch.linalg.eigh, torch.linalg.qr

    def signs(n):
        return torch.where(torch.arange(n) % 3 == 1, 1.0, -1.0)

    def flipped_svd(*args, **kwargs):
        U, S, Vh = svd(*args, **kwargs)
        k = S.shape[-1]
        s = signs(k).to(S)
        U, Vh = U.clone(), Vh.clone()
        U[..., :k] *= s
        Vh[..., :k, :] *= s[:, None]
        return torch.return_types.linalg_svd((U, S, Vh))

    def flipped_eigh(*args, **kwargs):
        e, V = eigh(*args, **kwargs)
        return torch.return_types.linalg_eigh((e, V * signs(V.shape[-1]).to(V)))

    monkeypatch.setattr(torch.linalg, "svd", flipped_svd)
    monkeypatch.setattr(torch.linalg, "eigh", flipped_eigh)
    monkeypatch.setattr(torch.linalg, "qr", lambda *a, **k: _turned(qr(*a, **k), signs))
    got = case.fresh()(case.x())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def _turned(pair, signs):
    Q, R = pair
    s = signs(R.shape[-2]).to(R)
    return torch.return_types.linalg_qr((Q * s if Q.shape[-1] == len(s) else Q, R * s[:, None]))
