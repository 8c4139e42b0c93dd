"""`lora-lite serve`: a model and its adapters behind OpenAI's HTTP interface."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

import lora_lite as ll

from . import _folder as folder
from ._base import BaseFlags, check_base, load_base, positions_of, quiet
from ._console import say
from ._rows import layout_of_run
from .chat import names_of


@dataclass(frozen=True, kw_only=True)
class Serve(BaseFlags):
    """Answer OpenAI's requests (/v1/models, /v1/completions, /v1/chat/completions, also streamed), each with the
    adapter that it names as its model, in one mixed batch.

    For evaluation and small teams: what waits is answered together, and what comes meanwhile waits. For more take vLLM,
    which reads what `ll.export` writes.
    """

    adapters: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Folders of runs, adapter files or folders in PEFT's layout; each is served under its folder's or file's name."""
    model: str | None = None  # type: ignore[assignment]
    """demo, a local model directory, or a hub id; None: the one that the adapters' runs were trained on, or demo."""
    name: str | None = None
    """What requests call the bare base; None: as --model."""
    template: Path | None = None
    """Chat template, a Jinja file; None: as each run's rows asked, or the tokenizer's, or "role: content" lines."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets others in, and no key is asked of them."""
    port: int = 8000
    """Port to listen at."""
    max_batch: int = 16
    """Most rows in one batch."""
    max_new_tokens: int = 256
    """Longest answer of a chat that names no length."""


def run(args: Serve) -> int:
    check_base(args)
    if args.max_batch < 1 or args.max_new_tokens < 1:
        raise ll.ConfigError("--max-batch and --max-new-tokens must be positive.")
    for path in args.adapters:
        if not path.exists():
            raise ll.FileError(f"{path}: there is no such file or folder.")
    import uvicorn

    from ._engine import Engine
    from ._openai import Api

    quiet(args.debug)
    base = folder.model_of(args.model, *args.adapters)
    model, tokenizer = load_base(args, base)
    names = names_of(args.adapters)
    layouts = {name: layout_of_run(args.template, tokenizer, path) for name, path in names.items()}
    tokenizer.chat_template = layout_of_run(args.template, tokenizer, None)
    models: dict[str, str | None] = {args.name or base: None}
    for name, path in names.items():
        if name in models:
            raise ll.ConfigError(f"two models are called {name!r}; call the base otherwise: --name base.")
        ll.load(model, folder.adapter_path(path), name=name)
        models[name] = name
    engine = Engine(model, tokenizer, args.max_batch)
    engine.start()
    say(f"http://{args.host}:{args.port}/v1 serves {', '.join(models)}. For many users take vLLM: ll.export, and")
    say(f"vllm serve {base} --enable-lora --lora-modules NAME=FOLDER")
    app = Api(engine, models, args.max_new_tokens, positions_of(base), layouts).app()
    uvicorn.run(app, host=args.host, port=args.port, log_level="info" if args.debug else "warning")
    engine.stop()
    return 0
