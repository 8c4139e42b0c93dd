"""`lora-lite bench learn`: the dry run, refusals, a small board from the first run to the report, a run that fails."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

pytest.importorskip("tyro")

import lora_lite as ll
from lora_lite.bench.board import Entry, Protocol
from lora_lite.bench.learn import Setting
from lora_lite.cli import bench_learn, main
from lora_lite.cli._console import LiveTable


def test_the_dry_run_counts_what_is_left(tmp_path, capsys):
    words = ["bench", "learn", "--methods", "lora", "ia3", "--dry-run", "--results", str(tmp_path / "a.jsonl")]
    assert main([*words, "--jobs", "2"]) == 0
    said = capsys.readouterr().out
    assert "16 runs, about" in said and "with 2 processes" in said and "0.001 0.003 0.009 0.027 0.081" in said
    assert main([*words, "--beside-peft", "--task", "wordmath"]) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--methods", "lorra"], "no method of that name trains. Did you mean 'lora'"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--grid", "1", "1"], "--grid needs different factors above 0"),
        (["--device", "cuda"], "finds no CUDA device here"),
        (["--beside-peft", "--methods", "caa"], "caa: not compared with PEFT"),
        (["--beside-peft", "--steps", "0"], "--steps must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_run_is_said(words, sentence, capsys):
    import torch

    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["bench", "learn", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_a_run_that_fails_is_said_and_counts(capsys):
    setting = Setting("wordmath", "lora", "select", 0, 0.1, 3)
    for error, words in ((ll.ConfigError("no."), "lora at 0.1: no."), (ZeroDivisionError("x"), "ZeroDivisionError: x")):
        done: Future[object] = Future()
        done.set_exception(error)
        with LiveTable(bench_learn.SHORT) as live:
            assert bench_learn.outcome(done, setting, live) is None
        assert words in capsys.readouterr().out


def test_the_live_table_and_its_title():
    protocol, entry = Protocol("wordmath", 3, 1, (1.0,)), Entry("lora")
    row = {"task": "wordmath", "method": "lora", "phase": "select", "seed": 0, "lr": 1e-3, "steps": 3, "fields": {}}
    rows = [{**row, "accuracy": 0.25, "loss": 1.0, "factor": 1.0}]
    assert bench_learn.short(rows, protocol, [entry]) == [["lora", "-", "-", "0", "0.001", "-"]]
    title = bench_learn.standing_title(1, 2, [(Setting(**row), 61.0)])
    assert title == "1 of 2 runs; now lora lr 0.001 select 0 (1 min 01 s)"


@pytest.mark.slow
def test_a_small_board_from_the_first_run_to_the_report(tmp_path, capsys):
    results = tmp_path / "learn.jsonl"
    words = ["bench", "learn", "--methods", "lora", "--steps", "2", "--seeds", "1", "--grid", "1", "--jobs", "2"]
    words += ["--results", str(results), "--checkpoints", str(tmp_path / "runs")]
    assert main(words) == 0
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [r["phase"] for r in rows] == ["select", "final"] and rows[1]["step_vs_lora"] > 0
    capsys.readouterr()
    assert main([*words, "--report", str(tmp_path / "report")]) == 0
    assert "every run is finished already" in capsys.readouterr().out
    assert (tmp_path / "report" / "learn.html").read_text().count("data:image/png;base64,") == 5
    assert main(["bench", "learn", "--beside-peft", "--methods", "ia3", "--steps", "2", "--results", str(results)]) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "learn-beside-peft.jsonl").read_text().splitlines()]
    assert row["last_apart"] < 1e-5 and len(row["ours"]) == 2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_a_killed_command_leaves_no_worker(tmp_path):
    words = ["-m", "lora_lite", "bench", "learn", "--steps", "10000", "--results", str(tmp_path / "rows.jsonl")]
    command = subprocess.Popen([sys.executable, *words, "--checkpoints", str(tmp_path)], stdout=subprocess.DEVNULL)
    try:
        workers = until(lambda: [p for p in children(command.pid) if "spawn_main" in p.read_text()])
    finally:
        command.kill()
        command.wait()
    assert workers, "none has begun"
    assert until(lambda: not any(p.exists() for p in workers)), "a worker goes on with a run that nobody reads"


def children(pid: int) -> list[Path]:
    """/proc/N/cmdline of the processes that it started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(path.with_name("cmdline"))
    return found


def until(true, seconds=90.0):
    """What `true` returns, once it is true."""
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.2)
    return found
