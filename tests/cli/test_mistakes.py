"""Mistakes, tried one by one: each is one sentence, exit code 2, no traceback, and nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_lite as ll
import tiny_llm
from lora_lite import cli

pytest.importorskip("trl")
pytest.importorskip("tyro")
TRAIN = "train --model {d}/tiny --data {d}/sums.jsonl --out {d}/run --steps 1"
WRITTEN = {
    "latin1.jsonl": '{"text": "caf\xe9"}\n'.encode("latin1"),
    "binary.jsonl": b"\x00\x01\x02" * 50,
    "utf16le.jsonl": '{"text": "a"}\n'.encode("utf-16-le"),
    "empty.jsonl": b"",
    "blank.jsonl": b"\n\n",
    "broken.jsonl": b'{"text": "a"}\n{"text": \n',
    "scalar.jsonl": b"3\n",
    "list.jsonl": b'["a"]\n',
    "columns.jsonl": b'{"q": "a", "a": "b"}\n',
    "number.jsonl": b'{"text": 3}\n',
    "null.jsonl": b'{"prompt": "a", "completion": null}\n',
    "roles.jsonl": b'{"messages": [{"role": "user", "content": "a"}]}\n',
    "turns.jsonl": b'{"messages": "hello"}\n',
    "content.jsonl": b'{"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "a"}]}\n',
    "sharegpt.jsonl": b'{"conversations": [{"from": "human"}]}\n',
    "broken.json": b'[{"text": "a"},',
    "half.jsonl": b'{"text": "\\ud83d"}\n',
    "half_turn.jsonl": b'{"messages": [{"role": "user", "content": "\\ude00"}]}\n',
    "digits.jsonl": b'{"text": "a", "n": ' + b"1" * 5000 + b"}\n",
    "deep.jsonl": b'{"text": ' + b"[" * 200_000 + b"\n",
    "deep.json": b"[" * 200_000,
    "ragged.csv": b"prompt,completion\na,b\nc\n",
    "fake.parquet": b"PAR1nothing",
    "pairs.jsonl": b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
    "choices.jsonl": b'{"question": "a", "choices": ["b", "c"], "answer": "D"}\n',
    "text.jsonl": b'{"text": "a"}\n',
    "bad.jinja": b"{% for %}",
    "latin1.jinja": "caf\xe9".encode("latin1"),
    "bad.yaml": b"a: [",
    "list.yaml": b"- a\n",
    "verb.yaml": b"verb: eval\n",
    "flag.yaml": b"learning-rate: 1\n",
    "broken.safetensors": b"\xff" * 40,
    "short.safetensors": b"\x10",
}
DATA = "train --model {d}/tiny --out {d}/run --data {d}/"
CASES = [
    # verbs and flags
    ("tarin", "Did you mean 'train'"),
    ("trian --model x", "no command 'trian'"),
    ("train --learning-rate 1", "here it is called --lr"),
    ("train --lora-r 8", "here it is called --r"),
    ("train --lora-alpha 8", "here it is called --alpha"),
    ("train --num-train-epochs 8", "here it is called --epochs"),
    ("train --output-dir x", "here it is called --out"),
    ("train --per-device-train-batch-size 8", "--batch-size"),
    ("train --max-seq-length 8", "--max-length"),
    ("train --steeps 3", "Did you mean '--steps'"),
    ("eval --adaptor x", "Did you mean '--adapter'"),
    ("plan --methd lora", "Did you mean '--method'"),
    ("plan --method lroa", "there is no such method"),
    ("variants dorra", "Did you mean 'dora'"),
    ("cite lroa", "no variant is called 'lroa'"),
    ("plan --gpu big", "24GB"),
    ("plan --model {d}/nothing", "no model config under"),
    ("plan --batch 0", "--batch and --length must be positive"),
    ("plan --compare nothing", "no trained method has that name"),
    ("plan --import nothing_here", "no module is called"),
    # words of another kind than their flag takes, missing ones, ones too many
    (TRAIN + " --seed 1.5", "--seed takes a whole number, got '1.5'."),
    (TRAIN + " --seed None", "--seed takes a whole number, got 'None'."),
    (TRAIN + " --seed=", "--seed takes a whole number, got ''."),
    (TRAIN + " --seed", "--seed needs a value: a whole number."),
    (TRAIN + " --lr fast", "--lr takes a number or None, got 'fast'."),
    (TRAIN + " --schedule cosin", "Did you mean 'cosine'?"),
    (TRAIN + " --layers 1 x", "each a whole number or None, got 'x'."),
    (TRAIN + " --layers 1 --layers 2", "after one: --layers 1 2"),
    (TRAIN + " --rank-pattern q_proj", "pairs of a name and a whole number"),
    (TRAIN + " --resume true", "A switch takes no value."),
    (TRAIN + " extra", "no use for the word 'extra'"),
    (TRAIN + " --method road --per-pair 3", "one of 1, 2, 4, got '3'."),
    ("info", "needs FILE: lora-lite info FILE"),
    ("info --file x", "FILE stands without a flag"),
    ("diff a", "needs B: lora-lite diff A B"),
    ("convert a b --out c", "no use for the word 'b'"),
    ("merge a", "needs --out"),
    ("bench memory --device cpu", "leave out --device"),
    ("plan --compare lora dora --gpus 8", "--method NAME instead of --compare"),
    ("bench learn --task x", "one of wordmath, glosses, metamath, got 'x'"),
    # numbers
    (TRAIN + " --seed -1", "--seed must lie between"),
    (TRAIN + " --seed 99999999999999999999", "--seed must lie between"),
    (TRAIN + " --batch-size 0", "--batch-size must be at least 1"),
    (TRAIN + " --accumulation 0", "--accumulation must be at least 1"),
    (TRAIN + " --steps 0", "--steps must be at least 1"),
    (TRAIN + " --rows 0", "--rows must be at least 1"),
    (TRAIN + " --epochs 0", "--epochs must be positive"),
    (TRAIN + " --epochs nan", "--epochs must be positive"),
    (TRAIN + " --lr -1", "--lr must be positive"),
    (TRAIN + " --lr nan", "--lr must be positive"),
    (TRAIN + " --lr inf", "--lr must be positive"),
    (TRAIN + " --beta 0", "--beta must be positive"),
    (TRAIN + " --clip -1", "--clip must be 0 or more"),
    (TRAIN + " --clip nan", "--clip must be 0 or more"),
    (TRAIN + " --weight-decay -1", "--weight-decay must be 0 or more"),
    (TRAIN + " --warmup -1", "--warmup must be 0 or more"),
    (TRAIN + " --warmup 5", "as long as the whole run"),
    (TRAIN + " --keep 0", "--keep must be at least 1"),
    (TRAIN + " --patience -1", "--patience must be 0 or more"),
    (TRAIN + " --samples -1", "--samples must be 0 or more"),
    (TRAIN + " --score -1", "--score must be 0 or more"),
    (TRAIN + " --max-length 1", "--max-length must be at least 2"),
    (TRAIN + " --max-length 100000", "was made for 512 tokens"),
    (TRAIN + " --threads -1", "--threads must be 0"),
    (TRAIN + " --calibration-batches 3", "uses no calibration data"),
    (TRAIN + " --method eva --calibration-batches 0", "must be positive"),
    (TRAIN + " --r 0", "r must be between"),
    (TRAIN + " --dropout 1", "dropout must lie in"),
    (TRAIN + " --alpha nan", "alpha must be finite"),
    (TRAIN + " --method ia3 --r 4", "--r has no effect"),
    (TRAIN + " --method ia3 --alpha 4", "--alpha has no effect"),
    (TRAIN + " --target-names nothing", "matches none"),
    (TRAIN + " --layers 99", "99"),
    # combinations
    (TRAIN + " --resume --overwrite", "give one of them"),
    (TRAIN + " --resume", "holds no checkpoint"),
    (TRAIN + " --best --eval-every 0", "--best needs evaluations"),
    (TRAIN + " --patience 2 --eval-every 0", "--patience needs evaluations"),
    (TRAIN + " --best --save-every 3 --eval-every 2", "multiple of --eval-every"),
    (TRAIN + " --load-in-4bit --load-in-8bit", "exclude each other"),
    (TRAIN + " --device cuda:99", "no such device here"),
    (TRAIN + " --device gpu", "torch knows no such device"),
    (TRAIN + " --packing --trainer dpo", "--packing is for rows of text"),
    (TRAIN + " --trainer dpo", "needs rows with prompt, chosen and rejected"),
    (TRAIN + " --init-from {d}/nothing", "there is no such file"),
    (TRAIN + " --preset qality", "Did you mean 'quality'"),
    (TRAIN + " --method caa", "contrast pairs"),
    (TRAIN + " --report-to tensorbord", "Did you mean 'tensorboard'"),
    (TRAIN + " --report-to flyte", "--report-to flyte needs its package: pip install flyte"),
    # files of settings and templates
    ("train --config {d}/nothing.yaml", "cannot be read"),
    ("train --config {d}/bad.yaml", "no YAML"),
    ("train --config {d}/list.yaml", "holds no settings"),
    ("train --config {d}/verb.yaml", "written by lora-lite eval"),
    ("train --config {d}/flag.yaml", "here it is called --lr"),
    (TRAIN + " --template {d}/bad.jinja", "not Jinja"),
    (TRAIN + " --template {d}/latin1.jinja", "cannot be read"),
    (TRAIN + " --template {d}/nothing.jinja", "cannot be read"),
    # places
    ("train --model {d}/tiny --data {d}/sums.jsonl --out {d}/sums.jsonl", "is a file"),
    ("train --model {d}/tiny --data {d}/sums.jsonl --out /proc/nowhere", "nothing can be written"),
    ("demo --out /proc/nowhere", "nothing can be written"),
    ("demo --seed -1", "--seed must lie between"),
    ("demo --steps 0", "must be positive"),
    # data
    (DATA + "nothing.jsonl", "neither 'wordmath' nor a file"),
    (DATA + "latin1.jsonl", "is not UTF-8"),
    (DATA + "binary.jsonl", "binary file"),
    (DATA + "utf16le.jsonl", "binary file"),
    (DATA + "empty.jsonl", "holds no rows"),
    (DATA + "blank.jsonl", "holds no rows"),
    (DATA + "broken.jsonl", "broken.jsonl:2: not JSON"),
    (DATA + "scalar.jsonl", "a row is a JSON object"),
    (DATA + "list.jsonl", "a row is a JSON object"),
    (DATA + "columns.jsonl", "a row needs the string"),
    (DATA + "number.jsonl", "not a string"),
    (DATA + "null.jsonl", "a row needs the string"),
    (DATA + "roles.jsonl", "last message is by 'user'"),
    (DATA + "turns.jsonl", "list of objects"),
    (DATA + "content.jsonl", "list of objects"),
    (DATA + "sharegpt.jsonl", "list of objects"),
    (DATA + "broken.json", "not JSON"),
    (DATA + "half.jsonl", "half a character, \\ud83d"),
    (DATA + "half_turn.jsonl", "half a character, \\ude00"),
    (DATA + "digits.jsonl", "digits.jsonl:1: not JSON"),
    (DATA + "deep.jsonl", "deep.jsonl:1: not JSON"),
    (DATA + "deep.json", "not JSON"),
    (DATA + "ragged.csv", "1 cells in a table of 2 columns"),
    (DATA + "fake.parquet", "no Parquet file"),
    (DATA + "pairs.jsonl", "add --trainer dpo"),
    (DATA + "columns.jsonl --columns prompt", "words such as prompt=question"),
    (DATA + "columns.jsonl --columns prompt=x completion=a", "there is no column 'x'"),
    (DATA + "columns.jsonl --columns promt=q", "Did you mean 'prompt'"),
    (DATA + "text.jsonl --eval-data {d}/nothing.jsonl", "neither 'wordmath' nor a file"),
    ("eval --model {d}/tiny --data {d}/choices.jsonl", "no letter"),
    ("eval --model {d}/tiny --data {d}/sums.jsonl --split train", "has none"),
    ("eval --model {d}/tiny --data {d}/sums.jsonl --rows 0", "must be positive"),
    ("eval --model {d}/tiny --data {d}/sums.jsonl --adapter {d}/nothing", "there is no such file"),
    ("generate --model {d}/tiny --data {d}/text.jsonl", "a row needs a prompt"),
    ("generate --model {d}/tiny --data {d}/sums.jsonl --max-new-tokens 0", "must be positive"),
    ("data {d}/nothing.jsonl", "neither 'wordmath' nor a file"),
    ("data {d}/sums.jsonl --rows 0", "--rows must be at least 1"),
    # models and adapters
    ("eval --model {d}/nothing", "Give 'demo'"),
    ("eval --model {d}/truncated --data {d}/sums.jsonl", "no model can be loaded"),
    ("info {d}/nothing", "holds no adapter"),
    ("info {d}/broken.safetensors", "cannot be read"),
    ("info {d}/short.safetensors", "cannot be read"),
    ("diff {d}/a.safetensors {d}/nothing", "holds no adapter"),
    ("check {d}/nothing --model {d}/tiny", "there is no such file"),
    ("check {d}/broken.safetensors --model {d}/tiny", "broken.safetensors"),
    ("check {d}/a.safetensors --model {d}/other", "other base weights"),
    ("chat {d}/nothing --model {d}/tiny", "there is no such file"),
    ("merge {d}/nothing --out {d}/m", "there is no such file"),
    ("merge {d}/a.safetensors --model {d}/tiny --out {d}/tiny", "is not empty"),
    ("merge {d}/a.safetensors --model {d}/tiny --out {d}/m --shard-size big", "a size such as 5GB"),
    ("merge {d}/a.safetensors --model {d}/tiny --out {d}/m --weights 1 2", "give one for each"),
    ("combine {d}/a.safetensors --out {d}/c", "two adapters or more"),
    ("combine {d}/a.safetensors {d}/a.safetensors --model {d}/tiny --out {d}/c --density 0", "density must lie"),
    ("scale {d}/a.safetensors", "needs --by"),
    ("convert {d}/a.safetensors --out {d}/c --to gguff", "there is no such layout"),
]


@pytest.fixture(scope="module")
def d(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    tiny_llm.save(folder / "tiny")
    tiny_llm.sums(folder / "sums.jsonl")
    for name, data in WRITTEN.items():
        (folder / name).write_bytes(data)
    model = tiny_llm.model()
    ll.attach(model, ll.LoRAConfig(r=3, alpha=5))
    ll.save(model, folder / "a.safetensors")
    tiny_llm.model(seed=5).save_pretrained(folder / "other")
    tiny_llm.tokenizer().save_pretrained(folder / "other")
    shutil.copytree(folder / "tiny", folder / "truncated")
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    return folder


@pytest.mark.parametrize(("line", "says"), CASES, ids=[f"{i}-{line.split()[0]}" for i, (line, _) in enumerate(CASES)])
def test_one_sentence_and_exit_code_2(line, says, d, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        code = cli.main(line.format(d=d).split())
    except SystemExit as e:
        code = int(str(e.code))
    err = capsys.readouterr().err
    assert code == 2, err
    assert says in err and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1 and err.startswith("error: "), err
    assert not (d / "m").exists() and not (d / "run" / "adapter.safetensors").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_may_not_be_written(d, tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert cli.main(TRAIN.format(d=d).replace(f"{d}/run", str(tmp_path / "locked" / "run")).split()) == 2
    assert "Permission denied" in capsys.readouterr().err


def test_the_last_of_two_counts_and_is_said(capsys):
    assert cli.main("plan --json --r 2 --layers 0 --r 3 --r 3".split()) == 0
    told = capsys.readouterr()
    assert "note: --r is given twice; the last one counts: 3" in told.err.splitlines()
    assert json.loads(told.out)["trained"] == 3 * (4 * 2 * 160 + 3 * (160 + 432))


# ---- in Python


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6))


def adapted() -> nn.Sequential:
    m = model()
    ll.attach(m, ll.LoRAConfig(r=3))
    return m


PYTHON = {
    "a dict as config": (lambda: ll.attach(model(), {"r": 8}), r"config such as .*got dict"),
    "a name as config": (lambda: ll.attach(model(), "lora"), "got the name 'lora'"),
    "the class as config": (lambda: ll.attach(model(), ll.LoRAConfig), "got the class"),
    "no config": (lambda: ll.attach(model(), None), "got NoneType"),
    "swapped": (lambda: ll.attach(ll.LoRAConfig(), model()), "the first argument is the model"),
    "a tokenizer": (lambda: ll.attach(tiny_llm.tokenizer(), ll.LoRAConfig()), "the first argument is the model"),
    "lora_alpha": (lambda: ll.LoRAConfig(lora_alpha=16), "called 'alpha'"),
    "target_modules": (lambda: ll.LoRAConfig(target_modules=["q"]), "called 'target_names'"),
    "positional": (lambda: ll.LoRAConfig(8), r"LoRAConfig\(r=8\)"),
    "all-linear": (lambda: ll.LoRAConfig(target_names="all-linear"), "is what None, the default, means"),
    "r as float": (lambda: ll.LoRAConfig(r=8.5), "r must be int"),
    "r as text": (lambda: ll.LoRAConfig(r="8"), "r must be int"),
    "dtype": (lambda: ll.LoRAConfig(dtype="float17"), "must be one of"),
    "roles": (lambda: ll.LoRAConfig(target_roles=("readers",)), "Did you mean 'reader'"),
    "a name that hits nothing": (lambda: ll.attach(model(), ll.LoRAConfig(target_names=("qq",))), "matches none"),
    "no path": (lambda: ll.load(model(), None), "a path is needed"),
    "a number as path": (lambda: ll.save(adapted(), 3), "a path is needed"),
    "nowhere to save": (lambda: ll.save(adapted(), "/proc/x/a.safetensors"), "could not be written"),
    "nowhere to export": (lambda: ll.export(adapted(), "/proc/x"), "could not be written"),
    "dtype of a file": (lambda: ll.save(adapted(), "x", dtype="float16"), "must be a torch.dtype"),
    "no adapter": (lambda: ll.save(model(), "x"), "has no adapter"),
    "an unknown adapter": (lambda: ll.activate(adapted(), "b"), "no adapter is called 'b'"),
    "numbers as names": (lambda: ll.activate(adapted(), [1]), "chosen by their names"),
    "a number as choice": (lambda: ll.activate(adapted(), 1), "chosen by a name"),
    "rows of numbers": (lambda: ll.rows(adapted(), [1]).__enter__(), "chosen by their names"),
    "rows as text": (lambda: ll.rows(adapted(), "default").__enter__(), "takes a list"),
    "prompt as text": (lambda: ll.prompt(adapted(), "x").__enter__(), "one whole number per batch row"),
    "twice": (lambda: ll.attach(adapted(), ll.LoRAConfig(r=3)), "is attached already"),
    "a dot in a name": (lambda: ll.rename(adapted(), "default", "a.b"), "letters, digits"),
    "combine a list": (lambda: ll.combine(adapted(), ["default"], name="c"), "adapters with weights"),
    "an optimiser's name": (lambda: ll.schedule(adapted(), "adam", 3), "no torch.optim.Optimizer"),
    "no class of trainer": (lambda: ll.trainer("Trainer", ll.LoRAConfig()), "takes a trainer's class"),
    "no state dict": (lambda: ll.load_adapter_state_dict(adapted(), "default", None), "a state dict is needed"),
    "no data": (lambda: ll.attach(model(), ll.EVAConfig(r=3)), "calibration_data="),
    "another layout": (lambda: ll.export(adapted(), "x", format="ggufff"), "format must be"),
    "an unknown method": (lambda: ll.get_variant("lroa"), "Did you mean"),
    "a number as method": (lambda: ll.get_variant(3), "by its name"),
    "a number as name": (lambda: ll.attach(model(), ll.LoRAConfig(r=3), name=3), "an adapter's name"),
    "a weight as text": (lambda: ll.activate(adapted(), {"default": "0.5"}), "must be a finite number"),
    "a sum with text": (lambda: ll.combine(adapted(), {"default": "1"}, name="c"), "must be finite numbers"),
    "a rate as text": (lambda: ll.adapters(adapted())["default"].param_groups(lr="1e-3"), "lr is a number"),
    "a rate below 0": (lambda: ll.adapters(adapted())["default"].param_groups(lr=-1e-3), "lr is a number"),
    "a decay below 0": (lambda: ll.adapters(adapted())["default"].param_groups(1e-3, -1), "weight_decay is a number"),
    "a shape that is none": (lambda: ll.ParamSpec(3), "tuple of whole numbers"),
    "use_dora": (lambda: ll.LoRAConfig(use_dora=True), r"lora_lite\.DoRAConfig"),
    "a start": (lambda: ll.LoRAConfig(init_lora_weights="pissa"), r"lora_lite\.PiSSAConfig"),
    "task_type": (lambda: ll.LoRAConfig(task_type="CAUSAL_LM"), "a field of PEFT's"),
    "bias": (lambda: ll.LoRAConfig(bias="none"), r"lora_lite\.BitFitConfig"),
}


@pytest.mark.parametrize("mistake", PYTHON)
def test_in_python(mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, says = PYTHON[mistake]
    with pytest.raises(ll.LoraLiteError, match=says):
        call()
    assert not list(tmp_path.iterdir())


def test_what_has_no_effect_is_said():
    assert "alpha" in str(ll.plan(model(), ll.IA3Config(alpha=3))).split("\n", 1)[1]
    assert "rank of 4096" in str(ll.plan(model(), ll.LoRAConfig(r=4096)))


def test_files_with_a_byte_order_mark_are_read(tmp_path):
    from lora_lite.data.read import read_rows

    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": "a"}).encode() + b"\n")
    (tmp_path / "b.jsonl").write_bytes((json.dumps({"text": "a"}) + "\n").encode("utf-16"))
    assert read_rows(str(tmp_path / "a.jsonl"))[0][0] == read_rows(str(tmp_path / "b.jsonl"))[0][0] == {"text": "a"}
