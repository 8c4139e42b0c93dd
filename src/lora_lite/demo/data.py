"""The bundled base, and rows of the word problems `wordmath`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.errors import FileError
from .wordmath import Split, generate

BASE = Path(__file__).parent / "base"


def model_path(name: str) -> str:
    """`demo` is the bundled base; anything else is a local folder or a hub id, returned as it is."""
    return str(BASE) if name == "demo" else name


def load_tokenizer(name: str = "demo") -> Any:
    """The tokenizer of the bundled base ("demo"), a local folder or a hub id. It pads on the left, and gets the end
    token for padding if it has none.

    Raises:
        FileError: none can be loaded under that name.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path(name))
    except Exception as e:
        raise _nothing("tokenizer", name, e) from None
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str = "demo", dtype: str = "float32", **options: Any) -> tuple[Any, Any]:
    """(model, tokenizer) of the bundled base ("demo"), a local folder or any hub id.

    Args:
        dtype: of the weights; "auto" is the checkpoint's.
        options: for `from_pretrained`, such as a quantisation.

    Raises:
        FileError: nothing can be loaded under that name, or the weights are damaged.
    """
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(name)
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        return AutoModelForCausalLM.from_pretrained(model_path(name), dtype=wanted, **options), tokenizer
    except ImportError:  # a quantiser that is not installed
        raise
    except Exception as e:
        raise _nothing("model", name, e) from None


def _nothing(what: str, name: str, e: Exception) -> FileError:
    """Whatever the libraries beneath raise, a user needs one sentence."""
    first = (str(e).splitlines() or [type(e).__name__])[0].strip().rstrip(".:")
    return FileError(f"no {what} can be loaded from {name!r}: {first}. Give 'demo', a local folder or a hub id.")


def wordmath_rows(split: Split = "train", n: int = 2000, seed: int = 0) -> list[dict[str, Any]]:
    """Word problems as rows of `prompt` and `completion`."""
    return [{"prompt": p.prompt, "completion": p.completion} for p in generate(split, n, seed)]
