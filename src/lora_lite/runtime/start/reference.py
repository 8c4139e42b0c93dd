"""A start from full-precision weights: the low-rank part of what the base lost, say by quantisation (LoftQ, arXiv
2310.08659), the base untouched."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...core.errors import BaseMismatchError, ConfigError, FileError, TargetError, did_you_mean
from ...core.files import opened
from ...core.registry import variants
from ...core.variant import Variant
from ...ops.spectrum import top_svd
from ...ops.svd import balanced_factors
from ..layers.kinds import kind_named
from ..layers.read import read_weight
from ..layers.sound import check_sound
from ..progress import track
from .staging import StagedTarget

FAR = 0.5
"""Relative distance from which on two weights are of different models, not of different precision."""


class Checkpoint:
    """The tensors of a safetensors file, of a folder of them, or of a hub id; one at a time in memory.

    Raises:
        FileError: nothing is there, or only files of another kind.
    """

    def __init__(self, where: str | Path) -> None:
        self.where = str(where)
        path = Path(where)
        if not path.exists():
            path = _download(self.where)
        index = path / "model.safetensors.index.json"
        self.files: dict[str, Path] = {}
        if index.is_file():
            for key, name in json.loads(index.read_text())["weight_map"].items():
                self.files[key] = path / Path(name).name  # no path from a file
            return
        found = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        if not found or any(f.suffix != ".safetensors" for f in found):
            raise FileError(
                f"reference_weights: {self.where} holds no safetensors file; give a .safetensors file, a folder as "
                "save_pretrained writes it, or a hub id."
            )
        for file in found:
            with opened(file) as f:
                self.files |= dict.fromkeys(f.keys(), file)

    def key(self, path: str, prefix: str) -> str:
        """The key of a layer's weight; checkpoints may have the model's prefix (`model.`) more or less than the model.

        Raises:
            FileError: there is none.
        """
        wanted = f"{path}.weight"
        tries = [wanted, f"{prefix}.{wanted}", wanted.removeprefix(f"{prefix}.")] if prefix else [wanted]
        for key in tries:
            if key in self.files:
                return key
        raise FileError(
            f"reference_weights: {self.where} has no {wanted!r}.{did_you_mean(wanted, self.files)} It must be a "
            "checkpoint of the same architecture, not quantised."
        )

    def read(self, key: str) -> Tensor:
        """One tensor.

        Raises:
            FileError: it is no floating-point matrix.
        """
        with opened(self.files[key]) as f:
            t: Tensor = f.get_tensor(key)
        if not t.is_floating_point() or t.dim() != 2:
            raise FileError(
                f"reference_weights: {key} in {self.where} is {t.dtype} of shape {tuple(t.shape)}, not a matrix of "
                "weights; give the checkpoint in full precision."
            )
        return t


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.safetensors.index.json"]))
    except Exception as e:
        raise FileError(
            f"reference_weights: {name!r} is no file or folder here, and no repository that can be downloaded: "
            f"{str(e).splitlines()[0]}"
        ) from None


@dataclass
class Recovered:
    """What a start from reference weights achieved. Prints as one line."""

    before: dict[str, float]
    """Path -> ‖W_ref − W‖ / ‖W_ref‖."""
    after: dict[str, float]
    """Path -> ‖W_ref − W − s BA‖ / ‖W_ref‖."""

    def __str__(self) -> str:
        one, two = (sum(d.values()) / max(1, len(d)) for d in (self.before, self.after))
        return f"reference weights: mean relative error of {len(self.before)} weights {one:.2e} -> {two:.2e}"


def check_reference(variant: type[Variant]) -> None:
    """Raise for methods whose start cannot be any given low-rank matrix."""
    if variant.from_factors is None:
        able = [v.name for v in variants() if v.from_factors is not None]
        raise ConfigError(
            f"variant {variant.name!r} cannot start from reference_weights: it is no free low-rank update. Methods "
            f"that can: {', '.join(able)}."
        )


def start_from_reference(model: nn.Module, staged: list[StagedTarget], where: str | Path) -> Recovered:
    """Fill every target's factors with s BA = the best rank-r part of W_ref − W, W being what the layer does.

    Raises:
        TargetError: a target is no linear layer; FileError: a weight is missing; BaseMismatchError: it belongs to
            another model.
    """
    other = next((v for v in staged if not kind_named(v.target.kind).replaceable), None)
    if other is not None:
        raise TargetError(
            f"{other.path}: reference_weights start linear layers only; take {other.target.kind!r} out of target_kinds."
        )
    checkpoint = Checkpoint(where)
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    keys = {view.path: checkpoint.key(view.path, prefix) for view in staged}
    result = Recovered({}, {})
    for view in track(staged, "reference weights"):
        variant, key = view.cfg.variant, keys[view.path]
        W = check_sound(read_weight(view.module, view.path, torch.float32), view.path, variant)
        reference = check_sound(checkpoint.read(key), f"{view.path} in the reference", variant).to(W)
        reference = _aligned(reference, W, view, checkpoint)
        size = reference.norm().clamp_min(1e-30)
        residual = reference.sub_(W)
        del W
        k, r = min(view.cfg.r, *residual.shape), view.cfg.r
        U, S, V = top_svd(residual, k, decays=True)
        k = int((S > 1e-9 * size).sum())
        A, B = balanced_factors(U[:, :k], S[:k], V[:, :k], view.cfg.scale)
        result.before[view.path] = float(residual.norm() / size)
        result.after[view.path] = float((residual - view.cfg.scale * B @ A).norm() / size)
        page = view.target.variant
        full_A = page.factors(view)[0].to(residual).clone()  # type: ignore[misc]  # rows without a part of the residual train as drawn
        full_B = residual.new_zeros(B.shape[0], r)
        full_A[:k], full_B[:, :k] = A, view.cfg.scale * B
        page.from_factors(view, full_A, full_B)  # type: ignore[misc]
    return result


def _aligned(reference: Tensor, W: Tensor, view: StagedTarget, checkpoint: Checkpoint) -> Tensor:
    """The reference as (d_out, d_in). GPT-2 stores the transpose, and a quantised stand-in does not tell: the nearer
    one is meant."""
    fitting = [t for t in (reference, reference.mT) if t.shape == W.shape]
    if not fitting:
        raise BaseMismatchError(
            f"{view.path}: the reference weight is {tuple(reference.shape)}, the layer's {tuple(W.shape)}; "
            f"{checkpoint.where} belongs to another model."
        )
    nearest = min(fitting, key=lambda t: float((t - W).norm()))
    error = float((nearest - W).norm() / nearest.norm().clamp_min(1e-30))
    if not error <= FAR:
        raise BaseMismatchError(
            f"{view.path}: the reference weight differs by {error:.0%} from what the layer does, which is more than a "
            f"precision; {checkpoint.where} belongs to another model."
        )
    return nearest.clone()
