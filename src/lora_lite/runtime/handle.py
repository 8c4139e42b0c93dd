"""`Adapter`: the handle of one named adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..core.arguments import checked
from ..core.config import AdapterConfig
from ..core.errors import ConfigError, StateError, shown
from .model.record import Record
from .model.site import base_parameters, owned_tensors
from .model.state import outside_calls, record_of, state_of, unwrap
from .model.surroundings import own_surroundings
from .model.undo import Undo, all_or_nothing, restoring


def check_differentiable(model: nn.Module, record: Record) -> None:
    """Raise where an adapter that trains would stand on weights that no backward pass can go through."""
    if not any(spec.is_trained for target in record.targets.values() for spec in target.specs.values()):
        return
    made = next((path for path, p in base_parameters(model) if p.is_inference()), None)
    if made is not None:
        raise StateError(
            f"{made} was made inside torch.inference_mode, and no backward pass can go through it, so adapter "
            f"{record.name!r} could not train. Build or load the model outside of inference_mode and attach then; to "
            "run an adapter without training it, ll.load(model, path)."
        )


class Adapter:
    """One named adapter of one model. Prints as the plan it was attached with."""

    def __init__(self, model: nn.Module, name: str, plan: object = None) -> None:
        self._model = model
        self._name = name
        self._record = record_of(model, name)
        self._plan = plan

    @property
    def record(self) -> Record:
        """What the model keeps of it. Raises `StateError` after a detach."""
        if state_of(self._model).records.get(self._record.name) is not self._record:
            raise StateError(f"adapter {self._name!r} has been detached.")
        return self._record

    @property
    def name(self) -> str:
        """Its name in this model; `ll.rename` changes it."""
        return self.record.name

    @property
    def cfg(self) -> AdapterConfig:
        """The config it was attached or loaded with."""
        return self.record.cfg

    @property
    def targets(self) -> list[str]:
        """Paths of the adapted layers."""
        return list(self.record.targets)

    @property
    def active(self) -> bool:
        """Whether it acts on the next call."""
        return self.name in dict(state_of(self._model).active)

    @property
    def trainable(self) -> bool:
        """Whether its trained tensors require a gradient; apart from being active."""
        return self.record.trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        if value:
            check_differentiable(self._model, self.record)
        record, owned = self.record, owned_tensors(self._model, self.record)
        trained = [t for target, short, _, t in owned if target.specs[short].is_trained]

        def steps(undo: Undo) -> None:
            undo(restoring(record))
            record.trainable = bool(value)
            for tensor in trained:
                undo(lambda t=tensor, was=tensor.requires_grad: t.requires_grad_(was))
                tensor.requires_grad_(bool(value))

        all_or_nothing(steps)

    def restore_dtype(self) -> None:
        """Cast its tensors back to the config's dtype after a `model.to(dtype)`; the parameters stay the same
        objects."""
        outside_calls(unwrap(self._model), "restore_dtype")
        owned, record = list(owned_tensors(self._model, self.record)), self.record

        def steps(undo: Undo) -> None:
            undo(restoring(record))
            with own_surroundings():
                for target, short, _, tensor in owned:
                    dtype = target.specs[short].dtype or target.cfg.torch_dtype
                    if tensor.dtype != dtype:
                        undo(lambda t=tensor, was=tensor.data: setattr(t, "data", was))
                        tensor.data = tensor.data.to(dtype)
            record.cast_noticed = False

        all_or_nothing(steps)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(full path without the adapter's name, parameter) of what an optimiser should see."""
        for target, short, _, tensor in owned_tensors(self._model, self.record):
            if target.specs[short].is_trained:
                yield target.key(short), tensor  # type: ignore[misc]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained parameters of this adapter and of no other."""
        for _, p in self.named_parameters():
            yield p

    @checked
    def param_groups(
        self, lr: float, weight_decay: float = 0.0, modules_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Optimiser groups: each tensor at `lr` times its ratio (LoRA+), weight decay 0 on gains, rotations and
        magnitudes.

        Args:
            modules_lr: the rate of what `train_modules` names, such as a fresh head, which bears another one than an
                adapter; None: `lr`.

        Raises:
            ConfigError: a rate or decay that is no number, or below 0.
        """
        _check_rate("lr", lr)
        _check_rate("weight_decay", weight_decay)
        if modules_lr is not None:
            _check_rate("modules_lr", modules_lr)
        groups: dict[tuple[float | None, float, float], list[nn.Parameter]] = {}
        for target, short, _, tensor in owned_tensors(self._model, self.record):
            spec = target.specs[short]
            if spec.is_trained:
                own = modules_lr if self.record.stands_beside(target) else None
                decay = weight_decay if spec.decay else 0.0
                groups.setdefault((own, spec.lr_ratio, decay), []).append(tensor)  # type: ignore[arg-type]
        return [
            {"params": tensors, "lr": (lr if own is None else own) * ratio, "weight_decay": decay}
            for (own, ratio, decay), tensors in groups.items()
        ]

    def num_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.parameters())

    def __repr__(self) -> str:
        head = (
            f"adapter {self.name!r}: {'active' if self.active else 'inactive'}, "
            f"{'trainable' if self.trainable else 'frozen'}"
        )
        body = (
            str(self._plan)
            if self._plan is not None
            else f"{self.cfg.variant} on {len(self.targets)} targets, {self.num_parameters():,} trained parameters"
        )
        return f"{head}\n{body}"


def _check_rate(name: str, value: Any) -> None:
    """Raise unless it is a number of 0 or more."""
    try:
        fine = bool(value >= 0)
    except TypeError:
        fine = False
    if not fine:
        raise ConfigError(f"param_groups: {name} is a number of 0 or more, such as 1e-3; got {shown(value)}.")


@checked
def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Name -> handle of every attached adapter, in attach order; empty for a bare model."""
    try:
        state = state_of(model)
    except StateError:
        return {}
    return {name: Adapter(model, name) for name in state.records}
