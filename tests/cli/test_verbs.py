"""The small verbs on a tiny model: info, diff, check, cite, generate, chat, variants NAME, plan --gpu."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import lora_lite as ll
import tiny_llm
from lora_lite import cli
from lora_lite.cli._adapters import names_of

pytest.importorskip("transformers")
pytest.importorskip("tyro")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verbs")
    tiny_llm.save(folder / "tiny")
    model = tiny_llm.model()
    ll.attach(model, ll.LoRAConfig(r=3, alpha=5))
    ll.save(model, folder / "fresh.safetensors")
    for p in ll.adapters(model)["default"].parameters():
        with torch.no_grad():
            p.add_(torch.randn_like(p))
    ll.save(model, folder / "a.safetensors")
    ll.export(model, folder / "peft")
    ll.detach(model)
    ll.attach(model, ll.LoRAConfig(r=4, layers=(0,)))
    ll.save(model, folder / "b.safetensors")
    return folder


@pytest.fixture
def told(capsys):
    """Runs a command; returns (exit code, what it printed)."""

    def run(*words: object) -> tuple[int, str]:
        capsys.readouterr()
        code = cli.main([str(w) for w in words])
        out = capsys.readouterr()
        return code, out.out + out.err

    return run


def test_info(files, told):
    code, text = told("info", files / "a.safetensors", "--json")
    facts = json.loads(text)
    assert code == 0 and (facts["method"], facts["ranks"], facts["config"]["alpha"]) == ("lora", [3], 5.0)
    assert len(facts["targets"]) == 14 and facts["dead"] == [] and len(facts["norms"]) == 28
    fresh = json.loads(told("info", files / "fresh.safetensors", "--json")[1])
    assert len(fresh["dead"]) == 14 and all("lora_B" in key for key in fresh["dead"])
    peft = json.loads(told("info", files / "peft", "--json")[1])
    assert (peft["layout"], peft["ranks"], len(peft["targets"])) == ("peft", [3], 14)
    assert "largest tensors" in told("info", files / "a.safetensors")[1]
    assert told("info", files / "tiny")[0] == 2


def test_diff(files, told):
    assert told("diff", files / "a.safetensors", files / "a.safetensors")[0] == 0
    code, text = told("diff", files / "a.safetensors", files / "b.safetensors", "--json")
    found = json.loads(text)
    assert code == 1 and found["config"]["r"] == [3, 4] and found["tensors"] and len(found["only_a"]) == 14
    code, text = told("diff", files / "a.safetensors", files / "fresh.safetensors")
    assert code == 1 and "28 tensors differ of 28" in text
    code, text = told("diff", files / "a.safetensors", files / "b.safetensors")
    assert code == 1 and "r: 3 in a, 4 in b\n" in text
    assert "14 tensors have other shapes, such as " in text and ": 3x48 in a, 4x48 in b" in text


def test_diff_of_two_methods(capsys):
    from lora_lite.cli.diff import show_settings

    show_settings({"r": 3, "variant": "lora", "own": 1}, {"r": 4, "variant": "dora", "other": None})
    said = "variant: 'lora' in a, 'dora' in b\nr: 3 in a, 4 in b\n"
    assert capsys.readouterr().out == f"{said}settings that only a has: own\nsettings that only b has: other\n"


def test_check(files, told):
    code, text = told("check", files / "a.safetensors", "--model", files / "tiny", "--json")
    found = json.loads(text)
    assert code == 0 and found["acts"] and found["effect"] > 0 and len(found["targets"]) == 14
    code, text = told("check", files / "fresh.safetensors", "--model", files / "tiny")
    assert code == 1 and "it does nothing" in text


def test_cite_and_the_page_of_a_method(files, told):
    text = told("cite", "dora")[1]
    assert "eprint = {2402.09353}" in text and "title = {DoRA: Weight-Decomposed Low-Rank Adaptation}" in text
    assert "author = {Liu and others}" in text and "year = {2024}" in text
    assert "author = {Kang and Yin}" in told("cite", "miss")[1]
    text = told("variants", "dora")[1]
    assert text.startswith("dora: ") and "2402.09353" in text
    assert "ignores" in json.loads(told("variants", "ia3", "--json")[1])
    code, text = told("variants", "dora", "--model", files / "tiny")
    assert code == 0 and re.search(r"^lora_m +768 ", text, re.M) and "└──" in text and "FLOP" in text
    assert told("variants", "--model", "demo")[0] == 2
    code, text = told("variants", "dorra")
    assert code == 2 and "Did you mean 'dora'" in text


@pytest.mark.parametrize(
    ("name", "found", "how"),
    [
        ("MHR", "poly", "splits"),
        ("mixlora", "molora", "top=2"),
        ("LoRAMoE", "molora", ""),
        ("KronA", "lokr", "factored=False"),
        ("LLaMA-Adapter", "adaption_prompt", ""),
        ("Pfeiffer", "bottleneck", "down_proj"),
        ("P-Tuning v2", "prefix_tuning", ""),
        ("ETHER+", "ether_plus", ""),
        ("LoRA-FA", "lora_fa", ""),
        ("LN Tuning", "whole", "norm"),
    ],
)
def test_other_names_lead_to_the_page(told, name, found, how):
    code, text = told("variants", name)
    assert code == 0 and text.startswith(f"{name!r} is {found!r}") and how in text.splitlines()[0]
    assert json.loads(told("variants", name, "--json")[1])["name"] == found
    with pytest.raises(ll.ConfigError, match=f"is '{found}'"):
        ll.get_variant(name)
    assert all(other in told("variants", "--markdown")[1] for other in ll.get_variant(found).also)


def test_no_name_leads_to_two_methods():
    from lora_lite.core.registry import called

    for variant in ll.variants():
        for name in (variant.name, *variant.also):
            assert called(name) is variant, name


def test_plan_says_whether_it_fits(files, told):
    text = told("plan", "--model", files / "tiny", "--length", "16", "--gpu", "24GB")[1]
    assert text.count(" fits (1 x 16 tokens") == 2
    assert "does not fit" in told("plan", "--model", files / "tiny", "--length", "16", "--gpu", "0.0001")[1]
    code, text = told("plan", "--gpu", "big")
    assert code == 2 and "24GB" in text


def test_plan_on_many_gpus(told, files):
    tiny = ("plan", "--model", files / "tiny", "--length", "16")
    text = told(*tiny, "--gpus", "4", "--shards", "2", "--gpu", "24GB")[1]
    assert "fsdp2 on 4 in shards over 2: each holds" in text and "fits" in text
    stated = json.loads(told(*tiny, "--gpus", "2", "--json")[1])
    own = stated["spread"]
    assert own["shards"] == 2 and stated["bytes"] / 2 <= own["adapter"] < 0.7 * stated["bytes"]
    code, text = told("plan", "--gpus", "6", "--shards", "4")
    assert code == 2 and "multiple of shards" in text


def test_generate(files, told, tmp_path):
    rows = [
        {"prompt": "1+1="},
        {"messages": [{"role": "user", "content": "2+2"}]},
        {"instruction": "Add", "input": "1"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("generate", "--model", files / "tiny", "--data", tmp_path / "p.jsonl", "--max-new-tokens", "3")
    code, text = told(*words)
    bare = [json.loads(line) for line in text.splitlines()]
    assert code == 0 and [set(row) for row in bare] == [{"prompt", "answer"}] * 3
    assert told(*words, "--adapter", files / "a.safetensors", "--out", tmp_path / "o.jsonl")[0] == 0
    adapted = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [r["prompt"] for r in adapted] == [r["prompt"] for r in bare] and adapted != bare
    (tmp_path / "q.jsonl").write_text('{"text": "a"}\n')
    code, text = told("generate", "--model", files / "tiny", "--data", tmp_path / "q.jsonl")
    assert code == 2 and "q.jsonl:1: a row needs a prompt" in text


def test_chat_switches_adapters_and_takes_turns_back(files, told, monkeypatch):
    seen = []
    talk = __import__("lora_lite.cli.chat", fromlist=["Talk"]).Talk
    answer = talk.answer
    monkeypatch.setattr(
        talk, "answer", lambda self, line: (seen.append((len(self.turns), line)), answer(self, line))[1]
    )
    lines = "hi\n/adapter none\nhi\n/undo\nhi\n/reset\nhi\n/adapter nobody\n/help\n/quit\nnever\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    words = ("chat", files / "a.safetensors", files / "b.safetensors", "--model", files / "tiny")
    code, text = told(*words, "--max-new-tokens", "3")
    assert code == 0 and "adapters: a, b" in text and "nobody" in text
    assert seen == [(0, "hi"), (2, "hi"), (2, "hi"), (0, "hi")]
    assert list(names_of((Path("x/adapter.safetensors"), Path("y/x")))) == ["x", "x_"]


def test_generate_asks_as_training_does():
    """Alpaca's own prompt where the tokenizer has no chat template, ShareGPT's turns by their roles."""
    from lora_lite.cli.generate import prompt_of
    from lora_lite.data.forms import formed, question

    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    for chat in (False, True):
        for extra in ("1 and 2", ""):
            located = ({**row, "input": extra}, "here")
            assert prompt_of(located, {}, chat) == question(formed([located], {}, chat)[0])
    turns = [{"from": "human", "value": "1+1"}, {"from": "gpt", "value": "2"}]
    located = ({"conversations": turns}, "here")
    assert prompt_of(located, {}, True) == [{"role": "user", "content": "1+1"}]
    assert prompt_of(({"messages": [{"role": "user", "content": "a"}]}, "x"), {}, True) == [
        {"role": "user", "content": "a"}
    ]
