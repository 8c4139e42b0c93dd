"""The tasks of the leaderboard on local files: what they ask, and that no question of the test is trained on."""

from __future__ import annotations

import json

import pytest
import torch

import lora_lite as ll
import tiny_llm

transformers = pytest.importorskip("transformers")


def test_wordmath(monkeypatch):
    from lora_lite.demo import learning
    from lora_lite.demo.learning import WordMath

    monkeypatch.setattr(learning, "TRAIN_ROWS", 200)
    task = WordMath(batch_size=3, questions=4)
    one, again, other = task.batch(5), task.batch(5), task.batch(6)
    assert torch.equal(one["input_ids"], again["input_ids"]) and one["input_ids"].shape[0] == 3
    assert one["input_ids"].shape != other["input_ids"].shape or not torch.equal(one["input_ids"], other["input_ids"])
    model = task.load()
    accuracy, loss, n = task.examine(model, "validation")
    assert n == 4 and 0 <= accuracy <= 1 and 1 < loss < 6
    assert 1 < task.remembered(model) < 5


@pytest.mark.parametrize("method", ["direft", "lora"])
def test_forgetting_on_wordmath(monkeypatch, tmp_path, method):
    """Also of a method that edits prompts, which a plain text does not name."""
    from lora_lite.bench.learn import Setting, run
    from lora_lite.demo import learning

    monkeypatch.setattr(learning, "TRAIN_ROWS", 50)
    monkeypatch.setattr(learning, "EVERY", 40)
    task = learning.WordMath(batch_size=2, questions=2)
    row = run(task, Setting("wordmath", method, "final", 1, 0.05, 2), tmp_path)
    assert row["remembered"]["before"] != row["remembered"]["after"]


def words(tmp_path, fields=24):
    lines = ["  1 licence"]
    for i in range(fields):
        for k in range(400 - i):
            lines.append(f'{i:08d} {i + 3:02d} n 01 word 0 000 | meaning {k} of field {i}; "an example"')
    lines.append("00000000 90 n 01 word 0 000 | the smallest field is left out")
    path = tmp_path / "data.noun"
    path.write_text("\n".join(lines) + "\n")
    return path


def encoder(tmp_path):
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "meaning", "of", "field", *map(str, range(50))]
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(names))
    transformers.BertTokenizerFast(str(tmp_path / "bert" / "vocab.txt")).save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def test_glosses(tmp_path):
    from lora_lite.bench.learn import Setting, run
    from lora_lite.demo.glosses import Glosses

    task = Glosses(encoder(tmp_path), str(words(tmp_path)), batch_size=5)
    texts = {name: {text for text, _ in rows} for name, rows in task.splits.items()}
    assert not texts["train"] & texts["test"] and not texts["validation"] & texts["test"]
    assert [len(task.splits[k]) for k in ("train", "validation", "test")] == [4000, 1000, 2000]
    assert not any("example" in text or "smallest" in text for part in texts.values() for text in part)
    a, b = task.load(), task.load()
    assert torch.equal(a.classifier.weight, b.classifier.weight), "the head starts differently for each method"
    found = run(task, Setting("glosses", "lora", "select", 0, 0.01, 3, {"r": 2}), tmp_path)
    assert found["trained"] > 24 * 16 and found["problems"] == 1000  # the head trains beside the adapter


def test_glosses_say_what_is_missing(tmp_path):
    from lora_lite.demo import glosses

    with pytest.raises(ll.FileError, match="wordnet-base"):
        glosses.find(str(tmp_path / "nothing"))
    with pytest.raises(ll.FileError, match="data.noun"):
        glosses.read(words(tmp_path, fields=3))


def test_metamath_on_local_files(tmp_path):
    from lora_lite.demo.metamath import MetaMath, last_number

    tiny_llm.save(tmp_path / "base")
    rows = [{"query": f"{i}+1?", "response": f"It is {i + 1}. The answer is: {i + 1}"} for i in range(70)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    asked = [{"question": "a?", "answer": "b\n#### 1,200"}, {"question": "c?", "answer": "d\n#### 3"}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in asked))
    paths = str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl")
    task = MetaMath(str(tmp_path / "base"), *paths, dtype="float32", batch_size=2, new_tokens=4)
    assert task.batch(0)["input_ids"].shape[0] == 2
    held = {row["prompt"] for row in task.rows[:50]}
    assert len(held) == 50 and not held & {row["prompt"] for row in task.rows[50:]}
    assert [number for _, number in task.questions["test"]] == ["1200", "3"]
    accuracy, loss, n = task.examine(task.load(), "test")
    assert n == 2 and accuracy in (0.0, 0.5, 1.0) and loss > 0
    assert last_number("so 3 apples cost $1,250.50 in all") == "1250.5" and last_number("no") is None
    assert last_number("The answer is: 12.0") == "12"
    with pytest.raises(ll.FileError, match="and no query"):
        MetaMath(str(tmp_path / "base"), paths[1], paths[1], dtype="float32").batch(0)
