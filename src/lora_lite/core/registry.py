"""One table: name -> variant class."""

from __future__ import annotations

from typing import TypeVar

from .config import AdapterConfig
from .errors import ConfigError, did_you_mean
from .variant import Variant

_TABLE: dict[str, type] = {}
T = TypeVar("T", bound=type)


def register(cls: T) -> T:
    """Class decorator: enter an adapter method into the registry.

    The class needs `name`, a static `param_specs(d_in, d_out, cfg)` and a static `forward(layer, x, y)` or
    `forward_input(layer, x)`; every other member of `Variant` that it lacks takes the default. Registering a name again
    replaces the class only if it is the same class defined anew (a notebook cell run twice).

    Raises:
        ConfigError: a member is missing, or the name belongs to another class.
    """
    name = vars(cls).get("name") or getattr(cls, "name", "")
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError(
            f"{cls.__name__} needs a class attribute like name = 'myvariant' (letters, digits, underscores)."
        )
    if not callable(getattr(cls, "param_specs", None)):
        raise ConfigError(f"{name}: write a static param_specs(d_in, d_out, cfg) -> dict[str, ParamSpec].")
    if not (callable(getattr(cls, "forward", None)) or callable(getattr(cls, "forward_input", None))):
        raise ConfigError(f"{name}: write a static forward(layer, x, y) or forward_input(layer, x).")
    old = _TABLE.get(name)
    if old is not None and (old.__module__, old.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ConfigError(f"the name {name!r} belongs to {old.__module__}.{old.__qualname__}; choose another name.")
    for member, default in vars(Variant).items():
        if not member.startswith("__") and not hasattr(cls, member):
            setattr(cls, member, default)
    if not issubclass(cls.config, AdapterConfig):  # type: ignore[attr-defined]
        raise ConfigError(f"{name}.config must be a dataclass that inherits AdapterConfig.")
    if not cls.title:  # type: ignore[attr-defined]
        paragraph = (cls.__doc__ or name).strip().split("\n\n")[0]
        cls.title = " ".join(paragraph.split()).rstrip(".")  # type: ignore[attr-defined]
    _TABLE[name] = cls
    return cls


def variants() -> list[type[Variant]]:
    """All registered methods, in alphabetical order of their names."""
    return [_TABLE[name] for name in sorted(_TABLE)]


def get_variant(name: str) -> type[Variant]:
    """The method called `name`; raises `ConfigError` with the nearest names otherwise."""
    if name not in _TABLE:
        raise ConfigError(
            f"no variant is called {name!r}.{did_you_mean(name, _TABLE)} Registered: {', '.join(sorted(_TABLE))}."
        )
    return _TABLE[name]


def resolve(cfg: AdapterConfig) -> AdapterConfig:
    """`AdapterConfig(variant="x")` becomes the config class of x with the same fields; others are checked and
    returned."""
    if not cfg.variant:
        raise ConfigError(
            f"{type(cfg).__name__} names no method: pass variant=..., one of {', '.join(sorted(_TABLE))}, or use a "
            "method's own config class."
        )
    variant = get_variant(cfg.variant)
    if isinstance(cfg, variant.config):
        return cfg
    if type(cfg) is AdapterConfig:
        return variant.config(**cfg.common())
    raise ConfigError(
        f"{type(cfg).__name__} is not a config of variant {cfg.variant!r}; use {variant.config.__name__}(...)."
    )
