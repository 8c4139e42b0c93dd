"""`ll.load`: an adapter wherever it lies: a file, a folder, a repository of the hub, tensors at hand."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core.arguments import checked
from ..core.errors import ConfigError, FileError
from ..io.load import load as load_local
from ..io.native import BaseCheck
from ..runtime.handle import Adapter
from ..runtime.model.state import DEFAULT
from .upstream import is_upstream, load_upstream

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?:/[\w./-]+)?")
"""Owner and name of a repository, and a folder or file in it."""
PATTERNS = ["*.safetensors", "*.json"]
"""What an adapter needs of a repository; nothing pickled comes."""


@checked
def load(
    model: nn.Module,
    path: str | os.PathLike[str] | Mapping[str, Tensor],
    name: str = DEFAULT,
    trainable: bool = False,
    base_check: BaseCheck = "error",
    *,
    config: Any = None,
    revision: str | None = None,
) -> Adapter:
    """Attach an adapter and make it the active one. Needs neither an SVD nor calibration data.

    Args:
        path: a file written by `save`, a folder that a trainer left or one in PEFT's or MLX-LM's layout, a file of
            diffusers, kohya or LyCORIS, a file of the original lora-lite's `torch.save`, a repository of the hub
            ("owner/name"), or tensors with PEFT's names, which are copied. Of a folder with several of our files the
            one of the adapter called `name` is read.
        name: the adapter's name in this model.
        trainable: go on training it.
        base_check: what to do when the base weights are not those the adapter was trained on.
        config: for tensors at hand: the fields of adapter_config.json, as a dict or as PEFT's own config. Without it
            they are a LoRA of scale 1.
        revision: of a repository of the hub: a branch, a tag or a commit.

    Raises:
        FileError: damaged, of another format, with missing, unexpected or ill-shaped tensors, or not to be had.
        BaseMismatchError: other base weights.
        StateError: the name is taken or the model is merged. In each case the model is untouched.
    """
    if isinstance(path, (str, os.PathLike)):
        if config is not None:
            raise ConfigError("ll.load: config= is for tensors at hand; a file or folder has its own. Leave it out.")
        place = located(path, revision)
        if is_upstream(place):
            return load_upstream(model, Path(place), name, trainable)
        return load_local(model, place, name, trainable, base_check)
    said = config.to_dict() if hasattr(config, "to_dict") else config
    return load_local(model, path, name, trainable, base_check, config=said)


def located(path: str | os.PathLike[str], revision: str | None = None) -> str | os.PathLike[str]:
    """The place on this machine: the path itself where it is there, or the copy that the hub's client keeps.

    Raises:
        FileError: it is nowhere.
    """
    if not isinstance(path, str) or os.path.lexists(path) or not HUB_ID.fullmatch(path) or path.startswith("."):
        return path
    owner, repository, *inside = path.split("/")
    try:
        from huggingface_hub import snapshot_download

        found = Path(snapshot_download(f"{owner}/{repository}", revision=revision, allow_patterns=PATTERNS))
    except ImportError:
        raise FileError(f"{path} does not exist here. To load it from the hub, pip install huggingface_hub.") from None
    except Exception as e:  # no connection, no such repository, no permission
        raise FileError(
            f"{path} does not exist: it is no file or folder here, and the hub's client says: "
            f"{str(e).strip().splitlines()[0][:300] if str(e).strip() else type(e).__name__}"
        ) from None
    return found.joinpath(*inside)
