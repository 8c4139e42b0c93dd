"""merge, combine, scale and convert on files."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lora_lite as ll
import tiny_llm
from lora_lite import cli
from lora_lite.cli.convert import layouts
from lora_lite.io.fold_files import checkpoint_tensors, hollow, merge_files, size_of
from lora_lite.io.load import load
from lora_lite.runtime.view import folded as folded_module

transformers = pytest.importorskip("transformers")
pytest.importorskip("tyro")


def fill(model, seed: int = 1) -> None:
    torch.manual_seed(seed)
    for name in ll.adapters(model):
        for p in ll.adapters(model)[name].parameters():
            with torch.no_grad():
                p.add_(0.2 * torch.randn_like(p))


def made(path: Path, cfg: ll.AdapterConfig, seed: int = 1) -> Path:
    model = tiny_llm.model()
    ll.attach(model, cfg)
    fill(model, seed)
    return ll.save(model, path)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merge")
    tiny_llm.save(folder / "tiny")
    made(folder / "a.safetensors", ll.LoRAConfig(r=3, alpha=5))
    made(folder / "b.safetensors", ll.LoRAConfig(r=4, layers=(0,)), seed=2)
    tiny_llm.sums(folder / "sums.jsonl")
    return folder


@pytest.fixture
def told(capsys):
    def run(*words: object) -> tuple[int, str]:
        capsys.readouterr()
        code = cli.main([str(w) for w in words])
        out = capsys.readouterr()
        return code, out.out + out.err

    return run


def in_memory(files: Path, weights: dict[str, float]) -> dict[str, torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(files / "tiny")
    for name in weights:
        ll.load(model, files / f"{name}.safetensors", name=name)
    ll.activate(model, weights)
    ll.merge(model)
    return {n: p.detach() for n, p in model.named_parameters() if "lora_" not in n}


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for path in sorted(folder.glob("*.safetensors")) for k, t in load_file(path).items()}


def test_merge_writes_what_merging_in_memory_gives(files, told, tmp_path):
    code, text = told(
        "merge", files / "a.safetensors", files / "b.safetensors", "--weights", "0.5", "-1.5", "--model",
        files / "tiny", "--out", tmp_path / "m",
    )  # fmt: skip
    assert code == 0 and "merged a, b into 14 layers" in text
    want, got = in_memory(files, {"a": 0.5, "b": -1.5}), weights_in(tmp_path / "m")
    assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want)
    base = weights_in(files / "tiny")
    assert sum(not torch.equal(base[k], got[k]) for k in base) == 14
    assert (tmp_path / "m" / "tokenizer.json").is_file() and (tmp_path / "m" / "config.json").is_file()
    assert told("eval", "--model", tmp_path / "m", "--data", files / "sums.jsonl", "--rows", "2")[0] == 0
    assert told("merge", files / "a.safetensors", "--model", files / "tiny", "--out", tmp_path / "m")[0] == 2


def test_shards_have_an_index(files, told, tmp_path):
    words = ("merge", files / "a.safetensors", "--model", files / "tiny", "--out", tmp_path / "m", "--json")
    code, text = told(*words, "--shard-size", "20KB")
    assert code == 0 and len(json.loads(text)["change"]) == 14
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    want, model = in_memory(files, {"a": 1.0}), transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert all(torch.equal(p, want[n]) for n, p in model.named_parameters())
    # and several files become one again
    code, _ = told(
        *words[:3], tmp_path / "m", "--out", tmp_path / "one", "--base-check", "ignore", "--shard-size", "1GB"
    )
    assert code == 0 and [p.name for p in (tmp_path / "one").glob("*.safetensors")] == ["model.safetensors"]


def test_another_base_is_refused_and_nothing_is_left(files, told, tmp_path):
    other = tiny_llm.model(seed=9)
    other.save_pretrained(tmp_path / "other")
    tiny_llm.tokenizer().save_pretrained(tmp_path / "other")
    code, text = told("merge", files / "a.safetensors", "--model", tmp_path / "other", "--out", tmp_path / "m")
    assert code == 2 and "trained on other base weights" in text and not (tmp_path / "m").exists()
    assert not list(tmp_path.glob(".lora-lite-*"))


@pytest.mark.parametrize("method", ["ia3", "dora", "oft", "vera", "hra", "bitfit"])
def test_every_kind_of_page(method, files, tmp_path, monkeypatch):
    for name, numbers in (("SMALL", 70), ("LARGE", 200)):  # several blocks in matrices of 32 x 32
        monkeypatch.setattr(folded_module, name, numbers)
    variant = ll.get_variant(method)
    config = transformers.LlamaConfig.from_pretrained(files / "tiny")
    config.attention_bias = True
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    names = ("q_proj", "o_proj")
    model.save_pretrained(tmp_path / "base")
    extra = {} if "r" in variant.ignores else {"r": 4}
    ll.attach(model, variant.config(variant=method, target_names=names, train_modules=("norm",), **extra))
    fill(model)
    ll.save(model, tmp_path / "x.safetensors")
    report = ll.merge(model)
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(config)
    hollow(empty, checkpoint_tensors(tmp_path / "base"))
    load(empty, tmp_path / "x.safetensors", base_check="ignore")
    said = merge_files(empty, tmp_path / "base", tmp_path / "m", adapter_files={"default": tmp_path / "x.safetensors"})
    got = weights_in(tmp_path / "m")
    for n, p in model.named_parameters():
        if "lora_" not in n:
            assert torch.equal(p, got[n]), n
    assert said.change.keys() == report.change.keys() and said.rounding == report.rounding


def test_transposed_and_tied_weights(tmp_path):
    config = transformers.GPT2Config(n_layer=1, n_embd=12, n_head=2, vocab_size=30, n_positions=16)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    ll.attach(model, ll.DoRAConfig(r=2, alpha=3, target_names=("c_attn", "c_fc")))
    fill(model)
    ll.save(model, tmp_path / "x.safetensors")
    assert cli.main(["merge", str(tmp_path / "x.safetensors"), "--model", str(tmp_path / "base"), "--out",
                     str(tmp_path / "m")]) == 0  # fmt: skip
    ll.merge(model)
    got = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "m")
    want = {n: p for n, p in model.named_parameters() if "lora_" not in n}
    assert all(torch.equal(p, want[n]) for n, p in got.named_parameters())


def test_checkpoints_that_cannot_be_merged(files, told, tmp_path):
    shutil.copytree(files / "tiny", tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    whole = path.read_bytes()
    for data, says in ((whole[:-100], "cut short"), (b"\xff" * 64, "no safetensors file"), (None, "never pickles")):
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)
        code, text = told("merge", files / "a.safetensors", "--model", tmp_path / "base", "--out", tmp_path / "m")
        assert (code, says in text) == (2, True), text
    assert told("merge", files / "a.safetensors", "--model", files / "tiny", "--out", files / "tiny", "--overwrite")[0]
    for text in ("x", "0GB", "-1MB", "nanGB"):
        with pytest.raises(ll.FileError):
            size_of(text)
    assert size_of("1.5GB") == 1_500_000_000 and size_of("2MiB") == 2 << 20


MEASURED = """
import resource
from lora_lite import cli
folder = {folder!r}
assert cli.main(["merge", folder + "/small.safetensors", "--model", folder + "/small", "--out", folder + "/s"]) == 0
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert cli.main(["merge", folder + "/large.safetensors", "--model", folder + "/large", "--out", folder + "/l"]) == 0
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_memory_is_one_tensor(tmp_path):
    """A model of 430 MB whose largest tensor has 67 MB."""
    for name, width in (("small", 64), ("large", 2048)):
        config = transformers.LlamaConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=3, num_attention_heads=8,
            num_key_value_heads=8, vocab_size=64,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        model.save_pretrained(tmp_path / name)
        ll.attach(model, ll.LoRAConfig(r=2, alpha=3))
        fill(model)
        ll.save(model, tmp_path / f"{name}.safetensors")
        del model
    run = subprocess.run(
        [sys.executable, "-c", MEASURED.format(folder=str(tmp_path))], capture_output=True, text=True, check=True
    )
    extra = int(run.stdout.split()[-1])
    assert extra < 1.5 * 4 * 2048 * 8192, extra


