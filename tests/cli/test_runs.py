"""Runs and their folders: settings that repeat them, going on, replacing, stopping, and what is said of the rows."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch

import lora_lite as ll
import tiny_llm
from lora_lite import cli
from lora_lite.cli import _fit, _folder, _log
from lora_lite.cli._log import RunLog, smooth
from lora_lite.cli._settings import expanded, imported
from lora_lite.io import native

pytest.importorskip("trl")
pytest.importorskip("tyro")
TURNS = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And 2+2?"},
    {"role": "assistant", "content": "4"},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    tiny_llm.save(folder / "tiny")
    tiny_llm.sums(folder / "sums.jsonl")
    return folder


def command(files: Path, out: Path | None, *words: str, data: str = "sums.jsonl") -> list[str]:
    flags = {
        "model": files / "tiny", "data": files / data, "rows": 12, "steps": 4, "batch-size": 4, "lr": 0.01,
        "eval-every": 2, "save-every": 2, "eval-rows": 0.25, "samples": 0, "warmup": 0, **({"out": out} if out else {}),
    }  # fmt: skip
    given = {w for w in words if w.startswith("--")}
    return ["train", *(x for k, v in flags.items() if f"--{k}" not in given for x in (f"--{k}", str(v))), *words]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return native.read(run / "adapter.safetensors")[1]


def same(a: Path, b: Path) -> bool:
    x, y = tensors(a), tensors(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def steps(run: Path) -> list[int]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def first(files, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("first") / "a"
    assert cli.main(command(files, out, "--r", "3", "--layers", "-1", "--dropout", "0.1")) == 0
    return out


# ---- settings


def test_a_run_is_repeated_by_its_settings(files, first, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--config", str(first / "run.yaml")]) == 0
    assert same(first, tmp_path / "runs" / "train")
    capsys.readouterr()
    assert cli.main(["train", "--config", str(first / "run.yaml"), "--steps", "2", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "2 of 4 rows" in text and "train-2" in text  # the first folder holds a run


def test_a_run_knows_how_it_asked(first, tmp_path):
    """Its prompts were text, so that chat and serve ask in text too, whatever the tokenizer says; a flag wins."""
    from lora_lite.cli._rows import layout_of_run
    from lora_lite.data.tokens import PLAIN, prompt_ids

    tok = tiny_llm.tokenizer()
    turn = [{"role": "user", "content": "3+4="}]
    assert prompt_ids(turn, tok, layout_of_run(None, tok, first)) == prompt_ids("3+4=", tok)
    assert layout_of_run(None, tok, None) == PLAIN
    tok.chat_template = "{{ messages[0]['content'] }}!"
    assert tok.decode(prompt_ids(turn, tok, layout_of_run(None, tok, first))) == "3+4="
    assert tok.decode(prompt_ids(turn, tok, layout_of_run(None, tok, None))) == "3+4=!"
    (tmp_path / "a.jinja").write_text("{{ messages[0]['content'] }}?")
    assert tok.decode(prompt_ids(turn, tok, layout_of_run(tmp_path / "a.jinja", tok, first))) == "3+4=?"


def test_info_names_the_base_of_a_run(files, first, tmp_path, capsys):
    assert cli.main(["info", str(first), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["base"] == str(files / "tiny") and told["steps"] is None
    shutil.copytree(first, out := tmp_path / "a")
    (out / "run.json").write_text("{")
    assert cli.main(["info", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["base"] is None


def test_settings_are_words_and_flags_win(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("verb: train\nlr: 1e-4\nbest: true\nresume: false\nlayers: [1, -1]\nrank-pattern: {q_proj: 2}\n")
    assert expanded(["train", "--lr", "2", "--config", str(file)]) == [
        "train", "--best", "--layers", "1", "-1", "--rank-pattern", "q_proj", "2", "--lr", "2",
    ]  # fmt: skip
    file.write_text(json.dumps({"steps": 3}))
    assert expanded(["train", f"--config={file}"]) == ["train", "--steps", "3"]


def test_switches_that_are_on_can_be_turned_off_and_come_back_from_settings(tmp_path, capsys):
    from lora_lite.cli._flags import flags_of
    from lora_lite.cli._verbs import command_of
    from lora_lite.cli._words import check_words

    file = tmp_path / "a.yaml"
    for line, words in (
        ("use_rslora: true", []),
        ("use_rslora: false", ["--no-use-rslora"]),
        ("best: true", ["--best"]),
        ("best: false", []),
    ):
        file.write_text(f"method: lora_ga\n{line}\n")
        assert expanded(["train", "--config", str(file)]) == ["train", "--method", "lora_ga", *words]
    file.write_text("method: lora_ga\nbest: true\nuse_rslora: false\n")
    words = expanded(["train", "--config", str(file), "--no-best", "--use-rslora"])
    assert words == ["train", "--method", "lora_ga", "--no-best", "--use-rslora"]  # flags win
    command = command_of("train", words)
    assert check_words("train", command, words[1:]) == ["--method", "lora_ga"]  # which is so anyway
    assert flags_of(command)["use_rslora"].default is True
    file.write_text("method: lokr\nfactored: true\n")  # no switch: it may be None
    assert expanded(["train", "--config", str(file)])[-2:] == ["--factored", "True"]
    assert cli.main(["plan", "--method", "lora_ga", "--no-use-rslora", "--json"]) == 0
    capsys.readouterr()


def test_another_method_with_the_settings_of_a_run(first, tmp_path, monkeypatch, capsys):
    """What the old method alone has is left out, and said where somebody had set it; what both have stays."""
    monkeypatch.chdir(tmp_path)
    file = str(first / "run.yaml")
    expanded(["train", "--config", file, "--method", "dora"])
    assert "left out" not in capsys.readouterr().out
    text = (first / "run.yaml").read_text()
    assert "lr_ratio_B: 1.0" in text
    file = str(tmp_path / "faster.yaml")
    Path(file).write_text(text.replace("lr_ratio_B: 1.0", "lr_ratio_B: 4.0"))
    words = expanded(["train", "--config", file, "--method", "dora"])
    assert "--lr-ratio-B" not in words and words[words.index("--r") + 1] == "3"
    assert "left out: lr_ratio_B\n" in capsys.readouterr().out
    assert "--r" not in expanded(["train", "--config", file, "--method", "ia3"])
    words = expanded(["train", "--config", file])
    assert words[words.index("--lr-ratio-B") + 1] == "4.0"
    capsys.readouterr()
    assert cli.main(["train", "--config", file, "--method=dora", "--out", "b", "--dry-run"]) == 0
    assert "dora: 7 targets" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n- b", "holds no settings"), ("a: [", "no YAML"), ("verb: eval", "written by lora-lite eval"),
        (None, "cannot be read"),
    ],
)  # fmt: skip
def test_damaged_settings(tmp_path, text, says, capsys):
    if text is not None:
        (tmp_path / "a.yaml").write_text(text)
    assert cli.main(["train", "--config", str(tmp_path / "a.yaml")]) == 2
    assert says in capsys.readouterr().err


def test_presets(capsys):
    assert expanded(["train", "--preset", "quality", "--r", "3"])[1:3] == ["--epochs", "3"]
    words = expanded(["train", "--preset", "memory", "--method", "ia3"])
    assert "--load-in-4bit" in words and "--r" not in words  # ia3 has no rank
    assert cli.main(["train", "--preset", "qality"]) == 2
    assert "Did you mean 'quality'" in capsys.readouterr().err


def test_methods_of_ones_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_methods.py").write_text("FOUND = True\n")
    monkeypatch.chdir(tmp_path)
    assert imported(["plan", "--import", "my_methods", "--method", "x"]) == ["plan", "--method", "x"]
    assert cli.main(["plan", "--import=nothing_here"]) == 2
    assert "no module is called 'nothing_here'" in capsys.readouterr().err


# ---- the rows


def test_columns_and_what_is_said_of_rows(files, tmp_path, capsys):
    rows = [{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(10)] + [{"question": "9" * 60, "answer": "1"}]
    (files / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--columns", "prompt=question", "completion=answer", "--max-length", "30", "--dry-run")
    assert cli.main(command(files, tmp_path / "x", *words, "--eval-rows", "0", data="other.jsonl")) == 0
    text = capsys.readouterr().out
    assert "note: 1 rows are left out: --max-length 30" in text and "0+1=«1<eos>»" in text


def test_data_shows_and_prints_what_train_sees(files, tmp_path, capsys):
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": TURNS}) + "\n")
    (tmp_path / "t.jinja").write_text("{% for m in messages %}({{ m['role'] }}) {{ m['content'] }}<eos>{% endfor %}"
                                      "{% if add_generation_prompt %}(assistant) {% endif %}")  # fmt: skip
    words = [
        "data",
        str(tmp_path / "talk.jsonl"),
        "--model",
        str(files / "tiny"),
        "--template",
        str(tmp_path / "t.jinja"),
    ]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "(user) 1+1?<eos>(assistant) «2<eos>»(user) And 2+2?<eos>(assistant) «4<eos>»" in text
    assert cli.main([*words, "--turns", "last", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["rows"] and [set(row) for row in found["rows"]] == [{"input_ids", "labels"}]
    tok = tiny_llm.tokenizer()
    (row,) = found["rows"]
    assert tok.decode([label for label in row["labels"] if label != -100]) == "4<eos>"
    assert cli.main(words[:-2]) == 0
    assert "no chat template" in capsys.readouterr().out


# ---- going on


def test_a_finished_run_trains_nothing_more_but_goes_on_to_more_steps(files, first, tmp_path, capsys):
    shutil.copytree(first, out := tmp_path / "a")
    words = ("--r", "3", "--layers", "-1", "--dropout", "0.1", "--resume")
    assert cli.main(command(files, out, *words)) == 0
    assert same(first, out) and steps(out) == [1, 2, 3, 4]
    assert "nothing is trained" in capsys.readouterr().out
    assert cli.main(command(files, out, *words, "--steps", "8")) == 0
    assert not same(first, out) and steps(out) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert not (out / "checkpoint-4").exists()  # the one from which it went on is of no more use


def test_other_data_is_refused_on_resume(files, first, tmp_path, capsys):
    shutil.copytree(first, out := tmp_path / "a")
    text = (files / "sums.jsonl").read_text()
    try:
        (files / "sums.jsonl").write_text(text.replace("+", "-"))
        assert cli.main(command(files, out, "--r", "3", "--layers", "-1", "--dropout", "0.1", "--resume")) == 2
    finally:
        (files / "sums.jsonl").write_text(text)
    assert "are not those it was trained on" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter.safetensors", "trainer_state.json"]
)
def test_a_damaged_checkpoint_is_passed_over(first, tmp_path, name):
    shutil.copytree(first, out := tmp_path / "a")
    path = out / "checkpoint-4" / name
    path.write_bytes(path.read_bytes()[:-20] if name != "trainer_state.json" else b"")
    found, said = _folder.last_checkpoint(out)
    assert found.name == "checkpoint-2" and name in said[0]
    path = out / "checkpoint-2" / name
    path.unlink()
    with pytest.raises(ll.FileError, match="no checkpoint in .* is whole"):
        _folder.last_checkpoint(out)


@pytest.mark.parametrize(
    ("name", "state"),
    [("optimizer.pt", {}), ("optimizer.pt", {"state": {}, "param_groups": [{"lr": 1.0}]}), ("optimizer.pt", [1]),
     ("scheduler.pt", {}), ("rng_state.pth", [])],
)  # fmt: skip
def test_a_checkpoint_with_an_empty_state_is_passed_over(first, tmp_path, name, state):
    shutil.copytree(first, out := tmp_path / "a")
    assert _folder.last_checkpoint(out)[0].name == "checkpoint-4"
    torch.save(state, out / "checkpoint-4" / name)
    found, said = _folder.last_checkpoint(out)
    assert found.name == "checkpoint-2" and said == [f"checkpoint-4 is damaged ({name} is empty) and left alone"]


@pytest.mark.parametrize("text", ["[1]", "3", "{}", '{"config": 1}', "{"])
def test_a_damaged_run_is_named(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ll.FileError, match="run.json is damaged"):
        _folder.check_same_run(tmp_path, {"steps": 1, "config": {}})


def test_half_a_log_line_is_dropped(tmp_path):
    log = RunLog(tmp_path, "x")
    log.add(1, loss=2.0)
    log.path.write_text(log.path.read_text() + '{"step": 2, "ti')
    again = RunLog(tmp_path, "x")
    again.keep(5)
    assert [row["step"] for row in again.rows] == [1] and again.path.read_text().count("\n") == 1
    log.path.write_bytes(log.path.read_bytes() + b"\xff\xfe\n")
    again.keep(5)
    assert [row["step"] for row in again.rows] == [1]


def test_the_old_run_is_replaced_only_at_the_end(files, first, tmp_path, capsys, monkeypatch):
    shutil.copytree(first, out := tmp_path / "a")
    (out / "notes.txt").write_text("mine")
    before = sorted(p.name for p in out.iterdir())
    for words in (("--target-names", "nothing"), ("--lr", "1e30", "--save-every", "0")):
        assert cli.main(command(files, out, "--overwrite", *words)) == 2
        assert sorted(p.name for p in out.iterdir()) == before and same(first, out)
    assert cli.main(command(files, out, "--overwrite", "--steps", "1")) == 0
    assert steps(out) == [1] and (out / "notes.txt").read_text() == "mine" and not (out / "replaced-run").exists()


def test_a_full_disk_is_one_sentence(files, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(_log, "draw_run", full)  # whatever is written meets the same disk
    assert cli.main(command(files, tmp_path / "a")) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: the disk that holds") and err.count("\n") == 1
    monkeypatch.setattr(_folder, "write_run", full)
    assert cli.main(command(files, tmp_path / "b")) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'b'}: No space left on device.\n"


# ---- stopping and ending


@pytest.fixture
def ctrl_c():
    """The signal is on, as it is not for what a shell starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_keeps_the_step_and_the_line_that_is_said_goes_on(files, tmp_path, monkeypatch, capsys, ctrl_c):
    """The result is that of a run without interruption, to the bit."""
    words = ("--r", "3", "--layers", "-1", "--dropout", "0.1", "--save-every", "0", "--score", "0")
    assert cli.main(command(files, tmp_path / "whole", *words)) == 0
    add = RunLog.add

    def pressed(self, step, **values):
        add(self, step, **values)
        if step == 1 and "loss" in values:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunLog, "add", pressed)
    out = tmp_path / "a run"
    capsys.readouterr()
    assert cli.main(command(files, out, *words)) == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    said = capsys.readouterr()
    assert "stopping after this step" in said.err and not (out / "adapter.safetensors").exists()
    monkeypatch.setattr(RunLog, "add", add)
    (line,) = (line for line in said.out.splitlines() if line.startswith("stopped"))
    assert "checkpoint-2 is kept" in line
    typed = shlex.split(line.partition("from there: lora-lite ")[2])
    assert cli.main(typed) == 0
    assert same(tmp_path / "whole", out) and steps(out) == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_second_ctrl_c_strikes_at_once(files, tmp_path, monkeypatch, capsys, ctrl_c):
    add = RunLog.add

    def pressed(self, step, **values):
        add(self, step, **values)
        if step == 1 and "loss" in values:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunLog, "add", pressed)
    assert cli.main(command(files, tmp_path / "a", "--save-every", "0")) == 130
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("stopped before the first checkpoint") and line.endswith("--overwrite")
    monkeypatch.setattr(RunLog, "add", add)
    assert cli.main([*shlex.split(line.partition("lora-lite ")[2]), "--steps", "1"]) == 0


