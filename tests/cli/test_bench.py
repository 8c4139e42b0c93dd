"""`lora-lite bench`, on a model that is timed in a moment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_lite.bench import device, goals, pairs, report, speed
from lora_lite.cli import main

ROOT = Path(__file__).parents[2]
TINY = ["bench", "speed", "--sizes", "tiny", "--shapes", "2x8", "--rounds", "3"]


def test_figures_table_and_picture(tmp_path, capsys):
    out = ["--json", str(tmp_path / "a.json"), "--table", str(tmp_path / "a.md"), "--plot", str(tmp_path / "a.png")]
    assert main([*TINY, "--methods", "lora", "ia3", "svft", *out]) == 0
    data = json.loads((tmp_path / "a.json").read_text())
    assert [r["method"] for r in data["rows"]] == ["lora", "ia3", "svft"]
    lora, ia3, svft = data["rows"]
    assert lora["trained"] == 8 * (4 * 64 + 3 * 80)
    assert lora["step_vs_peft"]["q1"] <= lora["step_vs_peft"]["median"] <= lora["step_vs_peft"]["q3"]
    assert lora["ours_extra_saved_mb"] > 0
    assert lora["saved_vs_peft"] == pytest.approx(1, abs=0.05)
    assert "step_vs_peft" not in svft
    assert svft["ours_step_vs_base"]["median"] > 0
    for verb in ("plan", "attach", "save", "load", "merge", "unmerge"):
        assert lora[f"ours_{verb}_ms"] > 0, verb
    assert lora["merge_vs_peft"] > 0
    assert lora["ours_merge_peak_mb"] > lora["peft_merge_peak_mb"], "a merge that can be taken back keeps a copy"
    assert ia3["ours_token_vs_base"]["median"] > 0
    shown = capsys.readouterr().out
    assert "step / PEFT" in shown
    assert "svft" in shown
    assert (tmp_path / "a.md").read_text() == report.markdown(data)
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"

    (tmp_path / "a.json").write_text(json.dumps({**data, "rows": [lora]}))
    assert main([*TINY, "--methods", "lora", "ia3", *out]) == 0
    again = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert again[0] == lora, "a known row is not measured again"
    assert [r["method"] for r in again] == ["lora", "ia3"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_methods_that_start_from_weights_or_data(tmp_path):
    """The start of a method from data is that of batches which the benchmark draws."""
    names = ["eva", "corda", "lora_one", "lora_xs", "pissa", "olora"]
    assert main([*TINY, "--rounds", "2", "--methods", *names, "--json", str(tmp_path / "a.json")]) == 0
    rows = {r["method"]: r for r in json.loads((tmp_path / "a.json").read_text())["rows"]}
    assert list(rows) == names and not any("refused" in r for r in rows.values())
    assert [n for n in names if "attach_vs_peft" in rows[n]] == ["pissa", "olora"]
    slow = {**rows["eva"], "size": "layer-8b", "ours_attach_ms": 5100.0}
    assert goals.verdicts(slow)["ours_attach_ms"] == "missed" and "goal 5000.00" in report.verb_cells(slow)[4]


def test_a_dry_run_measures_nothing(capsys, monkeypatch):
    monkeypatch.setattr(speed, "measure", lambda *a: pytest.fail("measured"))
    assert main([*TINY, "--methods", "all", "--ranks", "8", "32", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"{len(speed.PAIRS) * 2 - len(speed.WITHOUT_RANK)} rows, about" in shown


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--methods", "lroa"], "Did you mean"),
        (["--sizes", "XL"], "choose from S4, M3, layer-8b, tiny"),
        (["--shapes", "4-128"], "for instance 4x128"),
        (["--rounds", "1"], "at least 2"),
    ],
)
def test_mistakes_are_named(words, sentence, capsys):
    assert main(["bench", "speed", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_a_foreign_file_is_left_alone(tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text('["mine"]')
    assert main([*TINY, "--json", str(path)]) == 2
    assert "holds no figures" in capsys.readouterr().err
    assert path.read_text() == '["mine"]'


def q(m, low=None):
    return {"median": m, "q1": m if low is None else low, "q3": m}


def test_verdicts():
    row = {"method": "dora", "size": "S4", "r": 8, "ours_forward_vs_base": q(1.2, 1.07), "ours_step_vs_base": q(1.16)}
    assert goals.verdicts(row) == {"ours_forward_vs_base": "met", "ours_step_vs_base": "missed"}
    assert goals.judged(row)["ours_step_vs_base"] == {"goal": 1.15, "reached": 1.16, "verdict": "missed"}
    assert goals.verdicts({**row, "size": "tiny"}) == {}, "the interpreter is all that a tiny model times"
    assert goals.verdicts({**row, "r": 32}) == {}, "another rank costs otherwise"
    row = {"method": "delora", "size": "M3", "r": 32, "shape": "4x128", "step_vs_peft": q(1.0), "merge_vs_peft": 2.0}
    assert goals.verdicts(row) == {"step_vs_peft": "met"}
    layer = {**row, "size": "layer-8b"}
    assert goals.verdicts(layer) == {"step_vs_peft": "met", "merge_vs_peft": "missed"}
    assert goals.missed([row, layer]) == ["delora layer-8b 4x128 r=32: merge_vs_peft 2.00 > 1.00"]


def test_no_goal_is_out_of_reach():
    """What is compared with the base cannot lie below the base; PEFT's figures are goals only where they lie above."""
    for method, bounds in (goals.GOALS | goals.AT_LAYER).items():
        assert all(v > 1 for k, v in bounds.items() if k.endswith(("_vs_base", "_vs_copy"))), method
    assert {goals.GOALS[m]["ours_forward_vs_base"] for m in ("lora", "dora", "delora", "pissa", "gralora")} == {1.08}
    assert {goals.GOALS[m]["ours_step_vs_base"] for m in ("lora", "dora", "delora", "pissa", "gralora")} == {1.15}


