"""Files of every form: the same rows, and mistakes that name file and line."""

from __future__ import annotations

import io
import json
import sys

import pytest

from lora_lite import ConfigError, FileError
from lora_lite.data.forms import column_map, formed
from lora_lite.data.read import read_rows

ROWS = [{"prompt": "1+1=", "completion": "2, or é"}, {"prompt": 'a "b"', "completion": "c\nd"}]
TURNS = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And 2+2?"},
    {"role": "assistant", "content": "4"},
]


def lines(*rows) -> bytes:
    return "".join(
        (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows
    ).encode()


def plain(found) -> list[dict]:
    return [row for row, _ in found]


def table(path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


FILES = {
    "a.jsonl": lines(ROWS[0], "", ROWS[1]),
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "a.csv": 'prompt,completion\r\n1+1=,"2, or é"\r\n"a ""b""","c\nd"\r\n'.encode(),
    "a.tsv": 'prompt\tcompletion\n1+1=\t2, or é\n"a ""b"""\t"c\nd"\n'.encode(),
    "marked.jsonl": b"\xef\xbb\xbf" + lines(*ROWS),
    "marked.csv": b"\xef\xbb\xbf" + 'prompt,completion\n1+1=,"2, or é"\n"a ""b""","c\nd"\n'.encode(),
    "wide.jsonl": lines(*ROWS).decode().encode("utf-16"),
}


@pytest.mark.parametrize("name", [*FILES, "a.parquet"])
def test_every_form_holds_the_same_rows(tmp_path, name):
    path = tmp_path / name
    table(path) if name == "a.parquet" else path.write_bytes(FILES[name])
    assert plain(read_rows(str(path))) == ROWS
    assert plain(read_rows(str(path), 1)) == ROWS[:1]


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines(*ROWS))))
    assert plain(read_rows("-")) == ROWS


def test_a_folder_that_datasets_wrote(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert plain(read_rows(str(tmp_path / "saved"))) == ROWS


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl", lines(ROWS[0], "{not json"), r"a\.jsonl:2: not JSON"),
        ("a.jsonl", lines(ROWS[0], "[1, 2]"), r"a\.jsonl:2: .*got list"),
        ("a.jsonl", lines("[1, 2]", "[1]"), r"a\.jsonl:1: .*got list"),
        ("a.json", b"[{]", r"a\.json:1: not JSON"),
        ("a.jsonl", lines(ROWS[0]) + "é".encode("latin1"), r"a\.jsonl:2: byte 0xe9 .* iconv"),
        ("a.jsonl", bytes(range(256)), "binary"),
        ("a.jsonl", b"\0" * 50, "binary"),
        ("a.csv", b"prompt,completion\n1\n", r"a\.csv:2: 1 cells"),
        ("a.parquet", b"PAR1 and no more", "no Parquet file"),
        ("a.jsonl", b"\n", "no rows"),
        ("absent.jsonl", None, "neither 'wordmath' nor a file"),
    ],
)
def test_a_damaged_file_is_named_by_file_and_line(tmp_path, name, data, says):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(FileError, match=says):
        read_rows(str(tmp_path / name))


# ---- columns


def one(row, chat=True, **columns):
    return formed([(row, "rows.jsonl:2")], columns, chat)[0]


def test_columns_become_the_forms_of_trl():
    alpaca = {"instruction": "Add.", "input": "1 and 1", "output": "2"}
    asked = [{"role": "user", "content": "Add.\n\n1 and 1"}]
    assert one({"text": "abc", "id": 3}) == {"text": "abc"}
    assert one({"prompt": "1+1=", "completion": "2", "id": 5}) == {"prompt": "1+1=", "completion": "2"}
    assert one({"messages": TURNS, "text": None}) == {"messages": TURNS}
    assert one(alpaca) == {"prompt": asked, "completion": [{"role": "assistant", "content": "2"}]}
    text = one(alpaca, chat=False)
    assert text["completion"] == "2" and text["prompt"].endswith(
        "### Instruction:\nAdd.\n\n### Input:\n1 and 1\n\n### Response:\n"
    )
    assert "Input" not in one({"instruction": "Go.", "input": "", "output": "x"}, chat=False)["prompt"]


def test_sharegpt():
    talk = [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]
    assert one({"conversations": talk}) == {"messages": TURNS[:2]}


def test_other_columns_by_name():
    assert column_map(["prompt=question", "completion=answer"]) == {"prompt": "question", "completion": "answer"}
    assert one({"question": "a", "answer": "b"}, prompt="question", completion="answer") == {
        "prompt": "a", "completion": "b",
    }  # fmt: skip
    with pytest.raises(FileError, match="no column 'queston'. Did you mean 'question'"):
        one({"question": "a"}, prompt="queston")
    for word in ("prompt", "promt=a", "prompt="):
        with pytest.raises(ConfigError, match="prompt=question"):
            column_map([word])


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "a", "answer": "b"}, "--columns"),
        ({"prompt": "a"}, "completion"),
        ({"text": 3}, "holds int, not a string"),
        ({"messages": []}, "role"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": TURNS[:1]}, "last message is by 'user'"),
        ({"conversations": [{"from": "human", "value": "1"}]}, "last message is by 'user'"),
    ],
)
def test_a_malformed_row_is_named_by_its_place(row, says):
    with pytest.raises(FileError, match=r"rows\.jsonl:2: .*" + says):
        one(row)
