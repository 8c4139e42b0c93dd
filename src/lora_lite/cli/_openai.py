"""OpenAI's HTTP interface before an engine: `/v1/models`, `/v1/completions`, `/v1/chat/completions`, the last two also
as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from ..data.tokens import Message, prompt_ids
from ._engine import Answer, Engine, Sampling

COMPLETION_TOKENS = 16
"""The longest completion where a request says nothing, as OpenAI has it."""
UNHEEDED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls",
    "tool_choice",
}  # fmt: skip
"""Fields that change no answer: those of tools do not without `tools`, which are refused."""


class Asked(BaseModel):
    """What both kinds of requests hold. A field beside these is refused where it would change the answer."""

    model_config = ConfigDict(extra="allow")

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=16)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None


class Completion(Asked):
    """/v1/completions"""

    prompt: str | list[str] | list[int] | list[list[int]]


class Turn(BaseModel):
    """What one side says; fields beside these reach the chat template."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None


class Chat(Asked):
    """/v1/chat/completions"""

    messages: list[Turn] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


class Refused(Exception):
    """An answer of OpenAI's form that says what is wrong."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Api:
    """The answers to requests.

    Args:
        models: name -> adapter; None is the bare base.
        max_tokens: the longest answer of a chat where the request says nothing.
        positions: the longest text that the model was made for.
        layouts: name -> the chat template in which its turns are written; the tokenizer's where there is none.
    """

    def __init__(
        self,
        engine: Engine,
        models: dict[str, str | None],
        max_tokens: int,
        positions: int | None,
        layouts: Mapping[str, str] | None = None,
    ) -> None:
        self.engine, self.models, self.max_tokens, self.positions = engine, models, max_tokens, positions
        self.layouts = layouts or {}
        self.born = int(time.time())

    def app(self) -> FastAPI:
        """The application that a server runs."""
        app = FastAPI(title="lora-lite", docs_url=None, redoc_url=None)
        app.add_api_route("/v1/models", self.list_models)
        app.add_api_route("/v1/models/{name:path}", self.one_model)
        app.add_api_route("/health", lambda: {"status": "ok"})
        app.add_api_route("/v1/completions", self.completions, methods=["POST"], response_model=None)
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], response_model=None)
        app.add_exception_handler(Refused, _refused)
        app.add_exception_handler(RequestValidationError, _invalid)
        return app

    async def list_models(self) -> dict[str, Any]:
        """The base and every adapter."""
        return {"object": "list", "data": [self._card(name) for name in self.models]}

    async def one_model(self, name: str) -> dict[str, Any]:
        """One of them."""
        self._adapter(name)
        return self._card(name)

    async def completions(self, asked: Completion, request: Request) -> Any:
        """Goes on with each prompt."""
        told: Any = asked.prompt
        single = isinstance(told, str) or (bool(told) and isinstance(told[0], int))
        prompts = [told] if single else list(told)
        rows = [p if isinstance(p, list) else prompt_ids(p, self.engine.tokenizer) for p in prompts]
        return await self.answer("text_completion", asked, rows, asked.max_tokens or COMPLETION_TOKENS, request)

    async def chat(self, asked: Chat, request: Request) -> Any:
        """The assistant's next turn."""
        ids = self._turns(asked.messages, asked.model)
        longest = asked.max_completion_tokens or asked.max_tokens
        if longest is None:
            room = self.max_tokens if self.positions is None else max(self.positions - len(ids), 1)
            longest = min(self.max_tokens, room)
        return await self.answer("chat.completion", asked, [ids], longest, request)

    # ---- one request

    async def answer(self, kind: str, asked: Asked, prompts: list[list[int]], longest: int, request: Request) -> Any:
        _check_fields(asked)
        adapter = self._adapter(asked.model)
        self._check_lengths(prompts, longest)
        told: asyncio.Queue[tuple[int, str]] = asyncio.Queue()
        answers = _rows(asked, adapter, prompts, longest, told)
        for answer in answers:
            self.engine.waiting.put(answer)
        head = {
            "id": f"{'chatcmpl' if kind == 'chat.completion' else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": asked.model,
        }
        if asked.stream:
            events = _events(head, asked, answers, told, len(prompts))
            return StreamingResponse(events, media_type="text/event-stream")
        try:
            async for _ in _pieces(answers, told, request):
                pass
        finally:
            _cancel(answers)
        broken = next((a for a in answers if a.finish == "error"), None)
        if broken is not None:
            raise Refused(500, broken.error)
        choices = [_whole(kind, i, answer) for i, answer in enumerate(answers)]
        return {**head, "choices": choices, "usage": _usage(answers, asked.n)}

    def _turns(self, turns: list[Turn], name: str) -> list[int]:
        """The tokens of what was said so far."""
        said: list[Message] = [{**turn.model_dump(exclude_unset=True), "content": _text(turn)} for turn in turns]
        try:
            return prompt_ids(said, self.engine.tokenizer, self.layouts.get(name))
        except Exception as e:  # a template's own, of whatever class
            raise Refused(400, f"the chat template does not take these turns: {e}", "messages") from None

    def _adapter(self, name: str) -> str | None:
        if name not in self.models:
            known = ", ".join(self.models)
            raise Refused(404, f"no model is called {name!r}. Served: {known}.", "model", "model_not_found")
        return self.models[name]

    def _check_lengths(self, prompts: list[list[int]], longest: int) -> None:
        if not prompts or not all(prompts):
            raise Refused(400, "a prompt must hold a token at least.", "prompt")
        size = self.engine.model.get_input_embeddings().num_embeddings
        if any(not 0 <= token < size for ids in prompts for token in ids):
            raise Refused(400, f"a token of the prompt lies outside the vocabulary of {size}.", "prompt")
        need = max(map(len, prompts)) + longest
        if self.positions is not None and need > self.positions:
            raise Refused(
                400,
                f"the prompt of {need - longest} tokens and an answer of up to {longest} are longer than the model's "
                f"{self.positions} positions.",
                "max_tokens",
                "context_length_exceeded",
            )

    def _card(self, name: str) -> dict[str, Any]:
        base = next(n for n, adapter in self.models.items() if adapter is None)
        return {
            "id": name, "object": "model", "created": self.born, "owned_by": "lora-lite",
            "parent": None if name == base else base,
        }  # fmt: skip