def test_a_missed_goal_fails_the_exit_code(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(goals, "JUDGED", ("tiny",))
    words = [*TINY, "--method", "svft", "--json", str(tmp_path / "a.json"), "--table", str(tmp_path / "a.md")]
    monkeypatch.setattr(goals, "GOALS", {"svft": {"ours_step_vs_base": 1e9}})
    assert main(words) == 0
    monkeypatch.setattr(goals, "GOALS", {"svft": {"ours_step_vs_base": 0.01}})
    assert main(words) == 1, "known rows are judged again"
    assert "missed: svft tiny 2x8 r=8: ours_step_vs_base" in capsys.readouterr().out
    assert "(goal 0.01 **missed**)" in (tmp_path / "a.md").read_text()
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert row["goals"]["ours_step_vs_base"]["verdict"] == "met"
    assert row["goals"]["ours_step_vs_base"]["goal"] == 1e9


def test_a_method_that_refuses_the_model_is_a_row(tmp_path):
    words = [*TINY, "--methods", "adalora", "--json", str(tmp_path / "a.json"), "--table", str(tmp_path / "a.md")]
    assert main(words) == 0
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert "ll.schedule" in row["refused"]
    assert "ll.schedule" in (tmp_path / "a.md").read_text()


def test_a_layer_of_the_size_that_people_use(capsys):
    assert main(["bench", "--size", "layer-8b", "--methods", "every", "--dry-run"]) == 0
    assert f"{len(speed.methods())} rows, about" in capsys.readouterr().out
    shape = pairs.SIZES["layer-8b"]
    assert (shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]) == (4096, 14336, 1)
    assert not pairs.runs_in_peft("boft", "layer-8b")


