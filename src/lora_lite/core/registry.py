"""One table: name -> variant class."""

from __future__ import annotations

from typing import TypeVar, cast

from .config import CLASSES, AdapterConfig, stay_as_it_is
from .errors import ConfigError, did_you_mean, shown
from .variant import Derived, Variant, forward_of

_TABLE: dict[str, type[Variant]] = {}
T = TypeVar("T", bound=type)
ACTS = ("forward", "forward_input", "weight", "prefix", "tokens")
"""The members by which a method acts; it has one of them at least."""


def register(cls: T) -> T:
    """Class decorator: enter an adapter method into the registry.

    The class needs `name`, a static `param_specs(d_in, d_out, cfg)` and a static `forward(layer, x, y)`,
    `forward_input(layer, x)` or `weight(layer, W)`, at the attention also `prefix(layer)` or `tokens(layer)`; every
    other member of `Variant` that it lacks takes the default.
    Registering a name again replaces the class only if it is the same class defined anew (a notebook cell run twice).

    Raises:
        ConfigError: a member is missing or follows from others, or the name or what the class `holds` belongs to
            another class.
    """
    if not callable(getattr(cls, "mro", None)):
        raise ConfigError(f"ll.register takes a class, as @ll.register above it; got {shown(cls)}.")
    name = vars(cls).get("name") or getattr(cls, "name", "")
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError(
            f"{cls.__name__} needs a class attribute like name = 'myvariant' (letters, digits, underscores)."
        )
    if not callable(getattr(cls, "param_specs", None)):
        raise ConfigError(f"{name}: write a static param_specs(d_in, d_out, cfg) -> dict[str, ParamSpec].")
    if not any(callable(getattr(cls, member, None)) for member in ACTS):
        raise ConfigError(f"{name}: write a static forward(layer, x, y), forward_input(layer, x) or weight(layer, W).")
    old = _TABLE.get(name)
    if old is not None and not _same(old, cls):
        raise ConfigError(f"the name {name!r} belongs to {old.__module__}.{old.__qualname__}; choose another name.")
    page = _completed(cls)
    _check_facts(page)
    if not page.title:
        paragraph = (page.__doc__ or name).strip().split("\n\n")[0]
        page.title = " ".join(paragraph.split()).rstrip(".")
    _TABLE[name], CLASSES[name] = page, page.config
    return cls


def _same(old: type, new: type) -> bool:
    """Whether this is one class, perhaps defined twice."""
    return (old.__module__, old.__qualname__) == (new.__module__, new.__qualname__)


def _completed(cls: type) -> type[Variant]:
    """The class with the defaults of the members that it lacks."""
    there = {member for base in cls.__mro__ for member in vars(base)}
    for member, default in vars(Variant).items():
        if member not in there and not member.startswith("__"):
            setattr(cls, member, default)
    page = cast("type[Variant]", cls)
    if page.weight is not None and not _has_both(page):
        page.forward, page.needs_weight = staticmethod(forward_of(page.weight)), True
    return page


def _has_both(page: type) -> bool:
    """Whether one class of the page writes a `forward` beside its `weight`."""
    owner = next(base for base in page.__mro__ if "weight" in vars(base))
    forward = getattr(vars(owner).get("forward"), "__func__", None)
    return forward is not None and not hasattr(forward, "follows")


def _check_facts(page: type[Variant]) -> None:
    """Refuse facts that are no facts."""
    for member, since in ((m, d.since) for m, d in vars(Variant).items() if isinstance(d, Derived)):
        if any(member in vars(base) and not isinstance(vars(base)[member], Derived) for base in page.__mro__):
            raise ConfigError(f"{page.name}: {member} follows from {since}; leave it out.")
    config: type = page.config
    if not issubclass(config, AdapterConfig):
        raise ConfigError(f"{page.name}.config must be a dataclass that inherits AdapterConfig.")
    config.__setattr__ = config.__delattr__ = stay_as_it_is
    if page.needs_data not in ("", "batches", "pairs", "adapters"):
        raise ConfigError(
            f"{page.name}.needs_data must be '', 'batches' or 'pairs' (contrast pairs), or 'adapters', got "
            f"{page.needs_data!r}."
        )
    role = vars(page).get("holds", "")
    owner = next((v for v in _TABLE.values() if role and vars(v).get("holds") == role), None)
    if owner is not None and not _same(owner, page):
        raise ConfigError(f"{page.name}: {owner.name!r} already holds {role!r}, and only one method can; leave it out.")


def holder(role: str) -> type[Variant]:
    """The method that keeps what the library makes itself: the sums of `ll.combine` ("factors"), the modules of
    `train_modules` ("modules").

    Raises:
        ConfigError: none is registered.
    """
    for variant in variants():
        if vars(variant).get("holds") == role:
            return variant
    raise ConfigError(f"no registered method declares holds = {role!r}; import lora_lite.variants.")


def variants() -> list[type[Variant]]:
    """All registered methods, in alphabetical order of their names."""
    return [_TABLE[name] for name in sorted(_TABLE)]


def get_variant(name: str) -> type[Variant]:
    """The method called `name`; raises `ConfigError` with the nearest names otherwise."""
    if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"a method is asked for by its name, such as 'lora'; got {shown(name)}.")
    if name not in _TABLE:
        known = called(name)
        if known is not None:
            raise ConfigError(f"no variant is called {name!r}: {said_as(name, known)}.")
        raise ConfigError(
            f"no variant is called {name!r}.{did_you_mean(name, _TABLE)} Registered: {', '.join(sorted(_TABLE))}."
        )
    return _TABLE[name]


def called(name: str) -> type[Variant] | None:
    """The method that people call `name`, its own name or another one of the same mathematics, however it is spelt:
    "LoRA-FA", "ETHER+", "mixlora"."""
    words = {_bare(variant.name): variant for variant in _TABLE.values()}
    for variant in _TABLE.values():
        for other in variant.also:
            words.setdefault(_bare(other), variant)
    return words.get(_bare(name))


def said_as(name: str, variant: type[Variant]) -> str:
    """What to type for a method that people call `name`: "'MHR' is 'poly' with splits=2 or more"."""
    how = next((how for other, how in variant.also.items() if _bare(other) == _bare(name)), "")
    return f"{name!r} is {variant.name!r}" + (f" with {how}" if how else "")


def _bare(name: str) -> str:
    """A name without case, spaces and signs."""
    return "".join(c for c in name.lower().replace("+", "plus") if c.isalnum())


def check_config(cfg: object) -> None:
    """Refuse what people pass instead of a config.

    Raises:
        ConfigError: a method's name, a dict, a class, or anything else; the line to type is named.
    """
    if isinstance(cfg, AdapterConfig):
        return
    got, hint = type(cfg).__name__, "lora_lite.LoRAConfig(r=8)"
    if isinstance(cfg, str) and cfg in _TABLE:
        got, hint = f"the name {cfg!r}", f"lora_lite.{get_variant(cfg).config.__name__}()"
    elif isinstance(cfg, dict):
        hint = "lora_lite.LoRAConfig(**settings)"
    elif isinstance(cfg, type) and issubclass(cfg, AdapterConfig):
        got, hint = f"the class {cfg.__name__}", f"{cfg.__name__}(r=8)"
    raise ConfigError(f"the second argument is a config such as {hint}, got {got}.")


def resolve(cfg: AdapterConfig) -> AdapterConfig:
    """`AdapterConfig(variant="x")` becomes the config class of x with the same fields; others are checked and
    returned.

    Raises:
        ConfigError: it is no config, names no method, or belongs to another one.
    """
    check_config(cfg)
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
