"""The commands on a random two-block model: each flag acts, resume is exact, mistakes are one sentence, pipes get plain
text."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lora_lite as ll
import tiny_llm
from lora_lite import cli
from lora_lite.cli import demo, eval, plan, train, variants
from lora_lite.cli._method import SHARED, build_config, config_flags, field_docs, with_method
from lora_lite.io import native

pytest.importorskip("transformers")
pytest.importorskip("tyro")


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    tiny_llm.save(folder / "tiny")
    tiny_llm.model(seed=9).save_pretrained(folder / "other")
    tiny_llm.tokenizer().save_pretrained(folder / "other")
    tiny_llm.sums(folder / "sums.jsonl")
    tiny_llm.sums(folder / "more.jsonl", start=100)
    return folder


@pytest.fixture
def threads(monkeypatch) -> list[int]:
    """What torch was told; on a busy machine a second thread would make these tests minutes long."""
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    return told


@dataclasses.dataclass
class Run:
    """What a training run left behind."""

    out: Path

    @property
    def log(self) -> list[dict]:
        return [json.loads(line) for line in (self.out / "log.jsonl").read_text().splitlines()]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return native.read(self.out / "adapter.safetensors")[1]

    @property
    def tokens(self) -> list[int]:
        return [r["tokens"] for r in self.log if "tokens" in r]

    @property
    def evals(self) -> list[tuple[int, float]]:
        return [(r["step"], r["eval_loss"]) for r in self.log if "eval_loss" in r]

    @property
    def checkpoints(self) -> list[str]:
        return sorted(p.name for p in self.out.glob("checkpoint-*"))

    def same_tensors(self, other: Run) -> bool:
        a, b = self.tensors, other.tensors
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def base_flags(files: Path) -> dict[str, str]:
    return {
        "model": str(files / "tiny"), "data": str(files / "sums.jsonl"), "eval-data": str(files / "more.jsonl"),
        "eval-rows": "8", "rows": "20", "steps": "6", "batch-size": "4", "lr": "0.01",
        "eval-every": "3", "save-every": "2", "samples": "0",
    }  # fmt: skip


def do_train(files: Path, out: Path, **changes: str) -> Run:
    flags = {**base_flags(files), "out": str(out), **{k.replace("_", "-"): v for k, v in changes.items()}}
    argv = ["train"]
    for name, value in flags.items():
        if value is not None:
            argv += [f"--{name}"] + ([value] if value else [])
    assert cli.main(argv) == 0
    return Run(out)


@pytest.fixture(scope="session")
def plain(files, tmp_path_factory) -> Run:
    return do_train(files, tmp_path_factory.mktemp("plain") / "run")


# ---- train


def test_a_run_leaves_adapter_log_and_picture(plain, files, capsys):
    steps = [r for r in plain.log if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    assert set(steps[0]) == {"step", "time", "loss", "lr", "grad_norm", "tokens", "updates"}
    assert [s for s, _ in plain.evals] == [0, 3, 6]
    assert plain.evals[-1][1] < plain.evals[0][1]
    assert plain.checkpoints == ["checkpoint-4", "checkpoint-6"]
    picture = (plain.out / "loss.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 10_000
    model = tiny_llm.model()
    assert ll.load(model, plain.out / "adapter.safetensors").cfg == ll.LoRAConfig()
    assert not list(plain.out.rglob("model*"))


# flag -> (value, what must differ from the plain run)
ACTS = {
    "model": ("{files}/other", "tensors"),
    "data": ("{files}/more.jsonl", "tensors"),
    "eval_data": ("{files}/sums.jsonl", "evals"),
    "rows": ("10", "tensors"),
    "eval_rows": ("4", "evals"),
    "steps": ("5", "tokens"),
    "batch_size": ("3", "tokens"),
    "accumulation": ("2", "tokens"),
    "lr": ("0.02", "tensors"),
    "warmup": ("3", "tensors"),
    "schedule": ("linear", "tensors"),
    "weight_decay": ("0.5", "tensors"),
    "clip": ("0.001", "tensors"),
    "seed": ("1", "tensors"),
    "base_dtype": ("bfloat16", "tensors"),
    "max_length": ("5", "tokens"),
    "eval_every": ("2", "evals"),
    "save_every": ("3", "checkpoints"),
    "keep": ("1", "checkpoints"),
    "truncation": ("keep_end", "tokens"),
    "bf16": ("", "tensors"),
    "load_in_4bit": ("", "tensors"),
    "load_in_8bit": ("", "tensors"),
}
BESIDE = {"truncation": {"max_length": "5"}}
ELSEWHERE = {
    "out": "every run", "method": "test_the_method_and_its_flags", "adapter": "test_the_method_and_its_flags",
    "epochs": "test_epochs", "gradient_checkpointing": "test_gradient_checkpointing", "best": "test_best",
    "calibration_batches": "test_calibration", "trainer": "test_sft", "threads": "test_threads",
    "resume": "test_resume", "overwrite": "test_a_run_is_not_overwritten_in_silence", "dry_run": "test_dry_run",
    "debug": "test_debug", "reference_weights": "test_reference_weights", 
    **dict.fromkeys(
        "config preset init_from patience samples report_to device columns template turns".split(), "in test_runs.py"
    ),
    **dict.fromkeys("packing beta score json".split(), "in test_train_more.py"),
}  # fmt: skip


def test_every_train_flag_has_its_test():
    here = {f.name for f in dataclasses.fields(train.Train)}
    assert here - {"adapter"} == (ACTS.keys() | ELSEWHERE.keys()) - {"adapter"}
    assert all(name in globals() for name in ELSEWHERE.values() if name.startswith("test"))


QUICK = ("steps", "lr", "seed", "data", "eval_every")
"""Flags whose test is quick; a run of each takes seconds."""


@pytest.mark.parametrize("flag", [pytest.param(f, marks=[pytest.mark.slow] * (f not in QUICK)) for f in ACTS])
def test_the_flag_acts(flag, files, plain, tmp_path):
    value, observed = ACTS[flag]
    beside = BESIDE.get(flag, {})
    plain = do_train(files, tmp_path / "plain", **beside) if beside else plain
    run = do_train(files, tmp_path / "run", **beside, **{flag: value.format(files=files)})
    if observed == "tensors":
        assert not run.same_tensors(plain)
    else:
        assert getattr(run, observed) != getattr(plain, observed)


@pytest.mark.slow
def test_reference_weights(files, plain, tmp_path, capsys):
    full = tiny_llm.model()
    with torch.no_grad():
        for p in full.parameters():
            p.add_(0.05 * p.std() * torch.randn_like(p))
    full.save_pretrained(tmp_path / "full")
    run = do_train(files, tmp_path / "run", **{"reference-weights": str(tmp_path / "full")})
    assert not run.same_tensors(plain)


@pytest.mark.slow
def test_the_same_flags_give_the_same_adapter(files, plain, tmp_path):
    assert do_train(files, tmp_path / "again").same_tensors(plain)


@pytest.mark.slow
def test_the_method_and_its_flags(files, tmp_path):
    run = do_train(files, tmp_path / "run", method="lora", r="3", alpha="5", layers="-1", **{"target-names": "q_proj"})
    head, tensors = native.read(run.out / "adapter.safetensors")
    assert (head["config"]["r"], head["config"]["alpha"]) == (3, 5.0)
    assert list(head["targets"]) == ["model.layers.1.self_attn.q_proj"]
    (other,) = [v.name for v in ll.variants() if v.name == "eva"]
    run = do_train(files, tmp_path / "other", method=other)
    assert native.read_header(run.out / "adapter.safetensors")["config"]["variant"] == other


@pytest.mark.slow
def test_epochs(files, tmp_path):
    run = do_train(files, tmp_path / "run", steps=None, epochs="2")
    assert len(run.tokens) == 10  # 20 rows, 4 at a time, twice


@pytest.mark.slow
def test_gradient_checkpointing(files, plain, tmp_path, monkeypatch):
    import transformers

    calls = []
    model_class = transformers.PreTrainedModel
    name = next(
        n for n in ("activation_checkpointing_enable", "gradient_checkpointing_enable") if hasattr(model_class, n)
    )
    enable = getattr(model_class, name)
    monkeypatch.setattr(model_class, name, lambda self, *a, **k: (calls.append(1), enable(self, *a, **k))[1])
    run = do_train(files, tmp_path / "run", **{"gradient-checkpointing": ""})
    assert calls
    for k, v in plain.tensors.items():
        torch.testing.assert_close(run.tensors[k], v, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_best(files, tmp_path):
    (files / "against.jsonl").write_text(
        '{"prompt": "1+1=", "completion": "zzzzzzzzzzzzzzzzzzzz"}\n' * 4
    )  # what is learned makes this worse
    flags = {
        "eval-data": str(files / "against.jsonl"),
        "eval-every": "1",
        "save-every": "1",
        "keep": "9",
        "warmup": "0",
        "lr": "0.1",
    }
    last, run = do_train(files, tmp_path / "last", **flags), do_train(files, tmp_path / "run", best="", **flags)
    losses = {step: loss for step, loss in run.evals if step}
    best = min(losses, key=losses.get)
    assert best < 6
    kept = native.read(run.out / f"checkpoint-{best}" / "adapter.safetensors")[1]
    assert all(torch.equal(v, kept[k]) for k, v in run.tensors.items())
    assert not run.same_tensors(last)


@pytest.mark.slow
def test_calibration(files, tmp_path, capsys):
    runs = [
        do_train(files, tmp_path / n, method="eva", steps="1", **{"calibration-batches": n, "batch-size": "2"})
        for n in ("1", "4")
    ]
    a, b = (next(v for k, v in r.tensors.items() if k.endswith("lora_A0") or k.endswith("lora_A")) for r in runs)
    assert a.shape != b.shape or not torch.equal(a, b)
    words = ["--model", str(files / "tiny"), "--data", str(files / "sums.jsonl"), "--out", str(tmp_path / "x")]
    assert cli.main(["train", *words, "--calibration-batches", "2"]) == 2
    assert "uses no calibration data" in capsys.readouterr().err


def test_sft(files, tmp_path, monkeypatch):
    trl = pytest.importorskip("trl")
    seen = []
    init = trl.SFTTrainer.__init__
    monkeypatch.setattr(trl.SFTTrainer, "__init__", lambda self, *a, **k: (seen.append(1), init(self, *a, **k))[1])
    run = do_train(files, tmp_path / "run", trainer="sft")
    assert seen and [s for s, _ in run.evals] == [0, 3, 6]
    assert run.evals[-1][1] < run.evals[0][1]


def test_threads(files, tmp_path, threads):
    do_train(files, tmp_path / "run", threads="2", steps="1")
    assert threads == [2]


def test_resume(files, tmp_path, capsys):
    flags = {"dropout": "0.1", "save-every": "3"}
    straight = do_train(files, tmp_path / "a", **flags)
    shutil.copytree(straight.out, tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoint-6")
    (tmp_path / "b" / "adapter.safetensors").unlink()
    resumed = do_train(files, tmp_path / "b", resume="", **flags)
    assert resumed.same_tensors(straight)
    assert [{**r, "time": 0} for r in resumed.log] == [{**r, "time": 0} for r in straight.log]
    times = [r["time"] for r in resumed.log]
    assert times == sorted(times)
    capsys.readouterr()
    argv = [
        "train",
        "--out",
        str(tmp_path / "b"),
        "--resume",
        "--model",
        str(files / "tiny"),
        "--data",
        str(files / "sums.jsonl"),
    ]
    assert cli.main([*argv, "--lr", "0.5"]) == 2
    assert "lr: 0.01 before, 0.5 now" in capsys.readouterr().err
    assert cli.main([*argv[:2], str(tmp_path / "none"), *argv[3:]]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_a_run_is_not_overwritten_in_silence(files, tmp_path, capsys):
    run = do_train(files, tmp_path / "run", steps="1")
    (run.out / "notes.txt").write_text("mine")
    before = (run.out / "adapter.safetensors").read_bytes()
    flags = [x for k, v in base_flags(files).items() for x in (f"--{k}", v)]
    assert cli.main(["train", *flags, "--out", str(run.out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (run.out / "adapter.safetensors").read_bytes() == before
    do_train(files, run.out, steps="2", overwrite="")
    assert len(run.tokens) == 2
    assert (run.out / "notes.txt").read_text() == "mine"


def test_dry_run(files, tmp_path, capsys):
    run = do_train(files, tmp_path / "run", **{"dry-run": ""})
    text = capsys.readouterr().out
    assert not run.out.exists()
    assert "14 targets" in text and "6 of 4 rows" in text and "tokens" in text


def test_debug(files, tmp_path, capsys):
    with pytest.raises(ll.FileError):
        cli.main(["eval", "--model", str(tmp_path / "nothing"), "--debug"])
    assert cli.main(["eval", "--model", str(tmp_path / "nothing")]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and "Traceback" not in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--steps", "-1"], "--steps must be at least 1"),
        (["--lr", "0"], "--lr must be positive"),
        (["--best", "--eval-every", "0"], "--best needs evaluations"),
        (["--best", "--save-every", "3", "--eval-every", "2"], "multiple of --eval-every 2"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--r", "0"], "r must be between"),
        (["--method", "lroa"], "there is no such method. Did you mean"),
        (["--max-length", "1"], "--max-length must be at least 2"),
        (["--target-names", "nothing"], "matches none"),
        (["--data", "nowhere.jsonl"], "neither 'wordmath' nor a file"),
    ],
)
def test_mistakes_are_one_sentence(files, tmp_path, capsys, flags, words):
    argv = [
        "train",
        "--model",
        str(files / "tiny"),
        "--data",
        str(files / "sums.jsonl"),
        "--out",
        str(tmp_path / "run"),
    ]
    assert cli.main([*argv, *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err
    if "--target-names" not in flags:
        assert not (tmp_path / "run").exists()


def test_divergence_is_named(files, tmp_path, capsys, monkeypatch):
    argv = [
        x for k, v in {**base_flags(files), "lr": "1e30", "out": str(tmp_path / "run")}.items() for x in (f"--{k}", v)
    ]
    assert cli.main(["train", *argv]) == 2
    assert "diverged" in capsys.readouterr().err


# ---- eval


@pytest.fixture
def evaluated(files, plain, capsys):
    def run(**changes):
        flags = {
            "model": str(files / "tiny"), "data": str(files / "sums.jsonl"), "rows": "6", "max-new-tokens": "3",
            "adapter": str(plain.out / "adapter.safetensors"), **{k.replace("_", "-"): v for k, v in changes.items()},
        }  # fmt: skip
        argv = [x for k, v in flags.items() if v is not None for x in ([f"--{k}", v] if v else [f"--{k}"])]
        capsys.readouterr()
        code = cli.main(["eval", *argv, "--json"])
        said = capsys.readouterr()
        return json.loads(said.out) if code == 0 else said.err

    return run


def test_eval(evaluated, files, plain):
    got = evaluated()
    assert got["rows"] == 6 and 0 <= got["accuracy"] <= 1 and len(got["samples"]) == 3
    assert got["perplexity"] == pytest.approx(2.718281828 ** got["loss"], rel=1e-6)
    assert evaluated(adapter=None)["loss"] > got["loss"]
    assert evaluated(data=str(files / "more.jsonl"))["loss"] != got["loss"]
    assert evaluated(rows="5")["rows"] == 5
    assert evaluated(samples="1")["samples"] == got["samples"][:1]
    assert all(len(s["answer"]) <= 1 for s in evaluated(max_new_tokens="1")["samples"])
    assert "accuracy" not in evaluated(max_new_tokens="0")
    assert evaluated(max_length="3")["loss"] != got["loss"]
    assert evaluated(base_dtype="bfloat16")["loss"] != got["loss"]
    assert "other base" in evaluated(model=str(files / "other")) or "base" in evaluated(model=str(files / "other"))
    assert isinstance(evaluated(model=str(files / "other"), base_check="ignore"), dict)
    assert "--split" in evaluated(split="train")


def test_eval_on_wordmath(evaluated):
    got = {
        (split, seed): evaluated(data="wordmath", split=split, seed=seed, rows="2", max_new_tokens="2")["samples"][0][
            "prompt"
        ]
        for split, seed in (("test", "0"), ("train", "0"), ("test", "1"))
    }
    assert len(set(got.values())) == 3


def test_eval_batch_size_and_threads(evaluated, monkeypatch, threads):
    from lora_lite.demo import evaluate

    sizes = []
    whole = evaluate.complete
    monkeypatch.setattr(
        evaluate, "complete", lambda m, t, p, size, *a: (sizes.append(size), whole(m, t, p, size, *a))[1]
    )
    evaluated(batch_size="2", threads="2")
    assert sizes == [2] and threads == [2]


def test_every_eval_flag_has_its_test():
    tested = set(
        "model data adapter base_check split rows batch_size max_new_tokens max_length samples seed base_dtype threads "
        "json debug columns template turns truncation load_in_4bit load_in_8bit device tasks".split()
    )
    assert {f.name for f in dataclasses.fields(eval.Eval)} == tested


def test_eval_prints_text_for_people(files, capsys):
    words = ["--model", str(files / "tiny"), "--data", str(files / "sums.jsonl"), "--rows", "3"]
    assert cli.main(["eval", *words, "--max-new-tokens", "2"]) == 0
    text = capsys.readouterr().out
    assert "accuracy" in text and "the bare base" in text and text.count("right ") >= 3


@pytest.mark.parametrize(
    ("said", "reference", "ok"),
    [
        (" 2 + 2 = 4.\n#### 4", "#### 4", True),
        ("#### 1,024 and more", "so\n#### 1024", True),
        ("#### 42", "#### 4", False),
        ("4", "#### 4", False),
        (" Paris\n", "Paris", True),
        ("Paris is", "Paris", False),
    ],
)
def test_what_counts_as_right(said, reference, ok):
    assert eval.right(said, reference) is ok


# ---- demo


@pytest.fixture
def small_demo(files, monkeypatch, capsys):
    from lora_lite.demo import data

    monkeypatch.setattr(data, "BASE", files / "tiny")
    monkeypatch.setattr(demo, "TRAIN_ROWS", 48)
    monkeypatch.setattr(demo, "EVAL_ROWS", 4)

    def run(*flags: str, code: int = 0) -> str:
        assert cli.main(["demo", "--steps", "3", "--problems", "3", *flags]) == code
        return "".join(capsys.readouterr())

    return run


def test_demo(small_demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = small_demo()
    out = tmp_path / "runs" / "demo-lora-0"
    facts = json.loads((out / "run.json").read_text())
    assert {"accuracy_before", "accuracy_after", "seconds", "cpu_seconds", "trained"} <= set(facts)
    assert (facts["steps"], facts["method"], facts["lr"], facts["problems"]) == (3, "lora", 5e-3, 3)
    assert [r["step"] for r in Run(out).log if "loss" in r] == [1, 2, 3]
    assert (out / "loss.png").stat().st_size > 10_000
    assert text.count("right    ") == 3 and "accuracy before" in text
    for name in ("adapter.safetensors", "log.jsonl", "loss.png", "run.json"):
        assert f"runs/demo-lora-0/{name}" in text
    small_demo()  # its own folder is replaced without asking
    first = Run(out).tensors

    small_demo("--seed", "1")
    other = Run(tmp_path / "runs" / "demo-lora-1").tensors
    assert any(not torch.equal(first[k], other[k]) for k in first)


@pytest.mark.slow
@pytest.mark.parametrize("method", [v.name for v in ll.variants()])
def test_demo_takes_every_method(small_demo, tmp_path, method):
    small_demo("--method", method, "--out", str(tmp_path / "x"), "--problems", "1", "--steps", "2")
    model = tiny_llm.model()
    assert ll.load(model, tmp_path / "x" / "adapter.safetensors").cfg.variant == method
    assert len(Run(tmp_path / "x").tensors) > 0


def test_train_says_what_a_fitted_method_needs(files, tmp_path, capsys):
    pairs = [v.name for v in ll.variants() if v.needs_data == "pairs"]
    assert pairs
    argv = ["train", "--model", str(files / "tiny"), "--data", str(files / "sums.jsonl"), "--out", str(tmp_path / "x")]
    assert cli.main([*argv, "--method", pairs[0]]) == 2
    assert "contrast pairs" in capsys.readouterr().err
    assert not (tmp_path / "x" / "run.json").exists()


@pytest.mark.slow
def test_long_work_reports_in_lines(small_demo, tmp_path, monkeypatch):
    from lora_lite.cli import _console

    monkeypatch.setattr(_console, "QUIET", 0.0)
    monkeypatch.setattr(_console, "EVERY", 0.0)
    text = small_demo("--out", str(tmp_path / "x"))
    assert all(
        words in text for words in ("answering before: 3/3, 0 s left", "training: 2/3", "loss", "answering after: 3/3")
    )
    assert "\x1b" not in text and "\r" not in text


@pytest.mark.slow
def test_demo_flags(small_demo, tmp_path, capsys, threads):
    out = tmp_path / "x"
    text = small_demo("--out", str(out), "--lr", "0.02", "--r", "2", "--method", "eva", "--threads", "2")
    facts = json.loads((out / "run.json").read_text())
    assert (facts["lr"], facts["config"]["r"], facts["method"]) == (0.02, 2, "eva")
    assert threads == [2]
    assert "--overwrite" in small_demo("--out", str(out), code=2)
    text = small_demo("--out", str(out), "--overwrite", "--steps", "5000", "--seconds", "0.1")
    facts = json.loads((out / "run.json").read_text())
    assert 1 <= facts["steps"] < 50 and "(of 5000, to keep within --seconds 0.1)" in text
    assert "must be positive" in small_demo("--problems", "0", code=2)
    assert "lora_lite" not in text
    tested = {"method", "seed", "seconds", "steps", "lr", "problems", "out", "overwrite", "threads", "debug"}
    assert {f.name for f in dataclasses.fields(demo.Demo)} == tested


# ---- plan, variants, help


def test_plan(files, capsys):
    assert cli.main(["plan", "--model", str(files / "tiny"), "--r", "4", "--layers", "1"]) == 0
    text = capsys.readouterr().out
    assert "lora: 7 targets" in text and "q_proj" in text and "lm_head" in text
    assert cli.main(["plan", "--model", str(files / "tiny"), "--method", "eva", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["config"]["variant"] == "eva" and len(data["targets"]) == 14
    assert {f.name for f in dataclasses.fields(plan.Plan)} == {
        "model", "method", "json", "cost", "compare", "batch", "length", "base_dtype", "debug", "gpu", "gpus", "shards",
    }  # fmt: skip


def test_plan_of_a_large_model_needs_no_weights(tmp_path, capsys):
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["plan", "--model", str(tmp_path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["base"] > 70e9 and len(data["targets"]) == 560


def test_variants(capsys):
    assert cli.main(["variants", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["name"] for r in rows] == [v.name for v in ll.variants()]
    lora = next(r for r in rows if r["name"] == "lora")
    assert lora["trained"] == 8 * (768 + 768) and lora["merges"] and not lora["needs_data"]
    assert cli.main(["variants", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows) + 2 and {line.count(" | ") for line in lines if "---" not in line} == {7}
    assert {f.name for f in dataclasses.fields(variants.Variants)} == {"markdown", "json", "name", "model"}


@pytest.mark.parametrize("columns", [None, 40, 80, 160])
def test_the_list_of_methods_fits_the_terminal(columns, capsys, monkeypatch):
    """One line for each method, by family; whole in a pipe."""
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(["variants"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for v in ll.variants():
        (line,) = [line for line in lines if line.startswith(f"  {v.name} ")]
        assert columns is not None or line.endswith(v.title)
        assert f"{v.family[:1].upper()}{v.family[1:]}" in lines
    listed = lines[: lines.index("", len(lines) - 6)]
    assert columns is None or max(map(len, listed)) <= columns
    assert len(lines) < 150 and "W: reads the weight" in "\n".join(lines)


def test_the_page_of_a_method_is_broken_at_the_terminals_width(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    text = variants.filled("one " * 30 + "\n\n  as  it stands " + "x" * 60)
    assert max(map(len, text.split("\n\n")[0].splitlines())) <= 60 and "  as  it stands" in text
    monkeypatch.delenv("COLUMNS")
    assert variants.filled("one " * 30) == "one " * 30


@pytest.mark.parametrize("verb", ["train", "demo", "plan"])
@pytest.mark.parametrize("method", [v.name for v in ll.variants()])
def test_every_method_has_its_flags(verb, method):
    variant = ll.get_variant(method)
    command = {"train": train.Train, "demo": demo.Demo, "plan": plan.Plan}[verb]
    full = with_method(command, variant)
    assert build_config(full(method=method)) == variant.config(variant=method)
    docs = field_docs(variant.config)
    fields = {f.name for f in dataclasses.fields(variant.config)} - set(SHARED)
    assert len(dataclasses.fields(config_flags(variant))) == len(fields)
    assert not (missing := fields - docs.keys()), f"{method}: no help for {missing}"


def test_help_names_the_methods_own_options(capsys):
    for argv, words in (
        (["--help"], ["demo", "train", "eval", "plan", "variants"]),
        ([], ["demo", "train"]),
        (["train", "--help"], ["--lr-ratio-B", "--target-names", "--resume"]),
        (["train", "--method", "eva", "--help"], ["Options of eva"]),
    ):
        with pytest.raises(SystemExit) as left:
            cli.main(argv)
        assert left.value.code == 0
        text = capsys.readouterr().out
        assert all(w in text for w in words)


@pytest.mark.parametrize("verb", [v for v in cli.VERBS if v not in ("train", "demo", "plan")])
def test_help_fits_the_terminal(verb, capsys, monkeypatch):
    """Lines end between words, at the terminal's width."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main([verb, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[1:])) <= 80  # the first is the usage