# ---- combine, scale, convert


def test_combine(files, told, tmp_path):
    words = ("combine", files / "a.safetensors", files / "b.safetensors", "--model", files / "tiny", "--out")
    assert told(*words, tmp_path / "c.safetensors", "--weights", "0.5", "-1.5")[0] == 0
    model = tiny_llm.model()
    ll.load(model, tmp_path / "c.safetensors")
    ll.merge(model)
    want = in_memory(files, {"a": 0.5, "b": -1.5})
    for n, p in model.named_parameters():
        if "lora_" not in n:
            assert torch.allclose(p, want[n], atol=1e-5), n
    code, text = told(*words, tmp_path / "t.safetensors", "--how", "ties", "--density", "0.3", "--json")
    facts = json.loads(text)
    assert code == 0 and facts["targets"] == 14
    assert ll.load(tiny_llm.model(), tmp_path / "t.safetensors").cfg.r == 4
    assert "give one for each" in told(*words, tmp_path / "n", "--weights", "1")[1]


def test_combine_searches(files, told, tmp_path):
    words = ("combine", files / "a.safetensors", files / "b.safetensors", "--model", files / "tiny", "--out")
    more = ("--search", "0", "0.5", "--data", files / "sums.jsonl", "--json")
    facts = json.loads(told(*words, tmp_path / "c.safetensors", *more)[1])
    assert len(facts["curve"]) == 4
    assert facts["weights"] == min(facts["curve"], key=lambda point: point["loss"])["weights"]
    told_alone = told(
        "eval", "--model", files / "tiny", "--data", files / "sums.jsonl", "--max-new-tokens", "0", "--json"
    )
    assert facts["curve"][0]["loss"] == pytest.approx(json.loads(told_alone[1])["loss"], abs=1e-5)  # both weights 0


