"""The engine of `lora-lite serve`: requests that wait are answered together by transformers' `generate`, each row with
its own adapter (`ll.rows`), its own sampling and its own end."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import lora_lite as ll

from ..data.tokens import closing_ids

PATIENCE = 0.005
"""Seconds that the first request of a batch waits for others."""
BROKEN = "�"
"""What a tokenizer writes for bytes that are no character yet."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are chosen, and where it ends."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass
class Answer:
    """One row: what is asked, and what has been said so far."""

    ids: list[int]
    adapter: str | None
    sampling: Sampling
    tell: Callable[[Answer, str], None]
    """Called in the engine's thread with each new piece of text, and with "" at the end."""
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str | None = None
    """"stop", "length" or "error" once it has ended."""
    error: str = ""
    cancelled: bool = False
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        if self.sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.sampling.seed)

    def choose(self, scores: Tensor) -> Tensor:
        """Scores (vocabulary,) whose largest one is the chosen token's: those of the nucleus, plus Gumbel noise."""
        how = self.sampling
        if how.temperature == 0:
            return scores
        logs = (scores.float() / how.temperature).log_softmax(-1)
        if how.top_p < 1:
            ranked, order = logs.sort(descending=True)
            before = ranked.exp().cumsum(-1) - ranked.exp()
            logs = logs.index_fill(0, order[before >= how.top_p], -torch.inf)
        noise = torch.rand(logs.shape, generator=self.generator, dtype=torch.float64)
        return logs - (-noise.clamp_min(torch.finfo(torch.float64).tiny).log()).log().to(logs)

    def take(self, token: int, tokenizer: Any, ends: Sequence[int]) -> bool:
        """One more token; whether the answer has ended."""
        self.tokens.append(token)
        whole = tokenizer.decode(self.tokens, skip_special_tokens=True)
        if token in ends:
            self.finish = "stop"
        elif (cut := min((at for s in self.sampling.stop if (at := whole.find(s)) >= 0), default=-1)) >= 0:
            whole, self.finish = whole[:cut], "stop"
        elif len(self.tokens) >= self.sampling.max_tokens:
            self.finish = "length"
        self.say(whole if self.finish else whole[: len(whole) - self.held(whole)])
        if self.finish:
            self.tell(self, "")
        return self.finish is not None or self.cancelled

    def held(self, whole: str) -> int:
        """How many characters at the end wait for the next token: half a character, or the beginning of a stop."""
        broken = len(whole) - len(whole.rstrip(BROKEN))
        begun = (n for s in self.sampling.stop for n in range(1, len(s)) if whole.endswith(s[:n]))
        return max((broken, *begun))

    def say(self, whole: str) -> None:
        """Tell what is new of the text so far."""
        if len(whole) > len(self.text):
            new, self.text = whole[len(self.text) :], whole
            self.tell(self, new)

    def fail(self, error: str) -> None:
        """End without an answer."""
        self.finish, self.error = "error", error
        self.tell(self, "")


class Engine:
    """One thread that answers what is put into its queue, as many at a time as wait and `max_batch` allows."""

    def __init__(self, model: Any, tokenizer: Any, max_batch: int = 16) -> None:
        self.model, self.tokenizer, self.max_batch = model.eval(), tokenizer, max_batch
        self.ends = closing_ids(tokenizer)
        self.waiting: queue.Queue[Answer | None] = queue.Queue()
        self.batches: list[int] = []
        """The sizes of the batches so far."""
        self.thread = threading.Thread(target=self._work, name="lora-lite engine", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self.thread.start()

    def stop(self) -> None:
        """Answer what waits, and end."""
        self.waiting.put(None)
        self.thread.join()

    def _work(self) -> None:
        while (first := self.waiting.get()) is not None:
            batch, more = [first], True
            while more and len(batch) < self.max_batch:
                try:
                    after = self.waiting.get(timeout=PATIENCE)
                except queue.Empty:
                    break
                if after is None:
                    self.waiting.put(None)
                    more = False
                else:
                    batch.append(after)
            self._answered([answer for answer in batch if not answer.cancelled])

    def _answered(self, batch: list[Answer]) -> None:
        """Every answer of a batch comes to its end, be it an error's."""
        if not batch:
            return
        self.batches.append(len(batch))
        try:
            self._generate(batch)
        except Exception as e:  # whatever it is belongs to these requests, and the next ones are answered
            for answer in batch:
                if answer.finish is None:
                    answer.fail(f"{type(e).__name__}: {e}")

    @torch.no_grad()
    def _generate(self, batch: list[Answer]) -> None:
        from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

        tokenizer, ends = self.tokenizer, self.ends

        class Each(LogitsProcessor):
            def __call__(self, input_ids: Any, scores: Any) -> Any:
                rows = zip(batch, scores, strict=True)
                return torch.stack([a.choose(s) if a.finish is None else s for a, s in rows]).to(scores.dtype)

        class Ended(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
                last = input_ids[:, -1].tolist()
                over = [a.finish is not None or a.take(t, tokenizer, ends) for a, t in zip(batch, last, strict=True)]
                return torch.tensor(over, device=input_ids.device)

        ids, mask = self._padded([answer.ids for answer in batch])
        with ll.rows(self.model, [answer.adapter for answer in batch]):
            self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max(answer.sampling.max_tokens for answer in batch),
                do_sample=False,
                num_beams=1,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=ends or None,
                logits_processor=LogitsProcessorList([Each()]),
                stopping_criteria=StoppingCriteriaList([Ended()]),
            )

    def _padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """(ids, mask), padded on the left."""
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return ids.to(self.model.device), mask.to(self.model.device)