def test_unknown_flags_and_verbs_leave_with_2(capsys):
    for argv in (["train", "--nonsense"], ["nonsense"], ["train", "--r", "many"]):
        with pytest.raises(SystemExit) as left:
            cli.main(argv)
        assert left.value.code == 2


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lora-lite {ll.__version__}\n"


def test_the_package_runs_as_the_command():
    for module in ("lora_lite", "lora_lite.cli"):
        done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, f"lora-lite {ll.__version__}\n"), done.stderr
    done = subprocess.run([sys.executable, "-m", "lora_lite", "tarin"], capture_output=True, text=True)
    assert done.returncode == 2 and "Did you mean 'train'" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_fish_completes_verbs_flags_and_methods(tmp_path, capsys):
    assert cli.main(["--tyro-print-completion", "fish"]) == 0
    (tmp_path / "lora-lite.fish").write_text(capsys.readouterr().out)
    for typed, found in (("tr", "train"), ("train --sche", "--schedule"), ("plan --method dor", "dora")):
        script = f"source {tmp_path / 'lora-lite.fish'}; complete -C 'lora-lite {typed}'"
        done = subprocess.run(["fish", "--no-config", "-c", script], capture_output=True, text=True, check=True)
        assert [line.split("\t")[0] for line in done.stdout.splitlines()] == [found]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_the_script_for_zsh_is_one(tmp_path, capsys):
    assert cli.main(["--tyro-print-completion", "zsh"]) == 0
    path = tmp_path / "_lora-lite"
    path.write_text(capsys.readouterr().out)
    assert path.read_text().startswith("#compdef lora-lite\n")
    subprocess.run(["zsh", "-n", str(path)], check=True)