def _text(turn: Turn) -> str:
    """A turn's content, which may come in parts."""
    parts = turn.content if isinstance(turn.content, list) else [{"type": "text", "text": turn.content or ""}]
    for part in parts:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Refused(400, f"a part of type {part.get('type')!r} is not supported; text is.", "messages")
    return "".join(part["text"] for part in parts)


def _check_fields(asked: Asked) -> None:
    """Raise for a field that would change the answer and is not known here."""
    for name, value in (asked.model_extra or {}).items():
        harmless = not value or (name == "best_of" and value == asked.n) or value == {"type": "text"}
        if not harmless and name not in UNHEEDED:
            raise Refused(400, f"{name}={json.dumps(value)[:80]} is not supported by this server; vLLM has it.", name)


def _rows(
    asked: Asked, adapter: str | None, prompts: list[list[int]], longest: int, told: asyncio.Queue[tuple[int, str]]
) -> list[Answer]:
    """n rows for every prompt, which tell what they say to the loop that serves the request."""
    loop = asyncio.get_running_loop()
    stop = tuple(s for s in ([asked.stop] if isinstance(asked.stop, str) else asked.stop or ()) if s)
    answers: list[Answer] = []
    for ids in prompts:
        for k in range(asked.n):
            seed = None if asked.seed is None else asked.seed + k
            how = Sampling(longest, asked.temperature, asked.top_p, seed, stop)
            index = len(answers)

            def tell(answer: Answer, text: str, index: int = index) -> None:
                loop.call_soon_threadsafe(told.put_nowait, (index, text))

            answers.append(Answer(ids, adapter, how, tell))
    return answers


async def _pieces(
    answers: list[Answer], told: asyncio.Queue[tuple[int, str]], request: Request | None = None
) -> AsyncIterator[tuple[int, str]]:
    """(row, new text) until every row has ended, "" being a row's end; the rows end with a client that has gone."""
    left = len(answers)
    while left:
        try:
            index, text = await asyncio.wait_for(told.get(), timeout=1.0)
        except asyncio.TimeoutError:
            if request is not None and await request.is_disconnected():
                return
            continue
        left -= not text
        yield index, text


async def _events(
    head: dict[str, Any], asked: Asked, answers: list[Answer], told: asyncio.Queue[tuple[int, str]], prompts: int
) -> AsyncIterator[str]:
    """The events of a stream; an error is one of them, since the status has been sent."""
    chat = head["object"] == "chat.completion"
    if chat:
        head = {**head, "object": "chat.completion.chunk"}
    try:
        for index in range(len(answers) if chat else 0):
            yield _event(head, [{"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        async for index, text in _pieces(answers, told):
            answer = answers[index]
            if answer.finish == "error":
                yield f"data: {json.dumps(Refused(500, answer.error).body)}\n\n"
                return
            end = None if text else answer.finish
            said: dict[str, Any] = {"delta": {"content": text} if text else {}} if chat else {"text": text}
            yield _event(head, [{"index": index, **said, "logprobs": None, "finish_reason": end}])
        if (asked.stream_options or {}).get("include_usage"):
            yield _event({**head, "usage": _usage(answers, asked.n)}, [])
        yield "data: [DONE]\n\n"
    finally:
        _cancel(answers)


def _event(head: dict[str, Any], choices: list[dict[str, Any]]) -> str:
    return f"data: {json.dumps({**head, 'choices': choices})}\n\n"


def _whole(kind: str, index: int, answer: Answer) -> dict[str, Any]:
    said: dict[str, Any] = {"text": answer.text}
    if kind == "chat.completion":
        said = {"message": {"role": "assistant", "content": answer.text}}
    return {"index": index, **said, "logprobs": None, "finish_reason": answer.finish}


def _usage(answers: list[Answer], n: int) -> dict[str, int]:
    asked, said = sum(len(a.ids) for a in answers[::n]), sum(len(a.tokens) for a in answers)
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


def _cancel(answers: list[Answer]) -> None:
    """Nobody waits for these any more."""
    for answer in answers:
        answer.cancelled = True


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)
    return JSONResponse(error.body, error.status)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    wrong = Refused(400, f"{'.'.join(place) or 'the body'}: {first['msg']}.", place[0] if place else None)
    return JSONResponse(wrong.body, wrong.status)
