"""The leaderboard: what a run writes, that it goes on after a stop, which rate is chosen, and what the page says."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.bench import board, board_report, board_words, boards, learn, sizes
from lora_lite.bench.board import Entry, Protocol
from lora_lite.bench.learn import Setting
from lora_lite.testing.toy import toy


class Output:
    def __init__(self, loss):
        self.loss = loss


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = toy()

    def forward(self, x, labels):
        return Output(nn.functional.mse_loss(self.body(x), labels))


class Lines:
    """Regression on a random map: right is a row whose error is below the median of the base's."""

    name, fields, head_lr = "lines", {}, None

    def load(self):
        return Net()

    def batch(self, step):
        g = torch.Generator().manual_seed(1000 + step)
        x = torch.randn(4, 5, 12, generator=g)
        return {"x": x, "labels": x.cumsum(-1)}

    def examine(self, model, split):
        batch = self.batch({"validation": -50, "test": -60}[split])
        with torch.no_grad():
            error = (model.body(batch["x"]) - batch["labels"]).square().mean(-1)
        return float((error < 6).float().mean()), float(error.mean()), error.numel()

    def remembered(self, model):
        with torch.no_grad():
            return float(model.body(torch.ones(1, 5, 12)).square().mean())


def setting(method="lora", phase="final", seed=1, lr=0.02, steps=12, **fields):
    return Setting("lines", method, phase, seed, lr, steps, fields)


def row(s, accuracy=0.5, loss=1.0, **more):
    fields = {name: getattr(s, name) for name in Setting.__dataclass_fields__}
    figures = {"ms_per_step": 2.0, "trained": 100, "losses": [3.0, 2.0], "step_mb": 10.0, "factor": 1.0}
    return {**fields, "split": "test", "accuracy": accuracy, "loss": loss, "problems": 9, **figures, **more}


def test_a_row_says_what_ran(tmp_path):
    found = learn.run(Lines(), setting(r=3, alpha=7), tmp_path)
    assert json.loads(json.dumps(found)) == found
    assert Setting.of(found) == setting(r=3, alpha=7)
    assert {"method", "task", "seed", "lr", "steps", "accuracy"} <= set(found)
    assert found["trained"] == sum(3 * (a + b) for a, b in ((12, 20), (20, 12)) * 2)
    assert len(found["losses"]) == 12 and found["losses"][-1] < found["losses"][0]
    assert found["file_bytes"] > 4 * found["trained"] and found["problems"] == 20
    assert found["remembered"]["before"] != found["remembered"]["after"]
    assert 0.2 < found["step_vs_lora"] < 5 and found["device"] == "cpu"
    assert found["step_mb"] * 2**20 > 4 * found["trained"], "at the end the gradients stand"
    assert not list(tmp_path.iterdir()), "a finished run leaves no checkpoint"


@pytest.mark.parametrize("method", ["lora", "adalora", "pissa"])
def test_a_stopped_run_goes_on_to_the_same_end(tmp_path, monkeypatch, method):
    """adalora has a schedule and a penalty, and dropout's masks come back too."""
    monkeypatch.setattr(learn, "CHECKPOINT", 0.0)
    fields = {"r": 3, "alpha": 7, "dropout": 0.1} if method == "lora" else {"r": 4, "alpha": 7}
    fields |= {"target_r": 2} if method == "adalora" else {}
    s = setting(method, **fields)
    whole = learn.run(Lines(), s, tmp_path / "a")

    class Stop(Exception):
        pass

    def tick(done, steps):
        if done == 8:
            raise Stop

    with pytest.raises(Stop):
        learn.run(Lines(), s, tmp_path / "b", tick)
    seen = []
    again = learn.run(Lines(), s, tmp_path / "b", lambda done, steps: seen.append(done))
    assert seen == [8, 9, 10, 11, 12], "it began anew"
    assert whole["step_vs_lora"] > 0, "timed after the last step, past the end of a schedule"
    for key in ("losses", "accuracy", "loss", "remembered", "file_bytes"):
        assert again[key] == whole[key], key