@pytest.mark.parametrize("words", [[], ["ksh"], ["bash", "zsh"]])
def test_a_shell_without_a_script(words, capsys):
    assert cli.main(["--tyro-print-completion", *words]) == 2
    assert "takes one shell of bash, zsh, fish, got" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_verbs_flags_and_methods(tmp_path, capsys):
    assert cli.main(["--tyro-print-completion", "bash"]) == 0
    (tmp_path / "lora-lite.bash").write_text(capsys.readouterr().out)
    for typed, found in (
        (("tr",), {"train"}),
        (("train", "--sche"), {"--schedule"}),
        (("train", "--schedule", "c"), {"cosine", "constant_with_warmup"}),
        (("plan", "--method", "dor"), {"dora"}),
        (("train", "--target-r"), {"--target-roles"}),  # a flag of the method
        (("info", "x"), set()),  # files
    ):
        words = ("lora-lite", *typed)
        script = (
            f"source {tmp_path / 'lora-lite.bash'}; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(typed)}; "
            '_tyro_lora_lite; echo "${COMPREPLY[*]}"; complete -p lora-lite'
        )
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        words_found, how = done.stdout.splitlines()
        assert set(words_found.split()) == found, typed
        assert "-o default" in how
    text = (tmp_path / "lora-lite.bash").read_text()
    assert "or a data set\\n" not in text and "hub as NAME" in text  # each help stands on one line


