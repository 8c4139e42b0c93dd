"""The base model as the commands load it: by name, dtype, quantisation and device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import lora_lite as ll

BaseDtype = Literal["auto", "float32", "bfloat16", "float16"]
MAX_SEED = 2**32 - 1
"""The largest seed that numpy takes."""
LENGTH = 1024
"""Longest row where nothing is said, as in TRL."""


@dataclass(frozen=True, kw_only=True)
class BaseFlags:
    """The flags of every command that loads a model."""

    model: str = "demo"
    """demo (the bundled base), a local model directory, or a hub id."""
    base_dtype: BaseDtype = "auto"
    """Storage of the base weights (--dtype is the adapter's); auto: the checkpoint's."""
    load_in_4bit: bool = False
    """Quantise the base to 4-bit NF4 by bitsandbytes while it is loaded."""
    load_in_8bit: bool = False
    """Quantise the base to 8 bits by bitsandbytes while it is loaded."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps; None: the GPU where there is one."""
    threads: int = 0
    """CPU threads; 0: torch's choice."""
    debug: bool = False
    """Show tracebacks and other libraries' messages."""


def quiet(debug: bool) -> None:
    """Keep other libraries' chatter, bars and usage reports off the terminal."""
    import logging
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if debug:
        return
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for package in ("transformers", "accelerate", "trl", "datasets", "torch", "bitsandbytes"):
        warnings.filterwarnings("ignore", module=rf"{package}(\.|$)")


def check_base(args: BaseFlags) -> None:
    """Values that no later step would catch with a good sentence.

    Raises:
        ConfigError: a device that is not there, both quantisations, or a wrong number.
    """
    if args.threads < 0:
        raise ll.ConfigError(f"--threads must be 0 (torch's choice) or more, got {args.threads}.")
    if args.load_in_4bit and args.load_in_8bit:
        raise ll.ConfigError("--load-in-4bit and --load-in-8bit exclude each other; give one of them.")
    device_of(args.device)


def check_seed(seed: int) -> None:
    """Seeds reach numpy, which takes 32 bits.

    Raises:
        ConfigError: it lies outside.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ll.ConfigError(f"--seed must lie between 0 and {MAX_SEED}, got {seed}.")


def device_of(name: str | None) -> str:
    """The device that a flag names, or the best there is.

    Raises:
        ConfigError: no such device.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return "cpu" if accelerator is None else accelerator.type
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ll.ConfigError(f"--device {name}: torch knows no such device. Give cpu, cuda, cuda:1 or mps.") from None
    here = accelerator is not None and device.type == accelerator.type
    if device.type != "cpu" and not (here and (device.index or 0) < torch.accelerator.device_count()):
        found = "none" if accelerator is None else f"{torch.accelerator.device_count()} of {accelerator.type}"
        raise ll.ConfigError(f"--device {name}: there is no such device here (accelerators found: {found}).")
    return str(device)


def processes() -> int:
    """How many processes `torchrun` or `accelerate launch` started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def load_base(args: BaseFlags, name: str, seed: int = 0) -> tuple[Any, Any]:
    """(model, tokenizer) on their device, with threads and the global seed set."""
    import torch

    from ..demo.data import load_model

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(seed)
    device, options = device_of(args.device), {}
    if processes() > 1 and device == "cuda":  # every process has a device of its own
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if args.load_in_4bit or args.load_in_8bit:
        import bitsandbytes  # noqa: F401 -- missing, it is named before anything is loaded
        from transformers import BitsAndBytesConfig

        compute = torch.float32 if device == "cpu" else torch.bfloat16
        options = {
            "device_map": {"": device},
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=args.load_in_4bit,
                load_in_8bit=args.load_in_8bit,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=compute,
            ),
        }
    model, tokenizer = load_model(name, args.base_dtype, **options)
    return (model if options else model.to(device)), tokenizer


def positions_of(name: str) -> int | None:
    """The longest text that a model was made for, from its config alone; None where it names none."""
    from transformers import AutoConfig

    from ..demo.data import model_path

    try:
        config = AutoConfig.from_pretrained(model_path(name)).get_text_config()
    except Exception as e:
        first = (str(e).splitlines() or [type(e).__name__])[0].strip().rstrip(".")
        raise ll.FileError(
            f"no model can be loaded from {name!r}: {first}. Give 'demo', a local folder or a hub id."
        ) from None
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return int(found) if found else None


def length_of(wanted: int | None, positions: int | None) -> int:
    """The longest row in tokens.

    Raises:
        ConfigError: longer than the model's positions.
    """
    if wanted is None:
        return min(LENGTH, positions or LENGTH)
    if positions is not None and wanted > positions:
        raise ll.ConfigError(f"--max-length {wanted}: the model was made for {positions} tokens at most; give that.")
    return wanted
