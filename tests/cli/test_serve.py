"""`lora-lite serve`, asked over HTTP: each request is answered with the adapter that it names, in one batch."""

from __future__ import annotations

import copy
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import lora_lite as ll
import tiny_llm
from lora_lite.testing.case import randomise

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(port, model, engine, twin) of a server in this process: a bare base and two adapters; the twin is a copy of the
    model, which may be asked while the engine's thread is still at the last request."""
    from lora_lite.cli._engine import Engine
    from lora_lite.cli._openai import Api
    from lora_lite.data.tokens import PLAIN

    model, tokenizer = tiny_llm.model(), tiny_llm.tokenizer()
    tokenizer.chat_template = PLAIN
    for name, method in (("a", ll.LoRAConfig(r=3, alpha=7)), ("b", ll.IA3Config())):
        ll.attach(model, method, name=name)
        randomise(model, name, seed=1)
    twin = copy.deepcopy(model)
    engine = Engine(model, tokenizer)
    engine.start()
    app = Api(engine, {"base": None, "a": "a", "b": "b"}, 9, 512).app()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield port, model, engine, twin
    server.should_exit = True
    thread.join()
    engine.stop()


def ask(port, path, body=None):
    """(status, JSON or the events' data)"""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    text = None if body is None else json.dumps(body)
    connection.request("GET" if body is None else "POST", path, text, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    said = answer.read().decode()
    connection.close()
    if answer.headers["Content-Type"].startswith("text/event-stream"):
        return answer.status, [line.removeprefix("data: ") for line in said.split("\n\n") if line]
    return answer.status, json.loads(said)


def greedy(model, name, prompt, n):
    """What the model itself says with this adapter."""
    tokenizer = tiny_llm.tokenizer()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with ll.active(model, name), torch.no_grad():
        out = model.generate(input_ids=ids, max_new_tokens=n, do_sample=False, pad_token_id=0, eos_token_id=[2])
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_models(served):
    status, said = ask(served[0], "/v1/models")
    assert status == 200 and [m["id"] for m in said["data"]] == ["base", "a", "b"]
    assert [m["parent"] for m in said["data"]] == [None, "base", "base"]
    assert ask(served[0], "/v1/models/b")[1]["id"] == "b"


def test_one_batch_with_the_adapter_that_each_request_names(served):
    port, _, engine, model = served
    asked = [("base", "1+1="), ("a", "hello there"), ("b", "x"), ("a", "2*3="), ("base", "abc"), ("b", "12 and 13")]
    before = len(engine.batches)

    def completion(model, prompt):
        return ask(port, "/v1/completions", {"model": model, "prompt": prompt, "max_tokens": 7, "temperature": 0})

    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda pair: completion(*pair), asked))
    sizes = engine.batches[before:]
    assert sum(sizes) == len(asked) and max(sizes) > 1
    for (name, prompt), (status, said) in zip(asked, found, strict=True):
        want = greedy(model, None if name == "base" else name, prompt, 7)
        assert status == 200 and said["model"] == name and said["choices"][0]["text"] == want
        assert said["usage"]["prompt_tokens"] == len(prompt) and said["object"] == "text_completion"
    texts = {greedy(model, name, "hello there", 7) for name in (None, "a", "b")}
    assert len(texts) == 3


def test_a_stream_says_what_the_whole_says(served):
    port, *_ = served
    turns = [{"role": "user", "content": "how much is 3+4?"}]
    body = {"model": "a", "messages": turns, "temperature": 0, "n": 2, "max_tokens": 6}
    _, whole = ask(port, "/v1/chat/completions", body)
    _, events = ask(port, "/v1/chat/completions", {**body, "stream": True, "stream_options": {"include_usage": True}})
    assert events[-1] == "[DONE]" and whole["object"] == "chat.completion"
    chunks = [json.loads(e) for e in events[:-1]]
    assert chunks[-1]["usage"] == whole["usage"] and chunks[-1]["choices"] == []
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"} and len({c["id"] for c in chunks}) == 1
    for i in (0, 1):
        mine = [c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["index"] == i]
        assert mine[0]["delta"]["role"] == "assistant" and mine[-1]["finish_reason"] == "length" and len(mine) > 3
        said = "".join(m["delta"].get("content", "") for m in mine)
        assert said == whole["choices"][i]["message"]["content"]


def test_a_turn_in_parts_is_the_turn_in_one(served):
    def said(content, **changes):
        turn = {"role": "user", "content": content, **changes}
        return ask(served[0], "/v1/chat/completions", {"model": "a", "messages": [turn], "temperature": 0})

    parts = [{"type": "text", "text": "how much "}, {"type": "text", "text": "is 3+4?"}]
    whole, cut = said("how much is 3+4?"), said(parts)
    assert whole[1]["choices"] == cut[1]["choices"] and whole[1]["usage"] == cut[1]["usage"] and whole[0] == 200
    status, wrong = said([{"type": "image_url", "image_url": {"url": "data:"}}])
    assert status == 400 and "'image_url' is not supported" in wrong["error"]["message"]