def test_a_run_that_never_began_leaves_nothing(files, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ll.StateError("x")

    monkeypatch.setattr(_fit, "fit", broken)
    assert cli.main(command(files, tmp_path / "a")) == 2
    assert not list((tmp_path / "a").iterdir())


def test_a_checkpoint_that_gave_a_wrong_loss_is_no_good(files, tmp_path, capsys):
    for step in (2, 4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    assert _fit._left_good(tmp_path, 7).endswith("checkpoint-6 begins there.")
    assert _fit._left_good(tmp_path, 6).endswith("checkpoint-4 begins there.")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert _fit._left_good(tmp_path, 1) == "no good checkpoint is left."
    assert cli.main(command(files, tmp_path / "b", "--lr", "1e20", "--save-every", "1", "--eval-every", "0")) == 2
    assert "no good checkpoint is left" in capsys.readouterr().err  # that of step 1 gave the loss of step 2
    assert not list((tmp_path / "b").glob("checkpoint-*"))


def test_the_last_eval_loss_is_that_of_the_result(files, tmp_path, capsys):
    assert cli.main(command(files, tmp_path / "a", "--steps", "3", "--eval-every", "2", "--score", "0")) == 0
    rows = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 2, 3]


@pytest.mark.slow
def test_patience_and_divergence(files, tmp_path, capsys):
    (files / "against.jsonl").write_text('{"prompt": "1+1=", "completion": "zzzzzzzzzzzzzzzzzzzz"}\n' * 4)
    words = ("--eval-data", str(files / "against.jsonl"), "--eval-rows", "2", "--lr", "0.1")
    assert (
        cli.main(command(files, tmp_path / "a", *words, "--patience", "2", "--eval-every", "1", "--steps", "12")) == 0
    )
    assert 2 <= len(steps(tmp_path / "a")) < 12
    assert "2 evaluations without a lower eval loss" in capsys.readouterr().out
    assert cli.main(command(files, tmp_path / "b", "--lr", "1e20", "--save-every", "1")) == 2
    assert "training diverged" in capsys.readouterr().err
    for kept in (tmp_path / "b").glob("checkpoint-*"):
        assert all(t.isfinite().all() for t in native.read(kept / "adapter.safetensors")[1].values())


def test_the_end_shows_answers_and_the_next_line(files, first, tmp_path, capsys):
    words = (
        "--samples",
        "2",
        "--init-from",
        str(first),
        "--r",
        "3",
        "--layers",
        "-1",
        "--steps",
        "1",
        "--device",
        "cpu",
    )
    assert cli.main(command(files, tmp_path / "b", *words, "--lr", "1e-9")) == 0
    text = capsys.readouterr().out
    assert text.count("  base ") == text.count("  adapted ") == text.count("  right ") == 2
    assert "step 1: loss" in text and "tokens/s" in text and f"lora-lite chat {tmp_path / 'b'}" in text
    a, b = tensors(first), tensors(tmp_path / "b")
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)  # began with the first run's tensors
    assert cli.main(command(files, tmp_path / "c", "--init-from", str(first), "--r", "4")) == 2


