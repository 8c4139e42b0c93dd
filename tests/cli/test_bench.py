"""`lora-lite bench`, on a model that is timed in a moment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_lite.bench import report, speed
from lora_lite.cli import main

ROOT = Path(__file__).parents[2]
TINY = ["bench", "speed", "--sizes", "tiny", "--shapes", "2x8", "--rounds", "3"]


def test_figures_table_and_picture(tmp_path, capsys):
    out = ["--json", str(tmp_path / "a.json"), "--table", str(tmp_path / "a.md"), "--plot", str(tmp_path / "a.png")]
    assert main([*TINY, "--methods", "lora", "ia3", "psoft", *out]) == 0
    data = json.loads((tmp_path / "a.json").read_text())
    assert [r["method"] for r in data["rows"]] == ["lora", "ia3", "psoft"]
    lora, ia3, psoft = data["rows"]
    assert lora["trained"] == 8 * (4 * 64 + 3 * 80)
    assert lora["step_vs_peft"]["q1"] <= lora["step_vs_peft"]["median"] <= lora["step_vs_peft"]["q3"]
    assert lora["ours_extra_saved_mb"] > 0
    assert lora["saved_vs_peft"] == pytest.approx(1, abs=0.05)
    assert "step_vs_peft" not in psoft
    assert psoft["ours_step_vs_base"]["median"] > 0
    shown = capsys.readouterr().out
    assert "step / PEFT" in shown
    assert "psoft" in shown
    assert (tmp_path / "a.md").read_text() == report.markdown(data)
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"

    (tmp_path / "a.json").write_text(json.dumps({**data, "rows": [lora]}))
    assert main([*TINY, "--methods", "lora", "ia3", *out]) == 0
    again = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert again[0] == lora, "a known row is not measured again"
    assert [r["method"] for r in again] == ["lora", "ia3"]


def test_a_dry_run_measures_nothing(capsys, monkeypatch):
    monkeypatch.setattr(speed, "measure", lambda *a: pytest.fail("measured"))
    assert main([*TINY, "--methods", "all", "--ranks", "8", "32", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"{len(speed.PAIRS) * 2 - len(speed.WITHOUT_RANK)} rows, about" in shown


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--methods", "lroa"], "Did you mean"),
        (["--sizes", "XL"], "choose from S4, M3, tiny"),
        (["--shapes", "4-128"], "for instance 4x128"),
        (["--rounds", "1"], "at least 2"),
    ],
)
def test_mistakes_are_named(words, sentence, capsys):
    assert main([*TINY, *words]) == 2
    assert sentence in capsys.readouterr().err


def test_a_foreign_file_is_left_alone(tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text('["mine"]')
    assert main([*TINY, "--json", str(path)]) == 2
    assert "holds no figures" in capsys.readouterr().err
    assert path.read_text() == '["mine"]'


def test_verdicts():
    def q(m, low=None):
        return {"median": m, "q1": m if low is None else low, "q3": m}

    row = {"method": "dora", "forward_vs_peft": q(0.6), "step_vs_peft": q(0.9, 0.8), "ours_step_vs_base": q(1.3, 1.21)}
    row |= {"peft_forward_vs_base": q(1.4), "peft_step_vs_base": q(1.5)}
    assert speed.verdicts(row) == {"forward_vs_peft": "met", "step_vs_peft": "missed", "ours_step_vs_base": "met"}
    row |= {"forward_vs_peft": q(0.8)}
    assert speed.verdicts(row)["forward_vs_peft"] == "beyond the base"


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
