"""Bugs in `ops`."""

from __future__ import annotations

from .bug import Bug

DROP = "tests/ops/test_dropout.py"
HRA = "tests/equations/test_hra.py"
OFT = "tests/equations/test_oft.py"
BOFT = "tests/equations/test_boft.py"
ROAD = "tests/equations/test_road.py"
DORA = "tests/equations/test_dora.py"
SPECTRUM = "tests/ops/test_spectrum.py"

BUGS = [
    Bug(
        "own products under autocast",
        "ops/autograd.py",
        "return t.is_meta or not torch.is_autocast_enabled(t.device.type)",
        "return t.is_meta or True",
        DROP + " -k autocast",
    ),
    Bug(
        "own products without gradients",
        "ops/autograd.py",
        "if not (torch.is_grad_enabled() and own_backward()):",
        "if not own_backward():",
        DROP + " -k without_gradients",
    ),
    Bug(
        "dropout without its scale in the backward pass",
        "ops/dropout.py",
        "return (g * ctx.saved_tensors[0]).mul(ctx.scale), None, None",
        "return g * ctx.saved_tensors[0], None, None",
        DROP,
    ),
    Bug("dropout drops the share that it should keep", "ops/dropout.py", ".bernoulli_(1 - p)", ".bernoulli_(p)", DROP),
    Bug(
        "A's gradient sees the undropped input",
        "ops/dropout.py",
        "d = (x * mask).mul(ctx.scale)",
        "d = x.mul(ctx.scale)",
        DROP,
    ),
    Bug(
        "B's gradient without s",
        "ops/lowrank.py",
        "at_B = (z.mT @ g).mT * ctx.s if needed[2]",
        "at_B = (z.mT @ g).mT if needed[2]",
        "tests/ops/test_lowrank.py",
    ),
    Bug(
        "the cross term of the row norms twice",
        "ops/lowrank.py",
        "torch.addmm(WA, B, A @ A.mT, alpha=s / 2)",
        "torch.addmm(WA, B, A @ A.mT, alpha=s)",
        DORA,
    ),
    Bug(
        "the deviation forgets B0",
        "ops/lowrank.py",
        "torch.cat(((B0 + B).mT, B.mT)).mT",
        "torch.cat((B.mT, B.mT)).mT",
        "tests/equations/test_pissa.py",
    ),
    Bug(
        "the bias is scaled too",
        "ops/lowrank.py",
        "return torch.addcmul(y, y if b is None else y - b, h)\n\n    @staticmethod",
        "return torch.addcmul(y, y, h)\n\n    @staticmethod",
        DORA,
    ),
    Bug(
        "the gain's gradient sees the bias",
        "ops/lowrank.py",
        "at_h = (g * (y if b is None else y - b))",
        "at_h = (g * y)",
        "tests/ops/test_lowrank.py",
    ),
    Bug("a skew matrix that is not", "ops/orthogonal.py", "return upper - upper.mT", "return upper + upper.mT", OFT),
    Bug(
        "Cayley's gradient with half a factor",
        "ops/orthogonal.py",
        "return torch.baddbmm(half, DT, half, beta=2).view(D.shape)",
        "return torch.baddbmm(half, DT, half).view(D.shape)",
        OFT,
    ),
    Bug(
        "Cayley's gradient transposed",
        "ops/orthogonal.py",
        "n, DT = D.shape[-1], D.mT.reshape(-1, *D.shape[-2:])",
        "n, DT = D.shape[-1], D.reshape(-1, *D.shape[-2:])",
        OFT,
    ),
    Bug(
        "the Neumann series one term short",
        "ops/orthogonal.py",
        "for _ in range(terms - 3):",
        "for _ in range(terms - 4):",
        OFT,
    ),
    Bug(
        "blocks act transposed in the backward pass",
        "ops/orthogonal.py",
        "gx = _AddBlocks.apply(g, D.mT) if",
        "gx = _AddBlocks.apply(g, D) if",
        OFT,
    ),
    Bug(
        "a butterfly joins neighbours at every level",
        "ops/orthogonal.py",
        "halves = (-1, n >> level, 2, 1 << level, b // 2)",
        "halves = (-1, n, 2, 1, b // 2)",
        BOFT,
    ),
    Bug(
        "partners swapped in the gradient",
        "ops/orthogonal.py",
        "_join([((g1 * y2).sum(dims), (g2 * y1).sum(dims))",
        "_join([((g2 * y1).sum(dims), (g1 * y2).sum(dims))",
        ROAD,
    ),
    Bug(
        "the length of a moved vector to first order",
        "ops/orthogonal.py",
        "change = 2 * (u * delta).sum(-1, keepdim=True) + square",
        "change = 2 * (u * delta).sum(-1, keepdim=True)",
        HRA,
    ),
    Bug(
        "reflections not normalised",
        "ops/orthogonal.py",
        "    return u / torch.linalg.vector_norm(u, dim=-1, keepdim=True)\n",
        "    return u\n",
        "tests/equations/test_ether.py",
    ),
    Bug(
        "pairs of reflections commute",
        "ops/orthogonal.py",
        ".tril(-1)[:, None, :, None]",
        ".tril(-2)[:, None, :, None]",
        HRA,
    ),
    Bug(
        "long vectors are not shortened",
        "ops/orthogonal.py",
        "keepdim=True).clamp_min(bound))",
        "keepdim=True))",
        "tests/equations",
    ),
    Bug(
        "Givens rotations turn the other way",
        "ops/orthogonal.py",
        "even, odd = a + (a * c1 - b * s1), b + (a * s1 + b * c1)",
        "even, odd = a + (a * c1 + b * s1), b - (a * s1 - b * c1)",
        "tests/equations/test_goft.py",
    ),
    Bug(
        "eigenvectors in ascending order",
        "ops/spectrum.py",
        "found = e[-k:].flip(0), V[:, -k:].flip(1)",
        "found = e[-k:], V[:, -k:]",
        "tests/equations/test_eva.py",
    ),
    Bug(
        "Lanczos believes a large first value",
        "ops/spectrum.py",
        "tolerance * (e[0] * e.clamp_min(0)).sqrt()",
        "tolerance * e[0]",
        SPECTRUM,
    ),
    Bug(
        "signs of U left alone",
        "ops/spectrum.py",
        "return U * sign, S, V * sign\n\n\ndef _gram",
        "return U, S, V * sign\n\n\ndef _gram",
        SPECTRUM,
    ),
    Bug(
        "a buried singular value is believed",
        "ops/spectrum.py",
        "floor = 1e-2 if dtype == N.dtype else 1e-8",
        "floor = 1e-12",
        SPECTRUM,
    ),
    Bug(
        "orthonormal rows with free signs",
        "ops/stiefel.py",
        "return (Q * sign[..., None, :]).mT",
        "return Q.mT",
        "tests/equations/test_loreft.py",
    ),
    Bug(
        "the smallest triplets are the largest",
        "ops/svd.py",
        "return U[:, -k:] * sign, S[-k:], V * sign",
        "return U[:, :k] * sign, S[:k], V * sign",
        "tests/equations/test_lora_starts.py",
    ),
    Bug(
        "balanced factors ignore a negative scale",
        "ops/svd.py",
        "U * math.copysign(1, s) * root",
        "U * root",
        "tests/ops/test_svd.py",
    ),
    Bug(
        "subspace iteration never iterates",
        "ops/svd.py",
        "for _ in range(niter):",
        "for _ in range(0):",
        "tests/ops/test_svd.py",
    ),
]