def test_ctrl_c(monkeypatch, files):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "skeleton", stop)
    assert cli.main(["plan"]) == 130


# ---- the process


def process(*argv: str, **kwargs) -> subprocess.CompletedProcess:
    code = "import sys; from lora_lite.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, **kwargs)


def test_a_pipe_gets_no_control_codes(files, plain):
    adapter = str(plain.out / "adapter.safetensors")
    done = process(
        "eval",
        "--model",
        str(files / "tiny"),
        "--data",
        str(files / "sums.jsonl"),
        "--adapter",
        adapter,
        "--rows",
        "3",
        "--max-new-tokens",
        "2",
    )
    assert done.returncode == 0, done.stderr
    assert b"accuracy" in done.stdout
    assert not {b"\x1b", b"\r"} & {bytes([c]) for c in done.stdout + done.stderr}
    assert done.stderr == b""


def test_help_and_variants_import_no_transformers():
    for verb in ("--help", "variants"):
        code = (
            f"import sys; from lora_lite.cli import main\ntry: main([{verb!r}])\nexcept SystemExit: pass\nassert "
            "'transformers' not in sys.modules"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("package", "extra"), [("tyro", "cli"), ("transformers", "cli")])
def test_a_missing_package_is_named_with_the_line_to_type(package, extra):
    code = f"import sys; sys.modules[{package!r}] = None; from lora_lite.cli import main; sys.exit(main(['plan']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert f'pip install "lora-lite[{extra}]"' in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_a_terminal_gets_a_coloured_error():
    import pty

    parent, child = pty.openpty()
    code = "import sys; from lora_lite.cli import main; sys.exit(main(['train', '--method', 'nothing']))"
    done = subprocess.Popen([sys.executable, "-c", code], stderr=child, env={**os.environ, "TERM": "xterm"})
    assert done.wait(60) == 2
    os.close(child)
    text = os.read(parent, 4096)
    os.close(parent)
    assert b"\x1b[31m" in text and b"there is no such method" in text


def test_plan_counts_costs(capsys):
    assert cli.main(["plan", "--cost", "--length", "64", "--method", "dora", "--r", "4"]) == 0
    shown = capsys.readouterr().out
    assert "saved activations" in shown
    assert cli.main(["plan", "--cost", "--length", "64", "--batch", "3", "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)["cost"]
    assert (cost["batch"], cost["length"], cost["variant"]) == (3, 64, "lora")
    assert cost["extra_step"] > cost["extra_forward"] > 0


@pytest.mark.slow
def test_plan_compares_methods(capsys):
    assert cli.main(["plan", "--compare", "lora", "ia3", "--length", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "the frozen base saves" in lines[0]
    assert [line.split()[0] for line in lines[2:4]] == ["lora", "ia3"]
    assert cli.main(["plan", "--model", "llama-8b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["base"] == 8_030_261_248  # the published number of parameters
    assert cli.main(["plan", "--compare", "lroa"]) == 2
    assert "Did you mean" in capsys.readouterr().err