def test_seeds_see_other_rows_and_methods_the_same(tmp_path):
    """PiSSA's start does not depend on the seed."""
    pissa = [learn.run(Lines(), setting("pissa", seed=n, lr=1e-9, r=3, alpha=7), tmp_path)["losses"] for n in (1, 2)]
    assert pissa[0] != pissa[1]
    lora = learn.run(Lines(), setting("lora", seed=1, lr=1e-9, r=3, alpha=7), tmp_path)["losses"]
    assert lora == pytest.approx(pissa[0], abs=1e-3)


def test_a_rate_too_high_is_a_row(tmp_path):
    found = learn.run(Lines(), setting(lr=1e18, phase="select"), tmp_path)
    assert None in found["losses"] or found["loss"] is None or found["loss"] > 100
    assert found["split"] == "validation" and "file_bytes" not in found


PROTOCOL = Protocol("lines", 12, seeds=2, grid=(0.5, 1.0, 2.0))


def test_the_rate_is_chosen_on_validation_and_then_the_seeds_run():
    entry, rate = Entry("lora"), ll.get_variant("lora").lr
    first = board.left([], PROTOCOL, [entry])
    assert [(s.phase, s.seed, s.lr) for s in first] == [("select", 0, f * rate) for f in PROTOCOL.grid]
    assert board.count_left([], PROTOCOL, [entry]) == 5
    rows = [row(s, accuracy) for s, accuracy in zip(first, (0.8, 0.8, 0.2), strict=True)]
    rows[1]["loss"] = 0.5  # as often right, and more surely
    assert board.left(rows[:2], PROTOCOL, [entry]) == first[2:]
    finals = board.left(rows, PROTOCOL, [entry])
    assert [(s.phase, s.seed, s.lr) for s in finals] == [("final", n, rate) for n in (1, 2)]
    rows += [row(s, accuracy) for s, accuracy in zip(finals, (0.5, 0.7), strict=True)]
    assert board.left(rows, PROTOCOL, [entry]) == [] and board.count_left(rows, PROTOCOL, [entry]) == 0
    s = board.standing(rows, PROTOCOL, entry)
    assert s.mean == pytest.approx(0.6) and s.half == pytest.approx(12.706 * 0.1414214 / 2**0.5, rel=1e-3)
    other = Protocol("lines", 13, seeds=2, grid=(0.5, 1.0, 2.0))
    assert len(board.left(rows, other, [entry])) == 3, "runs of other steps do not count"


@pytest.mark.parametrize("high", [True, False])
def test_the_grid_grows_where_the_best_rate_stands_at_its_end(high):
    entry, rows, asked = Entry("lora"), [], []

    def run(accuracy):
        now = board.left(rows, PROTOCOL, [entry])
        assert {s.phase for s in now} == {"select"}
        asked.append([PROTOCOL.place(s) for s in now])
        rows.extend(row(s, accuracy(s.lr), **PROTOCOL.place(s)) for s in now)

    def better(lr):
        return lr if high else 1 - lr

    run(better)
    run(better)
    run(better)
    first, second = (4.0, 8.0) if high else (0.25, 0.125)
    assert [p["factor"] for p in asked[0]] == [0.5, 1.0, 2.0] and not any("beyond" in p for p in asked[0])
    assert asked[1:] == [[{"factor": first, "beyond": True}], [{"factor": second, "beyond": True}]]
    chosen = second * ll.get_variant("lora").lr
    assert {s.lr for s in board.left(rows, PROTOCOL, [entry])} == {chosen}, "no further than two"
    rows[-1]["accuracy"] = 0.0  # past the best one, which is inside now
    assert {s.lr for s in board.left(rows, PROTOCOL, [entry])} == {first * ll.get_variant("lora").lr}
    done = [row(s, 0.5, **PROTOCOL.place(s)) for s in board.left(rows, PROTOCOL, [entry])]
    assert board.count_left(rows + done, PROTOCOL, [entry]) == 0
    (found,) = boards.boards(rows + done)
    assert found.protocol.grid == PROTOCOL.grid, "what grew is no part of everybody's grid"