def test_scale(files, told, tmp_path):
    words = ("scale", files / "a.safetensors", "--model", files / "tiny")
    assert told(*words, "--by", "-0.25", "--out", tmp_path / "s.safetensors")[0] == 0
    model = tiny_llm.model()
    ll.load(model, tmp_path / "s.safetensors")
    ll.merge(model)
    want = in_memory(files, {"a": -0.25})
    assert all(torch.allclose(p, want[n], atol=1e-5) for n, p in model.named_parameters() if n in want)
    code, text = told(*words, "--search", "0", "0.1", "1", "--data", files / "sums.jsonl")
    assert code == 0 and "lowest" in text and "nothing is written" in text
    for bad in (
        (),
        ("--by", "1"),
        ("--by", "1", "--out", "x", "--keep", files / "sums.jsonl"),
        ("--search", "1"),
        ("--by", "nan", "--out", "x"),
        ("--by", "1", "--search", "1"),
    ):
        assert told(*words, *bad)[0] == 2


def test_what_is_forgotten_stands_beside_what_is_learnt(files, told, tmp_path):
    known = tmp_path / "known.jsonl"
    known.write_text('{"text": "1 2 3"}\n{"text": "3 2 1 3"}\n')
    words = ("scale", files / "a.safetensors", "--model", files / "tiny", "--data", files / "sums.jsonl")
    code, text = told(*words, "--search", "0", "0.5", "1", "--keep", known)
    assert code == 0 and re.search(r"^ *0 +\d\.\d{4} +\d\.\d{4} +\+0\.0000", text, re.M), text
    curve = json.loads(told(*words, "--search", "0", "1", "--keep", known, "--json")[1])["curve"]
    alone = told("eval", "--model", files / "tiny", "--data", known, "--max-new-tokens", "0", "--json")
    assert curve[0]["kept"] == pytest.approx(json.loads(alone[1])["loss"], abs=1e-5)
    assert curve[0]["kept"] != curve[1]["kept"] and curve[0]["kept"] != curve[0]["loss"]
    code, text = told(*words, "--search", "0.5", "1", "--keep", known)
    assert code == 0 and "forgotten" in text and not re.search(r"[+-]\d\.\d{4}", text)  # the base was not asked


def test_convert_there_and_back(files, told, tmp_path):
    words = ("--model", files / "tiny", "--out")
    assert told("convert", files / "a.safetensors", *words, tmp_path / "peft", "--to", "peft")[0] == 0
    assert told("convert", tmp_path / "peft", *words, tmp_path / "back.safetensors", "--to", "lora_lite")[0] == 0
    a, b = tiny_llm.model(), tiny_llm.model()
    ll.load(a, files / "a.safetensors")
    ll.load(b, tmp_path / "back.safetensors")
    ids = torch.arange(5, 25)[None]
    assert torch.allclose(a(ids).logits, b(ids).logits, atol=1e-5)
    code, text = told("convert", files / "a.safetensors", *words, tmp_path / "x", "--to", "peftt")
    assert code == 2 and "Did you mean 'peft'" in text and all(name in text for name in layouts())
