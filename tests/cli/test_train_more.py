"""train: packing, preference pairs, what is noticed and shown; eval: multiple choice. On a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lora_lite as ll
import tiny_llm
from lora_lite import cli
from lora_lite.cli._fit import block_of
from lora_lite.cli._notice import check_packing, untrained_tokens
from lora_lite.data.batches import collate
from lora_lite.data.choices import Choice, choices_in, pick
from lora_lite.data.packing import packed
from lora_lite.demo.evaluate import mean_loss

pytest.importorskip("trl")
pytest.importorskip("tyro")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("more")
    tiny_llm.save(folder / "tiny")
    tiny_llm.sums(folder / "sums.jsonl")
    pairs = [{"prompt": f"{i}+1=", "chosen": f"{i + 1}", "rejected": f"{i} no"} for i in range(12)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    return folder


def words(files: Path, out: Path, *more: str, data: str = "sums.jsonl") -> list[str]:
    flags = {
        "model": files / "tiny", "data": files / data, "steps": 4, "batch-size": 4, "lr": 0.01, "eval-every": 2,
        "save-every": 0, "eval-rows": 0.25, "warmup": 0, "out": out, "r": 3,
    }  # fmt: skip
    given = {w for w in more if w.startswith("--")}
    return ["train", *(x for k, v in flags.items() if f"--{k}" not in given for x in (f"--{k}", str(v))), *more]


# ---- the rate


def test_a_narrow_model_is_told_larger_rates(files, tmp_path, capsys):
    given = words(files, tmp_path / "a", "--steps", "1")
    del given[given.index("--lr") : given.index("--lr") + 2]
    assert cli.main(given) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "lr 0.001 is recommended for models thousands wide, and this one is" in said
    assert "--lr 0.003, 0.009, 0.027 on held-out rows" in said
    assert cli.main(words(files, tmp_path / "b", "--steps", "1")) == 0
    assert "recommended for models" not in capsys.readouterr().out, "a rate that was given is not questioned"


# ---- packing


def test_packed_rows_are_whole_and_learn_the_same():
    rows = [{"input_ids": list(range(4, 4 + n)), "labels": [-100] * 2 + list(range(6, 4 + n))} for n in (9, 5, 7, 3, 8)]
    blocks = packed(rows, 16)
    assert len(blocks) == 2 and all(len(b["input_ids"]) <= 16 for b in blocks)
    assert sorted(b["position_ids"].count(0) for b in blocks) == [2, 3]
    model = tiny_llm.model()
    check_packing(model, blocks)
    assert mean_loss(model, blocks, 2, 0) == pytest.approx(mean_loss(model, rows, 3, 0), rel=1e-5)
    # rows that see each other are noticed: the same without positions
    forward = model.forward
    model.forward = lambda position_ids=None, **kwargs: forward(**kwargs)
    assert abs(mean_loss(model, blocks, 2, 0) - mean_loss(tiny_llm.model(), rows, 3, 0)) > 1e-4
    with pytest.raises(ll.ConfigError, match="sees the one before it"):
        check_packing(model, blocks)


def test_train_packs(files, tmp_path, capsys):
    assert cli.main(words(files, tmp_path / "p", "--packing", "--max-length", "24")) == 0
    text = capsys.readouterr().out
    assert "18 rows are packed into" in text
    assert cli.main(words(files, tmp_path / "q", "--packing", "--trainer", "dpo", data="pairs.jsonl")) == 2


# ---- preference pairs


def test_preference_pairs(files, tmp_path, capsys):
    assert cli.main(words(files, tmp_path / "d", "--trainer", "dpo", "--json", data="pairs.jsonl")) == 0
    out = capsys.readouterr()
    facts = json.loads(out.out)
    assert facts["steps"] == 4 and facts["eval_loss_before"] == pytest.approx(0.6931, abs=1e-3)
    rows = [json.loads(line) for line in (tmp_path / "d" / "log.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]
    assert trained[0]["margin"] == 0 and trained[-1]["margin"] > 0
    assert cli.main(words(files, tmp_path / "e", data="pairs.jsonl")) == 2
    assert "add --trainer dpo" in capsys.readouterr().err
    assert cli.main(words(files, tmp_path / "e", "--trainer", "dpo")) == 2
    assert "needs rows with prompt, chosen and rejected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]}, "assistant"),
        ({"prompt": "a", "chosen": 1, "rejected": "b"}, "not a string"),
        (
            {
                "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}],
                "rejected": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}],
            },
            "same turns",
        ),
    ],
)
def test_damaged_pairs(row, says, files, tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    assert cli.main(words(files, tmp_path / "e", "--trainer", "dpo", data=str(tmp_path / "x.jsonl"))) == 2
    assert says in capsys.readouterr().err


# ---- what is shown


def test_figures_answers_and_picture(files, tmp_path, capsys):
    assert cli.main(words(files, tmp_path / "a", "--json")) == 0
    out = capsys.readouterr()
    facts = json.loads(out.out)
    assert len(facts["answers"]) == 3 and set(facts["answers"][0]) == {"prompt", "base", "adapted", "right"}
    assert 0 <= facts["accuracy_before"] <= 1 and "right answers:" in out.err and facts["eval_loss"] > 0
    rows = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    updates = [row["updates"] for row in rows if "updates" in row]
    assert set(updates[0]) == {"model.layers.0", "model.layers.1"}
    assert updates[-1]["model.layers.0"] > updates[0]["model.layers.0"] > 0
    assert (tmp_path / "a" / "loss.png").stat().st_size > 10_000
    assert block_of("model.layers.3.mlp.up_proj.lora_A") == "model.layers.3" and block_of("head.lora_A") == "head"


def test_generate_as_one_object(files, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1="}\n')
    code = cli.main(["generate", "--model", str(files / "tiny"), "--data", str(tmp_path / "p.jsonl"), "--json",
                     "--max-new-tokens", "2"])  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and found["answers"][0]["prompt"] == "1+1="


# ---- what is noticed


def test_untrained_tokens_are_noticed():
    model, tokenizer = tiny_llm.model(), tiny_llm.tokenizer()
    rows = [{"input_ids": [1, 10, 11, 2], "labels": [-100, 10, 11, 2]}]
    assert untrained_tokens(model, tokenizer, rows) == []
    with torch.no_grad():
        model.lm_head.weight[2] *= 1e-3
    (said,) = untrained_tokens(model, tokenizer, rows)
    assert "'<eos>'" in said and "--method token_rows --token-ids 2" in said
    with torch.no_grad():
        model.model.embed_tokens.weight[1] = model.model.embed_tokens.weight[2]
    assert "'<bos>'" in untrained_tokens(model, tokenizer, rows)[0]
    with pytest.raises(ll.ConfigError, match="do not belong together"):
        untrained_tokens(model, tokenizer, [{"input_ids": [500], "labels": [500]}])


# ---- multiple choice


def test_multiple_choice(files, tmp_path, capsys):
    model, tokenizer = tiny_llm.model(), tiny_llm.tokenizer()
    question = Choice("1+1= ", ["2", "33", "no"], 1)
    picked = pick(model, tokenizer, [question], 2)[0]
    sums = []
    for choice in question.choices:
        ids = tokenizer(question.prompt + choice, return_tensors="pt")["input_ids"]
        logs = model(ids).logits.detach().log_softmax(-1)[0]
        n = len(choice)
        sums.append(sum(float(logs[-n - 1 + i, ids[0, -n + i]]) for i in range(n)))
    assert picked["accuracy"] == sums.index(max(sums))
    means = [s / len(c) for s, c in zip(sums, question.choices, strict=True)]
    assert picked["accuracy_norm"] == means.index(max(means)) and means.index(max(means)) != sums.index(max(sums))
    path = tmp_path / "mc.jsonl"
    rows = [
        {"question": "1+1=", "choices": ["2", "3"], "answer": a} for a in (0, "A", "2")
    ] + [{"question": "a", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}]  # fmt: skip
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert [c.right for c in choices_in(str(path), None)] == [0, 0, 0, 1]
    assert cli.main(["eval", "--model", str(files / "tiny"), "--data", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 4
    path.write_text(json.dumps({"question": "a", "choices": ["x", "y"], "answer": 2}) + "\n")
    assert cli.main(["eval", "--model", str(files / "tiny"), "--data", str(path)]) == 2
    assert "mc.jsonl:1: answer 2 is no number" in capsys.readouterr().err
    code = cli.main(["eval", "--model", str(files / "tiny"), "--tasks", "hellaswag"])
    said = capsys.readouterr().err
    assert code == 2 and 'pip install "lora-lite[eval]"' in said


# ---- several processes


@pytest.mark.slow
def test_two_processes(files, tmp_path):
    out = tmp_path / "two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29611"]
    run = subprocess.run(
        [*launch, "-m", "--", "lora_lite.cli", *words(files, out, "--device", "cpu", "--save-every", "2")],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("right answers") == 1 and "steps of 8 rows" in run.stdout
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    ll.load(tiny_llm.model(), out / "adapter.safetensors")


def test_collate_of_packed_rows():
    blocks = packed([{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7], "labels": [7]}], 2)
    batch = collate(blocks, 0)
    assert "attention_mask" not in batch and batch["position_ids"].tolist() == [[0, 1], [0, 0]]
    assert batch["labels"].tolist() == [[-100, 6], [-100, -100]]