def test_a_file_that_was_cut_is_read_and_mended(tmp_path):
    path = tmp_path / "learn.jsonl"
    board.add(path, row(setting()))
    with path.open("a") as f:
        f.write('{"method": "lo')
    assert len(board.read(path)) == 1
    board.add(path, row(setting(seed=2)))
    assert [r["seed"] for r in board.read(path)] == [1, 2]
    path.write_text("[1]\n" + path.read_text())
    with pytest.raises(ll.FileError, match="learn.jsonl:1 is no row"):
        board.read(path)


def test_sizes_at_equal_parameters():
    model = toy()
    for method, wanted in (("lora", 640), ("hra", 512), ("dora", 700)):
        fields = sizes.fields_for(model, method, wanted, {})
        assert fields is not None
        n = ll.plan(model, ll.get_variant(method).config(variant=method, **fields)).trainable
        assert abs(n - wanted) < 0.15 * wanted
    assert sizes.fields_for(model, "ia3", 50_000, {}) is None


def test_a_default_size_that_is_near_stands_itself():
    """LoRA's default trains 1,536 here; 1,600 is within 15 %, 3,000 is not."""
    model = toy()
    default = ll.plan(model, ll.get_variant("lora").config(variant="lora")).trainable
    assert sizes.fields_for(model, "lora", round(1.05 * default), {}) == {}
    assert sizes.fields_for(model, "lora", 2 * default, {}) == {"r": 16}


def test_boards_at_equal_parameters(tmp_path):
    """One board for each size; a method stands once on each, with the runs of its default size where that is near."""
    rows, entries = finished(), [Entry("lora", {"r": 1}, 50), Entry("lora", {"r": 40}, 2000)]
    entries.append(Entry("dora", {"r": 2}, 50))
    for phase in range(2):
        for s in board.left(rows, PROTOCOL, entries):
            place = PROTOCOL.place(s) | board.aim(s, entries)
            right = 0.6 if phase else 0.5 - abs(place["factor"] - 1) / 10
            rows.append(row(s, right, trained=48 if s.fields["r"] < 3 else 1900, **place))
    assert board.count_left(rows, PROTOCOL, entries) == 0
    small, large = (b for b in boards.boards(rows) if b.parameters)
    assert (small.parameters, large.parameters) == (50, 2000)
    assert {e.method for e in small.entries} == {"lora", "dora"} and [e.label for e in large.entries] == ["lora (r=40)"]
    near = [{**r, "trained": 2100} if r["method"] == "ia3" else r for r in rows]
    at = {b.parameters: [e.label for e in b.entries] for b in boards.boards(near)}
    assert at[2000] == ["lora (r=40)", "ia3"] and "ia3" not in at[50] and at[None] == ["lora", "ia3"]
    stray = row(setting("dora", "select", 0, r=9), factor=1.0)
    assert [b.parameters for b in boards.boards([*rows, stray])] == [None, 0, 50, 2000]
    assert "other sizes" in board_report.markdown([*rows, stray])
    page = board_report.markdown(near)
    assert "## lines, 12 steps, about 2,000 trained parameters" in page and "| lora (r=40) | 60.0% |" in page
    names = {p.name for p in board_report.write(tmp_path, near)}
    assert {"learn-lines-12-sizes.png", "learn-lines-12-50-time.png", "learn-lines-12-2000-rates.png"} <= names


def finished():
    rows = []
    for method, right in (("lora", 0.8), ("ia3", 0.6)):
        for s in board.left([], PROTOCOL, [Entry(method)]):
            factor = PROTOCOL.place(s)["factor"]
            rows.append(row(s, right - abs(factor - 1) / 10, factor=factor))
        for s in board.left(rows, PROTOCOL, [Entry(method)]):
            rows.append(
                row(
                    s,
                    right + s.seed / 100,
                    remembered={"before": 1.0, "after": 1.5},
                    file_bytes=2048,
                    step_vs_lora=1.25,
                )
            )
    return rows


