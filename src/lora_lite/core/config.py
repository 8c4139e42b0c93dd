"""`AdapterConfig`: the fields every method shares. A method adds its own in a subclass beside its page."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch

from .errors import ConfigError, did_you_mean, shown

Role = Literal["reader", "writer", "inner"]
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
CLASSES: dict[str, type[AdapterConfig]] = {}
"""Method -> its config class, which `register` enters."""
MAX_RANK = 1 << 20
MAX_INT = 1 << 63
LITERAL = re.compile(r"(?:[\w-]|\\?\.)*")
"""A plain path: most patterns are, and nothing can be wrong with them."""
ELSEWHERE = {
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "target_names",
    "exclude_modules": "exclude_names",
    "modules_to_save": "train_modules",
    "layers_to_transform": "layers",
    "rank": "r",
    "lora_r": "r",
    "lambda0": "strength",
    "max_rotation_angle": "max_angle",
    "block_size": "block",
}
"""Fields as other libraries call them -> ours."""
OTHERWISE = {
    "road_variant": '"road_1", "road_2", "road_4" are per_pair=1, 2, 4 of RoadConfig.',
    "rotate_basis": 'AntiPaSTOConfig turns the input side, "V"; block=1 turns nothing; "U" is not offered.',
    "variant_kwargs": "They are fields of the method's own config: lora_lite.DeLoRAConfig(r=8, strength=8.0).",
    "use_dora": "DoRA is a method of its own: lora_lite.DoRAConfig(r=8).",
    "use_rslora": "Only LoRAConfig has it; elsewhere give the alpha that makes the scale alpha / sqrt(r).",
    "init_lora_weights": "A start is a method of its own: lora_lite.PiSSAConfig, OLoRAConfig, EVAConfig, ...",
    "bias": "Biases are a method of their own: lora_lite.BitFitConfig().",
    "target_parameters": 'Fused experts are adapted by target_kinds=("experts",).',
    **dict.fromkeys(
        (
            "task_type",
            "inference_mode",
            "peft_type",
            "base_model_name_or_path",
            "fan_in_fan_out",
            "layers_pattern",
            "trainable_token_indices",
            "layer_replication",
            "loftq_config",
            "eva_config",
            "corda_config",
        ),
        "That is a field of PEFT's, whose own config ll.attach and ll.plan take as it is; leave it out here.",
    ),
}
"""Fields of others whose values are others here too, or which nothing here needs -> what to type."""
POSITIONS = ("variant", "r", "alpha", "dtype", "target_roles", "target_names", "exclude_names", "layers")
"""The order in which the original lora-lite took its fields."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Plain data: every field survives JSON, so a file can be read without running anything."""

    variant: str = ""
    """Name of the method; `lora-lite variants` lists them. A method's own config class knows it."""
    r: int = 8
    """Rank, or what the method uses as its size."""
    alpha: float | None = None
    """Scale numerator; None means r, so that the scale is 1."""
    dtype: str = "float32"
    """Storage of adapter tensors: float32 (best), bfloat16, float16 or float64."""
    target_roles: tuple[Role, ...] | None = None
    """Keep only layers that read the residual stream, write to it, or neither; None or () keeps all."""
    target_names: tuple[str, ...] | None = None
    """Regular expressions, each matched against the whole path or its tail after a dot. None: all linear layers of the
    blocks."""
    target_kinds: tuple[str, ...] = ("linear",)
    """What to adapt: "linear", "embedding", "conv", "norm", and "experts" whose weights are one fused parameter
    (mixtures of experts)."""
    exclude_names: tuple[str, ...] = ()
    """Regular expressions of targets to leave out, matched in the same way."""
    train_modules: tuple[str, ...] = ()
    """Regular expressions of modules to train whole beside the method, such as a classification head: every layer
    inside gets a trained change of all its parameters."""
    layers: tuple[int, ...] | None = None
    """Block indices to keep; negative ones count from the end."""
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict[str, int])
    """Regular expression -> rank for the targets it matches; the last match wins."""
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict[str, float])
    """Regular expression -> alpha for the targets it matches; the last match wins."""
    dropout: float = 0.0
    """Probability with which `layer.dropout(x)` zeroes an input of the adapter in training; the share of one call is
    a multiple of 1/256 that is right on average."""
    seed: int | None = 0
    """Each target draws from a generator seeded with (seed, its path), whatever `torch.manual_seed` was given; None
    draws the seed itself from torch's global generator at `ll.attach`, and the file keeps what was drawn."""
    dequantize: bool = False
    """Allow methods that need the dense weight to read a quantised one."""

    def __new__(cls, *args: object, **values: object) -> AdapterConfig:
        """Name the field that was meant where other libraries call it otherwise. Raises `ConfigError`."""
        where = cls.__name__
        if args:
            names = POSITIONS if isinstance(args[0], str) else POSITIONS[1:]
            typed = ", ".join(f"{name}={value!r}" for name, value in zip(names, args, strict=False))
            raise ConfigError(f"{where} takes its fields by name: {where}({shown(typed)[1:-1]}).")
        fields = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                raise ConfigError(f"{where} has no field {name!r}.{_meant(name, fields)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if isinstance(self.dtype, torch.dtype):
            object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        hints = _hints(type(self))
        for f in dataclasses.fields(self):
            value = _coerce(getattr(self, f.name), hints[f.name], f"{type(self).__name__}.{f.name}")
            object.__setattr__(self, f.name, value)
        object.__setattr__(self, "target_roles", self.target_roles or None)
        self.validate()

    def validate(self) -> None:
        """Check values, not types; subclasses extend it. Raises `ConfigError`."""
        where = type(self).__name__
        if not 1 <= self.r <= MAX_RANK:
            raise ConfigError(f"{where}.r must be between 1 and {MAX_RANK}, got {self.r}.")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha != 0):
            raise ConfigError(f"{where}.alpha must be finite and not 0, got {self.alpha}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"{where}.dropout must lie in [0, 1), got {self.dropout}.")
        if self.dtype not in DTYPES:
            raise ConfigError(f"{where}.dtype must be one of {sorted(DTYPES)}, got {self.dtype!r}.")
        if "all-linear" in (self.target_names or ()):
            raise ConfigError(
                f"{where}.target_names: 'all-linear' is what None, the default, means: the linear layers of the "
                "blocks. Leave it out."
            )
        for pattern, r in self.rank_pattern.items():
            if not 1 <= r <= MAX_RANK:
                raise ConfigError(f"{where}.rank_pattern[{pattern!r}] must be between 1 and {MAX_RANK}, got {r}.")
        for pattern, alpha in self.alpha_pattern.items():
            if not (math.isfinite(alpha) and alpha != 0):
                raise ConfigError(f"{where}.alpha_pattern[{pattern!r}] must be finite and not 0, got {alpha}.")
        for field, pattern in self.patterns():
            if fault := _fault(pattern):
                raise ConfigError(f"{where}.{field}: {shown(pattern)} is not a regular expression ({fault}).")

    @property
    def effective_alpha(self) -> float:
        """alpha, or r where alpha is None."""
        return float(self.r if self.alpha is None else self.alpha)

    @property
    def scale(self) -> float:
        """s = alpha / r, the factor of the update. Methods with another rule override it."""
        return self.effective_alpha / self.r

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's own object."""
        return DTYPES[self.dtype]

    def patterns(self) -> list[tuple[str, str]]:
        """(field, regular expression) of every pattern; each must match a target or `attach` raises."""
        names = [("target_names", p) for p in self.target_names or ()] + [
            ("exclude_names", p) for p in self.exclude_names
        ]
        return (
            names
            + [("train_modules", p) for p in self.train_modules]
            + [("rank_pattern", p) for p in self.rank_pattern]
            + [("alpha_pattern", p) for p in self.alpha_pattern]
        )

    def for_target(self, path: str, role: str | None = None) -> AdapterConfig:
        """The config as one target sees it: rank and alpha of the last matching pattern."""
        changes: dict[str, Any] = {}
        for pattern, r in self.rank_pattern.items():
            if matches(pattern, path):
                changes["r"] = r
        for pattern, alpha in self.alpha_pattern.items():
            if matches(pattern, path):
                changes["alpha"] = alpha
        return dataclasses.replace(self, **changes) if changes else self

    def start_note(self, shapes: Sequence[tuple[int, int]]) -> str | None:
        """What a plan says of a start that takes long, for targets of these (d_in, d_out)."""
        return None

    def for_layer(self, has_bias: bool) -> AdapterConfig:
        """The config as a layer with or without a bias sees it; applied after `for_target`."""
        return self

    def common(self) -> dict[str, Any]:
        """The fields of `AdapterConfig` itself, as a dict."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(AdapterConfig)}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` reads it back."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], unknown: list[str] | None = None) -> AdapterConfig:
        """Read `to_dict` data; `AdapterConfig` itself gives the config class of the method that they name. Unknown keys
        raise, or are appended to `unknown` when a list is given."""
        if cls is AdapterConfig:
            cls = CLASSES.get(str(data.get("variant")), cls)
        fields = {f.name for f in dataclasses.fields(cls)}
        for key in data:
            if key not in fields:
                if unknown is None:
                    raise ConfigError(f"{cls.__name__} has no field {key!r}.{_meant(str(key), fields)}")
                unknown.append(str(key))
        return cls(**{k: v for k, v in data.items() if k in fields})


class FrozenConfigError(ConfigError, dataclasses.FrozenInstanceError):
    """A field of a config was written to."""


def stay_as_it_is(cfg: AdapterConfig, name: str, value: object = None) -> None:
    """What setting or deleting a field of any config does."""
    raise FrozenConfigError(
        f"a {type(cfg).__name__} stays as it was made, since adapters hold it; make another: "
        f"dataclasses.replace(cfg, {name}={shown(value)})."
    )


AdapterConfig.__setattr__ = AdapterConfig.__delattr__ = stay_as_it_is  # what frozen dataclasses say is less


def _meant(name: str, fields: set[str]) -> str:
    """What a name that is no field is called here."""
    if ELSEWHERE.get(name) in fields:
        return f" Here it is called {ELSEWHERE[name]!r}."
    return f" {OTHERWISE[name]}" if name in OTHERWISE else did_you_mean(name, fields)


@functools.lru_cache(1 << 14)
def _fault(pattern: str) -> str:
    """Why it is no regular expression, or an empty string; kept, since every target has a config."""
    if LITERAL.fullmatch(pattern):
        return ""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as e:
        return str(e)
    return ""


def matches(pattern: str, path: str) -> bool:
    """Whether the regular expression matches the whole path or its tail after a dot."""
    # fused experts are targets under `experts.lora_gate_up_proj`, and everybody calls them `experts.gate_up_proj`
    return any(re.fullmatch(rf"(?:.*\.)?(?:{pattern})", p) for p in {path, path.replace(".lora_", ".")})


def anywhere(pattern: str) -> str:
    """The pattern that matches what this one finds anywhere in a path, as the original lora-lite looks."""
    front, back = pattern.startswith("^"), pattern.endswith("$")
    middle = pattern[front : len(pattern) - back]
    middle = f"(?:{middle})" if "|" in middle else middle
    return ("" if front else ".*") + middle + ("" if back else ".*")


_HINTS: dict[type, dict[str, Any]] = {}


def _hints(cls: type) -> dict[str, Any]:
    if cls not in _HINTS:
        _HINTS[cls] = typing.get_type_hints(cls)
    return _HINTS[cls]


def _plain(value: object) -> object:
    """The value as JSON has it."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in cast("Mapping[object, object]", value).items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in cast("Sequence[object]", value)]
    return value


def _coerce(value: object, hint: Any, where: str) -> Any:
    """`value` as the annotated type, or `ConfigError`: configs come from files, so nothing is taken on trust."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, args, where)
    if origin is Literal:
        return _choice(value, args, where)
    if origin is tuple:
        return tuple(_coerce(v, args[0], f"{where}[{i}]") for i, v in enumerate(_items(value, where)))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a mapping, got {shown(value)}.")
        pairs = cast("Mapping[object, object]", value).items()
        return {_coerce(k, args[0], where): _coerce(v, args[1], f"{where}[{k!r}]") for k, v in pairs}
    return _plain_value(value, hint, where)


def _one_of(value: object, options: tuple[Any, ...], where: str) -> Any:
    """The value as the first of the types that takes it; the error of the last one."""
    if value is None and type(None) in options:
        return None
    *others, last = (option for option in options if option is not type(None))
    for option in others:
        try:
            return _coerce(value, option, where)
        except ConfigError:
            continue
    return _coerce(value, last, where)


def _choice(value: object, allowed: tuple[Any, ...], where: str) -> Any:
    if value in allowed:
        return value
    raise ConfigError(
        f"{where} must be one of {list(allowed)}, got {shown(value)}.{did_you_mean(str(value), map(str, allowed))}"
    )


def _items(value: object, where: str) -> Sequence[object]:
    """A list of anything; a single string or number is a list of one."""
    if isinstance(value, (str, int)):
        return (value,)
    if isinstance(value, (set, frozenset)):
        return sorted(cast("set[Any]", value))
    if isinstance(value, (list, tuple)):
        return cast("Sequence[object]", value)
    raise ConfigError(f"{where} must be a list, got {shown(value)}.")


def _plain_value(value: object, hint: Any, where: str) -> object:
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not abs(value) <= sys.float_info.max:
            raise ConfigError(f"{where} must be finite, got {shown(value)}.")
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        if not -MAX_INT <= value < MAX_INT:
            raise ConfigError(f"{where} must lie between -2**63 and 2**63, got {shown(value)}.")
        return value
    if hint in (bool, str) and isinstance(value, hint):
        return value
    raise ConfigError(f"{where} must be {getattr(hint, '__name__', hint)}, got {shown(value)}.")
