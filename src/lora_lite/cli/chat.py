"""`lora-lite chat`: talk with a model and its adapters."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

import lora_lite as ll

from ..data.tokens import closing_ids, prompt_ids
from . import _folder as folder
from ._adapters import check_paths, names_of
from ._base import BaseFlags, check_base, load_base, quiet
from ._console import say
from ._rows import layout_of_run

HELP = "/adapter NAME or none switches, /undo takes back the last turn, /reset all of them, /quit leaves"


@dataclass(frozen=True, kw_only=True)
class Chat(BaseFlags):
    """Talk with a model. Several adapters are known by their folder or file name and switched while talking."""

    adapters: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Folders of runs, adapter files or folders in PEFT's layout; the first acts at the start."""
    model: str | None = None  # type: ignore[assignment]
    """demo, a local model directory, or a hub id; None: the one that the adapters' runs were trained on, or demo."""
    template: Path | None = None
    """Chat template, a Jinja file; None: as the run's rows asked, or the tokenizer's, or "role: content" lines."""
    system: str | None = None
    """What the system says before the first turn."""
    max_new_tokens: int = 256
    """Longest answer in tokens."""


def run(args: Chat) -> int:
    check_base(args)
    check_paths(args.adapters)
    quiet(args.debug)
    model, tokenizer = load_base(args, folder.model_of(args.model, *args.adapters))
    names = names_of(args.adapters)
    layouts = {name: layout_of_run(args.template, tokenizer, path) for name, path in names.items()}
    tokenizer.chat_template = next(iter(layouts.values()), layout_of_run(args.template, tokenizer, None))
    for name, path in names.items():
        ll.load(model, folder.adapter_path(path), name=name)
    ll.activate(model, next(iter(names), None))
    model.eval()
    say(f"adapters: {', '.join(names) or 'none'}. {HELP}")
    Talk(model, tokenizer, args.system, args.max_new_tokens, layouts).loop()
    return 0


class Talk:
    """The turns so far, and what a line of the user does to them."""

    def __init__(
        self, model: Any, tokenizer: Any, system: str | None, new_tokens: int, layouts: Mapping[str, str] | None = None
    ) -> None:
        self.model, self.tokenizer, self.new_tokens = model, tokenizer, new_tokens
        self.layouts = layouts or {}
        """Adapter -> the chat template in which its turns are asked; the bare base is asked as the last one was."""
        self.start = [{"role": "system", "content": system}] if system else []
        self.turns = list(self.start)

    def loop(self) -> None:
        """Lines until the end of the input or /quit; Ctrl-C stops an answer."""
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            if line == "/quit":
                return
            if line.startswith("/"):
                self.command(line)
            elif line:
                try:
                    self.answer(line)
                except KeyboardInterrupt:
                    say()

    def command(self, line: str) -> None:
        """What begins with a slash."""
        word, _, rest = line.partition(" ")
        if word == "/reset":
            self.turns = list(self.start)
        elif word == "/undo":
            self.turns = self.turns[:-2] if len(self.turns) > len(self.start) else self.turns
        elif word == "/adapter":
            self.switch(rest.strip())
        else:
            say(HELP)

    def switch(self, name: str) -> None:
        """Another adapter answers from here on, asked in its own form; none: the bare base."""
        try:
            ll.activate(self.model, None if name in ("", "none") else name)
        except ll.LoraLiteError as e:
            say(str(e), "red")
        self.tokenizer.chat_template = self.layouts.get(name, self.tokenizer.chat_template)

    def answer(self, line: str) -> None:
        """One turn of the user and the model's, streamed."""
        import torch
        from transformers import TextStreamer

        turns = [*self.turns, {"role": "user", "content": line}]
        ids = torch.tensor([prompt_ids(turns, self.tokenizer)], device=self.model.device)
        streamer: Any = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with torch.no_grad():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.new_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=closing_ids(self.tokenizer) or None,
                streamer=streamer,
            )
        said = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        self.turns = [*turns, {"role": "assistant", "content": said}]