def test_the_page_and_the_report(tmp_path):
    rows = finished()
    paths = board_report.write(tmp_path, rows)
    page = (tmp_path / "learn.md").read_text()
    assert "## lines, 12 steps, default sizes" in page
    line = next(line for line in page.splitlines() if line.startswith("| lora |"))
    assert "81.5%" in line and "| 2 |" in line and "+0.500" in line and "| 1.25 |" in line
    assert page.index("| lora |") < page.index("| ia3 |") and "Not begun:" in page and "edge" not in line
    assert "Not finished: " not in page
    report = (tmp_path / "learn.html").read_text()
    assert report.count("data:image/png;base64,") == 5 and "http" not in report.replace("data:image", "")
    assert all(p.stat().st_size > 5000 for p in paths if p.suffix == ".png")
    assert "Not finished: ia3." in board_report.markdown(rows[:-1])


def final(method, accuracies, label=None):
    """A standing whose seeds 1, 2, ... have these shares of right answers."""
    entry, lr = Entry(method, label or {}), 1e-3
    rows = [row(setting(method, seed=n), a, problems=400) for n, a in enumerate(accuracies, 1)]
    return board.Standing(entry, {lr: 0.9, 2 * lr: 0.85}, lr, rows)


def test_differences_that_are_noise():
    """Three methods, three seeds, whose second is better by 4 points for all: what is left is a pattern of ±1."""
    pattern = ((-1, 0, 1), (1, 0, -1), (0, 0, 0))
    means = {"lora": 0.5, "dora": 0.52, "ia3": 0.2}
    standings = [
        final(method, [mean + 0.04 * (i == 1) + 0.01 * p for i, p in enumerate(own)])
        for (method, mean), own in zip(means.items(), pattern, strict=True)
    ]
    found = board.scatter(standings)
    assert found is not None and (found.seeds, found.free) == (3, 4) and found.sigma == pytest.approx(0.01)
    assert found.apart() == pytest.approx(2.776 * 0.01 * (2 / 3) ** 0.5, rel=5e-3)
    assert found.apart(runs=1) == pytest.approx(2.776 * 0.01 * 2**0.5, rel=5e-3)
    assert found.apart(2) > 1.2 * found.apart()
    said = " ".join(board_words.reading(standings))
    assert "Of the 3 methods that learnt (above 10%), a run lies 1.0 points" in said
    assert "less than 2 points apart are no ranking" in said and "others would move a figure by 2.5 points" in said
    assert "with 2 comparisons allowed for" in said and "better: none; worse: 1; not to be told from it: 1." in said
    assert "for 0 of 3 methods the second best lies within 4 points" in said
    assert board.scatter([]) is None and board.scatter(standings[:2]) is None, "too few to say"
    assert board.scatter([*standings[:2], final("ia3", [0.2, 0.3])]) is None, "other seeds"
    assert "Against" not in " ".join(board_words.reading([*standings[1:], final("road", [0.3, 0.4, 0.2])]))


@pytest.mark.parametrize(("p", "free", "t"), [(0.975, 4, 2.776), (0.975, 30, 2.042), (0.9995, 30, 3.646)])
def test_students_t(p, free, t):
    assert board.student(p, free) == pytest.approx(t, rel=5e-3)


def test_default_sizes_and_their_order():
    apart = [final(m, [a] * 3) for m, a in (("lora", 0.5), ("dora", 0.6), ("ia3", 0.7))]
    assert board_words.sizes_differ(apart) == [], "one size"
    for s, trained in zip(apart, (300, 200, 100), strict=True):
        for r in s.finals:
            r["trained"] = trained
    assert "from 100 to 300 parameters; the rank correlation of that with right answers is -1.00" in str(
        board_words.sizes_differ(apart)
    )


