"""Rows from wordmath and from JSONL: what is learned, what is masked, and errors that name file and line."""

from __future__ import annotations

import json

import pytest
import torch

import tiny_llm
from lora_lite import FileError
from lora_lite.demo.data import IGNORED, Example, batches, collate, encode, load_examples, load_model
from lora_lite.demo.wordmath import generate

TURNS = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And 2+2?"},
    {"role": "assistant", "content": "4"},
]
TEMPLATE = (
    "{% for m in messages %}({{ m['role'] }}) {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}(assistant) {% endif %}"
)


def jsonl(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def learned(row, tok):
    return tok.decode([t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED])


def test_wordmath_by_name():
    rows = load_examples("wordmath", "validation", 7, seed=2)
    assert [(r.prompt, r.completion) for r in rows] == [
        (p.prompt, p.completion) for p in generate("validation", 7, seed=2)
    ]


def test_text_and_prompt_completion_rows(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"text": "abc"}, "", {"prompt": "1+1=", "completion": "2", "id": 5})
    assert load_examples(path) == [Example("", "abc"), Example("1+1=", "2")]
    assert load_examples(path, n=1) == [Example("", "abc")]


def test_chat_without_a_template_is_role_and_content_lines(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"messages": TURNS})
    expected = Example("user: 1+1?\nassistant: 2\nuser: And 2+2?\nassistant:", " 4")
    assert load_examples(path, tokenizer=tiny_llm.tokenizer()) == [expected]
    assert load_examples(path) == [expected]


def test_chat_with_a_template_uses_it(tmp_path):
    tok = tiny_llm.tokenizer()
    tok.chat_template = TEMPLATE
    path = jsonl(tmp_path / "a.jsonl", {"messages": TURNS})
    expected = Example("(user) 1+1?\n(assistant) 2\n(user) And 2+2?\n(assistant) ", "4\n")
    assert load_examples(path, tokenizer=tok) == [expected]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "got list"),
        ({"question": "a", "answer": "b"}, "answer"),
        ({"prompt": "a"}, "completion"),
        ({"text": 3}, "text"),
        ({"messages": []}, "role"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": TURNS[:1]}, "assistant"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, row, says):
    path = jsonl(tmp_path / "rows.jsonl", {"text": "fine"}, row)
    with pytest.raises(FileError, match=r"rows\.jsonl:2: .*" + says):
        load_examples(path)


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(FileError, match=r"absent\.jsonl"):
        load_examples(str(tmp_path / "absent.jsonl"))
    with pytest.raises(FileError, match="no rows"):
        load_examples(jsonl(tmp_path / "empty.jsonl", ""))


def test_the_prompt_is_masked_and_the_end_token_is_learned():
    tok = tiny_llm.tokenizer()
    row = encode(Example("Q: 1+1?\nA:", " 2"), tok, 64)
    assert tok.decode(row["input_ids"]) == "Q: 1+1?\nA: 2<eos>"
    assert learned(row, tok) == " 2<eos>"
    assert learned(encode(Example("", "all of it"), tok, 64), tok) == "all of it<eos>"


def test_too_long_rows_lose_the_beginning_of_the_prompt_first():
    tok = tiny_llm.tokenizer()
    row = encode(Example("0123456789", "ab"), tok, 6)
    assert tok.decode(row["input_ids"]) == "789ab<eos>"
    row = encode(Example("0123456789", "abcdef"), tok, 4)
    assert learned(row, tok) == "abcd" and len(row["input_ids"]) == 4


def test_batches_are_padded_on_the_right_and_padding_is_not_learned():
    tok = tiny_llm.tokenizer()
    rows = [encode(Example("1", "2"), tok, 64), encode(Example("123", "45"), tok, 64)]
    batch = collate(rows, tok.pad_token_id)
    assert batch["input_ids"].shape == (2, 6)
    assert batch["attention_mask"].sum(1).tolist() == [3, 6]
    assert batch["input_ids"][0, 3:].tolist() == [tok.pad_token_id] * 3
    assert batch["labels"][0].tolist() == [IGNORED, *rows[0]["input_ids"][1:], IGNORED, IGNORED, IGNORED]
    assert [b["input_ids"].shape[0] for b in batches(rows * 3, 4, 0)] == [4, 2]


def test_any_local_folder_is_a_model(tmp_path):
    model, tok = load_model(str(tiny_llm.save(tmp_path / "m")), dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert tok.padding_side == "left" and tok.pad_token == "<pad>"


def test_a_name_that_loads_nothing_says_what_is_possible(tmp_path):
    with pytest.raises(FileError, match="demo"):
        load_model(str(tmp_path / "nothing"))