def test_without_a_gpu_the_run_on_one_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", "--device", "cuda"]) == 2
    assert "finds no CUDA device here" in capsys.readouterr().err
    assert main(["bench", "--device", "cuda", "--methods", "lora", "dora", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "20 units to measure" in shown, "two shapes: the base, and two methods of two, eager and compiled"
    assert "llama-3.1-8b" in shown
    assert main(["bench", "--device", "cpu", "--plot", "x.png"]) == 2
    assert main(["bench", "--device", "cpu", "--sizes", "S4"]) == 2


@pytest.mark.slow
def test_the_run_on_a_device_goes_on_and_needs_nobody(tmp_path, capsys, monkeypatch):
    """The paths of a run on a GPU, on the CPU; a unit that fails says so and is tried again."""
    compiled, build = [], device.build
    monkeypatch.setattr("torch.nn.Module.compile", lambda self, **kw: compiled.append(kw))
    monkeypatch.setattr(device, "build", lambda unit, where: 1 / 0 if unit.who == "peft" else build(unit, where))
    words = ["bench", "--device", "cpu", "--rounds", "2", "--json", str(tmp_path / "a.json")]
    words += ["--table", str(tmp_path / "a.md")]
    assert main(words) == 1
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    who = [(row["who"], row["mode"]) for row in rows]
    assert who == [(w, mode) for w in ("base", "peft", "ours") for mode in ("eager", "compiled")]
    assert rows[2]["failed"] == "ZeroDivisionError: division by zero"
    ours = rows[-1]
    assert all(ours[f] > 0 for f in device.FIGURES), ours
    assert ours["step_vs_base"] == pytest.approx(ours["step_ms"] / rows[1]["step_ms"], abs=1e-3)
    assert ours["trained"] == 8 * (4 * 64 + 3 * 80)
    assert len(compiled) == 2
    assert "failed: peft lora eager tiny" in capsys.readouterr().out

    monkeypatch.setattr(device, "build", build)
    assert main(words) == 0
    again = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert sorted(device.key_of(r) for r in again) == sorted(device.key_of(r) for r in rows)
    assert not any("failed" in row for row in again)
    assert len(compiled) == 3, "only what failed was measured again"
    assert (tmp_path / "a.md").read_text() == device.markdown(json.loads((tmp_path / "a.json").read_text()))


@pytest.mark.gpu
def test_the_run_on_a_gpu(tmp_path):
    words = ["bench", "--device", "cuda", "--size", "tiny", "--rounds", "2", "--json", str(tmp_path / "a.json")]
    assert main(words) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert all(row["peak_mb"] > 0 for row in rows)


def test_memory_is_counted():
    """Of y = sum exp(x Wᵀ) autograd saves the exponential; a linear layer with a frozen weight saves nothing."""
    import torch

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(speed.VOCABULARY, 16).requires_grad_(False)
            self.w = torch.nn.Linear(16, 32, bias=False).requires_grad_(False)

        def get_input_embeddings(self):
            return self.embed

        def forward(self, inputs_embeds, labels, use_cache):
            class Out:
                loss = self.w(inputs_embeds).exp().sum()

            return Out

    ids = torch.zeros(4, 8, dtype=torch.long)
    assert speed.saved_bytes(Model(), ids) == 4 * 8 * 32 * 4
    narrow, wide = 4 * 8 * 16 * 4, 4 * 8 * 32 * 4  # the embeddings; the layer's output and its exponential
    assert narrow + 2 * wide <= speed.peak_bytes(Model(), ids) < narrow + 2 * wide + 1024


def test_the_committed_table_is_that_of_the_committed_figures():
    figures = ROOT / "benchmarks" / "results" / "speed.json"
    assert (ROOT / "docs" / "results" / "speed.md").read_text() == report.markdown(json.loads(figures.read_text()))


def test_the_committed_page_of_a_gpu_is_that_of_the_committed_figures():
    data = json.loads((ROOT / "benchmarks" / "results" / "gpu.json").read_text())
    assert (ROOT / "docs" / "results" / "gpu.md").read_text() == device.markdown(data)
    assert all(row["device"] == "cuda" and "failed" not in row for row in data["rows"])


def test_memory_beside_peft_and_paper(tmp_path, capsys):
    out = ["--json", str(tmp_path / "a.json"), "--table", str(tmp_path / "a.md")]
    words = ["bench", "memory", "--size", "tiny", "--shapes", "1x64", "--methods", "lora", *out]
    assert main(words) == 0
    row = json.loads((tmp_path / "a.json").read_text())["rows"][0]
    assert row["kept"]["base"] > row["recomputed"]["base"] > 0
    assert 0 < row["kept"]["ours"] <= row["kept"]["peft"]
    assert "1x64" in (tmp_path / "a.md").read_text() and "of paper" in capsys.readouterr().out
    assert main([*words, "--dry-run"]) == 0
    assert "0 rows" in capsys.readouterr().out