def test_report_to_reaches_the_trainer(tmp_path):
    options = _fit.Options(steps=1, lr=0.1, report_to=("tensorboard",))
    assert _fit._arguments(options, tmp_path, False, True)["report_to"] == ["tensorboard"]


def test_the_running_mean_lags_behind_nothing():
    falling = [10.0 * 0.9**i for i in range(100)]
    assert all(abs(a / b - 1) < 0.12 for a, b in zip(smooth(falling), falling, strict=True))
    assert smooth([1.0, 3.0] * 20)[10:30] == pytest.approx([2.0] * 20, abs=0.5)


# ---- perfect answers


def test_perfect_answers_are_right_where_a_special_token_closes_the_turn(files, tmp_path, monkeypatch, capsys):
    from lora_lite.demo import evaluate

    folder = shutil.copytree(files / "tiny", tmp_path / "m")
    tok = tiny_llm.tokenizer()
    tok.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tok.chat_template = (
        "{% for m in messages %}({{ m['role'] }}) {{ m['content'] }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}(assistant) {% endif %}"
    )
    tok.save_pretrained(folder)
    model = tiny_llm.model()
    model.resize_token_embeddings(len(tok))
    model.save_pretrained(folder)
    rows = [{"messages": TURNS[:2]}, {"prompt": "1+1=", "completion": "2<end>"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    end = tok.convert_tokens_to_ids("<end>")

    def perfect(*_, input_ids, eos_token_id, **__):
        assert end in eos_token_id
        answer = torch.tensor([tok("2")["input_ids"] + [end]]).expand(len(input_ids), -1)
        return torch.cat([input_ids, answer], 1)

    load = evaluate.complete
    monkeypatch.setattr(
        evaluate, "complete", lambda m, *a: (setattr(m, "generate", lambda **k: perfect(**k)), load(m, *a))[1]
    )
    words = ["eval", "--model", str(folder), "--data", str(tmp_path / "a.jsonl"), "--json"]
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == 1.0


# ---- words


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "--learning-rate", "1e-4"], "here it is called --lr"),
        (["train", "--lora-r", "4"], "here it is called --r"),
        (["train", "--output_dir=x"], "here it is called --out"),
        (["train", "--batchsize", "4"], "Did you mean '--batch-size'"),
        (["tarin"], "Did you mean 'train'"),
        (["train", "--method", "ia3", "--alpha", "3"], "--alpha has no effect with method 'ia3'"),
        (["train", "--seed", "-1"], "--seed must lie between 0 and"),
        (["demo", "--seed", str(2**40)], "--seed must lie between 0 and"),
        (["train", "--device", "warp"], "torch knows no such device"),
        (["train", "--load-in-4bit", "--load-in-8bit"], "exclude each other"),
        (["train", "--out", "{file}/x"], "is a file; give a folder"),
        (["train", "--max-length", "100000"], "made for 512 tokens"),
        (["train", "--steps", "5", "--warmup", "5"], "as long as the whole run of 5 steps"),
        (["train", "--columns", "question"], "--columns takes words such as"),
        (["train", "--template", "/nowhere.jinja"], "cannot be read"),
        (["train", "--patience", "2", "--eval-rows", "0"], "--patience needs evaluations"),
        (["eval", "--adapter", "/nowhere"], "no such file"),
    ],
)
def test_mistakes_get_one_sentence(words, says, files, capsys):
    words = [w.format(file=files / "sums.jsonl") for w in words]
    try:
        code = cli.main(words)
    except SystemExit as left:
        code = left.code
    err = capsys.readouterr().err
    assert code == 2 and says in err and err.startswith("error: ") and err.count("\n") == 1
