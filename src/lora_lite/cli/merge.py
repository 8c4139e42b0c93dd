"""`lora-lite merge`: adapters into the weights of a checkpoint, file to file."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

import lora_lite as ll

from . import _folder as folder
from ._adapters import BaseCheck, check_paths, load_all, names_of, weights_of
from ._base import BaseFlags, check_base, load_base, quiet
from ._console import say


@dataclass(frozen=True, kw_only=True)
class Merge(BaseFlags):
    """Write a checkpoint with adapters merged into its weights, beside config, tokenizer and whatever else it holds.

    One tensor is in memory at a time, so that a model may be larger than memory. The report says how far the weights
    moved and what rounding to their dtype costs.
    """

    adapters: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs, adapter files or folders in PEFT's layout; several act together."""
    out: Path
    """The new folder."""
    model: str | None = None  # type: ignore[assignment]
    """demo, a local model directory, or a hub id; None: the one that the adapters were trained on, or demo."""
    weights: tuple[float, ...] = ()
    """How strongly each adapter acts, in their order; none: 1."""
    shard_size: str | None = None
    """Largest file, such as 5GB; None: files as in the old checkpoint."""
    in_memory: bool = False
    """Load the whole model instead: for quantised bases (which become dense) and for checkpoints that are stored
    otherwise than the model holds them."""
    base_check: BaseCheck = "error"
    """What to do if an adapter was trained on other base weights."""
    overwrite: bool = False
    """Replace files of a folder that exists."""
    json: bool = False
    """Print one JSON object: the change and the rounding of every layer."""


def run(args: Merge) -> int:
    check(args)
    quiet(args.debug)
    names = names_of(args.adapters)
    weights = dict(zip(names, weights_of(args.adapters, args.weights), strict=True))
    name = folder.model_of(args.model, *args.adapters)
    if args.in_memory or args.load_in_4bit or args.load_in_8bit:
        report = in_memory(args, name, names, weights)
    else:
        report = file_to_file(args, name, names, weights)
    keep_template(args)
    if args.json:
        facts = {k: v for k, v in dataclasses.asdict(report).items() if v is not None}
        print(json.dumps({"model": name, "out": str(args.out), "weights": weights, **facts}))
        return 0
    say(str(report))
    say(f"model    {args.out}")
    say(f"next     lora-lite eval --model {args.out}")
    return 0


def check(args: Merge) -> None:
    """Values that no later step would catch with a good sentence."""
    from ..io.fold_files import size_of

    check_base(args)
    if not args.adapters:
        raise ll.ConfigError("lora-lite merge needs an adapter: lora-lite merge runs/train --out merged")
    check_paths(args.adapters)
    weights_of(args.adapters, args.weights)
    if args.shard_size is not None:
        size_of(args.shard_size)
    folder.check_writable(args.out)
    if args.out.is_dir() and any(args.out.iterdir()) and not args.overwrite:
        raise ll.FileError(f"--out {args.out} is not empty. Give another folder, or --overwrite.")
    if args.model is not None and args.out.resolve() == Path(args.model).resolve():
        raise ll.FileError(f"--out {args.out} is the base itself; give another folder.")


def file_to_file(args: Merge, name: str, names: dict[str, Path], weights: dict[str, float]) -> Any:
    """Merge without the model in memory."""
    from ..io.fold_files import checkpoint_tensors, hollow, merge_files, size_of

    source = weights_folder(name)
    model = bare_model(source)
    hollow(model, checkpoint_tensors(source))
    load_all(model, names, "ignore")  # compared with every weight as it is read
    ll.activate(model, weights)
    files = {n: f for n, path in names.items() if (f := folder.adapter_path(path)).is_file()}
    size = None if args.shard_size is None else size_of(args.shard_size)
    return merge_files(model, source, args.out, size, files, args.base_check)


def in_memory(args: Merge, name: str, names: dict[str, Path], weights: dict[str, float]) -> Any:
    """Merge the loaded model and let transformers save it."""
    from ..io.places import replaced_folder

    model, tokenizer = load_base(args, name)
    load_all(model, names, args.base_check)
    ll.activate(model, weights)
    model.eval()
    ids = tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt").to(model.device)
    report = ll.merge(model, dequantize=args.load_in_4bit or args.load_in_8bit, check=dict(ids))
    with replaced_folder(args.out, "model.safetensors") as new:
        model.save_pretrained(new, max_shard_size=args.shard_size or "50GB")
        tokenizer.save_pretrained(new)
    return report


def weights_folder(name: str) -> Path:
    """The folder that holds a checkpoint; a hub id is downloaded.

    Raises:
        FileError: there is none.
    """
    from ..demo.data import model_path

    path = Path(model_path(name))
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as e:
        first = (str(e).splitlines() or [type(e).__name__])[0].strip().rstrip(".")
        raise ll.FileError(f"no checkpoint under {name!r}: {first}. Give 'demo', a local folder or a hub id.") from None


def bare_model(source: Path) -> Any:
    """The model of a checkpoint on the meta device, of the class that its config names.

    Raises:
        FileError: its config cannot be read.
    """
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(source)
        named = getattr(transformers, str((config.architectures or [""])[0]), None)
        stored = config.dtype or config.get_text_config().dtype or torch.float32
        with torch.device("meta"):
            if named is not None:
                return named(config).to(stored)
            return transformers.AutoModelForCausalLM.from_config(config, dtype=stored)
    except Exception as e:
        first = (str(e).splitlines() or [type(e).__name__])[0].strip().rstrip(".")
        raise ll.FileError(f"no model can be made from the config in {source}: {first}.") from None


def keep_template(args: Merge) -> None:
    """The chat template that a run was trained with, beside the merged weights."""
    kept = next((f["template"] for f in map(folder.facts_of, args.adapters) if f.get("template")), None)
    if kept and Path(kept).is_file():
        shutil.copyfile(kept, args.out / "chat_template.jinja")