def test_methods_whose_rate_is_not_chosen_stand_apart():
    rows = finished()
    began = next(s for s in board.left([], PROTOCOL, [Entry("dora")]) if PROTOCOL.place(s)["factor"] == 1)
    page = board_report.markdown([*rows, row(began, 0.4, factor=1.0)])
    finals, first = page.split("Whose rate is not chosen yet")
    assert "| dora |" not in finals and f"| dora | 40.0% | {began.lr:g} | 1 | 1 |" in first
    assert "Whose rate" not in board_report.markdown(rows)


def test_no_runs_no_tables():
    assert "##" not in board_report.markdown([])


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
def test_the_report_in_a_browser(tmp_path):
    """Every picture is drawn, and a narrow window scrolls the table alone."""
    board_report.write(tmp_path, finished(), [beside()])
    page = (tmp_path / "learn.html").read_text()
    probe = """<script>onload = () => { document.title = [...document.images].filter(i => i.naturalWidth > 300).length
      + " of " + document.images.length + ", " + (document.body.scrollWidth <= innerWidth) }</script></body>"""
    (tmp_path / "probe.html").write_text(page.replace("</body>", probe))
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=400,800", "--dump-dom"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", str(tmp_path / "probe.html")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert "<title>6 of 6, true</title>" in done.stdout, done.stdout[:300] + done.stderr[-500:]


def beside(**more):
    curves = {"ours": [3.0, 2.0, 1.5], "peft": [3.0, 2.0, 1.5], "start_apart": 0.0, "last_apart": 0.0}
    return {"method": "lora", "task": "lines", "lr": 0.02, "steps": 3, "peft_type": "LORA", **curves, **more}


def test_beside_peft_on_the_page(tmp_path):
    rows = [
        beside(),
        beside(method="dora", last_apart=0.12),
        {**beside(method="road"), "refused": "64 does not divide"},
    ]
    text = board_report.markdown([], rows)
    assert "| lora | LORA | 0.02 | 3 | PEFT's | 0e+00 | 3.0000 | 2.1667 | 2.1667 | the same |" in text
    assert (
        "| 12.0%: gains 1 + δ, whose steps Adam makes in shares of a row |" in text
        and "| road | - | 0.02 | - | - | - | - | - | - | 64 does not divide |" in text
    )
    assert "Beside PEFT" not in board_report.markdown([])


def test_a_run_beside_peft(monkeypatch):
    """The same start and the same steps on layers that PEFT adapts too; a rate of ours that differs is noticed."""
    pytest.importorskip("peft")
    from lora_lite.bench import beside_peft

    targets = {"target_modules": ["up", "down"]}

    def peft_config(method, r):
        import peft

        kind = {"lora": peft.LoraConfig, "ia3": peft.IA3Config}[method]
        return kind(**targets, **({"r": r} if method == "lora" else {"feedforward_modules": []}))

    monkeypatch.setattr(beside_peft, "peft_config", peft_config)
    for method in ("lora", "ia3"):
        found = beside_peft.run(Lines(), method, 12, r=3)
        assert found["start_apart"] == 0 and found["last_apart"] < 1e-5, found
        assert len(found["ours"]) == len(found["peft"]) == 12 and found["ours"][-1] != found["ours"][0]
    real, rates = beside_peft.at_rate, iter((2, 1))
    monkeypatch.setattr(beside_peft, "at_rate", lambda parameters, lr: real(parameters, next(rates) * lr))
    assert beside_peft.run(Lines(), "lora", 12, r=3)["last_apart"] > 1e-4

    def missing(method, r):
        raise ImportError("scikit-learn is required\nfor that")

    monkeypatch.setattr(beside_peft, "peft_config", missing)
    assert beside_peft.run(Lines(), "lora", 12, r=3)["refused"] == "scikit-learn is required", "the others go on"
