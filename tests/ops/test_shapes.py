"""The shapes that the docstrings of `ops` promise, checked at run time: every letter means one size within a call."""

from __future__ import annotations

import pytest
import torch
from beartype import beartype
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from lora_lite.ops import lowrank, orthogonal, spectrum, stiefel, svd

shaped = jaxtyped(typechecker=beartype)


@shaped
def lowrank_update(
    y: Float[Tensor, "*n o"], x: Float[Tensor, "*n i"], A: Float[Tensor, "r i"], B: Float[Tensor, "o r"]
) -> Float[Tensor, "*n o"]:
    return lowrank.lowrank_update(y, x, A, B, 0.5)


@shaped
def deviation_update(
    y: Float[Tensor, "*n o"],
    x: Float[Tensor, "*n i"],
    A: Float[Tensor, "r i"],
    B: Float[Tensor, "o r"],
    A0: Float[Tensor, "r i"],
    B0: Float[Tensor, "o r"],
) -> Float[Tensor, "*n o"]:
    return lowrank.deviation_update(y, x, A, B, A0, B0, 0.5)


@shaped
def deviation_factors(
    A: Float[Tensor, "r i"], B: Float[Tensor, "o r"], A0: Float[Tensor, "r i"], B0: Float[Tensor, "o r"]
) -> tuple[Float[Tensor, "2*r i"], Float[Tensor, "o 2*r"]]:
    return lowrank.deviation_factors(A, B, A0, B0)


@shaped
def row_norm_square_change(
    WA: Float[Tensor, "o r"], A: Float[Tensor, "r i"], B: Float[Tensor, "o r"]
) -> Float[Tensor, " o"]:
    return lowrank.row_norm_square_change(WA, A, B, 0.5)


@shaped
def scale_outputs(
    y: Float[Tensor, "*n o"], h: Float[Tensor, " o"], b: Float[Tensor, " o"] | None
) -> Float[Tensor, "*n o"]:
    return lowrank.scale_outputs(y, h, b)


@shaped
def rotation(Q: Float[Tensor, "*k b b"]) -> Float[Tensor, "*k b b"]:
    return orthogonal.cayley_minus_identity(Q)


@shaped
def householder_wy(V: Float[Tensor, "r d"]) -> tuple[Float[Tensor, "r d"], Float[Tensor, "r d"]]:
    return orthogonal.householder_wy(V)


@shaped
def householder_pairs(
    u: Float[Tensor, "p d"], delta: Float[Tensor, "p d"]
) -> tuple[Float[Tensor, "2*p d"], Float[Tensor, "2*p d"]]:
    return orthogonal.householder_pairs(u, delta)


@shaped
def mix_pairs(y: Float[Tensor, "*n d"], c: Float[Tensor, " d"], s: Float[Tensor, " d"]) -> Float[Tensor, "*n d"]:
    return orthogonal.mix_pairs(y, c, s, 4)


@shaped
def top_svd(
    M: Float[Tensor, "m n"], k: int
) -> tuple[Float[Tensor, "m {k}"], Float[Tensor, " {k}"], Float[Tensor, "n {k}"]]:
    return spectrum.top_svd(M, k)


@shaped
def balanced_factors(
    U: Float[Tensor, "m k"], S: Float[Tensor, " k"], V: Float[Tensor, "n k"]
) -> tuple[Float[Tensor, "k n"], Float[Tensor, "m k"]]:
    return svd.balanced_factors(U, S, V, 0.5)


@shaped
def orthonormal_rows(T: Float[Tensor, "r d"]) -> Float[Tensor, "r d"]:
    return stiefel.orthonormal_rows(T)


@pytest.mark.parametrize("lead", [(7,), (2, 5), (2, 3, 4)])
def test_updates_keep_the_leading_shape(lead):
    x, y = torch.randn(*lead, 20), torch.randn(*lead, 12)
    A, B, A0, B0 = torch.randn(3, 20), torch.randn(12, 3), torch.randn(3, 20), torch.randn(12, 3)
    assert not torch.equal(lowrank_update(y, x, A, B), y)
    assert not torch.equal(deviation_update(y, x, A, B, A0, B0), y)
    assert not torch.equal(scale_outputs(y, torch.randn(12), torch.randn(12)), scale_outputs(y, torch.randn(12), None))
    assert mix_pairs(y, torch.randn(12), torch.randn(12)).shape == y.shape


def test_small_algebra():
    A, B, A0, B0 = torch.randn(3, 20), torch.randn(12, 3), torch.randn(3, 20), torch.randn(12, 3)
    big_A, big_B = deviation_factors(A, B, A0, B0)
    torch.testing.assert_close(big_B @ big_A, (B0 + B) @ (A0 + A) - B0 @ A0, atol=1e-4, rtol=1e-4)
    assert row_norm_square_change(torch.randn(12, 3), A, B).shape == (12,)
    assert rotation(orthogonal.skew(torch.randn(5, 6), 4)).shape == (5, 4, 4)
    householder_wy(torch.randn(3, 20))
    householder_pairs(torch.randn(3, 20), torch.randn(3, 20))
    U, S, V = top_svd(torch.randn(12, 20), 5)
    balanced_factors(U, S, V)
    orthonormal_rows(torch.randn(3, 20))


def test_the_checker_notices_a_wrong_size():
    with pytest.raises(TypeCheckError):
        lowrank_update(torch.randn(2, 12), torch.randn(2, 20), torch.randn(3, 20), torch.randn(12, 4))

    @shaped
    def transposed(V: Float[Tensor, "r d"]) -> Float[Tensor, "r d"]:
        return orthogonal.unit_rows(V).mT

    with pytest.raises(TypeCheckError):
        transposed(torch.randn(3, 20))