def test_a_template_that_refuses_is_no_failure_of_the_server(served, monkeypatch):
    template = "{{ raise_exception('turns must alternate') }}"
    monkeypatch.setattr(served[2].tokenizer, "chat_template", template)
    body = {"model": "a", "messages": [{"role": "user", "content": "1"}]}
    status, said = ask(served[0], "/v1/chat/completions", body)
    assert status == 400 and "turns must alternate" in said["error"]["message"]


def test_sampling_is_each_rows_own(served):
    """A seed says the same whoever is asked beside it; a small nucleus is the greedy answer; stops end before them."""
    port, *_, model = served

    def said(**changes):
        body = {"model": "a", "prompt": "1+1=", "max_tokens": 8, "seed": 5, **changes}
        return [c["text"] for c in ask(port, "/v1/completions", body)[1]["choices"]]

    alone = said()
    want = greedy(model, "a", "1+1=", 8)
    assert alone != [want] and said(prompt=["1+1=", "longer than that"])[0] == alone[0] and said(seed=6) != alone
    assert said(n=2)[0] == alone[0] and said(n=2)[1] != alone[0] and said(n=2)[1] == said(seed=6)[0]
    assert said(temperature=1.5, top_p=1e-6) == [want] == said(temperature=0)
    assert said(temperature=0, stop=want[3:5]) == [want[: want.find(want[3:5])]]


def test_a_stop_is_never_streamed_in_part(served):
    port, *_, model = served
    want = greedy(model, "a", "1+1=", 8)
    body = {"model": "a", "prompt": "1+1=", "max_tokens": 8, "temperature": 0, "stop": [want[4:7]], "stream": True}
    chunks = [json.loads(e) for e in ask(port, "/v1/completions", body)[1][:-1]]
    assert "".join(c["choices"][0]["text"] for c in chunks) == want[: want.find(want[4:7])]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "status, param, body",
    [
        (404, "model", {"model": "c", "prompt": "1"}),
        (400, "prompt", {"model": "a"}),
        (400, "prompt", {"model": "a", "prompt": []}),
        (400, "prompt", {"model": "a", "prompt": [[4, 9999]]}),
        (400, "temperature", {"model": "a", "prompt": "1", "temperature": 9}),
        (400, "logprobs", {"model": "a", "prompt": "1", "logprobs": 3}),
        (400, "max_tokens", {"model": "a", "prompt": "1", "max_tokens": 600}),
    ],
)
def test_what_cannot_be_answered(served, status, param, body):
    got, said = ask(served[0], "/v1/completions", body)
    assert got == status and said["error"]["param"] == param and said["error"]["type"] == "invalid_request_error"


def test_an_error_in_the_model_is_told_and_the_next_request_answered(served, monkeypatch):
    port, model, *_ = served
    body = {"model": "a", "prompt": "1+1=", "max_tokens": 3}
    with monkeypatch.context() as patch:
        patch.setattr(model, "generate", lambda **_: 1 / 0)
        status, said = ask(port, "/v1/completions", body)
        assert status == 500 and "ZeroDivisionError" in said["error"]["message"]
        assert "ZeroDivisionError" in ask(port, "/v1/completions", {**body, "stream": True})[1][-1]
    assert ask(port, "/v1/completions", body)[0] == 200


@pytest.mark.slow
@pytest.mark.optional_backend("openai")
def test_the_command_with_openais_own_client(tmp_path):
    openai = pytest.importorskip("openai")
    tiny_llm.save(tmp_path / "tiny")
    model = tiny_llm.model()
    ll.attach(model, ll.LoRAConfig(r=3, alpha=7))
    randomise(model, seed=1)
    ll.save(model, tmp_path / "mine.safetensors")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = ["serve", tmp_path / "mine.safetensors", "--model", tmp_path / "tiny", "--name", "tiny", "--port", port]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    code = "import sys; from lora_lite.cli import main; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, words)], env=env)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=100)
        assert [m.id for m in client.models.list()] == ["tiny", "mine"]
        said = client.completions.create(model="mine", prompt="1+1=", max_tokens=6, temperature=0)
        assert said.choices[0].text == greedy(model, "default", "1+1=", 6)
        bare = client.completions.create(model="tiny", prompt="1+1=", max_tokens=6, temperature=0)
        assert bare.choices[0].text == greedy(model, None, "1+1=", 6) != said.choices[0].text
        turns = [{"role": "user", "content": "1+1="}]
        whole = client.chat.completions.create(model="mine", messages=turns, temperature=0, max_tokens=5)
        parts = client.chat.completions.create(model="mine", messages=turns, temperature=0, max_tokens=5, stream=True)
        text = "".join(part.choices[0].delta.content or "" for part in parts)
        assert text == whole.choices[0].message.content
        with pytest.raises(openai.NotFoundError, match="no model is called"):
            client.completions.create(model="other", prompt="1")
    finally:
        process.terminate()
        process.wait(30)
