"""lora-lite: adapters for frozen PyTorch models. A method is one page of mathematics; the rest is derived from it."""

from types import ModuleType as _Module

from ._version import __version__ as __version__
from .core.config import AdapterConfig as AdapterConfig
from .core.errors import BaseMismatchError as BaseMismatchError
from .core.errors import ConfigError as ConfigError
from .core.errors import FileError as FileError
from .core.errors import LoraLiteError as LoraLiteError
from .core.errors import LoraLiteWarning as LoraLiteWarning
from .core.errors import SelectionError as SelectionError
from .core.errors import StateError as StateError
from .core.errors import TargetError as TargetError
from .core.errors import WeightError as WeightError
from .core.layer import Layer as Layer
from .core.positions import BlockConfig as BlockConfig
from .core.registry import get_variant as get_variant
from .core.registry import register as register
from .core.registry import variants as _registered
from .core.spec import ParamSpec as ParamSpec
from .core.variant import Variant as Variant
from .cost.paper import Cost as Cost
from .cost.paper import cost as cost
from .interop.peft_config import attach as attach
from .interop.peft_config import plan as plan
from .interop.sources import load as load
from .interop.trainer import trainer as trainer
from .io.export import export as export
from .io.native import adapter_state_dict as adapter_state_dict
from .io.native import load_adapter_state_dict as load_adapter_state_dict
from .io.native import save as save
from .io.store import AdapterStore as AdapterStore
from .runtime.check import check as check
from .runtime.combine import combine as combine
from .runtime.combine import factors as factors
from .runtime.commit import detach as detach
from .runtime.commit import rename as rename
from .runtime.compact import compact as compact
from .runtime.handle import Adapter as Adapter
from .runtime.handle import adapters as adapters
from .runtime.merge import merge as merge
from .runtime.merge import unmerge as unmerge
from .runtime.plan import Plan as Plan
from .runtime.precondition import precondition as precondition
from .runtime.schedule import penalty as penalty
from .runtime.schedule import schedule as schedule
from .runtime.select import activate as activate
from .runtime.select import active as active
from .runtime.select import context as context
from .runtime.select import prompt as prompt
from .runtime.select import rows as rows
from .runtime.unload import merge_and_unload as merge_and_unload
from .variants import *  # noqa: F403  (the config classes, one per method)

variants = _registered

__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    name for name, value in list(globals().items()) if not name.startswith("_") and not isinstance(value, _Module)
]

_LATE = {"testing": ".testing", "callbacks": ".interop.callbacks"}
"""Loaded when they are asked for."""
_ELSEWHERE = {
    "REGISTRY": " ll.variants() lists the methods, and ll.get_variant(name) is one of them.",
    "register_config": " A method names its config itself: config = MyConfig beside name, under @ll.register.",
    "LoraLiteConfig": " Each method has a config of its own: lora_lite.LoRAConfig(r=8, alpha=16).",
}
"""Names of the original lora-lite -> what to type."""


def __dir__() -> list[str]:
    return [*__all__, *_LATE, "__version__"]


def __getattr__(name: str) -> object:
    if name in _LATE:
        from importlib import import_module

        return import_module(_LATE[name], __name__)
    from .core.errors import did_you_mean

    hint = _ELSEWHERE.get(name) or did_you_mean(name, __all__)
    if any(v.name == name for v in _registered()):
        hint = f" It is a method: attach it with lora_lite.{get_variant(name).config.__name__}(...)."
    raise AttributeError(f"lora_lite has no {name!r}.{hint}")
